"""NullScore: alpha in units of what chance gives a matrix of the layer's shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tempbalance.assign.contract import Alphas, Population, valid, vector

# Without bounds: what a float holds, with room for a rate.
_REPRESENTED = (1e-100, 1e100)


@dataclass(frozen=True)
class NullScore:
    """Multipliers from the z-score of alpha against the layer's own null, within its type.

    With alpha0 and sigma0 the mean and standard deviation of alpha of random matrices of the
    layer's shape, measured as the layer is (:func:`tempbalance.null_alpha`),

        z = (alpha - alpha0) / sigma0,  k = max(0, 1 - 1 / Var z),  m = exp(c k (z - mean z)),

    variance (unbiased) and mean being those of the layers of one type, the mean over parameters:
    so the geometric mean of m over the parameters of a type is 1. Were all layers of a type
    random, Var z would be 1 and k, the share of the variance that chance does not explain, 0. A
    type with a single layer gets 1: types are not compared. A type is the class of the module; in
    a transformer, where all are one, ``ByRole(NullScore())`` takes the role in the block.

    Args:
        c: log of the multiplier for a unit of z; below 0 the roles are exchanged, exactly.
        bounds: least and largest multiplier; ``None`` for none. Where they bind, the logs of the
            type are shifted together so that the geometric mean stays 1.

    Raises:
        ValueError: if c is not finite or 0, bounds do not hold 1 between them, or when called
            without what random matrices of the layers read (the balancer gives it).

    Source: shrinkage as of James and Stein (1961), in its positive part.
    """

    c: float = 0.1
    bounds: tuple[float, float] | None = (0.5, 2.0)
    uses_alphas = True
    once = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.c) and self.c):
            raise ValueError(f"NullScore: c must be a finite number other than 0, got {self.c!r}")
        object.__setattr__(self, "bounds", checked_bounds(self, self.bounds))

    def __call__(self, alphas: Alphas, kinds: Sequence[str] | None = None) -> Tensor:
        values = vector(alphas)
        layers = Population.of(kinds, len(values))
        out = torch.ones_like(values)
        voting = valid(values)
        if len(values[voting].unique()) < 2:
            return out
        scores = torch.full_like(values, math.nan)
        for i, null in enumerate(layers.null(self)):
            if voting[i] and null is not None and null[1] > 0:
                scores[i] = (values[i] - null[0]) / null[1]
        for places in _types(layers, torch.isfinite(scores)):
            out[places] = self._within(scores[places], layers.weights[places])
        return out

    def _within(self, z: Tensor, weights: Tensor) -> Tensor:
        variance = float(z.var())
        if variance <= 1:
            return torch.ones_like(z)
        logs = self.c * (1 - 1 / variance) * z
        return bounded(logs, weights, self.bounds).exp()


def _types(layers: Population, among: Tensor) -> list[list[int]]:
    """Places of the layers of each type that has two or more ``among`` (L,) them."""
    types: dict[str, list[int]] = {}
    for i, takes_part in enumerate(among.tolist()):
        if takes_part:
            types.setdefault(layers[i], []).append(i)
    return [places for places in types.values() if len(places) > 1]


def bounded(logs: Tensor, weights: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    """Logs of multipliers (L,) shifted and clipped, with a weighted mean of 0.

    The one shift for which the mean of the clipped logs, each counting ``weights`` (L,), is 0.
    """
    logs = logs - (logs * weights).sum() / weights.sum()
    low, high = (math.log(bound) for bound in bounds or _REPRESENTED)
    if logs.min() >= low and logs.max() <= high:
        return logs
    # The mean rises with the shift, from all at the lower bound to all at the upper one.
    below, above = low - float(logs.max()), high - float(logs.min())
    for _ in range(80):
        middle = (below + above) / 2
        over = bool(((logs + middle).clamp(low, high) * weights).sum() > 0)
        below, above = (below, middle) if over else (middle, above)
    return (logs + (below + above) / 2).clamp(low, high)


def checked_bounds(owner: object, bounds: Sequence[float] | None) -> tuple[float, float] | None:
    """The bounds of multipliers as a pair.

    Raises:
        ValueError: unless they are positive numbers with 1 between them.
    """
    if bounds is None:
        return None
    pair = tuple(float(bound) for bound in bounds)
    if len(pair) != 2 or not (0 < pair[0] < 1 < pair[1] < math.inf):
        raise ValueError(
            f"{type(owner).__name__}: bounds are the least and the largest multiplier, with 1 "
            f"between them, such as (0.5, 2.0); got {bounds!r}"
        )
    return pair
