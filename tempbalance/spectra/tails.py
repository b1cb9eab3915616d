"""Tails of a batch of spectra, each with the power law that fits it best.

Legend: B spectra, N entries each, ascending in float64; ``first`` (B,) is the index of the first
entry that counts (those before it are padding or zero eigenvalues). A tail is what lies from
index ``start`` up, k = N - start eigenvalues.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class PowerLaw(NamedTuple):
    """A fitted batch, each (B,) float64; NaN where a spectrum has no eigenvalue that counts."""

    alpha: Tensor  # exponent of the density, > 1; inf where the tail is one value
    xmin: Tensor  # lower end of the tail, an eigenvalue
    d: Tensor  # Kolmogorov-Smirnov distance between tail and fit; NaN where alpha is inf
    n_tail: Tensor  # eigenvalues in the tail


class Tails:
    """A batch with what every fit needs: logarithms, and their sums from each index up."""

    def __init__(self, eigenvalues: Tensor, first: Tensor) -> None:
        self.values = eigenvalues  # (B, N)
        self.first = first  # (B,)
        self.size = eigenvalues.shape[-1]
        self.index = torch.arange(self.size, device=eigenvalues.device)  # (N,)
        self.valid = self.index >= first.unsqueeze(-1)  # (B, N)
        # Before the first that counts its own value: no gap of a distribution lies below a tail.
        lowest = eigenvalues.gather(-1, first.clamp(max=self.size - 1).unsqueeze(-1))
        lowest = torch.where(lowest > 0, lowest, torch.ones_like(lowest))
        self.log = torch.log(torch.where(self.valid, eigenvalues, lowest))
        self.log_sum = self.log.flip(-1).cumsum(-1).flip(-1)  # (B, N)

    def hill(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """Exponent and size of the tails from ``start`` (B, M): each (B, M).

        alpha = 1 + k / sum_{j >= start} ln(lambda_j / lambda_start).
        """
        k = (self.size - start).to(self.values.dtype)
        total = self.log_sum.gather(-1, start) - k * self.log.gather(-1, start)
        return 1 + k / total.clamp_min(0.0), k

    def distance(self, row: Tensor, start: Tensor, alpha: Tensor) -> Tensor:
        """Kolmogorov-Smirnov distance of one tail a place: all (M,), ``row`` its spectrum.

        max_j |P(lambda_j) - (j - start) / k| over the tail, with P the fitted distribution.
        """
        low = 0 if row.is_cuda else int(start.min())  # a look at the host's own memory
        log_ratio = self.log[row, low:] - self.log[row, start].unsqueeze(-1)  # (M, N - low)
        rank = self.index[low:] - start.unsqueeze(-1)
        return self._gap(log_ratio, rank.clamp_min_(0), start, alpha)

    def distance_at(self, row: Tensor, start: Tensor, alpha: Tensor, points: int) -> Tensor:
        """The same over ``points`` eigenvalues of the tail alone, evenly spaced: at most D."""
        last = (self.size - 1 - start).unsqueeze(-1)  # (M, 1)
        steps = torch.arange(1, points + 1, device=start.device)
        rank = last * steps // points  # ends with the largest eigenvalue
        place = (row * self.size + start).unsqueeze(-1) + rank
        log_ratio = self.log.view(-1)[place] - self.log[row, start].unsqueeze(-1)
        return self._gap(log_ratio, rank, start, alpha)

    def _gap(self, log_ratio: Tensor, rank: Tensor, start: Tensor, alpha: Tensor) -> Tensor:
        """(M, J) each -> (M,); ``log_ratio`` is overwritten, and nothing below the tail counts."""
        over = log_ratio.clamp_min_(0.0).mul_((1 - alpha).unsqueeze(-1)).exp_()  # 1 - P
        share = rank.to(over.dtype) / (self.size - start).unsqueeze(-1)
        return over.add_(share).sub_(1).abs_().amax(-1)

    def fit(self, start: Tensor) -> PowerLaw:
        """The power law of the tails from ``start`` (B,)."""
        start = start.clamp(max=self.size - 1)
        alpha, k = (x.squeeze(-1) for x in self.hill(start.unsqueeze(-1)))
        d = self.distance(torch.arange(len(start), device=start.device), start, alpha)
        d = torch.where(torch.isfinite(alpha), d, math.nan)
        xmin = self.values.gather(-1, start.unsqueeze(-1)).squeeze(-1)
        empty = self.first >= self.size
        alpha, xmin, d = (torch.where(empty, math.nan, x) for x in (alpha, xmin, d))
        return PowerLaw(alpha, xmin, d, torch.where(empty, 0.0, k))
