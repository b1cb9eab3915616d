"""Gram matrices of windows, and the eigenvalues of those.

A Gram matrix of the shorter side costs less than half of an SVD. A float32 one loses what is small
against the largest eigenvalue (up to 6e-8 of it); :mod:`tempbalance.spectra.spectrum` sees to that.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tempbalance.spectra.batches import LARGE, Batch, converted

try:  # our own kernels, on request: without their folder the library does all
    from tempbalance.spectra.eigensolver import solver as kernels
except ImportError:
    kernels = None  # type: ignore[assignment]

# From this release on the library solves a batch on CUDA at once; before it loops over matrices of
# more than 32 rows.
BATCHED_LIBRARY = (2, 12)
# From this size on half of the Gram matrix is worth not computing, in strips of so many rows.
_HALVED = 192
_STRIP = 64


def worth_a_gpu(version: str = torch.__version__) -> bool:
    """Whether CUDA finds the eigenvalues of many matrices at once, rather than one after another.

    One after another the pool of CPU threads is faster: docs/speed.md has the reckoning.
    """
    major, minor = re.findall(r"\d+", version)[:2]
    return (int(major), int(minor)) >= BATCHED_LIBRARY or (
        kernels is not None and kernels.requested()
    )


def eigenvalues(windows: Tensor, wide: bool = False) -> Tensor:
    """(B, h, w) -> (B, min(h, w)) eigenvalues of the Gram matrix of the shorter side, ascending.

    NaN for a window whose eigenvalues do not converge. With ``wide`` products are in float64.
    """
    a = tall(windows)  # (B, n, k), n >= k
    del windows
    if a.is_cuda and a.is_complex():
        # The library's batched complex64 eigensolvers have an open defect (pytorch#192483).
        a = a.to(torch.complex128)
    gram = _wide_gram(a) if wide else _half_gram(a)
    del a  # a caller that keeps no windows has their memory for the solver
    return solve(gram)


def tall(windows: Tensor) -> Tensor:
    """Windows (..., h, w) turned so that rows are not fewer than columns."""
    return windows if windows.shape[-2] >= windows.shape[-1] else windows.mH


def solve(gram: Tensor) -> Tensor:
    """Eigenvalues (B, k) of matrices (B, k, k) of which, on a CPU, the lower half is read.

    NaN for a matrix whose eigenvalues do not converge.
    """
    found = None if kernels is None else kernels.eigvalsh(gram)
    if found is not None:
        return found
    # Not numpy's LAPACK: alone it is faster in double precision, but it brings threads of its own,
    # which no pool can pin; from two workers it is many times slower, and its last digits depend
    # on the number of cores.
    # LAPACK stores by columns: the transpose, which has the same eigenvalues, is copied in memory
    # order, and the upper half of it is what LAPACK reduces fastest.
    by_columns = gram.mT
    with contextlib.suppress(torch.linalg.LinAlgError):
        return torch.linalg.eigvalsh(by_columns, UPLO="U")
    rows = []
    for matrix in by_columns:
        try:
            rows.append(torch.linalg.eigvalsh(matrix, UPLO="U"))
        except torch.linalg.LinAlgError:
            rows.append(matrix.abs().new_full(matrix.shape[:1], float("nan")))
    return torch.stack(rows)


def settled(values: Tensor) -> Tensor:
    """Ascending eigenvalues (..., k) with rounding around zero settled, by their precision."""
    top = values[..., -1:].clamp_min(0.0)
    if values.dtype != torch.float64:
        return torch.maximum(values, top * 1e-9)
    floor = top * (values.shape[-1] * torch.finfo(torch.float64).eps)
    return torch.where(values <= floor, torch.zeros_like(values), values)  # NaN stays


def large_window(batch: Batch) -> Tensor:
    """Eigenvalues (1, k) of one large window, converted and multiplied a part at a time."""
    a = tall(batch.read().reshape(batch.task.grid.shape))  # a view (n, k)
    n, k = a.shape
    gram = a.new_zeros(k, k, dtype=batch.target)
    step = max(1, LARGE // k)
    for start in range(0, n, step):
        part = converted(a[start : start + step], batch.task.scale, batch.target)
        if batch.task.wide:
            gram += _wide_gram(part)
        else:
            gram.addmm_(part.mH, part)
    return solve(gram.unsqueeze(0))


def _wide_gram(a: Tensor) -> Tensor:
    """A^H A for (..., n, k), in the precision of A, by products in double precision."""
    dtype = a.dtype
    a = a.to(torch.complex128 if a.is_complex() else torch.float64)
    return (a.mH @ a).to(dtype)


def _half_gram(a: Tensor) -> Tensor:
    """A^H A for (B, n, k); above the diagonal of a large one on a CPU only small blocks."""
    k = a.shape[-1]
    if k < _HALVED or a.device.type != "cpu":
        return a.mH @ a
    gram = a.new_zeros(*a.shape[:-2], k, k)
    for window, into in zip(a, gram, strict=True):
        for start in range(0, k, _STRIP):
            stop = start + _STRIP  # the last strip may be shorter
            strip = into[start:stop, :stop]
            torch.mm(window[:, start:stop].mH, window[:, :stop], out=strip)
    return gram


# --- the precision of products -------------------------------------------------------------------


def _backends() -> list[Any]:
    """What has a precision of its own for products: nothing before torch 2.9."""
    backends = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    return [backend for backend in backends if hasattr(backend, "fp32_precision")]


def reduced() -> bool:
    """Whether products are in less than float32 just now, at the user's wish.

    :func:`full_precision` sees to that in the training thread. Beside it no setting may be
    touched, and such products are made in float64.
    """
    backends = _backends()
    if not backends:
        return torch.get_float32_matmul_precision() != "highest"
    return any(backend.fp32_precision in ("bf16", "tf32") for backend in backends)


@contextlib.contextmanager
def full_precision(*device_types: str) -> Iterator[None]:
    """Matrix products in IEEE float32 (no TF32, no bf16) and without autocast, then as before.

    A user's ``torch.set_float32_matmul_precision("high")`` would square its error in the Gram.
    """
    with contextlib.ExitStack() as stack:
        if reduced():
            stack.enter_context(_highest())
        for device_type in device_types:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


@contextlib.contextmanager
def _highest() -> Iterator[None]:
    """The setting for all backends, since torch refuses to read it where they have been mixed."""
    backends = _backends()
    own = [backend.fp32_precision for backend in backends]
    whole: str | None = None
    with contextlib.suppress(RuntimeError):  # set a backend at a time: there is no value for all
        whole = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if whole is not None:
            torch.set_float32_matmul_precision(whole)
        for backend, value in zip(backends, own, strict=True):
            if backend.fp32_precision != value:
                backend.fp32_precision = value
