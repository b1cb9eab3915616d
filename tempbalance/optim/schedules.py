"""Schedules: torch's schedulers hold lists with an entry a param group; here they follow a split.

torch zips those lists with the groups strictly, so a scheduler that was built before the split
would fail at its next step, or at its next milestone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tempbalance.optim.scaled import is_base_key

Group = dict[str, Any]

# Lists with an entry a param group, in torch's schedulers.
_PER_GROUP = (
    "base_lrs",
    "_last_lr",
    "lr_lambdas",
    "min_lrs",
    "max_lrs",
    "base_momentums",
    "max_momentums",
)


# What OneCycleLR keeps in a group.
_CYCLE = ("initial_lr", "max_lr", "min_lr")


def expand_scheduler(scheduler: Any, source: Sequence[int], before: int) -> None:
    """Grow a scheduler's per-group lists, and those of the schedulers it holds, with the split.

    Args:
        scheduler: any object that holds such lists; those of another length are left alone.
        source: for each group the index of the group that it came from.
        before: the number of groups before the split.

    Raises:
        ValueError: if a per-group list is closed (a tuple, or in an attribute not known here).
    """
    for child in _children(scheduler):
        expand_scheduler(child, source, before)
    if list(source) == list(range(before)):
        return
    for name in _PER_GROUP:
        values = scheduler.__dict__.get(name)
        if isinstance(values, list) and len(values) == before:
            # A new list: the old one may be in a state that somebody holds.
            setattr(scheduler, name, [_clone(values[i]) for i in source])


def extend_scheduler(scheduler: Any, groups: Sequence[Group], known: int) -> None:
    """Give param groups added behind the first ``known`` the schedule of the first group.

    Their own rate is where they start: what a scheduler keeps in a group or in a list of its own
    is copied from the first. Where that has a largest rate (OneCycleLR, CyclicLR), theirs is the
    largest instead, and the others are in proportion.
    """
    for group in groups[known:]:
        for key in _CYCLE if "max_lr" in groups[0] else ():
            value = groups[0].get(key)
            if value is not None:
                group.setdefault(key, _in_proportion(value, group, groups[0]["max_lr"]))
        group.setdefault("initial_lr", _clone(group["lr"]))
        for key, value in groups[0].items():
            if key not in ("params", "name", "param_names") and not is_base_key(key):
                group.setdefault(key, _clone(value))
    for child in _children(scheduler):
        extend_scheduler(child, groups, known)
    largest = scheduler.__dict__.get("max_lrs")
    for name in _PER_GROUP:
        values = scheduler.__dict__.get(name)
        if isinstance(values, list) and len(values) == known:
            own = {"base_lrs": "initial_lr", "_last_lr": "lr"}.get(name)
            if largest and name in ("base_lrs", "max_lrs"):
                new = [_in_proportion(values[0], g, largest[0]) for g in groups[known:]]
            else:
                new = [_clone(g[own] if own else values[0]) for g in groups[known:]]
            setattr(scheduler, name, values + new)


def _in_proportion(value: Any, group: Group, largest: Any) -> Any:
    """A rate of the first group, whose largest is given, for a group with its own."""
    return value * (float(group["lr"]) / float(largest)) if float(largest) else _clone(value)


def check_scheduler(scheduler: Any, groups: int) -> None:
    """Refuse a scheduler that cannot serve so many groups.

    Raises:
        ValueError: naming the scheduler, the attribute and the cure.
    """
    for child in _children(scheduler):
        check_scheduler(child, groups)
    for name in _PER_GROUP:
        values = scheduler.__dict__.get(name)
        if isinstance(values, list | tuple) and len(values) != groups:
            _refuse(scheduler, f"its {name!r} has {len(values)} entries")
    compute = getattr(scheduler, "get_lr", None)
    if _children(scheduler) or compute is None:
        return
    saved = [dict(group) for group in scheduler.optimizer.param_groups]
    flags = dict(scheduler.__dict__)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rates = compute()
    except NotImplementedError:
        return
    except (ValueError, IndexError, TypeError, KeyError) as error:
        _refuse(scheduler, f"its get_lr fails with {error!r}")
    finally:
        for group, before in zip(scheduler.optimizer.param_groups, saved, strict=True):
            group.update(before)
        scheduler.__dict__.update(flags)
    if len(rates) != groups:
        _refuse(scheduler, f"its get_lr gives {len(rates)} rates")


def kept(scheduler: Any, groups: list[Group]) -> Callable[[], None]:
    """What puts param groups, a scheduler and those that it holds back as they are now."""
    objects, entries = list(groups), [dict(group) for group in groups]
    schedulers, found = [scheduler], []
    while schedulers:
        one = schedulers.pop()
        found.append((one, dict(one.__dict__)))
        schedulers += _children(one)

    def put_back() -> None:
        groups[:] = objects
        for group, before in zip(objects, entries, strict=True):
            group.clear()
            group.update(before)
        for one, before in found:
            one.__dict__.clear()
            one.__dict__.update(before)

    return put_back


def _refuse(scheduler: Any, what: str) -> None:
    raise ValueError(
        f"{type(scheduler).__name__} cannot follow the split into a param group per layer: {what}. "
        "Keep its per-group values in lists named as torch's schedulers name them (base_lrs, "
        "lr_lambdas, ...), or build it after tempbalance.TempBalanceLR(optimizer, model) and use "
        "tempbalance.StepHooks, which needs no per-group list."
    )


def _children(scheduler: Any) -> list[Any]:
    """Schedulers that a scheduler holds (SequentialLR, ChainedScheduler, warm-up wrappers)."""
    found: list[Any] = []
    for value in scheduler.__dict__.values():
        items = value if isinstance(value, list | tuple) else [value]
        found += [item for item in items if isinstance(item, torch.optim.lr_scheduler.LRScheduler)]
    return found


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
