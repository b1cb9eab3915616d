"""Twins: random matrices of the same shapes, and what theory says of alphas against theirs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tempbalance.layers.find import Layer
from tempbalance.measure.attempt import attempt
from tempbalance.measure.method import Method
from tempbalance.words import some

logger = logging.getLogger("tempbalance")

# Alphas of random layers of different shapes differ by about so much.
_MARGIN = 0.1


def random_twin(layer: Layer, seed: int = 0) -> Layer:
    """A layer of the same shape and device with independent Gaussian entries: no structure."""
    weight = layer.tensors()[0]

    def read() -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        dtype = torch.complex64 if weight.is_complex() else torch.float32
        # Where the generator is, whatever the default device.
        values = torch.randn(layer.shape, generator=generator, dtype=dtype, device="cpu")
        return values.to(weight.device)

    return replace(layer, _read=read, copies=True)


def theory_marks(
    layers: Sequence[Layer], alphas: Mapping[str, float | None], method: Method
) -> tuple[list[str], list[str]]:
    """Layers that theory calls over-trained, and under-trained, by their alphas.

    Over-trained: alpha under 2, and under that of a random matrix of the same shape by more
    than the margin (small windows read just under 2 at random). Under-trained: alpha within
    the margin of the random one. The margin is 0.1. Random matrices are drawn from a
    generator of their own. A layer whose random matrix cannot be measured has no mark.

    Source: Martin and Mahoney (2021), JMLR 22 (165); Prakash and Martin on anti-grokking.
    """
    over, under = [], []
    for name, (alpha, baseline) in _beside_twins(layers, alphas, method).items():
        if alpha < min(2.0, baseline - _MARGIN):
            over.append(name)
        elif abs(alpha - baseline) <= _MARGIN:
            under.append(name)
    return over, under


def below_twins(
    layers: Sequence[Layer], alphas: Mapping[str, float | None], method: Method
) -> list[str]:
    """Layers whose alpha lies under that of a random matrix of the shape by over 0.1."""
    pairs = _beside_twins(layers, alphas, method)
    return [name for name, (alpha, baseline) in pairs.items() if alpha < baseline - _MARGIN]


def _beside_twins(
    layers: Sequence[Layer], alphas: Mapping[str, float | None], method: Method
) -> dict[str, tuple[float, float]]:
    """By layer, its alpha and that of its twin, where both are known."""
    known = [layer for layer in layers if alphas.get(layer.name) is not None]
    result = attempt([random_twin(layer) for layer in known], method)
    if result.failures:
        logger.warning(
            "TempBalance: theory has no mark for %s: measuring a random matrix failed (%s)",
            *(some(list(result.failures)), next(iter(result.failures.values()))),
        )
    pairs = {}
    for record in result.records:
        alpha = alphas[record.name]
        if alpha is not None and record.alpha is not None:
            pairs[record.name] = (alpha, record.alpha)
    return pairs
