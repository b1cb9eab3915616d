"""Marks: what theory says of alphas, against those of random matrices of the same shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tempbalance.attempt import Method
from tempbalance.layers import Layer, random_twin
from tempbalance.measure import measure

# Alphas of random layers of different shapes differ by about so much.
_MARGIN = 0.1


def theory_marks(
    layers: Sequence[Layer], alphas: Mapping[str, float | None], method: Method
) -> tuple[list[str], list[str]]:
    """Layers that theory calls over-trained, and under-trained, by their alphas.

    Over-trained: alpha under 2, and under that of a random matrix of the same shape by more
    than the margin (small windows read just under 2 at random). Under-trained: alpha within
    the margin of the random one. The margin is 0.1. Random matrices are drawn from a
    generator of their own.

    Source: Martin and Mahoney (2021), JMLR 22 (165); Prakash and Martin on anti-grokking.
    """
    known = [layer for layer in layers if alphas.get(layer.name) is not None]
    records = measure([random_twin(layer) for layer in known], **method.options)
    over, under = [], []
    for layer, record in zip(known, records, strict=True):
        alpha, baseline = alphas[layer.name], record.alpha
        if alpha is None or baseline is None:
            continue
        if alpha < min(2.0, baseline - _MARGIN):
            over.append(layer.name)
        elif abs(alpha - baseline) <= _MARGIN:
            under.append(layer.name)
    return over, under
