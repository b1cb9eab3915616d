"""Schedules that take more than one of torch's."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR


def warmup_cosine(optimizer: Optimizer, warmup: int, total: int) -> SequentialLR:
    """Linear warm-up from 0.01 of the rate over `warmup` steps, then cosine to 0 at `total`.

    Raises: ValueError unless 0 < warmup < total.
    """
    if not 0 < warmup < total:
        raise ValueError(f"warm-up of {warmup} does not fit in {total}: schedule.scheduler.warmup")
    return SequentialLR(
        optimizer,
        [
            LinearLR(optimizer, start_factor=0.01, total_iters=warmup),
            CosineAnnealingLR(optimizer, T_max=total - warmup),
        ],
        milestones=[warmup],
    )
