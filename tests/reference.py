"""A slow float64 twin of windows, spectrum and fits: plain loops over the equations of the papers.

Nothing of the package is used here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Law(NamedTuple):
    alpha: float
    xmin: float
    d: float
    n_tail: int


# --- windows ---------------------------------------------------------------------------------


def even_starts(size: int, window: int, count: int) -> list[int]:
    """``count`` starts from 0 to size - window, distances as equal as integers allow."""
    last = size - window
    count = min(count, last + 1)
    if count == 1:
        return [0]
    return [math.floor(k * last / (count - 1) + 1e-12) for k in range(count)]


def covering_starts(size: int, window: int, step: int) -> list[int]:
    """The fewest even starts whose neighbours are at most ``step`` apart and reach both ends."""
    count = 1
    while (count - 1) * step < size - window:
        count += 1
    return even_starts(size, window, count)


def farms_windows(
    matrix: Array,
    aspect_ratio: float = 1.0,
    rows: int | None = None,
    per_dim: int | None = None,
    stride: int | None = None,
) -> list[Array]:
    """The windows of one slice, in order of position."""
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T
    long, short = matrix.shape
    # The largest integer height with room for its width on both sides.
    height = min(long, short / aspect_ratio)
    if rows is not None:
        height = min(height, rows)
    h = max(1, math.floor(height + 1e-9))
    w = max(1, min(short, math.floor(height * aspect_ratio + 1e-9)))
    found = []
    for turned in [matrix, matrix.T] if long == short and h != w else [matrix]:
        if per_dim is not None:
            tops, lefts = even_starts(long, h, per_dim), even_starts(short, w, per_dim)
        else:
            tops = covering_starts(long, h, stride or h)
            lefts = covering_starts(short, w, stride or w)
        found += [turned[t : t + h, c : c + w] for t in tops for c in lefts]
    return found


def released_conv_windows(matrix: Array, aspect_ratio: float) -> list[Array]:
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T
    long, short = matrix.shape
    if aspect_ratio > 1:
        h, w = int(short // aspect_ratio), short
    else:
        h, w = short, int(short // (1 / aspect_ratio))
    return [matrix[i * h : (i + 1) * h, :w] for i in range(long // short)]


def released_linear_windows(
    matrix: Array, rows: int, aspect_ratio: float, per_dim: int | None, stride: int | None
) -> list[Array]:
    h, w = rows, int(rows * aspect_ratio)

    def starts(size: int, window: int) -> list[int]:
        if per_dim is not None:
            step = max(1, (size - window) // (per_dim - 1))
            return list(range(0, size - window + 1, step))[:per_dim]
        assert stride is not None
        return list(range(0, size - window + 1, stride))

    tops, lefts = starts(matrix.shape[0], h), starts(matrix.shape[1], w)
    return [matrix[t : t + h, c : c + w] for t in tops for c in lefts]


# --- spectrum ---------------------------------------------------------------------------------


def eigenvalues(matrices: Iterable[Array]) -> Array:
    """All eigenvalues of W W^H of all matrices, ascending, zero to rounding left out."""
    pooled = []
    for matrix in matrices:
        exact = matrix.astype(np.complex128 if np.iscomplexobj(matrix) else np.float64)
        singular = np.linalg.svd(exact, compute_uv=False)
        floor = max(matrix.shape) * np.finfo(np.float64).eps * singular.max(initial=0.0)
        pooled += [float(s) ** 2 for s in singular if s > floor]
    return np.array(sorted(pooled))


# --- power laws --------------------------------------------------------------------------------


def law_from(values: Array, i: int) -> Law:
    """Hill's exponent of the tail values[i:], and its distance from that tail."""
    n, xmin = len(values) - i, float(values[i])
    total = sum(math.log(float(v) / xmin) for v in values[i:])
    alpha = 1 + n / total if total > 0 else math.inf
    d = 0.0
    for j in range(i, len(values)):
        fitted = 1 - (float(values[j]) / xmin) ** (1 - alpha)
        d = max(d, abs(fitted - (j - i) / n))
    return Law(alpha, xmin, d, n)


def hill(values: Array, xmin_pos: float = 2) -> Law:
    return law_from(values, int(len(values) / xmin_pos))


def best(values: Array, starts: Sequence[int]) -> Law:
    laws = [law_from(values, i) for i in starts]
    return min((law for law in laws if math.isfinite(law.alpha)), key=lambda law: law.d)


def ks(values: Array) -> Law:
    return best(values, range(len(values) - 1))


def peak(values: Array, bins: int = 100) -> Law:
    logs = np.log10(values)
    counts, edges = np.histogram(logs, bins=bins)
    k = int(counts.argmax())
    mode = 10 ** ((edges[k] + edges[k + 1]) / 2)
    near = [i for i in range(len(values) - 1) if 0.95 * mode <= values[i] <= 1.5 * mode]
    return best(values, near)


def peak_released(values: Array, bins: int = 100) -> Law:
    """The left edge of the bin, and a log10 compared with an eigenvalue."""
    counts, edges = np.histogram(np.log10(values), bins=bins)
    mode = 10 ** edges[int(counts.argmax())]
    low = math.log10(0.95 * mode)
    near = [i for i in range(len(values) - 1) if low <= values[i] <= 1.5 * mode]
    return best(values, near)


# --- a layer -----------------------------------------------------------------------------------


def measure(
    slices: Array,
    windows: Callable[[Array], list[Array]] = lambda m: [m],
    fit: Callable[[Array], Law] = hill,
    pool: str = "spectrum",
) -> tuple[float, float, Array]:
    """(slices, rows, cols) -> alpha, D, pooled eigenvalues."""
    each = [windows(s) for s in slices]
    values = eigenvalues(window for some in each for window in some)
    if pool == "spectrum":
        law = fit(values)
        return law.alpha, law.d, values
    by_position = [eigenvalues(w) for w in zip(*each, strict=True)]
    laws = [fit(v) for v in by_position]
    alpha = math.fsum(law.alpha for law in laws) / len(laws)
    return alpha, math.fsum(law.d for law in laws) / len(laws), values


# --- random matrices ---------------------------------------------------------------------------


def marchenko_pastur_alpha(ratio: float, points: int = 200_000) -> float:
    """Hill's alpha (upper half) of an infinite i.i.d. Gaussian matrix, ratio = cols / rows <= 1.

    With lambda = 1 + q + 2 sqrt(q) cos(t), t from 0 (upper edge) to pi, the density of the
    eigenvalues becomes smooth, 2 sin(t)^2 / (pi lambda): the midpoint rule is exact enough.
    """
    t = (np.arange(points) + 0.5) * math.pi / points
    value = 1 + ratio + 2 * math.sqrt(ratio) * np.cos(t)
    mass = np.sin(t) ** 2 / value
    mass /= mass.sum()
    share = np.cumsum(mass)  # from the upper edge down
    upper = share <= 0.5
    log_median = float(np.interp(0.5, share, np.log(value)))
    return 1 + 0.5 / float(((np.log(value) - log_median) * mass)[upper].sum())
