"""Launches the Triton kernels: sizes, scaling, and one program a matrix.

Importing this module needs Triton.

Sources: Golub and Van Loan, Matrix Computations, 4th ed., section 8.3.1 (reduction) and 8.4.2
(Sturm counts); Dhillon, PhD thesis, Berkeley 1997 (counts from both ends, the twisted
factorization); Demmel, Dhillon and Ren, ETNA 3 (1995), 116-149 (bisection in IEEE arithmetic).

Legend: B matrices of n x n; ``d`` (B, n) the diagonal and ``e2`` (B, n - 1) the squared magnitudes
of what is beside it. All entries are scaled so that the largest of a matrix is about 1.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from tempbalance.spectra.eigensolver.kernels import reduction_kernel, sturm_kernel

# Columns of a panel.
PANEL = 16
# Steps of the Sturm recurrence whose entries are loaded together, and eigenvalues of a program.
UNROLL = 8
LANES = 64
# A column of less than this share of the largest entry is zero: far below rounding, and far above
# where the squares underflow (a reflector from such a norm would not be orthogonal).
NEGLIGIBLE = {torch.float32: 2.0**-50, torch.float64: 2.0**-150}
# Halvings of the Gershgorin interval that leave less than rounding: its width is at most six times
# the norm.
STEPS = {torch.float32: 28, torch.float64: 57}


@torch.no_grad()
def solve(matrices: Tensor) -> Tensor:
    """Eigenvalues (B, n), ascending, of symmetric matrices (B, n, n), both halves filled.

    The memory besides: a copy of the matrices with 33 rows more each, and vectors.
    """
    with torch.cuda.device(matrices.device) if matrices.is_cuda else contextlib.nullcontext():
        work, factor, finite = load(matrices)
        values = bisect(*tridiagonalize(work))
        return (values * factor).masked_fill_(~finite, float("nan"))


def load(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The matrices at the head of a buffer (B, n + 2 PANEL + 1, n), scaled to entries near 1.

    With the factors (B, 1) that undo the scaling, powers of two, and a mask (B, 1) of the matrices
    that are finite; no operation mixes them with the others.
    """
    batch, n = matrices.shape[:2]
    work = matrices.new_empty(batch, n + 2 * PANEL + 1, n)
    top = torch.maximum(matrices.amax((-2, -1)), -matrices.amin((-2, -1))).double()
    finite = torch.isfinite(top)
    # Both the factor and its inverse must be numbers of this precision.
    limit = 126 if matrices.dtype == torch.float32 else 1000
    exponent = torch.floor(torch.log2(top)).clamp(-limit, limit)
    exponent = torch.where(finite & (top > 0), exponent, torch.zeros_like(exponent))
    scale = torch.exp2(-exponent).to(matrices.dtype)
    torch.mul(matrices, scale[:, None, None], out=work[:, :n])
    factor = torch.exp2(exponent) * (top > 0)  # a matrix of zeros has zeros exactly
    return work, factor.to(matrices.dtype).unsqueeze(-1), finite.unsqueeze(-1)


@dataclass(frozen=True)
class Tiles:
    """Compile-time sizes of the reduction for matrices up to ``block``."""

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
    """How the reduction is compiled: nothing is loaded ahead of a barrier."""
    fixed = {"num_warps": sizes.warps, "num_stages": 1}
    # Two programs of eight warps then fit a multiprocessor.
    return {**fixed, "maxnreg": 128} if sizes.warps == 8 else fixed


def tridiagonalize(work: Tensor) -> tuple[Tensor, Tensor]:
    """Reduce a batch: d (B, n) and e2 (B, n - 1). ``work`` is overwritten."""
    batch, _, n = work.shape
    d = work.new_empty(batch, n)
    e2 = work.new_empty(batch, n - 1)
    sizes = tiles(n, work.dtype)
    if n > 2:
        reduction_kernel[(batch,)](
            work, d, e2, n,
            PANEL=PANEL, BLOCK=sizes.block, ROWS=sizes.rows, COLS=sizes.cols, CHUNK=sizes.chunk,
            NEGLIGIBLE=NEGLIGIBLE[work.dtype], **options(sizes),
        )  # fmt: skip
    tail = max(0, n - 2)
    d[:, tail:] = work[:, tail:n, tail:].diagonal(dim1=-2, dim2=-1)
    if n > 1:
        e2[:, -1] = work[:, n - 2, n - 1] ** 2
    return d, e2


def bisect(d: Tensor, e2: Tensor) -> Tensor:
    """All eigenvalues of the tridiagonal matrices, ascending: (B, n)."""
    batch, n = d.shape
    low, high = bounds(d, e2)
    half = triton.cdiv(n // 2, UNROLL) * UNROLL
    padding = 2 * half + 1 - n
    out = torch.empty_like(d)
    sturm_kernel[(batch, triton.cdiv(n, LANES))](
        F.pad(d, (0, padding), value=2.0**40),  # above every shift: never counted
        F.pad(e2, (1, padding + 1)), low, high, out, n, half,
        STEPS=STEPS[d.dtype], LANES=LANES, UNROLL=UNROLL,
        # No pivot is then 0 / 0, and no eigenvalue moves by its rounding.
        PIVOT=NEGLIGIBLE[d.dtype] ** 2, num_warps=LANES // 32, num_stages=1,
    )  # fmt: skip
    return torch.cummax(out, -1).values


def bounds(d: Tensor, e2: Tensor) -> tuple[Tensor, Tensor]:
    """Gershgorin's interval of each matrix, widened by rounding: two of (B, 1)."""
    e = F.pad(e2.sqrt(), (1, 1))
    radius = e[:, 1:] + e[:, :-1]
    low = (d - radius).amin(-1, keepdim=True)
    high = (d + radius).amax(-1, keepdim=True)
    size = torch.maximum(low.abs(), high.abs())
    margin = size * (4 * torch.finfo(d.dtype).eps) + NEGLIGIBLE[d.dtype]
    return low - margin, high + margin
