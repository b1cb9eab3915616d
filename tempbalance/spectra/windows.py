"""Windows: which submatrices of a weight are measured. Only shapes are decided here.

Legend: R, C sides of a slice turned so that R >= C; h, w sides of a window; Q = w / h the aspect
ratio.

Source: FARMS (Hu, Goel, Killiakov and Yang, ICML 2025, arXiv 2506.06280), section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tempbalance.spectra.grid import Grid, Pool, Windows


def _covering(size: int, window: int, step: int) -> tuple[int, ...]:
    """As few starts as reach both ends with neighbours at most ``step`` apart, evenly spread."""
    return _spread(size, window, math.ceil((size - window) / step) + 1)


def _spread(size: int, window: int, count: int) -> tuple[int, ...]:
    """``count`` distinct starts from 0 to size - window, evenly spread."""
    last = size - window
    count = min(count, last + 1)
    if count == 1:
        return (0,)
    return tuple(i * last // (count - 1) for i in range(count))


def _check(aspect_ratio: float, **counts: int | None) -> None:
    if not (math.isfinite(aspect_ratio) and aspect_ratio > 0):
        raise ValueError(f"aspect_ratio must be a positive number, got {aspect_ratio!r}")
    for name, value in counts.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} must be a positive integer or None, got {value!r}")
    if counts.get("per_dim") is not None and counts.get("stride") is not None:
        raise ValueError("give per_dim or stride, not both")


@dataclass(frozen=True)
class WholeMatrix:
    """No windows: the whole of every slice, all slices pooled (plain TempBalance)."""

    @property
    def pool(self) -> Pool:
        return "spectrum"

    def grid(self, rows: int, cols: int) -> Grid:
        return Grid(max(rows, cols), min(rows, cols), (0,), (0,), transpose=cols > rows)


@dataclass(frozen=True)
class Farms:
    """Fixed-aspect-ratio submatrices (FARMS), so that alpha does not depend on the layer's shape.

    Args:
        aspect_ratio: window columns / window rows, Q.
        rows: window rows; ``None`` takes the largest window that fits each slice. Where a slice
            is smaller, the window shrinks and Q is kept.
        per_dim: window positions along each side, evenly spread; ``None`` (with no ``stride``)
            takes as few as cover the whole matrix.
        stride: the largest distance between neighbouring windows, instead of ``per_dim``. The
            first and the last window always reach the two ends.
        pool: ``"spectrum"`` pools the eigenvalues of all windows into one fit (the paper's
            average ESD); ``"alpha"`` fits each position, all its slices together, and averages.

    A square slice has no longer side: when the window is not square, windows of both its
    orientations are taken, so that a weight and its transpose always read the same.

    Raises:
        ValueError: for a value out of range, or both ``per_dim`` and ``stride``.

    >>> Farms().grid(100, 30)
    Grid(height=30, width=30, row_starts=(0, 23, 46, 70), col_starts=(0,), transpose=False, \
both=False)
    """

    aspect_ratio: float = 1.0
    rows: int | None = None
    per_dim: int | None = None
    stride: int | None = None
    pool: Pool = "spectrum"

    def __post_init__(self) -> None:
        _check(self.aspect_ratio, rows=self.rows, per_dim=self.per_dim, stride=self.stride)
        if self.pool not in ("spectrum", "alpha"):
            raise ValueError(f"pool must be 'spectrum' or 'alpha', got {self.pool!r}")

    def grid(self, rows: int, cols: int) -> Grid:
        long, short = max(rows, cols), min(rows, cols)
        height, width = _fit_window(long, short, self.aspect_ratio, self.rows)
        if self.per_dim is not None:
            row_starts = _spread(long, height, self.per_dim)
            col_starts = _spread(short, width, self.per_dim)
        else:
            row_starts = _covering(long, height, self.stride or height)
            col_starts = _covering(short, width, self.stride or width)
        both = rows == cols and height != width
        return Grid(height, width, row_starts, col_starts, transpose=cols > rows, both=both)

    @staticmethod
    def released_conv(aspect_ratio: float = 1.0) -> Windows:
        """The windows of the released convolution path (HUST-AI-HYZ/FARMS), gaps included.

        floor(R / C) windows down the rows, C rows high for Q <= 1 and C // Q for Q > 1, all at
        column 0, pooled as ``"alpha"``. For Q other than 1 part of the matrix is never read.
        """
        return ReleasedConv(aspect_ratio)

    @staticmethod
    def released_linear(
        rows: int, aspect_ratio: float, per_dim: int | None = None, stride: int | None = None
    ) -> Windows:
        """The windows of the released linear path (HUST-AI-HYZ/FARMS), floor strides included.

        Windows of ``rows`` x int(rows * Q) from the start of each side, either at most ``per_dim``
        of them at a distance of (size - window) // (per_dim - 1), or one every ``stride``; the
        last rows and columns may be left out. Where a side is smaller the window shrinks with Q
        kept (the released code cuts it short instead and changes Q).
        """
        return ReleasedLinear(rows, aspect_ratio, per_dim, stride)


def _fit_window(long: int, short: int, q: float, rows: int | None) -> tuple[int, int]:
    """The largest h x w with w = Q h inside long x short, not higher than ``rows``."""
    height = min(float(long), short / q, float(rows) if rows is not None else math.inf)
    # The tolerance keeps 3 / (3 / 7) from rounding down to a window of 6.
    h = max(1, math.floor(height + 1e-9))
    w = max(1, min(short, math.floor(height * q + 1e-9)))
    return h, w


@dataclass(frozen=True)
class ReleasedConv:
    """See :meth:`Farms.released_conv`."""

    aspect_ratio: float = 1.0

    def __post_init__(self) -> None:
        _check(self.aspect_ratio)

    @property
    def pool(self) -> Pool:
        return "alpha"

    def grid(self, rows: int, cols: int) -> Grid:
        long, short = max(rows, cols), min(rows, cols)
        q = self.aspect_ratio
        height, width = (int(short // q), short) if q > 1 else (short, int(short // (1 / q)))
        height, width = max(1, height), max(1, width)
        row_starts = tuple(i * height for i in range(long // short))
        return Grid(height, width, row_starts, (0,), transpose=cols > rows)


@dataclass(frozen=True)
class ReleasedLinear:
    """See :meth:`Farms.released_linear`."""

    rows: int
    aspect_ratio: float
    per_dim: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        _check(self.aspect_ratio, rows=self.rows, per_dim=self.per_dim, stride=self.stride)
        if self.per_dim is None and self.stride is None:
            raise ValueError("give per_dim (windows along each side) or stride")

    @property
    def pool(self) -> Pool:
        return "spectrum"

    def grid(self, rows: int, cols: int) -> Grid:
        # The released code does not turn a linear weight.
        q = self.aspect_ratio
        height = min(self.rows, rows, int(cols / q + 1e-9))
        height, width = max(1, height), max(1, int(height * q))
        return Grid(height, width, self._starts(rows, height), self._starts(cols, width))

    def _starts(self, size: int, window: int) -> tuple[int, ...]:
        step, most = self.stride, size
        if self.per_dim is not None:
            step, most = max(1, (size - window) // max(1, self.per_dim - 1)), self.per_dim
        assert step is not None
        return tuple(range(0, size - window + 1, step))[:most]
