"""Power-law fits of an empirical spectral density (ESD): p(lambda) ~ lambda^-alpha above xmin.

Every fit takes a batch of spectra and gives a batch of numbers, on the device of the input, with
no host synchronization and no Python loop over spectra.

Legend: B spectra, N entries each, ascending in float64; ``first`` (B,) is the index of the first
entry that counts (those before it are padding or zero eigenvalues), n = N - first their number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from tempbalance.spectra.nearest import nearest
from tempbalance.spectra.tails import PowerLaw as PowerLaw
from tempbalance.spectra.tails import Tails


@runtime_checkable
class Fit(Protocol):
    """What the engine asks of a fit.

    It is given eigenvalues in a unit of the engine's choice, exact from xmin up. One whose alpha
    depends on the unit says so by an attribute ``in_units = True``, and is given those of the
    weight itself; one that also looks at what lies below xmin, by ``reads_all = True``.
    """

    def __call__(self, eigenvalues: Tensor, first: Tensor) -> PowerLaw:
        """(B, N) ascending and (B,) -> the fitted batch."""
        ...


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
        return Tails(eigenvalues, first).fit(start)


@dataclass(frozen=True)
class KSFit:
    """The xmin, among all eigenvalues, whose tail is nearest to its power law.

    Nearest by the Kolmogorov-Smirnov distance D; the first of equals. Exact on a CPU, and on an
    accelerator up to 8192 eigenvalues; above, D is at most 1/256 over the smallest there is (see
    :func:`tempbalance.spectra.nearest.nearest`).

    Source: Clauset, Shalizi and Newman (2009), section 3.3.
    """

    def __call__(self, eigenvalues: Tensor, first: Tensor) -> PowerLaw:
        tails = Tails(eigenvalues, first)
        return tails.fit(nearest(tails, tails.valid))


@dataclass(frozen=True)
class PeakFit:
    """As :class:`KSFit`, with xmin near the peak of the density.

    The peak is the centre of the fullest bin of the histogram of log10(lambda); candidates lie
    between ``low`` and ``high`` times it, or in that bin where the range holds none.

    Args:
        bins: of the histogram.
        low, high: ends of the range, in units of the peak.
        released: the range as in the released codes (WeightWatcher, and its copies in
            AlphaPruning, FARMS and AlphaDecay), to reproduce their figures: the peak is the left
            edge of the bin, and log10 of the lower end is compared with the eigenvalue itself, so
            that it hardly ever binds, and depends on the unit of the weight.

    Raises:
        ValueError: unless 0 < low < high and bins >= 1.
    """

    bins: int = 100
    low: float = 0.95
    high: float = 1.5
    released: bool = False
    reads_all: ClassVar[bool] = True  # the smallest eigenvalue is where the histogram begins

    def __post_init__(self) -> None:
        if not (0 < self.low < self.high and self.bins >= 1):
            raise ValueError(f"PeakFit needs 0 < low < high and bins >= 1, got {self}")

    @property
    def in_units(self) -> bool:
        """Whether alpha depends on the unit of the eigenvalues."""
        return self.released

    def __call__(self, eigenvalues: Tensor, first: Tensor) -> PowerLaw:
        tails = Tails(eigenvalues, first)
        log10 = tails.log / math.log(10)
        start = first.clamp(max=tails.size - 1).unsqueeze(-1)
        lowest, highest = log10.gather(-1, start), log10[:, -1:]
        width = (highest - lowest).clamp_min(torch.finfo(log10.dtype).tiny) / self.bins
        bin_index = ((log10 - lowest) / width).floor().clamp(0, self.bins - 1).long()
        counts = torch.zeros(len(first), self.bins, dtype=log10.dtype, device=log10.device)
        counts.scatter_add_(-1, bin_index, tails.valid.to(log10.dtype))
        peak_bin = counts.argmax(-1, keepdim=True)
        peak = lowest + (peak_bin + (0.0 if self.released else 0.5)) * width  # a log10
        low, high = peak + math.log10(self.low), peak + math.log10(self.high)
        above = tails.values >= low if self.released else log10 >= low
        near = above & (log10 <= high) & tails.valid
        usable = near & (tails.index < tails.size - 1)
        fallback = (bin_index == peak_bin) & tails.valid
        allowed = torch.where(usable.any(-1, keepdim=True), near, fallback)
        return tails.fit(nearest(tails, allowed))
