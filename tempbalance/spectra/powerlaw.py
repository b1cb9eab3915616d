"""Power-law fits of an empirical spectral density (ESD): p(lambda) ~ lambda^-alpha above xmin.

Every fit takes a batch of spectra and gives a batch of numbers, on the device of the input, with
no host synchronization and no Python loop over spectra.

Legend: B spectra, N entries each, ascending in float64; ``first`` (B,) is the index of the first
entry that counts (those before it are padding or zero eigenvalues), n = N - first their number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

# Entries of one temporary (B, candidates, N) of the search for xmin: 64 MiB of float64.
_SEARCH_ENTRIES = 8_388_608


class PowerLaw(NamedTuple):
    """A fitted batch, each (B,) float64; NaN where a spectrum has no eigenvalue that counts."""

    alpha: Tensor  # exponent of the density, > 1; inf where the tail is one value
    xmin: Tensor  # lower end of the tail, an eigenvalue
    d: Tensor  # Kolmogorov-Smirnov distance between tail and fit; NaN where alpha is inf
    n_tail: Tensor  # eigenvalues in the tail


@runtime_checkable
class Fit(Protocol):
    """What the engine asks of a fit."""

    def __call__(self, eigenvalues: Tensor, first: Tensor) -> PowerLaw:
        """(B, N) ascending and (B,) -> the fitted batch."""
        ...


class _Spectra:
    """A batch with what every fit needs: logarithms, and their sums from each index up."""

    def __init__(self, eigenvalues: Tensor, first: Tensor) -> None:
        self.values = eigenvalues  # (B, N)
        self.first = first  # (B,)
        self.size = eigenvalues.shape[-1]
        self.index = torch.arange(self.size, device=eigenvalues.device)  # (N,)
        self.valid = self.index >= first.unsqueeze(-1)  # (B, N)
        one = torch.ones((), dtype=eigenvalues.dtype, device=eigenvalues.device)
        self.log = torch.log(torch.where(self.valid, eigenvalues, one))  # 0 where not valid
        self.log_sum = self.log.flip(-1).cumsum(-1).flip(-1)  # (B, N)

    def hill(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """Exponent and tail size for tails from index ``start`` (B, M): each (B, M)."""
        tail = (self.size - start).to(self.values.dtype)
        total = self.log_sum.gather(-1, start) - tail * self.log.gather(-1, start)
        return 1 + tail / total.clamp_min(0.0), tail

    def distance(self, start: Tensor, alpha: Tensor) -> Tensor:
        """Kolmogorov-Smirnov distance of tails from ``start`` (B, M): (B, M).

        max_j |P(lambda_j) - (j - i) / n| over the tail j >= i, with P the fitted distribution.
        """
        log_ratio = self.log.unsqueeze(-2) - self.log.gather(-1, start).unsqueeze(-1)  # (B, M, N)
        fitted = -torch.expm1((1 - alpha).unsqueeze(-1) * log_ratio)
        rank = (self.index - start.unsqueeze(-1)).to(self.values.dtype)
        gap = (fitted - rank / (self.size - start).unsqueeze(-1)).abs_()
        return gap.masked_fill_(rank < 0, 0.0).amax(-1)

    def fit(self, start: Tensor) -> PowerLaw:
        """The power law of the tails from ``start`` (B,)."""
        column = start.clamp(max=self.size - 1).unsqueeze(-1)
        alpha, tail = self.hill(column)
        d = self.distance(column, alpha)
        xmin = self.values.gather(-1, column)
        empty = (self.first >= self.size).unsqueeze(-1)
        nan = torch.full_like(alpha, math.nan)
        alpha, xmin, d = (torch.where(empty, nan, x).squeeze(-1) for x in (alpha, xmin, d))
        return PowerLaw(alpha, xmin, d, torch.where(empty, 0 * tail, tail).squeeze(-1))

    def search(self, allowed: Tensor) -> PowerLaw:
        """The start among ``allowed`` (B, N) whose tail has the smallest distance; the first wins.

        All candidates, exactly, in blocks of bounded memory.
        """
        batch = self.values.shape[0]
        best = torch.full((batch,), math.inf, dtype=self.values.dtype, device=self.values.device)
        where = self.first.clamp(max=self.size - 1).clone()
        block = max(1, _SEARCH_ENTRIES // max(1, batch * self.size))
        for low in range(0, self.size - 1, block):  # a tail has at least two eigenvalues
            start = self.index[low : min(low + block, self.size - 1)].expand(batch, -1)
            alpha, _ = self.hill(start)
            d = self.distance(start, alpha)
            usable = allowed.gather(-1, start) & torch.isfinite(alpha)
            d = torch.where(usable, d, torch.full_like(d, math.inf))
            block_best, block_where = d.min(-1)
            better = block_best < best
            best = torch.where(better, block_best, best)
            where = torch.where(better, start.gather(-1, block_where.unsqueeze(-1))[:, 0], where)
        return self.fit(where)


@dataclass(frozen=True)
class Hill:
    """Hill's estimator on a fixed share of the spectrum, PL_Alpha_Hill, the default.

    n eigenvalues ascending, i = int(n / xmin_pos), then
    alpha = 1 + (n - i) / sum_{j >= i} ln(lambda_j / lambda_i).

    Args:
        xmin_pos: 2 takes the upper half of the spectrum, 4 the upper three quarters.

    Raises:
        ValueError: if ``xmin_pos`` is not above 1.

    Source: Hill (1975); TempBalance (arXiv 2312.00359), equation 3.
    """

    xmin_pos: float = 2.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.xmin_pos) and self.xmin_pos > 1):
            raise ValueError(f"xmin_pos must be a number above 1, got {self.xmin_pos!r}")

    def __call__(self, eigenvalues: Tensor, first: Tensor) -> PowerLaw:
        count = eigenvalues.shape[-1] - first
        start = first + torch.floor(count.double() / self.xmin_pos).to(first.dtype)
        return _Spectra(eigenvalues, first).fit(start)


@dataclass(frozen=True)
class KSFit:
    """The xmin, among all eigenvalues, whose tail is nearest to its power law.

    Nearest by the Kolmogorov-Smirnov distance D; exact, so quadratic in the number of
    eigenvalues. Source: Clauset, Shalizi and Newman (2009), section 3.3.
    """

    def __call__(self, eigenvalues: Tensor, first: Tensor) -> PowerLaw:
        spectra = _Spectra(eigenvalues, first)
        return spectra.search(spectra.valid)


@dataclass(frozen=True)
class PeakFit:
    """As :class:`KSFit`, with xmin near the peak of the density.

    The peak is the centre of the fullest bin of the histogram of log10(lambda); candidates lie
    between ``low`` and ``high`` times it, or in that bin where the range holds none. The released
    codes compare log10 of the lower end with the eigenvalue itself, so that it never binds; here
    both ends bind.

    Raises:
        ValueError: unless 0 < low < high and bins >= 1.
    """

    bins: int = 100
    low: float = 0.95
    high: float = 1.5

    def __post_init__(self) -> None:
        if not (0 < self.low < self.high and self.bins >= 1):
            raise ValueError(f"PeakFit needs 0 < low < high and bins >= 1, got {self}")

    def __call__(self, eigenvalues: Tensor, first: Tensor) -> PowerLaw:
        spectra = _Spectra(eigenvalues, first)
        log10 = spectra.log / math.log(10)
        start = first.clamp(max=spectra.size - 1).unsqueeze(-1)
        lowest, highest = log10.gather(-1, start), log10[:, -1:]
        width = (highest - lowest).clamp_min(torch.finfo(log10.dtype).tiny) / self.bins
        bin_index = ((log10 - lowest) / width).floor().clamp(0, self.bins - 1).long()
        counts = torch.zeros(len(first), self.bins, dtype=log10.dtype, device=log10.device)
        counts.scatter_add_(-1, bin_index, spectra.valid.to(log10.dtype))
        peak_bin = counts.argmax(-1, keepdim=True)
        log10_peak = lowest + (peak_bin + 0.5) * width
        offset = log10 - log10_peak
        near = (offset >= math.log10(self.low)) & (offset <= math.log10(self.high)) & spectra.valid
        usable = near & (spectra.index < spectra.size - 1)
        fallback = (bin_index == peak_bin) & spectra.valid
        return spectra.search(torch.where(usable.any(-1, keepdim=True), near, fallback))
