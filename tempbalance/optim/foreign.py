"""Foreign: schedules that are not torch's, and what stands around torch's own.

torch's schedules have lists with an entry a param group, which follow the split (schedules.py).
Of others nothing is known but that a call writes into the groups: while they step, the optimizer
has its groups as they were before the split, and what was written goes to all parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tempbalance.optim.groups import Grouping
from tempbalance.optim.wrapped import innermost

_OURS = ("params", "name", "param_names")


class Foreign:
    """A schedule of another library (timm's, say) as a base.

    Args:
        schedule: it writes into ``optimizer.param_groups`` when it steps.
        optimizer: with its groups as they are before the split.

    Attributes:
        last_epoch: calls of :meth:`step`.
    """

    def __init__(self, schedule: Any, optimizer: Optimizer) -> None:
        self.schedule, self.optimizer = schedule, optimizer
        self.last_epoch = 0
        self.grouping: Grouping | None = None  # from the split on

    @property
    def name(self) -> str:
        return type(self.schedule).__name__

    def step(self, *arguments: Any, **named: Any) -> None:
        self.last_epoch += 1
        self.call("step", *arguments, **named)

    def call(self, method: str, *arguments: Any, **named: Any) -> None:
        """Call a method of the schedule on the groups as they were before the split."""
        assert self.grouping is not None
        grouping, groups = self.grouping, self.optimizer.param_groups
        parts = list(groups)
        first = {source: i for i, source in reversed(list(enumerate(grouping.source)))}
        whole = [
            {**{k: _copy(v) for k, v in parts[first[i]].items()}, "params": params}
            for i, params in enumerate(grouping.original)
            if i in first  # not removed since
        ]
        before = [{k: _copy(v) for k, v in group.items()} for group in whole]
        places = [i for i in range(len(grouping.original)) if i in first]
        groups[:] = whole
        try:
            getattr(self.schedule, method)(*arguments, **named)
        finally:
            groups[:] = parts
        for place, group, old in zip(places, whole, before, strict=True):
            written = {
                key: value
                for key, value in group.items()
                if key not in _OURS and not _equal(value, old.get(key))
            }
            for source, part in zip(grouping.source, parts, strict=True):
                if source == place:
                    part.update({key: _copy(value) for key, value in written.items()})

    def state_dict(self) -> dict[str, Any]:
        own = getattr(self.schedule, "state_dict", None)
        return {"last_epoch": self.last_epoch, "schedule": None if own is None else own()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.last_epoch = int(state["last_epoch"])
        if state["schedule"] is not None:
            self.schedule.load_state_dict(state["schedule"])


def base_of(optimizer: Optimizer, base: Any) -> LRScheduler | Foreign | None:
    """A base schedule as it is stepped: torch's as it is, another's as :class:`Foreign`.

    Raises:
        TypeError, ValueError: for what is no schedule of this optimizer, with the cure.
    """
    if base is None:
        return None
    other = isinstance(base, Optimizer | nn.Module | type)
    if other or not callable(getattr(base, "step", None)):
        raise TypeError(
            f"base must be a schedule with a method step, or None, got {type(base).__name__}; "
            "where rates are written by hand, leave base out and write them to every param "
            "group, or use tempbalance.StepHooks"
        )
    torchs = torchs_own(base)
    found = getattr(torchs if torchs is not None else base, "optimizer", optimizer)
    if innermost(found) is not optimizer:
        raise ValueError("base is the schedule of another optimizer: build it on this one")
    return torchs if torchs is not None else Foreign(base, optimizer)


def torchs_own(schedule: Any) -> LRScheduler | None:
    """The torch schedule that an object is, or stands around (accelerate's), if any."""
    while not isinstance(schedule, LRScheduler):
        schedule = getattr(schedule, "scheduler", None)
        if schedule is None:
            return None
    return schedule


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        both = isinstance(a, Tensor) and isinstance(b, Tensor)
        return both and a.shape == b.shape and bool((a == b).all())
    return bool(a == b)
