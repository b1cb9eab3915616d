"""Follow: how far a schedule has come, and which schedules were built on an optimizer."""

from __future__ import annotations

import gc
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

# A schedule that is not torch's has a method step and one of these.
_SIGNS = ("base_lrs", "base_values", "get_last_lr", "get_lr", "_get_lr")


def steps_of(schedule: Any) -> int:
    """Steps that a schedule has taken; of a ChainedScheduler, its first one has."""
    while not hasattr(schedule, "last_epoch") and getattr(schedule, "_schedulers", None):
        schedule = schedule._schedulers[0]
    return getattr(schedule, "last_epoch", 0)


def built_on(optimizer: Optimizer) -> list[Any]:
    """The schedules that were built on an optimizer and are alive, outermost ones alone.

    Nobody keeps a list of them. A schedule leaves ``initial_lr`` in the groups; where that is, the
    interpreter's objects are searched, once.
    """
    if not any("initial_lr" in group for group in optimizer.param_groups):
        return []
    found = [thing for thing in gc.get_objects() if _is_schedule_of(thing, optimizer)]
    inside = {id(child) for one in found for child in _children(one)}
    return [one for one in found if id(one) not in inside]


def _is_schedule_of(thing: Any, optimizer: Optimizer) -> bool:
    cls = type(thing)
    if not hasattr(cls, "step") or issubclass(cls, Optimizer):
        return False
    try:
        own = object.__getattribute__(thing, "__dict__")
    except AttributeError:
        return False
    if own.get("optimizer") is not optimizer:
        return False
    return issubclass(cls, LRScheduler) or any(hasattr(cls, x) or x in own for x in _SIGNS)


def _children(schedule: Any) -> list[Any]:
    base = getattr(schedule, "base", None)
    return [*getattr(schedule, "_schedulers", ()), *([] if base is None else [base])]


def check_not_forgotten(optimizer: Optimizer, base: Any) -> None:
    """Refuse to go on beside a schedule that was built on the optimizer and not passed.

    torch's have lists with an entry a param group, and would fail at their next step; others would
    go on with the first groups alone, without a word.

    Raises:
        ValueError: naming the line to write.
    """
    if base is not None:
        return
    forgotten = [one for one in built_on(optimizer) if not hasattr(one, "balancer")]
    if forgotten:
        name = type(forgotten[0]).__name__
        raise ValueError(
            f"a {name} was built on this optimizer and not passed: write "
            f"TempBalanceLR(optimizer, model, schedule) with that {name}, and step the "
            "TempBalanceLR in its place. (If its step belongs to somebody else, use "
            "tempbalance.StepHooks(optimizer, model); if it is of an earlier training, "
            "delete it.)"
        )
