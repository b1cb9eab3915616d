"""Allocation: from one number a layer to the share of its weights that is removed.

Legend: L layers (or blocks); p_l their sizes; r_l their ratios, the share that is removed;
S the total, the share removed of all of them together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LIMIT = 0.98

Numbers = Tensor | Sequence[float]


def allocate(
    alphas: Numbers,
    sizes: Numbers,
    total: float,
    *,
    spread: float = 0.3,
    limit: float = LIMIT,
) -> Tensor:
    """Ratios (L,) in float64: the larger a layer's alpha, the more of it is removed.

    raw_l = (1 - spread) + 2 spread (alpha_l - min) / (max - min), and r_l = min(c raw_l, limit)
    with the c for which sum(p r) = total sum(p). Before the limit binds, the largest ratio is so
    (1 + spread) / (1 - spread) times the smallest. What the limit cuts off, the other layers take
    over in proportion to their raw_l, so that the total is met to rounding.

    Args:
        alphas: (L,) one number a layer. One that is not finite counts as unknown, and gets
            raw_l = 1; where all known ones are equal, every layer gets the total.
        sizes: (L,) weights in each layer, positive.
        total: S, from 0 up to ``limit``.
        spread: epsilon, from 0 (uniform) to 1.
        limit: no ratio is above it, above 0 and up to 1; below 1 no layer is emptied.

    Raises:
        ValueError: for lengths that differ, a value out of range, or a total that the layers with
            raw_l > 0 cannot reach within ``limit``.

    Source: AlphaPruning (arXiv 2410.10912), section 3.3; the limit and what follows from it are
    ours: there, ratios above 1 are cut or fail, and the total is missed.

    >>> allocate([2.0, 3.0], [100, 100], 0.5, spread=0.2)
    tensor([0.4000, 0.6000], dtype=torch.float64)
    """
    values, weights = _vector(alphas), _vector(sizes)
    _check(values, weights, total, spread, limit)
    raw = _raw(values, spread)
    return _filled(raw, weights, total, limit)


def _vector(values: Numbers) -> Tensor:
    return torch.as_tensor(values).detach().to(torch.float64)


def _check(values: Tensor, sizes: Tensor, total: float, spread: float, limit: float) -> None:
    if values.ndim != 1 or values.shape != sizes.shape or not len(values):
        raise ValueError(
            "allocate needs one alpha and one size a layer, got shapes "
            f"{tuple(values.shape)} and {tuple(sizes.shape)}"
        )
    if not (torch.isfinite(sizes).all() and (sizes > 0).all()):
        raise ValueError("sizes must be positive and finite")
    if not 0 <= spread <= 1:
        raise ValueError(f"spread must lie between 0 and 1, got {spread!r}")
    if not 0 < limit <= 1:
        raise ValueError(f"limit must be above 0 and at most 1, got {limit!r}")
    if not (math.isfinite(total) and 0 <= total <= limit):
        raise ValueError(
            f"total={total!r} must lie between 0 and limit={limit}: no layer may lose more than "
            "the limit, so that all together cannot either"
        )


def _raw(values: Tensor, spread: float) -> Tensor:
    known = torch.isfinite(values)
    raw = torch.ones_like(values)
    if not known.any():
        return raw
    low, high = values[known].min(), values[known].max()
    # Halved: the span of the largest floats would be infinite.
    span = high / 2 - low / 2
    if not span > 0:
        return raw
    # A span below the smallest normal number may send the quotient a little above 1.
    place = ((values[known] / 2 - low / 2) / span).clamp(0, 1)
    raw[known] = (1 - spread) + 2 * spread * place
    return raw


def _filled(raw: Tensor, sizes: Tensor, total: float, limit: float) -> Tensor:
    """min(c raw, limit) with the weighted mean ``total``: the largest raw reach the limit first."""
    sizes = sizes / sizes.max()
    wanted = total * sizes.sum()
    if wanted > (reachable := limit * sizes[raw > 0].sum()):
        best = float(reachable / sizes.sum())
        raise ValueError(
            f"no allocation removes {total:.4g} of the weights: with a spread of 1 the layer of "
            f"least alpha keeps all of its own, and the others can give {best:.4g} within "
            f"limit={limit}; lower total or spread"
        )
    order = raw.argsort(descending=True, stable=True)
    r, p = raw[order], sizes[order]
    # With the first k at the limit, the rest share what is left: c_k.
    at_limit = torch.cat([p.new_zeros(1), p.cumsum(0)[:-1]]) * limit
    rest = (p * r).flip(0).cumsum(0).flip(0)
    c = (wanted - at_limit).clamp_min(0) / rest.clamp_min(torch.finfo(p.dtype).tiny)
    fits = c * r <= limit
    k = int(fits.to(torch.int8).argmax()) if fits.any() else len(r) - 1
    ratios = (c[k] * r).clamp(0, limit)
    ratios[:k] = limit
    result = torch.empty_like(ratios)
    result[order] = ratios
    return result
