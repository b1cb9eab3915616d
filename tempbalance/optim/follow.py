"""Follow: how far a schedule has come, and which schedules were built on an optimizer."""

from __future__ import annotations

import gc
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def steps_of(schedule: Any) -> int:
    """Steps that a schedule has taken; of a ChainedScheduler, its first one has."""
    while not hasattr(schedule, "last_epoch") and getattr(schedule, "_schedulers", None):
        schedule = schedule._schedulers[0]
    return getattr(schedule, "last_epoch", 0)


def built_on(optimizer: Optimizer) -> list[LRScheduler]:
    """The torch schedules that were built on an optimizer and are alive, outermost ones alone.

    torch keeps no list of them. A schedule leaves ``initial_lr`` in the groups; where that is, the
    interpreter's objects are searched, once.
    """
    if not any("initial_lr" in group for group in optimizer.param_groups):
        return []
    found = [
        thing
        for thing in gc.get_objects()
        if isinstance(thing, LRScheduler) and getattr(thing, "optimizer", None) is optimizer
    ]
    inside = {id(child) for one in found for child in _children(one)}
    return [one for one in found if id(one) not in inside]


def _children(schedule: Any) -> list[Any]:
    base = getattr(schedule, "base", None)
    return [*getattr(schedule, "_schedulers", ()), *([] if base is None else [base])]


def check_not_forgotten(optimizer: Optimizer, base: LRScheduler | None) -> None:
    """Refuse to go on beside a schedule that was built on the optimizer and not passed.

    Its lists have an entry a param group: after the split its next step would fail.

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
            "TempBalanceLR in its place"
        )
