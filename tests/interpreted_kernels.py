"""Run by test_eigensolver_triton.py in a process of its own, where Triton interprets kernels."""

from __future__ import annotations

import sys

import matrices
import numpy as np
import torch
from torch import Tensor

from tempbalance.spectra.eigensolver import launch as kernels
from tempbalance.spectra.eigensolver import solver as eigensolver
from tempbalance.spectra.eigensolver import tridiagonal


def loaded(batch: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A work buffer with nothing but the matrices in it, and their scaling."""
    n = batch.shape[-1]
    work = torch.full((len(batch), kernels.rows(n), n), float("nan"), dtype=batch.dtype)
    return work, eigensolver._load(batch, "U", False, work)


def reduction() -> None:
    """Both forms, one panel and several, blocks of rows and columns that do not come out even."""
    small = kernels.Tiles(block=32, rows=8, cols=16, chunk=4, warps=1)
    for n, dtype, shared, some, sizes in (
        (2, torch.float32, 1, [0, 2], None),
        (3, torch.float32, 1, [0, 12, 18], None),
        (18, torch.float32, 1, [2], None),
        (21, torch.float64, 1, [10], small),
        (20, torch.float32, 2, [0], small),
    ):
        kernels.tiles = (lambda *_, sizes=sizes: sizes) if sizes else usual
        batch = matrices.every_family(n, dtype)[some]
        work, scaling = loaded(batch)
        values = tridiagonal.eigenvalues(*kernels.tridiagonalize(work, shared))
        check(batch, eigensolver._unscaled(values, *scaling))


usual = kernels.tiles


def bisection() -> None:
    """The whole of it, on few and small matrices: an interpreted lane is slow."""
    for n, dtype in ((1, torch.float32), (2, torch.float64), (17, torch.float32)):
        batch = (
            matrices.every_family(n, dtype)[6:8] if n < 9 else matrices.every_family(n, dtype)[6:7]
        )
        work, scaling = loaded(batch)
        values = kernels.bisect(*kernels.tridiagonalize(work))
        check(batch, eigensolver._unscaled(values, *scaling))


def check(batch: Tensor, found: Tensor) -> None:
    truth = matrices.exact(batch)
    error = np.abs(found.double().numpy() - truth)
    allowed = matrices.tolerance(batch, truth) + np.finfo(np.float32).tiny
    assert (error <= allowed).all(), (batch.shape, batch.dtype, (error / allowed).max(-1))


if __name__ == "__main__":
    {"reduction": reduction, "bisection": bisection}[sys.argv[1]]()
