"""SparseGPT: what is removed is made up for by the weights that stay.

Legend: W (out, in) the weight, X (rows, in) its inputs, H = 2 X^T X / samples (in, in), U the upper
Cholesky factor of the inverse of H, damped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tempbalance.pruning.masks import Pattern, by_pattern, check_pattern, released_count, smallest
from tempbalance.pruning.method import Statistic, samples_and_rows


class Hessian:
    """2 / samples * sum of x x^T: (in, in) in float32, the Hessian of the layer's squared error."""

    def __init__(self, weight: Tensor) -> None:
        size = weight.shape[1]
        self.samples = 0
        self.mean = torch.zeros(size, size, device=weight.device)

    def add(self, inputs: Tensor) -> None:
        samples, rows = samples_and_rows(inputs)
        before, self.samples = self.samples, self.samples + samples
        if self.samples:
            self.mean *= before / self.samples
            self.mean.addmm_(rows.mT, rows, alpha=2 / self.samples)


@dataclass(frozen=True)
class SparseGPT:
    """Remove by w^2 / U_jj^2, column by column, and correct the columns that follow.

    Columns go in blocks; in each, the entries of least score are chosen over the whole block at
    the layer's ratio. A removed w in column j leaves the error w / U_jj, and the later columns of
    its row lose error * U[j, later]: the least-squares correction, given the columns before.
    Inputs that were always zero lose all their weights.

    Args:
        block: columns in a block.
        damping: added to the diagonal of H, times its mean, so that H has an inverse.
        pattern: (N, M) keeps N of every M neighbouring inputs instead.

    Raises:
        ValueError: for a value out of range, or a block that is no multiple of M.

    Source: Frantar and Alistarh (ICML 2023, arXiv 2301.00774), algorithm 1.
    """

    block: int = 128
    damping: float = 0.01
    pattern: Pattern | None = None

    def __post_init__(self) -> None:
        check_pattern(self.pattern)
        if self.block < 1 or not self.damping > 0:
            raise ValueError(f"SparseGPT needs block >= 1 and damping > 0, got {self}")
        if self.pattern is not None and self.block % self.pattern[1]:
            raise ValueError(f"block must be a multiple of {self.pattern[1]}, got {self.block}")

    def statistic(self, weight: Tensor) -> Hessian:
        return Hessian(weight)

    def __call__(self, weight: Tensor, ratio: float, statistic: Statistic | None) -> Tensor:
        assert isinstance(statistic, Hessian)
        if ratio <= 0 and self.pattern is None:
            return weight.detach().clone()
        w = weight.detach().float().clone()
        dead = statistic.mean.diagonal() == 0
        w[:, dead] = 0
        u = self._factor(statistic.mean, dead)
        for start in range(0, w.shape[1], self.block):
            stop = min(start + self.block, w.shape[1])
            errors = self._prune_block(w[:, start:stop], u[start:stop, start:stop], ratio)
            w[:, stop:] -= errors @ u[start:stop, stop:]
        return w.to(weight.dtype)

    def _factor(self, mean: Tensor, dead: Tensor) -> Tensor:
        """U in float32; factored in float64, where rounding never makes H indefinite."""
        h = mean.double()
        diagonal = h.diagonal()
        diagonal[dead] = 1
        diagonal += self.damping * diagonal.mean()
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
        return torch.linalg.cholesky(inverse, upper=True).float()

    def _prune_block(self, w: Tensor, u: Tensor, ratio: float) -> Tensor:
        """Prune some columns in place (out, B) by their corner of U (B, B); errors (out, B)."""
        power = u.diagonal().square()
        errors = torch.zeros_like(w)
        if self.pattern is None:
            scores = w.square() / power
            removed = smallest(scores.flatten(), released_count(w.numel(), ratio)).view_as(w)
        else:
            removed = torch.zeros_like(w, dtype=torch.bool)
        for j in range(w.shape[1]):
            if self.pattern is not None and j % self.pattern[1] == 0:
                group = slice(j, j + self.pattern[1])  # as the columns before have left it
                removed[:, group] = by_pattern(w[:, group].square() / power[group], self.pattern)
            gone = removed[:, j]
            errors[:, j] = torch.where(gone, w[:, j] / u[j, j], 0)
            w[:, j + 1 :] -= errors[:, j, None] * u[j, j + 1 :]
            w[gone, j] = 0
        return errors
