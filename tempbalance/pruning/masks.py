"""Masks: which entries are removed, given a score for each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Pattern = tuple[int, int]


def smallest(scores: Tensor, count: int) -> Tensor:
    """True at the ``count`` smallest along the last dimension; of equal ones, the first.

    Exactly that many: a threshold alone would take all equal ones, or none of them.
    """
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= scores.shape[-1]:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count, dim=-1, keepdim=True).values
    below, equal = scores < threshold, scores == threshold
    missing = count - below.sum(-1, keepdim=True)
    return below | (equal & (equal.cumsum(-1) <= missing))


def by_pattern(scores: Tensor, pattern: Pattern) -> Tensor:
    """True where N:M leaves nothing: of every M along the last dimension the N largest stay."""
    keep, of = pattern
    groups = scores.unflatten(-1, (-1, of))
    return smallest(groups, of - keep).flatten(-2)


def released_count(numel: int, ratio: float) -> int:
    """Entries up to the one at sorted place floor(numel * ratio), itself included.

    The published pruners remove what is at most that value: one more than the ratio asks for.
    """
    return min(numel, math.floor(numel * ratio) + 1) if ratio > 0 else 0


def check_pattern(pattern: Pattern | None) -> None:
    """Raises ValueError unless it is None or (N, M) with 0 < N < M."""
    if pattern is None:
        return
    if len(pattern) != 2 or not 0 < pattern[0] < pattern[1]:
        raise ValueError(
            f"pattern must be (N, M), N of every M weights kept, such as (2, 4); got {pattern!r}"
        )
