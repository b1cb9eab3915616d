"""Null: what random matrices of the layers' shapes read, in place of a number for all shapes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tempbalance.layers import Layer
from tempbalance.measure.measurement import LayerRecord, measured
from tempbalance.measure.method import Method
from tempbalance.spectra.by_layer import ByLayer, windows_of
from tempbalance.spectra.grid import Windows

_Shape = tuple[int, int, int]
_Key = tuple[_Shape, bool, Windows]


@dataclass(frozen=True)
class Null:
    """Alpha of random matrices of one shape: mean and standard deviation over the draws."""

    mean: float
    std: float  # 0 for a single draw


def null_alphas(
    records: Sequence[LayerRecord],
    method: Method,
    *,
    draws: int,
    complex_: frozenset[str] = frozenset(),
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Null]:
    """What each layer would read if its entries were independent and Gaussian, by its name.

    Simulated for the layer's own shape, windows and fit, once for all layers of a shape: Hill's
    formula for the error does not hold for the pooled windows of one matrix.

    Args:
        records: the measured layers.
        method: how they were measured.
        draws: random matrices a shape; about 10 for the standard deviation, 2 for the mean alone.
        complex_: names of the layers with complex entries.
    """
    keys = {
        r.name: (r.shape, r.name in complex_, windows_of(method.windows, r))
        for r in records
        if r.outcome.measured
    }
    wanted = list(dict.fromkeys(keys.values()))
    twins = [
        _twin(f"{k}.{i}", shape, is_complex, seed + 7919 * i + k)
        for k, (shape, is_complex, _) in enumerate(wanted)
        for i in range(draws)
    ]
    windows = ByLayer({f"{k}.*": own for k, (_, _, own) in enumerate(wanted)}) if wanted else None
    drawn: list[LayerRecord] = []
    if windows is not None:
        plain = replace(method, windows=windows, keep_spectra=False)
        drawn = measured(twins, method=plain, progress=progress)
    found: dict[_Key, Null] = {}
    for k, key in enumerate(wanted):
        alphas = [r.alpha for r in drawn[k * draws : (k + 1) * draws] if r.alpha is not None]
        if alphas:
            std = statistics.stdev(alphas) if len(alphas) > 1 else 0.0
            found[key] = Null(statistics.fmean(alphas), std)
    return {name: found[key] for name, key in keys.items() if key in found}


def _twin(name: str, shape: _Shape, is_complex: bool, seed: int) -> Layer:
    dtype = torch.complex64 if is_complex else torch.float32

    def read() -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=dtype, device="cpu")

    slices, rows, cols = shape
    return Layer(name, "Random", shape, (), slices * rows * cols, nn.Module(), (), read, True)
