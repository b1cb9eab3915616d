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
from tempbalance.spectra.by_layer import windows_of
from tempbalance.spectra.windows import Windows


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
    known = {r.name: r for r in records if r.outcome.measured}
    keys = {
        name: (r.shape, name in complex_, windows_of(method.windows, r))
        for name, r in known.items()
    }
    first = {key: known[name] for name, key in reversed(keys.items())}
    wanted = list(first)
    twins = [
        _twin(first[key], key[1], seed + 7919 * i + k)
        for k, key in enumerate(wanted)
        for i in range(draws)
    ]
    plain = replace(method, keep_spectra=False)
    read = measured(twins, method=plain, progress=progress) if twins else []
    found: dict[tuple[tuple[int, int, int], bool, Windows], Null] = {}
    for k, key in enumerate(wanted):
        alphas = [r.alpha for r in read[k * draws : (k + 1) * draws] if r.alpha is not None]
        if alphas:
            std = statistics.stdev(alphas) if len(alphas) > 1 else 0.0
            found[key] = Null(statistics.fmean(alphas), std)
    return {name: found[key] for name, key in keys.items() if key in found}


def _twin(like: LayerRecord, is_complex: bool, seed: int) -> Layer:
    """A random layer of the shape, and of the name and kind, by which windows may be chosen."""
    shape = like.shape
    dtype = torch.complex64 if is_complex else torch.float32

    def read() -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=dtype, device="cpu")

    return Layer(like.name, like.kind, shape, (), like.numel, nn.Module(), (), read, True)
