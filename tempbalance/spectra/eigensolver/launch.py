"""Launches the Triton kernels for eigenvalues: sizes, and how many programs share a matrix.

Importing this module needs Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from tempbalance.spectra.eigensolver import tridiagonal
from tempbalance.spectra.eigensolver.kernels import (
    column_kernel,
    panel_kernel,
    sturm_kernel,
    whole_kernel,
)

# Columns of a panel.
PANEL = 16
# Steps of the Sturm recurrence whose entries are loaded together, and eigenvalues of a program.
UNROLL = 8
LANES = 64
# Matrices smaller than this are not shared among programs: a column is too little work.
SHARED = 384


def rows(n: int) -> int:
    """Rows of the buffer for n x n."""
    return n + 2 * PANEL + 2


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
    if n < SHARED:
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
        shared = parts(work.shape[0], work.shape[-1], work.device)
        return bisect(*tridiagonalize(work, max(2, shared)))


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
    half = triton.cdiv(n // 2, UNROLL) * UNROLL
    padding = 2 * half + 1 - n
    out = torch.empty_like(d)
    sturm_kernel[(batch, triton.cdiv(n, LANES))](
        F.pad(d, (0, padding), value=2.0**40),  # above every shift: never counted
        F.pad(e2, (1, padding + 1)), low, high, out, n, half,
        STEPS=tridiagonal.iterations(d.dtype), LANES=LANES, UNROLL=UNROLL,
        PIVOT=tridiagonal.least_coupling(d.dtype), num_warps=LANES // 32, num_stages=1,
    )  # fmt: skip
    return torch.cummax(out, -1).values
