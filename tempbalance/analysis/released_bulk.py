"""WeightWatcher's own bulk fit and shuffles, for its columns; :mod:`.traps` says what is better.

Legend: N >= M the sides of a slice, Q = N / M; eigenvalues ascending in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

_BANDWIDTH, _POINTS, _THIN = 0.1, 1000, 0.01  # of its density estimate
_CLOSE = 1e-4  # of two steps of its descent
_EQUAL = 1e-12  # of two densities, relative
_REPLICAS, _FEW = 5, 100  # shuffles that are pooled where there are few eigenvalues


@dataclass(frozen=True)
class Bulk:
    """A Marchenko-Pastur fit; all -1 where it fails."""

    num_spikes: int = -1  # eigenvalues beyond bulk_max + sqrt(scale of the largest)
    sigma_mp: float = -1.0  # standard deviation, of eigenvalues whose mean is 1
    mp_softrank: float = -1.0  # bulk_max / the largest
    bulk_max: float = -1.0
    bulk_min: float = -1.0
    W_scale: float = -1.0  # its square makes the mean of the eigenvalues 1


def fit_bulk(eigenvalues: Values, n: int, m: int) -> Bulk:
    """The Marchenko-Pastur law nearest to a kernel density of the eigenvalues.

    sigma minimizes the squared difference: the best of a grid, and downhill from there. A
    square matrix has its singular values fitted to a quarter circle of radius 2, whatever sigma.
    The spread beyond the edge is the square root of Delta = Q^(-1/2) edge^(2/3) M^(-2/3), as
    released (Delta itself is the scale of the largest eigenvalue).
    """
    total = float(eigenvalues.sum())
    if not total > 0:
        return Bulk()
    scale = math.sqrt(len(eigenvalues) / total)
    values = eigenvalues * scale**2
    ratio = math.sqrt(m / n)  # Q^-1/2
    x, density = _density(np.sqrt(values) if n == m else values)
    if not len(x):
        return Bulk()
    unit = math.sqrt(values[-1]) / (1 + ratio)
    grid = np.arange(0.05, 2.0, 0.01) * unit
    start = float(grid[_misfits(grid, x, density, n, m).argmin()])
    best = _descend(lambda sigma: float(_misfits(np.array([sigma]), x, density, n, m)[0]), start)
    low, high = (best * (1 - ratio)) ** 2, (best * (1 + ratio)) ** 2
    spread = ratio * high ** (2 / 3) * m ** (-2 / 3)
    spikes = int((values > high + math.sqrt(spread)).sum())
    return Bulk(spikes, best, high / float(values[-1]), high / scale**2, low / scale**2, scale)


def _descend(function: Callable[[float], float], start: float) -> float:
    """The Nelder-Mead method for one number, as ``scipy.optimize.fmin``.

    Where the function jumps it may stop at once, and where it stops is part of the figures.
    """
    a, b = (function(start), start), (function(1.05 * start), 1.05 * start)
    for _ in range(200):
        a, b = (a, b) if a[0] <= b[0] else (b, a)  # a is the better one
        if abs(b[1] - a[1]) <= _CLOSE and abs(b[0] - a[0]) <= _CLOSE:
            break
        best, away = a[1], a[1] - b[1]
        reflected = _at(function, best + away)
        if reflected[0] < a[0]:
            expanded = _at(function, best + 2 * away)
            b = expanded if expanded[0] < reflected[0] else reflected
            continue
        # No better than the only other corner: shorten the step, on the better side of it.
        outside = reflected[0] < b[0]
        shorter = _at(function, best + (0.5 if outside else -0.5) * away)
        taken = shorter[0] <= reflected[0] if outside else shorter[0] < b[0]
        b = shorter if taken else _at(function, best - 0.5 * away)
    return min(a, b)[1]


def _at(function: Callable[[float], float], place: float) -> tuple[float, float]:
    return function(place), place


def _density(values: Values) -> tuple[Values, Values]:
    """Points, and the density there by a triangular kernel, where it is not next to nothing."""
    x = np.linspace(0, values[-1] + 0.5, _POINTS)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low, middle, high = (
        np.searchsorted(values, x + shift) for shift in (-_BANDWIDTH, 0.0, _BANDWIDTH)
    )
    # sum of h - |x - v|, over those within h
    left = (_BANDWIDTH - x) * (middle - low) + sums[middle] - sums[low]
    right = (_BANDWIDTH + x) * (high - middle) - sums[high] + sums[middle]
    density = (left + right) / (_BANDWIDTH**2 * len(values))
    keep = density > _THIN
    return x[keep], density[keep]


def _misfits(sigmas: Values, x: Values, density: Values, n: int, m: int) -> Values:
    """Sum of squares for each sigma; large where the support misses the mode or leaves the data."""
    sigma = sigmas[:, None]
    if n == m:
        law = np.sqrt(np.maximum(4 - x**2, 0)) / (math.pi * sigma**2)
        return ((law - density) ** 2).sum(-1)
    ratio = math.sqrt(m / n)
    low, high = (sigma * (1 - ratio)) ** 2, (sigma * (1 + ratio)) ** 2
    inside = np.sqrt(np.maximum((high - x) * (x - low), 0))
    law = inside / (2 * math.pi * sigma**2 * np.maximum(x, 1e-300) * (m / n))
    misfit = ((law - density) ** 2).sum(-1)
    # Of a plateau, which few eigenvalues make, the first: the others differ by rounding alone.
    mode = x[(density >= density.max() * (1 - _EQUAL)).argmax()]
    impossible = (high < mode) | (high > x[-1]) | (low > mode)
    return np.where(impossible[:, 0], 1e6 * len(x), misfit)


def shuffled(slices: Values, generator: np.random.RandomState, replicas: int) -> Values:
    """Eigenvalues of the shuffled slices (S, N, M), so many times each, pooled."""
    pooled = []
    for _ in range(replicas):
        for matrix in slices:
            entries = matrix.flatten()
            generator.shuffle(entries)
            pooled.append(np.linalg.svd(entries.reshape(matrix.shape), compute_uv=False) ** 2)
    return np.sort(np.concatenate(pooled))


def random_columns(
    slices: Values, eigenvalues: Values, n: int, m: int, generator: np.random.RandomState
) -> dict[str, float | int]:
    """Its columns of the shuffled weight: a bulk fit of a first pool, distances to a second."""
    count = m * len(slices)
    pool = shuffled(slices, generator, _REPLICAS if count < _FEW else 1)
    other = shuffled(slices, generator, 1)
    bulk = fit_bulk(pool, n, m)
    return {
        "max_rand_eval": float(pool[-1]),
        "rand_distance": _jensen_shannon(eigenvalues, other),
        "ww_softrank": float(other[-1] / eigenvalues[-1]),
        "ww_maxdist": float(eigenvalues[-1] - other[-1]),
        "rand_num_spikes": bulk.num_spikes,
        "num_traps": bulk.num_spikes,
        "rand_sigma_mp": bulk.sigma_mp,
        "rand_mp_softrank": bulk.mp_softrank,
        "rand_W_scale": bulk.W_scale,
        "rand_bulk_max": bulk.bulk_max,
        "rand_bulk_min": bulk.bulk_min,
    }


def _jensen_shannon(one: Values, other: Values) -> float:
    """Root of the divergence (natural log) of two vectors, each divided by its sum."""
    p, q = one / one.sum(), other / other.sum()
    middle = (p + q) / 2

    def to_middle(values: Values) -> float:
        some = values > 0
        return float((values[some] * np.log(values[some] / middle[some])).sum())

    return math.sqrt(max(0.0, (to_middle(p) + to_middle(q)) / 2))
