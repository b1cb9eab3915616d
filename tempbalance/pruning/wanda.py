"""Wanda: weights times the norm of what they are multiplied with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tempbalance.pruning.masks import Pattern, by_pattern, check_pattern, smallest
from tempbalance.pruning.method import Statistic, samples_and_rows


class InputPower:
    """Mean over samples of the sum over their rows of x_j^2: (in,) in float32."""

    def __init__(self, weight: Tensor) -> None:
        self.samples = 0
        self.mean = torch.zeros(weight.shape[1], device=weight.device)

    def add(self, inputs: Tensor) -> None:
        samples, rows = samples_and_rows(inputs)
        self.samples += samples
        # A running mean: a sum over many batches would lose digits in float32.
        self.mean += (rows.square().sum(0) - samples * self.mean) / max(1, self.samples)


@dataclass(frozen=True)
class Wanda:
    """Per output, zero the floor(in * ratio) entries of least ``|W_ij| sqrt(s_j)``.

    ``s_j`` is the mean power of input j. Nothing else is changed. An input that was always zero
    goes first; with equal powers this is magnitude pruning an output at a time.

    Args:
        pattern: (N, M) keeps N of every M neighbouring inputs instead.

    Source: Sun, Liu, Bair and Kolter (ICLR 2024, arXiv 2306.11695), equation 1.
    """

    pattern: Pattern | None = None

    def __post_init__(self) -> None:
        check_pattern(self.pattern)

    def statistic(self, weight: Tensor) -> InputPower:
        return InputPower(weight)

    def __call__(self, weight: Tensor, ratio: float, statistic: Statistic | None) -> Tensor:
        assert isinstance(statistic, InputPower)
        scores = weight.detach().float().abs() * statistic.mean.sqrt()
        if self.pattern is not None:
            removed = by_pattern(scores, self.pattern)
        else:
            removed = smallest(scores, math.floor(weight.shape[1] * ratio))
        return weight.detach().masked_fill(removed, 0)
