"""Maps: from alphas to multipliers by a formula of the papers.

A new one subclasses :class:`_Map`, which keeps the contract around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tempbalance.assign.contract import Alphas, check_positive, valid, vector


class _Map:
    """The contract, around a map of valid, not all equal alphas."""

    uses_alphas = True
    once = False

    def __call__(self, alphas: Alphas, kinds: Sequence[str] | None = None) -> Tensor:
        values = vector(alphas)
        out = torch.ones_like(values)
        voting = valid(values)
        chosen = values[voting]
        if len(chosen) < 2 or chosen.max() == chosen.min():
            return out
        out[voting] = self._map(chosen)
        return out

    def _map(self, alphas: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class LinearMap(_Map):
    """s1 at the smallest alpha, s2 at the largest, linear between (TempBalance, equation 4).

    Raises:
        ValueError: if s1 or s2 is not positive.
    """

    s1: float = 0.5
    s2: float = 1.5

    def __post_init__(self) -> None:
        check_positive(self, s1=self.s1, s2=self.s2)

    def _map(self, alphas: Tensor) -> Tensor:
        low, high = alphas.min(), alphas.max()
        share = (alphas - low) / (high - low)
        return self.s1 * (1 - share) + self.s2 * share  # exact, and positive, at both ends


@dataclass(frozen=True)
class SqrtShare(_Map):
    """Proportional to sqrt(alpha), mean 1 (``tb_sqrt`` of the released code)."""

    def _map(self, alphas: Tensor) -> Tensor:
        root = alphas.sqrt()
        return root / root.mean()


@dataclass(frozen=True)
class Log2Share(_Map):
    """Proportional to log2(alpha), mean 1 (``tb_log2`` of the released code).

    log2 vanishes at alpha = 1: no multiplier is below 1/1000.
    """

    def _map(self, alphas: Tensor) -> Tensor:
        log = torch.log2(alphas.clamp_min(1.0))
        return (log / log.mean()).clamp_min(1e-3) if log.any() else torch.ones_like(log)


@dataclass(frozen=True)
class RankMap(_Map):
    """s1 + (s2 - s1) * rank / L, with the smallest alpha at rank 0 (``tb_step``).

    The largest stays one step short of s2, as in the released code. Equal alphas share the mean
    of their ranks.

    Raises:
        ValueError: if s1 or s2 is not positive.
    """

    s1: float = 0.5
    s2: float = 1.5

    def __post_init__(self) -> None:
        check_positive(self, s1=self.s1, s2=self.s2)

    def _map(self, alphas: Tensor) -> Tensor:
        ordered = alphas.sort().values
        first = torch.searchsorted(ordered, alphas)
        last = torch.searchsorted(ordered, alphas, right=True) - 1
        rank = (first + last).double() / 2
        return self.s1 + (self.s2 - self.s1) * rank / len(alphas)


@dataclass(frozen=True)
class SigmoidMap(_Map):
    """10 ** (s * (sigmoid(tau * (alpha - mean)) - 0.5)): TB_Sigmoid (arXiv 2410.12178, eq. 2).

    Args:
        s: the width in decades: multipliers lie in 10 ** (-s / 2) to 10 ** (s / 2). A pair gives
            one for alphas below the mean and one for those above.
        tau: steepness.

    Raises:
        ValueError: if a value is not positive, or s is above 100 (no float holds such rates).
    """

    s: float | tuple[float, float] = 0.5
    tau: float = 10.0

    def __post_init__(self) -> None:
        if not isinstance(self.s, int | float):
            object.__setattr__(self, "s", tuple(float(v) for v in self.s))
        below, above = self._widths()
        check_positive(self, s_below=below, s_above=above, tau=self.tau)
        if max(below, above) > 100:
            raise ValueError(f"SigmoidMap: s is a width in decades, at most 100, got {self.s!r}")

    def _widths(self) -> tuple[float, float]:
        return (self.s, self.s) if isinstance(self.s, int | float) else self.s

    def _map(self, alphas: Tensor) -> Tensor:
        below, above = self._widths()
        offset = alphas - alphas.mean()
        width = torch.where(offset > 0, above, below).double()
        return 10 ** (width * (torch.sigmoid(self.tau * offset) - 0.5))


@dataclass(frozen=True)
class StandardSigmoid(_Map):
    """top * sigmoid(tau * z) of standardized alphas z = (alpha - mean) / std over all L of them.

    ``sigmoid`` of the released code of layer-wise rates for language models (arXiv 2605.22297).
    No multiplier is below 1e-9.

    Raises:
        ValueError: if top or tau is not positive.
    """

    top: float = 2.0
    tau: float = 4.0

    def __post_init__(self) -> None:
        check_positive(self, top=self.top, tau=self.tau)

    def _map(self, alphas: Tensor) -> Tensor:
        z = (alphas - alphas.mean()) / alphas.std(correction=0)
        return (self.top * torch.sigmoid(self.tau * z)).clamp_min(1e-9)
