# ruff: noqa: N803  (compile-time arguments are capitals)
# mypy: ignore-errors
"""Triton kernels for the eigenvalues of a batch of real symmetric matrices.

The reduction to tridiagonal form is blocked as LAPACK's ``latrd``: a column reads the trailing
matrix once, and the updates of a panel of columns are made together. A program does a whole matrix.
All eigenvalues then come from bisection with Sturm counts, a lane each.

Within a program what one thread writes to memory another one reads, with a barrier between.

Only long-standing features of Triton are used, and no matrix products that could round to TF32.

Legend: ``work`` (B, n + 2 PANEL + 1, n), the matrices and below each its panel: rows v, rows w,
and a row for A v. ROWS x COLS entries are a tile; CHUNK rows of a panel are read at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

# --- pieces of the reduction ---------------------------------------------------------------------


@triton.jit
def _finish(v, w, p, done, start, n, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """w of the last of ``done`` columns of a panel, from A v in ``p``; it begins at ``start``."""
    i = tl.arange(0, BLOCK)
    here = (i >= start) & (i < n)
    x = tl.load(v + (done - 1) * n + i, mask=here, other=0.0)
    y = tl.load(p + i, mask=here, other=0.0)
    for first in range(0, done - 1, CHUNK):
        k = first + tl.arange(0, CHUNK)
        before = (k[:, None] < done - 1) & here[None, :]
        vs = tl.load(v + k[:, None] * n + i[None, :], mask=before, other=0.0)
        ws = tl.load(w + k[:, None] * n + i[None, :], mask=before, other=0.0)
        on_v = tl.sum(vs * x[None, :], axis=1)
        on_w = tl.sum(ws * x[None, :], axis=1)
        y -= tl.sum(vs * on_w[:, None] + ws * on_v[:, None], axis=0)
    y -= (0.5 * tl.sum(x * y, axis=0)) * x
    tl.store(w + (done - 1) * n + i, y, mask=here)


@triton.jit
def _reflect(
    a, d, e2, v, w, j, done, n, BLOCK: tl.constexpr, CHUNK: tl.constexpr, NEGLIGIBLE: tl.constexpr
):
    """v of column j, with the updates of the panel's ``done`` columns; d and e2 of the column."""
    i = tl.arange(0, BLOCK)
    here = (i >= j) & (i < n)
    x = tl.load(a + j * n + i, mask=here, other=0.0)
    for first in range(0, done, CHUNK):
        k = first + tl.arange(0, CHUNK)
        before = (k[:, None] < done) & here[None, :]
        vs = tl.load(v + k[:, None] * n + i[None, :], mask=before, other=0.0)
        ws = tl.load(w + k[:, None] * n + i[None, :], mask=before, other=0.0)
        vj = tl.load(v + k * n + j, mask=k < done, other=0.0)
        wj = tl.load(w + k * n + j, mask=k < done, other=0.0)
        x -= tl.sum(vs * wj[:, None] + ws * vj[:, None], axis=0)
    tl.store(d + i, x, mask=i == j)
    x = tl.where(i > j, x, 0.0)
    square = tl.sum(x * x, axis=0)
    tl.store(e2 + j, square)
    # A handful of scalars in float64: a reflector is orthogonal as far as |v|^2 is 2.
    head = tl.sum(tl.where(i == j + 1, x, 0.0), axis=0).to(tl.float64)
    norm = tl.sqrt(square.to(tl.float64))
    some = norm > NEGLIGIBLE
    signed = tl.where(head < 0, -norm, norm)
    head += signed
    inverse = tl.where(some, 1.0, 0.0) / tl.sqrt(tl.where(some, signed * head, 1.0))
    first_entry = (head * inverse).to(x.dtype)
    x = tl.where(i == j + 1, first_entry, x * inverse.to(x.dtype))
    tl.store(v + done * n + i, x, mask=i < n)


@triton.jit
def _multiply(a, x, p, j, n, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A x below row j into ``p``."""
    begin = (j + 1) // COLS * COLS  # x is zero up to j
    for r in range((j + 1) // ROWS * ROWS, n, ROWS):
        row = r + tl.arange(0, ROWS)
        total = tl.zeros((ROWS, COLS), dtype=a.dtype.element_ty)
        for c in range(begin, n, COLS):
            col = c + tl.arange(0, COLS)
            inside = (row[:, None] < n) & (col[None, :] < n)
            tile = tl.load(a + row[:, None] * n + col[None, :], mask=inside, other=0.0)
            total += tile * tl.load(x + col, mask=col < n, other=0.0)[None, :]
        tl.store(p + row, tl.sum(total, axis=1), mask=(row > j) & (row < n))


@triton.jit
def _update(a, v, w, begin, done, n, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A - v w^T - w v^T for the ``done`` columns of a panel, from row ``begin`` on."""
    for r in range(begin // ROWS * ROWS, n, ROWS):
        row = r + tl.arange(0, ROWS)
        row_in = (row >= begin) & (row < n)
        for c in range(begin // COLS * COLS, n, COLS):
            col = c + tl.arange(0, COLS)
            col_in = (col >= begin) & (col < n)
            inside = row_in[:, None] & col_in[None, :]
            place = a + row[:, None] * n + col[None, :]
            tile = tl.load(place, mask=inside, other=0.0)
            for k in range(done):
                v_row = tl.load(v + k * n + row, mask=row_in, other=0.0)
                w_row = tl.load(w + k * n + row, mask=row_in, other=0.0)
                v_col = tl.load(v + k * n + col, mask=col_in, other=0.0)
                w_col = tl.load(w + k * n + col, mask=col_in, other=0.0)
                tile -= v_row[:, None] * w_col[None, :] + w_row[:, None] * v_col[None, :]
            tl.store(place, tile, mask=inside)


# --- kernels -------------------------------------------------------------------------------------


@triton.jit
def reduction_kernel(
    work, d, e2, n,
    PANEL: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    CHUNK: tl.constexpr, NEGLIGIBLE: tl.constexpr,
):  # fmt: skip
    """All columns of a matrix but the last two, a program a matrix."""
    b = tl.program_id(0).to(tl.int64)
    a = work + b * n * (n + 2 * PANEL + 1)
    v = a + n * n
    w = v + PANEL * n
    p = w + PANEL * n
    d += b * n
    e2 += b * (n - 1)
    for j in range(n - 1):
        if j > 0:
            done = (j - 1) % PANEL + 1
            _finish(v, w, p, done, j, n, BLOCK, CHUNK)
            tl.debug_barrier()
            if (done == PANEL) | (j == n - 2):
                _update(a, v, w, j, done, n, ROWS, COLS)
                tl.debug_barrier()
        if j < n - 2:
            done = j % PANEL
            _reflect(a, d, e2, v, w, j, done, n, BLOCK, CHUNK, NEGLIGIBLE)
            tl.debug_barrier()
            _multiply(a, v + done * n, p, j, n, ROWS, COLS)
            tl.debug_barrier()


@triton.jit
def _pivot(d, e2, x, q, PIVOT: tl.constexpr):
    """The next pivot of T - x I, kept away from zero."""
    q = (d - x) - e2 / q
    return tl.where(tl.abs(q) < PIVOT, -PIVOT, q)


@triton.jit(do_not_specialize=["half"])
def sturm_kernel(
    d, e2, low, high, out, n, half,
    STEPS: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, PIVOT: tl.constexpr,
):  # fmt: skip
    """Bisection, an eigenvalue a lane, the pivots from both ends to the middle at once.

    d (B, 2 half + 1), and e2 (B, 2 half + 2) with a zero in front and behind.
    """
    b = tl.program_id(0).to(tl.int64)
    d += b * (2 * half + 1)
    e2 += b * (2 * half + 2)
    d_end = d + 2 * half
    e2_end = e2 + 2 * half + 1
    which = tl.program_id(1) * LANES + tl.arange(0, LANES)
    zero = tl.zeros((LANES,), dtype=d.dtype.element_ty)
    bottom = tl.load(low + b) + zero
    top = tl.load(high + b) + zero
    for _ in range(STEPS):
        x = bottom + 0.5 * (top - bottom)
        q = zero + 1.0
        r = zero + 1.0
        below = tl.zeros((LANES,), dtype=tl.int32)
        for s in range(0, half, UNROLL):
            for u in tl.static_range(UNROLL):
                q = _pivot(tl.load(d + s + u), tl.load(e2 + s + u), x, q, PIVOT)
                r = _pivot(tl.load(d_end - s - u), tl.load(e2_end - s - u), x, r, PIVOT)
                below += (q < 0).to(tl.int32) + (r < 0).to(tl.int32)
        q = _pivot(tl.load(d + half), tl.load(e2 + half), x, q, PIVOT)
        below += (q - tl.load(e2 + half + 1) / r < 0).to(tl.int32)
        left = below <= which
        bottom = tl.where(left, x, bottom)
        top = tl.where(left, top, x)
    tl.store(out + b * n + which, bottom + 0.5 * (top - bottom), mask=which < n)
