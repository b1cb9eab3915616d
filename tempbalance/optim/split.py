"""Split: an optimizer's groups by layer, and its schedules with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from tempbalance.layers import Host
from tempbalance.optim.groups import Grouping
from tempbalance.optim.schedules import check_scheduler, expand_scheduler, extend_scheduler, kept


def split_all(
    optimizer: Optimizer,
    hosts: Sequence[Host],
    schedules: Sequence[Any],
    known: Sequence[Grouping],
) -> tuple[Grouping, int]:
    """Split groups and schedules; all of them stay as they were where one schedule cannot follow.

    Args:
        known: how others have split these groups before.

    Returns:
        The split, and the number of groups before it.

    Raises:
        ValueError: naming the schedule and the cure, or if no host is in the optimizer.
    """
    put_back = [kept(schedule, optimizer.param_groups) for schedule in schedules]
    try:
        for schedule in schedules:
            _catch_up(schedule, optimizer, known)
        before = len(optimizer.param_groups)
        grouping = Grouping(optimizer, hosts)
        for schedule in schedules:
            expand_scheduler(schedule, grouping.source, before)
            check_scheduler(schedule, len(optimizer.param_groups))
    except ValueError:
        for undo in put_back:
            undo()
        raise
    return grouping, before


def _catch_up(schedule: Any, optimizer: Optimizer, known: Sequence[Grouping]) -> None:
    """A schedule of fewer groups: another object has split them, or some were added."""
    groups = optimizer.param_groups
    has = len(getattr(schedule, "base_lrs", groups))
    for grouping in known:
        if has == len(grouping.original) < len(groups):
            expand_scheduler(schedule, grouping.source, has)
            return
    extend_scheduler(schedule, groups, has)
