"""Gram matrices of windows, and the eigenvalues of those.

A Gram matrix of the shorter side costs less than half of an SVD. A float32 one loses what is small
against the largest eigenvalue (up to 6e-8 of it); :mod:`tempbalance.spectra.spectrum` sees to that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from tempbalance.spectra.batches import LARGE, Job, converted, is_double
from tempbalance.spectra.eigensolver.solver import LARGEST, eigvalsh, preferred

# From this size on half of the Gram matrix is worth not computing, in strips of so many rows.
_HALVED = 192
_STRIP = 64


def eigenvalues(windows: Tensor, wait: bool = True, wide: bool = False) -> Tensor:
    """(B, h, w) -> (B, min(h, w)) eigenvalues of the Gram matrix of the shorter side, ascending.

    NaN for a window whose eigenvalues do not converge. Without ``wait`` no eigensolver is used
    that waits for the device, for up to 1024 eigenvalues. With ``wide`` products are in float64.
    """
    a = tall(windows)  # (B, n, k), n >= k
    del windows
    if a.is_cuda and a.is_complex() and not _ours(a.shape[-1], a.device, wait):
        # The library's batched complex64 eigensolvers have an open defect (pytorch#192483).
        a = a.to(torch.complex128)
    gram = _half_gram(a, wide)
    del a  # a caller that keeps no windows has their memory for the solver
    return solve(gram, wait)


def tall(windows: Tensor) -> Tensor:
    """Windows (..., h, w) turned so that rows are not fewer than columns."""
    return windows if windows.shape[-2] >= windows.shape[-1] else windows.mH


def solve(gram: Tensor, wait: bool = True) -> Tensor:
    """Eigenvalues (B, k) of matrices (B, k, k) of which, on a CPU, the lower half is read.

    NaN for a matrix whose eigenvalues do not converge.
    """
    if _ours(gram.shape[-1], gram.device, wait):
        return eigvalsh(gram, overwrite=True)
    if gram.device.type == "cpu" and is_double(gram):
        # The LAPACK of numpy takes two thirds of the time of torch's in double precision.
        with contextlib.suppress(np.linalg.LinAlgError):
            return torch.from_numpy(np.linalg.eigvalsh(gram.numpy(), UPLO="L"))
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


def large_window(job: Job, wait: bool = True) -> Tensor:
    """Eigenvalues (1, k) of one large window, converted and multiplied a part at a time."""
    a = tall(job.read().reshape(job.task.grid.height, job.task.grid.width))  # a view (n, k)
    n, k = a.shape
    gram = a.new_zeros(k, k, dtype=job.target)
    step = max(1, LARGE // k)
    for start in range(0, n, step):
        part = converted(a[start : start + step], job.task.scale, job.target)
        if job.task.wide:
            gram += (part.double().mH @ part.double()).to(job.dtype)
        else:
            gram.addmm_(part.mH, part)
    return solve(gram.unsqueeze(0), wait)


def _ours(k: int, device: torch.device, wait: bool) -> bool:
    """Whether our own eigensolver is to be used."""
    cannot_wait = not wait and device.type == "cuda" and k <= LARGEST
    return cannot_wait or preferred(k, device.type)


def _half_gram(a: Tensor, wide: bool) -> Tensor:
    """A^H A for (B, n, k); above the diagonal of a large one on a CPU only small blocks."""
    k = a.shape[-1]
    if wide:
        return (a.double().mH @ a.double()).to(a.dtype)
    if k < _HALVED or a.device.type != "cpu":
        return a.mH @ a
    gram = a.new_zeros(*a.shape[:-2], k, k)
    for window, into in zip(a, gram, strict=True):
        for start in range(0, k, _STRIP):
            stop = start + _STRIP  # the last strip may be shorter
            strip = into[start:stop, :stop]
            torch.mm(window[:, start:stop].mH, window[:, :stop], out=strip)
    return gram


def reduced() -> bool:
    """Whether products on the CPU are in less than float32 just now, at the user's wish.

    :func:`full_precision` sees to that in the training thread. Beside it no setting may be
    touched, and such products are made in float64.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return matmul.fp32_precision in ("bf16", "tf32")


@contextlib.contextmanager
def full_precision(*device_types: str) -> Iterator[None]:
    """Matrix products in IEEE float32 (no TF32, no bf16) and without autocast, then as before.

    A user's ``torch.set_float32_matmul_precision("high")`` would square its error in the Gram.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend, value in zip(backends, before, strict=True):
            if value != "ieee":
                backend.fp32_precision = "ieee"
        with contextlib.ExitStack() as stack:
            for device_type in device_types:
                stack.enter_context(torch.autocast(device_type, enabled=False))
            yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            if value != "ieee":
                backend.fp32_precision = value
