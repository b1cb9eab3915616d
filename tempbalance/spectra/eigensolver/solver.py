"""All eigenvalues of a batch of Hermitian matrices on a GPU, without waiting for it once.

``torch.linalg.eigvalsh`` on CUDA reads a status back to the host after every call, and before torch
2.12 it loops over the matrices from n = 33 on. Here the whole batch is reduced to tridiagonal form
and all eigenvalues are found by Sturm counts. Two forms of the same algorithm:

* Triton kernels (:mod:`tempbalance.spectra.eigensolver.launch`) for real matrices, where Triton is
  installed and passes a check on the device when first used;
* torch operations (:mod:`tridiagonal`) for all else, from the second batch of a shape
  on replayed as a CUDA graph (:mod:`tempbalance.spectra.cuda_graphs`).

Accuracy is that of LAPACK in the same precision: a few units of rounding of the largest eigenvalue
(in magnitude) of each matrix. A matrix with a value that is not finite gives NaN, itself alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from tempbalance.spectra.cuda_graphs import plans, usable
from tempbalance.spectra.eigensolver import tridiagonal

Form = Literal["auto", "triton", "graph", "torch"]

# Sizes that the library is left for: beyond, a single matrix fills the device.
LARGEST = 1024
# From this release on the library solves batches of any size at once.
BATCHED_LIBRARY = (2, 12)
# "ours", "library" or "auto": overrides :func:`preferred`.
VARIABLE = "TEMPBALANCE_EIGENSOLVER"

# What eigensolver_triton.rows adds to n.
_KERNEL_ROWS = 34
_DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
_log = logging.getLogger("tempbalance")


def preferred(n: int, device_type: str, version: str = torch.__version__) -> bool:
    """Whether :func:`eigvalsh` is to be used rather than ``torch.linalg.eigvalsh``.

    It is on CUDA up to n = :data:`LARGEST` before torch 2.12, where the library loops over the
    matrices from n = 33 on and waits for the device at every size. The environment variable
    ``TEMPBALANCE_EIGENSOLVER``, "ours" or "library", overrides this on CUDA.

    Raises:
        ValueError: for another value of that variable.
    """
    wish = os.environ.get(VARIABLE, "auto")
    if wish not in ("auto", "ours", "library"):
        raise ValueError(f"{VARIABLE} must be 'auto', 'ours' or 'library', got {wish!r}")
    if device_type != "cuda" or wish == "library":
        return False
    return wish == "ours" or (n <= LARGEST and _release(version) < BATCHED_LIBRARY)


def _release(version: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


def workspace_bytes(n: int, dtype: torch.dtype, overwrite: bool = False) -> int:
    """Extra memory of one n x n matrix in :func:`eigvalsh`, besides the matrix itself.

    The copy that is worked in with its panel, half of the matrix while it is copied (not with
    ``overwrite``), and vectors. Besides, for a whole batch, at most 128 MiB of Sturm counts; and
    what graphs keep for later: :data:`cuda_graphs.LIMIT_BYTES` for all together, and
    one more time the largest of these counts.
    """
    rows = max(tridiagonal.work_rows(n), n + _KERNEL_ROWS) + 16
    return dtype.itemsize * n * (rows if overwrite else rows + n)


@torch.no_grad()
def eigvalsh(
    matrices: Tensor, uplo: str = "U", *, overwrite: bool = False, form: Form = "auto"
) -> Tensor:
    """Eigenvalues of Hermitian matrices (..., n, n), ascending: (..., n), real, same precision.

    No operation waits for the device, and a call may be captured in a CUDA graph (it then takes
    the torch form). When Triton's kernels for a range of sizes (to 32, 64, 128, ...) are first
    used in a process they are compiled and checked, and that does wait.

    Args:
        matrices: float32, float64, complex64 or complex128, on any device.
        uplo: the half that is read, ``"U"`` or ``"L"``; the other may hold anything.
        overwrite: allow ``matrices`` to be written to, which saves a copy.
        form: ``"auto"``, or one form for a test: ``"triton"``, ``"graph"`` (both raise where they
            cannot be used) or ``"torch"``.

    Raises:
        ValueError: for a shape or an argument that is none of these.
        TypeError: for another dtype.
        RuntimeError: where the ``form`` asked for cannot run.
    """
    _check(matrices, uplo, form)
    n = matrices.shape[-1]
    if matrices.numel() == 0:
        return matrices.new_zeros(matrices.shape[:-1], dtype=matrices.dtype.to_real())
    flat = matrices.reshape(-1, n, n)
    with _full_precision(matrices):
        values = _batched(flat, uplo, overwrite, form)
    return values.view(matrices.shape[:-1])


def _check(matrices: Tensor, uplo: str, form: str) -> None:
    if matrices.ndim < 2 or matrices.shape[-1] != matrices.shape[-2]:
        raise ValueError(f"matrices must be (..., n, n), got {tuple(matrices.shape)}")
    if matrices.dtype not in _DTYPES:
        raise TypeError(f"matrices must be float32 or float64, real or complex, "
                        f"got {matrices.dtype}: convert them first")  # fmt: skip
    if uplo not in ("U", "L"):
        raise ValueError(f"uplo must be 'U' or 'L', got {uplo!r}")
    if form not in ("auto", "triton", "graph", "torch"):
        raise ValueError(f"form must be 'auto', 'triton', 'graph' or 'torch', got {form!r}")


@contextlib.contextmanager
def _full_precision(matrices: Tensor) -> Iterator[None]:
    """No TF32 and no autocast: either would spoil every product. Float64 knows no TF32."""
    matmul, device_type = torch.backends.cuda.matmul, matrices.device.type
    single = matrices.dtype in (torch.float32, torch.complex64)
    before = matmul.fp32_precision if device_type == "cuda" and single else "ieee"
    try:
        if before != "ieee":
            matmul.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if before != "ieee":
            matmul.fp32_precision = before


# --- scaling, and which form ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Solver:
    """``solve`` (B, rows(n), n), the scaled matrix in the first n rows, -> (B, n)."""

    rows: Callable[[int], int]
    solve: Callable[[Tensor], Tensor]
    graph: bool  # many launches: worth one


def _by_torch(work: Tensor) -> Tensor:
    return tridiagonal.eigenvalues(*tridiagonal.tridiagonalize(work))


def _solver(matrices: Tensor, form: Form) -> _Solver:
    if form in ("auto", "triton"):
        kernels = _kernels(matrices, form)
        if kernels is not None:
            return kernels
    return _Solver(tridiagonal.work_rows, _by_torch, graph=form != "torch")


def _kernels(matrices: Tensor, form: Form) -> _Solver | None:
    """The Triton form; None where it cannot run."""
    batch, n = matrices.shape[:2]
    kernels = None
    if usable(matrices) and not matrices.is_complex() and 1 < n <= LARGEST:
        kernels = _module()
    if kernels is not None:
        shared = kernels.parts(batch, n, matrices.device) > 1
        solver = _Solver(
            kernels.rows, kernels.solve_shared if shared else kernels.solve_alone, shared
        )
        # Each of these is compiled by itself.
        tiles = kernels.tiles(n, matrices.dtype)
        key = (matrices.device, matrices.dtype, tiles, n % 16 == 0, shared)
        with _checking:
            if key not in _verdicts:
                _verdicts[key] = _passes(solver, n, matrices.dtype, matrices.device)
            if _verdicts[key]:
                return solver
    if form == "triton":
        raise RuntimeError("form='triton' needs Triton, and real matrices of at most "
                           f"{LARGEST} x {LARGEST} on a CUDA device outside a graph capture "
                           "(see the log)")  # fmt: skip
    return None


_verdicts: dict[tuple[object, ...], bool] = {}
_checking = threading.Lock()


@functools.cache
def _module() -> ModuleType | None:
    """Triton's kernels; None, said once, where Triton is missing or does not load."""
    try:
        return importlib.import_module("tempbalance.spectra.eigensolver.launch")
    except Exception as error:  # a broken installation must not stop a training run
        _log.warning("eigenvalues are computed without Triton, which is slower: %s", error)
        return None


def _passes(solver: _Solver, n: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a solver finds the known eigenvalues of two dense n x n matrices on the device.

    This compiles its kernels and waits for the result, once for each of them.
    """
    matrices, truth = known(n)
    mode = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    try:
        if mode:
            torch.cuda.set_sync_debug_mode(0)
        work = torch.empty(2, solver.rows(n), n, dtype=dtype, device=device)
        scaling = _load(matrices.to(device, dtype), "U", True, work)
        found = _unscaled(solver.solve(work), *scaling).cpu().double()
        error = float((found - truth).abs().max())  # of a norm of 1
        passed = error <= 16 * (1 + n**0.5) * torch.finfo(dtype).eps
        reason = f"{n} x {n} matrices are off by {error:.1e}"
    except Exception as problem:  # a compiler that fails must not stop a training run
        passed, reason = False, str(problem)
    finally:
        if mode:
            torch.cuda.set_sync_debug_mode(mode)
    if not passed:
        _log.warning("eigenvalues are computed without Triton, which is slower: its kernels fail "
                     "their check on %s in %s (%s)", device, dtype, reason)  # fmt: skip
    return passed


def known(n: int) -> tuple[Tensor, Tensor]:
    """Two dense matrices (2, n, n) and their eigenvalues (2, n), in float64 on the CPU.

    H diag(values) H with the reflector H of a vector without zeros.
    """
    values = torch.linspace(-1, 1, n, dtype=torch.float64, device="cpu")
    values = torch.stack([values, torch.logspace(-4, 0, n, dtype=torch.float64, device="cpu")])
    u = torch.cos(torch.arange(n, dtype=torch.float64, device="cpu"))
    reflector = torch.eye(n, dtype=torch.float64, device="cpu") - 2 * torch.outer(u, u) / (u @ u)
    return (reflector * values.unsqueeze(1)) @ reflector, values


def _batched(matrices: Tensor, uplo: str, overwrite: bool, form: Form) -> Tensor:
    """(B, n, n) -> (B, n)."""
    batch, n = matrices.shape[:2]
    solver = _solver(matrices, form)
    shape = (batch, solver.rows(n), n)
    plan = plans.get(shape, matrices, solver.solve, form == "graph") if solver.graph else None
    if plan is None:
        if form == "graph":
            raise RuntimeError("a CUDA graph cannot be used here (see the log): form='torch' can")
        work = matrices.new_empty(shape)
        scaling = _load(matrices, uplo, overwrite, work)
        return _unscaled(solver.solve(work), *scaling)
    with plan:
        scaling = _load(matrices, uplo, overwrite, plan.work)
        return _unscaled(plan.replay(), *scaling)


def _load(matrices: Tensor, uplo: str, overwrite: bool, work: Tensor) -> tuple[Tensor, Tensor]:
    """Write both halves of each matrix into the first rows of ``work``, scaled to entries near 1.

    Returns the factors (B, 1) that undo the scaling, powers of two, and a mask (B, 1) of the
    matrices that are finite; no operation mixes them with the others.
    """
    n = matrices.shape[-1]
    a = work[:, :n]
    diagonal = matrices.diagonal(dim1=-2, dim2=-1).real.clone()
    if overwrite and uplo == "U":
        upper = matrices.triu_(1)
    else:
        upper = (matrices if uplo == "U" else matrices.mH).triu(1)
    a.copy_(upper.mH).add_(upper)
    a.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    del upper
    parts = torch.view_as_real(a).flatten(-2) if a.is_complex() else a
    top = torch.maximum(parts.amax((-2, -1)), -parts.amin((-2, -1))).double()
    finite = torch.isfinite(top)
    # Both the factor and its inverse must be numbers of this precision.
    limit = 126 if parts.dtype == torch.float32 else 1000
    exponent = torch.floor(torch.log2(top)).clamp(-limit, limit)
    exponent = torch.where(finite & (top > 0), exponent, torch.zeros_like(exponent))
    a.mul_(torch.exp2(-exponent).to(parts.dtype)[:, None, None])
    factor = torch.exp2(exponent) * (top > 0)  # a matrix of zeros has zeros exactly
    return factor.to(parts.dtype).unsqueeze(-1), finite.unsqueeze(-1)


def _unscaled(values: Tensor, factor: Tensor, finite: Tensor) -> Tensor:
    return (values * factor).masked_fill_(~finite, float("nan"))
