"""Agreement with float64 before any time: alpha from the singular values of every window.

The truth here shares nothing with the engine but the positions of the windows and Hill's formula,
written once more: plain slices of the weight, one float64 ``svdvals`` each, on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tempbalance.layers.find import Layer
from tempbalance.measure.measurement import measure
from tempbalance.spectra.windows import Windows

TOLERANCE = 1e-4  # relative, of alpha


class DisagreementError(AssertionError):
    """Alpha is not that of float64: no time is worth reporting."""


def require(layers: Sequence[Layer], windows: Windows, what: str) -> float:
    """The largest relative error of alpha over the measured layers.

    Raises:
        DisagreementError: if it is above ``TOLERANCE`` or no layer was measured; ``what``
            names it.
    """
    error = largest_error(layers, windows)
    if not error <= TOLERANCE:
        raise DisagreementError(
            f"{what}: alpha is off by {error:.1e} against float64 (at most {TOLERANCE:.0e} is "
            "allowed), so no time is given: find out why before measuring anything else"
        )
    return error


def largest_error(layers: Sequence[Layer], windows: Windows) -> float:
    """The largest relative error of alpha over measured layers; infinite without any."""
    errors = [
        abs(record.alpha - truth) / truth
        for record, layer in zip(measure(layers, windows=windows), layers, strict=True)
        if record.alpha is not None and (truth := alpha(layer, windows))
    ]
    return max(errors) if errors else math.inf


def alpha(layer: Layer, windows: Windows) -> float:
    """Hill's alpha of a layer's windows in float64."""
    slices = layer.read().cpu()
    spectra = [
        torch.cat([_eigenvalues(window) for window in stack]) for stack in _windows(slices, windows)
    ]
    if windows.pool == "spectrum":
        spectra = [torch.cat(spectra)]
    fits = [_hill(values) for values in spectra]
    return sum(fits) / len(fits)


def _windows(slices: Tensor, windows: Windows) -> Iterator[Tensor]:
    """(S, h, w) for each position."""
    grid = windows.grid(*slices.shape[1:])
    turned = slices.mT if grid.transpose else slices
    for each in (turned, turned.mT) if grid.both else (turned,):
        for row in grid.row_starts:
            for col in grid.col_starts:
                yield each[:, row : row + grid.height, col : col + grid.width]


def _eigenvalues(window: Tensor) -> Tensor:
    double = window.to(torch.complex128 if window.is_complex() else torch.float64)
    return torch.linalg.svdvals(double) ** 2


def _hill(values: Tensor) -> float:
    """The upper half of the eigenvalues that are not zero to rounding."""
    values = values[values > values.max() * 1e-13].sort().values
    start = len(values) // 2
    tail = values[start:]
    return float(1 + len(tail) / torch.log(tail / values[start]).sum())
