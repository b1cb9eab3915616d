"""The published way to measure, in our own words: one ``svdvals`` a window, a loop over all.

With ``pool="alpha"`` (convolutions) the square blocks down the longer side of a slice have a fit
each, pooled over the slices, and alpha is their mean; with ``pool="spectrum"`` (linear layers) the
squares side by side share one fit. A complex weight, which the published codes leave out, is a
matrix a mode in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tempbalance.layers.find import Layer
from tempbalance.spectra.windows import Pool


def alphas(layers: Sequence[Layer], pool: Pool, dtype: torch.dtype = torch.float32) -> list[float]:
    """Alpha of every layer; in float64 it is the truth that others are compared with."""
    return [_alpha(layer.read(), pool, dtype) for layer in layers]


def blocks(slices: Tensor) -> Iterator[list[Tensor]]:
    """The square blocks of (S, rows, cols) along the longer side: those of all slices together."""
    if slices.shape[1] < slices.shape[2]:
        slices = slices.mT
    side = slices.shape[2]
    for block in range(slices.shape[1] // side):
        yield [s[block * side : (block + 1) * side] for s in slices]


def _alpha(slices: Tensor, pool: Pool, dtype: torch.dtype) -> float:
    spectra = [torch.cat([_eigenvalues(w, dtype) for w in some]) for some in blocks(slices)]
    if pool == "spectrum":
        spectra = [torch.cat(spectra)]
    fits = [_hill(values) for values in spectra]
    return sum(fits) / len(fits)


def _eigenvalues(window: Tensor, dtype: torch.dtype) -> Tensor:
    target = dtype.to_complex() if window.is_complex() else dtype
    return torch.linalg.svdvals(window.to(target)) ** 2


def _hill(values: Tensor) -> float:
    """Hill's estimator on the upper half, read back to the host at once, as published."""
    values = values.sort().values
    start = len(values) // 2
    tail = values[start:]
    return float(1 + len(tail) / torch.log(tail / values[start]).sum())
