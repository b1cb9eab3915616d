"""Magnitude: the smallest weights of a layer go; no data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tempbalance.pruning.masks import Pattern, by_pattern, check_pattern, released_count, smallest
from tempbalance.pruning.method import Statistic


@dataclass(frozen=True)
class Magnitude:
    """Zero the entries of a layer whose absolute value is least.

    Args:
        pattern: (N, M) keeps N of every M neighbouring inputs instead.

    Source: Han, Pool, Tran and Dally (NeurIPS 2015), a threshold a layer; the published LLM codes
    remove the value at the threshold too.
    """

    pattern: Pattern | None = None

    def __post_init__(self) -> None:
        check_pattern(self.pattern)

    def statistic(self, weight: Tensor) -> None:
        return None

    def __call__(self, weight: Tensor, ratio: float, statistic: Statistic | None = None) -> Tensor:
        scores = weight.detach().abs()
        if self.pattern is not None:
            removed = by_pattern(scores, self.pattern)
        else:
            count = released_count(weight.numel(), ratio)
            removed = smallest(scores.flatten(), count).view_as(weight)
        return weight.detach().masked_fill(removed, 0)
