"""Schedules that torch does not have in one piece: a warm-up, then a decay."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

_START = 0.01  # of the rate, at the first step


def warmup_cosine(optimizer: Optimizer, warmup: float, total: int, final: float = 0.0) -> LambdaLR:
    """Linear warm-up from 0.01 of the rate, then cosine to `final` of it at `total`.

    `warmup`: so many steps, or below 1 that share of `total` (none of a run of a step or two).

    Raises: ValueError unless 0 < warmup < total.
    """

    def cosine(done: float) -> float:
        return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2

    return _warmed(optimizer, warmup, total, cosine)


def warmup_linear(optimizer: Optimizer, warmup: float, total: int, final: float = 0.0) -> LambdaLR:
    """Linear warm-up from 0.01 of the rate, then linear to `final` of it at `total`.

    `warmup`: so many steps, or below 1 that share of `total` (none of a run of a step or two).

    Raises: ValueError unless 0 < warmup < total.
    """
    return _warmed(optimizer, warmup, total, lambda done: 1 - (1 - final) * done)


def _warmed(
    optimizer: Optimizer, warmup: float, total: int, decay: Callable[[float], float]
) -> LambdaLR:
    share = 0 < warmup < 1
    first = min(round(warmup * total), total - 1) if share else round(warmup)
    if not (share or 0 < first < total):
        raise ValueError(f"warm-up of {warmup} does not fit in {total}: schedule.scheduler.warmup")

    def factor(step: int) -> float:
        if step < first:
            return _START + (1 - _START) * step / first
        return decay(min(1.0, (step - first) / (total - first)))

    return LambdaLR(optimizer, factor)
