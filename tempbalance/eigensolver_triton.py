"""Triton kernels for the eigenvalues of a batch of real symmetric matrices.

The reduction to tridiagonal form is blocked as in :mod:`tempbalance.tridiagonal`: a column reads
the trailing matrix once, and the updates of a panel of columns are made together. Either one
program does a whole matrix, or, where there are fewer matrices than multiprocessors, several
programs share one, and a launch does one column: the launches order what the programs exchange (no
program ever waits for another, so nothing can hang). All eigenvalues then come from bisection with
Sturm counts, a lane each.

Within a program what one thread writes to memory another one reads, with a barrier between. Programs
that share a matrix compute the vectors of a panel each for itself, the same bits at the same place.

Importing this module needs Triton. Only its long-standing features are used.

Legend: ``work`` (B, rows(n), n), the matrices and below each its panel: v, w and two rows for A v.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tempbalance import tridiagonal

PANEL = 16
LARGEST = 1024
# Steps of the Sturm recurrence whose entries are loaded together, and eigenvalues of a program.
_UNROLL = 8
_LANES = 64
# Matrices smaller than this are not shared among programs: a column is too little work.
_SHARED = 384


def rows(n: int) -> int:
    """Rows of the buffer for n x n."""
    return n + 2 * PANEL + 2


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
def _multiply(a, x, p, j, n, part, parts, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A x below row j into ``p``: every ``parts``-th block of rows, from block ``part`` on."""
    begin = (j + 1) // COLS * COLS  # x is zero up to j
    for r in range((j + 1) // ROWS * ROWS + part * ROWS, n, parts * ROWS):
        row = r + tl.arange(0, ROWS)
        total = tl.zeros((ROWS, COLS), dtype=a.dtype.element_ty)
        for c in range(begin, n, COLS):
            col = c + tl.arange(0, COLS)
            inside = (row[:, None] < n) & (col[None, :] < n)
            tile = tl.load(a + row[:, None] * n + col[None, :], mask=inside, other=0.0)
            total += tile * tl.load(x + col, mask=col < n, other=0.0)[None, :]
        tl.store(p + row, tl.sum(total, axis=1), mask=(row > j) & (row < n))


@triton.jit
def _update(a, v, w, begin, done, n, part, parts, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A - v w^T - w v^T for the ``done`` columns of a panel, from row ``begin`` on."""
    for r in range(begin // ROWS * ROWS + part * ROWS, n, parts * ROWS):
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
def whole_kernel(
    work, d, e2, n,
    PANEL: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    CHUNK: tl.constexpr, NEGLIGIBLE: tl.constexpr,
):  # fmt: skip
    """A program a matrix: all columns but the last two."""
    b = tl.program_id(0).to(tl.int64)
    a = work + b * n * (n + 2 * PANEL + 2)
    v = a + n * n
    w = v + PANEL * n
    p = w + PANEL * n
    d += b * n
    e2 += b * (n - 1)
    for j in range(0, n - 1):
        if j > 0:
            done = (j - 1) % PANEL + 1
            _finish(v, w, p, done, j, n, BLOCK, CHUNK)
            tl.debug_barrier()
            if (done == PANEL) | (j == n - 2):
                _update(a, v, w, j, done, n, 0, 1, ROWS, COLS)
                tl.debug_barrier()
        if j < n - 2:
            done = j % PANEL
            _reflect(a, d, e2, v, w, j, done, n, BLOCK, CHUNK, NEGLIGIBLE)
            tl.debug_barrier()
            _multiply(a, v + done * n, p, j, n, 0, 1, ROWS, COLS)
            tl.debug_barrier()


@triton.jit(do_not_specialize=["j"])
def column_kernel(
    work, d, e2, j, n,
    PANEL: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    CHUNK: tl.constexpr, NEGLIGIBLE: tl.constexpr,
):  # fmt: skip
    """Column j of every matrix, shared by the programs along the second axis.

    A v goes to one of two rows in turn: a slower program may still be reading the other.
    """
    b = tl.program_id(0).to(tl.int64)
    a = work + b * n * (n + 2 * PANEL + 2)
    v = a + n * n
    w = v + PANEL * n
    p = w + PANEL * n
    done = j % PANEL
    if done > 0:
        _finish(v, w, p + (j + 1) % 2 * n, done, j, n, BLOCK, CHUNK)
        tl.debug_barrier()
    _reflect(a, d + b * n, e2 + b * (n - 1), v, w, j, done, n, BLOCK, CHUNK, NEGLIGIBLE)
    tl.debug_barrier()
    _multiply(
        a, v + done * n, p + j % 2 * n, j, n, tl.program_id(1), tl.num_programs(1), ROWS, COLS
    )


@triton.jit(do_not_specialize=["j"])
def panel_kernel(
    work, j, n,
    PANEL: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The updates of the panel that ends with column j, shared in the same way."""
    b = tl.program_id(0).to(tl.int64)
    a = work + b * n * (n + 2 * PANEL + 2)
    v = a + n * n
    w = v + PANEL * n
    p = w + PANEL * n
    done = j % PANEL + 1
    _finish(v, w, p + j % 2 * n, done, j + 1, n, BLOCK, CHUNK)
    tl.debug_barrier()
    _update(a, v, w, j + 1, done, n, tl.program_id(1), tl.num_programs(1), ROWS, COLS)


@triton.jit
def _pivot(d, e2, x, q, PIVOT: tl.constexpr):
    """The next pivot of T - x I, kept away from zero."""
    q = (d - x) - e2 / q
    return tl.where(tl.abs(q) < PIVOT, -PIVOT, q)


@triton.jit
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


# --- launches ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiles:
    """Compile-time sizes of the reduction's kernels for matrices up to ``block``."""

    block: int
    rows: int
    cols: int
    chunk: int
    warps: int


def tiles(n: int, dtype: torch.dtype) -> Tiles:
    """The sizes for n x n: few, so that few kernels are compiled.

    A thread holds 32 entries of a tile in float32, 16 in float64, so that two programs of eight
    warps fit a multiprocessor.
    """
    block = max(32, triton.next_power_of_2(n))
    warps = min(8, block // 32)
    cols = min(128, block)
    each = 32 * 4 // dtype.itemsize
    return Tiles(block, each * 32 * warps // cols, cols, min(8, each * 128 // block), warps)


def options(sizes: Tiles) -> dict[str, int]:
    """How the reduction's kernels are compiled: nothing is loaded ahead of a barrier."""
    fixed = {"num_warps": sizes.warps, "num_stages": 1}
    # Two programs of eight warps then fit a multiprocessor.
    return {**fixed, "maxnreg": 128} if sizes.warps == 8 else fixed


def parts(batch: int, n: int, device: torch.device) -> int:
    """Programs that share a matrix; 1: one program does it all in one launch."""
    if n < _SHARED:
        return 1
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(count // batch, triton.cdiv(n, 64)))


def solve_alone(work: Tensor) -> Tensor:
    """``work`` (B, rows(n), n), the matrix in the first n rows, entries near 1, -> (B, n)."""
    with torch.cuda.device(work.device):
        return bisect(*tridiagonalize(work))


def solve_shared(work: Tensor) -> Tensor:
    """The same with several programs a matrix: a launch a column."""
    with torch.cuda.device(work.device):
        return bisect(*tridiagonalize(work, max(2, parts(*work.shape[::2], work.device))))


def tridiagonalize(work: Tensor, shared: int = 1) -> tuple[Tensor, Tensor]:
    """Reduce a batch: d (B, n) and e2 (B, n - 1). ``work`` is overwritten."""
    batch, _, n = work.shape
    d = work.new_empty(batch, n)
    e2 = work.new_empty(batch, n - 1)
    sizes = tiles(n, work.dtype)
    limit = tridiagonal.NEGLIGIBLE[work.dtype]
    fixed = {"PANEL": PANEL, "BLOCK": sizes.block, "ROWS": sizes.rows, "COLS": sizes.cols,
             "CHUNK": sizes.chunk, **options(sizes)}  # fmt: skip
    if shared == 1 and n > 2:
        whole_kernel[(batch,)](work, d, e2, n, NEGLIGIBLE=limit, **fixed)
    else:
        for j in range(n - 2):
            column_kernel[(batch, shared)](work, d, e2, j, n, NEGLIGIBLE=limit, **fixed)
            if j % PANEL == PANEL - 1 or j == n - 3:
                panel_kernel[(batch, shared)](work, j, n, **fixed)
    tail = max(0, n - 2)
    d[:, tail:] = work[:, tail:n, tail:].diagonal(dim1=-2, dim2=-1)
    if n > 1:
        e2[:, -1] = work[:, n - 2, n - 1] ** 2
    return d, e2


def bisect(d: Tensor, e2: Tensor) -> Tensor:
    """All eigenvalues of the tridiagonal matrices, ascending: (B, n)."""
    batch, n = d.shape
    low, high = tridiagonal.bounds(d, e2)
    half = triton.cdiv(n // 2, _UNROLL) * _UNROLL
    padding = 2 * half + 1 - n
    out = torch.empty_like(d)
    sturm_kernel[(batch, triton.cdiv(n, _LANES))](
        F.pad(d, (0, padding), value=2.0**40),  # above every shift: never counted
        F.pad(e2, (1, padding + 1)), low, high, out, n, half,
        STEPS=tridiagonal.iterations(d.dtype), LANES=_LANES, UNROLL=_UNROLL,
        PIVOT=tridiagonal.least_coupling(d.dtype), num_warps=_LANES // 32, num_stages=1,
    )  # fmt: skip
    return torch.cummax(out, -1).values
