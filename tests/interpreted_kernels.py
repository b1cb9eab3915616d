"""Run by test_eigensolver_triton.py in a process of its own, where Triton interprets kernels."""

from __future__ import annotations

import matrices
import numpy as np
import torch
from torch import Tensor

from tempbalance.spectra.eigensolver import launch


def reduction() -> None:
    """One panel and several, blocks of rows and columns that do not come out even."""
    small = launch.Tiles(block=32, rows=8, cols=16, chunk=4, warps=1)
    usual = launch.tiles
    for n, dtype, some, sizes in (
        (2, torch.float32, [0, 2], None),
        (3, torch.float32, [0, 12, 18], None),
        (18, torch.float32, [2], None),
        (21, torch.float64, [10], small),
    ):
        launch.tiles = (lambda *_, sizes=sizes: sizes) if sizes else usual
        batch = matrices.every_family(n, dtype)[some]
        work, factor, finite = launch.load(batch)
        assert finite.all()
        work[:, n:] = float("nan")  # scratch
        d, e2 = launch.tridiagonalize(work)
        e = e2.sqrt()
        dense = torch.diag_embed(d) + torch.diag_embed(e, 1) + torch.diag_embed(e, -1)
        check(batch, torch.linalg.eigvalsh(dense.double()).to(dtype) * factor)
    launch.tiles = usual


def bisection() -> None:
    """The whole of it, on few and small matrices: an interpreted lane is slow."""
    for n, dtype, some in ((1, torch.float32, [6]), (2, torch.float64, [6, 7]),
                           (17, torch.float32, [6])):  # fmt: skip
        batch = matrices.every_family(n, dtype)[some]
        batch = torch.cat([batch, torch.full_like(batch[:1], float("nan"))])
        before = batch.clone()
        found = launch.solve(batch)
        assert torch.equal(batch[:-1], before[:-1])  # the library may have to solve it yet
        assert found[-1].isnan().all() and (found[:-1].diff(dim=-1) >= 0).all()
        check(batch[:-1], found[:-1])


def tridiagonal() -> None:
    """Zero and tiny couplings, equal diagonals and clusters: the worst for a Sturm count."""
    rng = np.random.default_rng(0)
    entries = [0.0, 1.0, -1.0, 0.5, 1e-20, 1e-38]
    d = torch.from_numpy(rng.choice([*entries, *rng.uniform(-1, 1, 4)], (2, 13))).float()
    e = torch.from_numpy(rng.choice([*entries, *rng.uniform(-1, 1, 2)], (2, 12))).float()
    dense = torch.diag_embed(d) + torch.diag_embed(e, 1) + torch.diag_embed(e, -1)
    check(dense, launch.bisect(d, e * e))


def check(batch: Tensor, found: Tensor) -> None:
    truth = matrices.exact(batch)
    error = np.abs(found.double().numpy() - truth)
    allowed = matrices.tolerance(batch, truth) + np.finfo(np.float32).tiny
    assert (error <= allowed).all(), (batch.shape, batch.dtype, (error / allowed).max(-1))


if __name__ == "__main__":
    reduction()
    bisection()
    tridiagonal()
