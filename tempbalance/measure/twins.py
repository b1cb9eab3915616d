"""Twins: what theory says of alphas against those of random matrices of the same shapes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from tempbalance.layers.find import Layer
from tempbalance.measure.method import Method
from tempbalance.measure.null import NullAlpha, null_alphas
from tempbalance.words import some

logger = logging.getLogger("tempbalance")

# An alpha is like that of random matrices within so much, or within how far those scatter (which is
# more where matrices are small, and by far with a fit that chooses its xmin).
_MARGIN = 0.1


def theory_marks(
    layers: Sequence[Layer], alphas: Mapping[str, float | None], method: Method
) -> tuple[list[str], list[str]]:
    """Layers that theory calls over-trained, and under-trained, by their alphas.

    Over-trained: alpha under 2, and under that of random matrices of the same shape by more than
    the margin (small windows read just under 2 at random). Under-trained: alpha within the margin
    of the random ones. The margin is 0.1, or one standard deviation of the random ones if that is
    more. A layer whose random matrices cannot be measured has no mark.

    Source: Martin and Mahoney (2021), JMLR 22 (165); Prakash and Martin on anti-grokking.
    """
    over, under = [], []
    for name, (alpha, null) in _beside_null(layers, alphas, method).items():
        margin = max(_MARGIN, null.std)
        if alpha < min(2.0, null.mean - margin):
            over.append(name)
        elif abs(alpha - null.mean) <= margin:
            under.append(name)
    return over, under


def below_twins(
    layers: Sequence[Layer], alphas: Mapping[str, float | None], method: Method
) -> list[str]:
    """Layers whose alpha lies under that of random matrices of the shape by over the margin."""
    pairs = _beside_null(layers, alphas, method)
    return [n for n, (alpha, null) in pairs.items() if alpha < null.mean - max(_MARGIN, null.std)]


def _beside_null(
    layers: Sequence[Layer], alphas: Mapping[str, float | None], method: Method
) -> dict[str, tuple[float, NullAlpha]]:
    """By layer, its alpha and that of random matrices, where both are known."""
    known = {layer.name: a for layer in layers if (a := alphas.get(layer.name)) is not None}
    null = _null_of([layer for layer in layers if layer.name in known], method)
    return {name: (alpha, null[name]) for name, alpha in known.items() if name in null}


def _null_of(layers: Sequence[Layer], method: Method) -> dict[str, NullAlpha]:
    """Of all layers together; if that fails, one by one."""
    try:
        return null_alphas(layers, method)
    except Exception as error:
        logger.warning("measuring failed (%r); trying layer by layer", error)
    null: dict[str, NullAlpha] = {}
    failures: dict[str, str] = {}
    for layer in layers:
        try:
            null |= null_alphas([layer], method)
        except Exception as error:
            failures[layer.name] = repr(error)
    if failures:
        logger.warning(
            "TempBalance: theory has no mark for %s: measuring a random matrix failed (%s)",
            *(some(list(failures)), next(iter(failures.values()))),
        )
    return null
