"""Eigenvalues of W W^H for every window, batched and within a memory budget.

The eigenvalues come from a Gram matrix of the shorter side rather than from an SVD, which costs
less than half as much. A float32 Gram matrix loses what is small against the largest eigenvalue
(an error of up to 6e-8 of it), so the caller looks at the spectrum and asks for float64 on those
windows where it matters (:func:`needs_float64`).

On a CPU the windows are cut into jobs for a pool of threads, each of them pinned to one thread of
its own; on an accelerator windows of one shape, from whichever layer, go into one call.

Legend: P positions and S slices of a layer, k eigenvalues of a window, all ascending in k.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from tempbalance.eigensolver import eigvalsh, preferred, workspace_bytes
from tempbalance.farms import Grid

T = TypeVar("T")

# Below this share of a window's largest eigenvalue float32 has lost what alpha needs: the error of
# ln(lambda) is at most 6e-8 * lambda_max / lambda, 6e-5 here, and that of alpha is smaller.
FLOAT32_FLOOR = 1e-3
# Below this share float32 cannot tell an eigenvalue from zero. A square matrix with nothing wrong
# has 0.05% of its eigenvalues there, so only more than ZERO_SHARE of them is a reason to look again
# (fewer move alpha by less than 3e-4 when they are miscounted).
FLOAT32_ZERO = 1.2e-7
ZERO_SHARE = 1e-3
# In a window of more eigenvalues than this, one that may be a zero is no reason by itself.
_SMALL = 128
# Work of one job of the pool: small enough to balance two threads, large enough to hide Python.
_JOB_FLOPS = 2e8
# From this size on half of the Gram matrix is worth not computing.
_BLOCKED = 192
# torch.linalg refuses batches of 65,536 on CUDA; half of it is safe.
_MAX_BATCH = 32_768


@dataclass(frozen=True)
class Task:
    """One layer's windows: ``slices`` (S, rows, cols) in any dtype, and where to look.

    ``scale`` () is the power of two that brings the largest entry near 1, so that neither tiny nor
    huge weights under- or overflow when squared; 0 marks a layer with a value that is not finite.
    """

    slices: Tensor
    grid: Grid
    scale: Tensor


def unit_scale(tensor: Tensor) -> Tensor:
    """The power of two near 1 / max|entry|: float64, shape (), on the tensor's device, no sync.

    1 for an all-zero tensor and 0 for one with a NaN or an infinity.
    """
    # In memory order, and smallest and largest at once: several times faster than a norm.
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    dense = tensor.permute(order)
    smallest, largest = torch.aminmax(torch.view_as_real(dense) if tensor.is_complex() else dense)
    largest = torch.maximum(-smallest, largest).double()  # a NaN stays one
    # The scale must itself be a number in the precision that multiplies by it.
    limit = 1000 if _is_double(tensor) else 126
    scale = torch.exp2(-torch.floor(torch.log2(largest)).clamp(-limit, limit))
    scale = torch.where(largest == 0, torch.ones_like(scale), scale)
    return torch.where(torch.isfinite(largest), scale, torch.zeros_like(scale))


def spectra(
    tasks: Sequence[Task],
    budget: int,
    progress: Callable[[float], None] | None = None,
    workers: int | None = None,
) -> list[Tensor]:
    """Eigenvalues of every window of each task in float32: a list of (P, S, k), ascending in k.

    They belong to the scaled weight: divide by ``scale ** 2`` for those of the weight itself.
    Nothing is dropped but windows of zeros: float32 cannot tell a tiny eigenvalue from a zero, and
    :func:`needs_float64` says when that matters; until then rounding below zero is lifted to a
    positive floor. Windows that the solver could not do are NaN.

    Args:
        budget: bound on the extra memory, in bytes; a single window is never split.
        progress: called with the share of the work (0 to 1) that a finished job was.
        workers: threads on a CPU; default as many as torch uses.
    """
    whole = [(task, None) for task in tasks]
    return _compute(whole, budget, torch.float32, progress, workers)


def spectra_float64(
    tasks: Sequence[tuple[Task, Tensor, Tensor]], budget: int, workers: int | None = None
) -> list[Tensor]:
    """The windows marked in ``mask`` (P, S) redone in float64, the others kept from (P, S, k).

    ``tasks`` holds (task, float32 eigenvalues, mask). In what is redone, all that is zero to
    rounding is exactly 0.
    """
    marked = [(task, mask) for task, _, mask in tasks]
    redone = _compute(marked, budget, torch.float64, None, workers)
    return [
        torch.where(mask.unsqueeze(-1), new, old.double())
        for new, (_, old, mask) in zip(redone, tasks, strict=True)
    ]


def _settle(values: Tensor) -> Tensor:
    """Ascending eigenvalues (..., k) with rounding around zero settled, by their precision."""
    top = values[..., -1:].clamp_min(0.0)
    if values.dtype != torch.float64:
        return torch.maximum(values, top * 1e-9)
    floor = top * (values.shape[-1] * torch.finfo(torch.float64).eps)
    return torch.where(values <= floor, torch.zeros_like(values), values)  # NaN stays


def needs_float64(eigenvalues: Tensor, xmin: Tensor) -> Tensor:
    """Windows of (P, S, k) whose float32 error could reach alpha: a mask (P, S).

    ``xmin`` (P,) or (1,), the lower end of the fitted tail: what lies above it enters alpha.
    """
    top = eigenvalues[..., -1]
    low = ~(xmin.unsqueeze(-1) >= FLOAT32_FLOOR * top)  # also where xmin is NaN
    lost = (eigenvalues < FLOAT32_ZERO * top.unsqueeze(-1)).sum(-1)
    # One eigenvalue of many that may be a zero moves the median by half a place, and a square
    # matrix with nothing wrong often has one; two of them never come by chance.
    several = lost >= (1 if eigenvalues.shape[-1] <= _SMALL else 2)
    failed = torch.isnan(top)
    return ((low | several) & (top > 0)) | failed


# --- one window shape ----------------------------------------------------------------------------


def _eigenvalues(windows: Tensor) -> Tensor:
    """(B, h, w) -> (B, min(h, w)) eigenvalues of the Gram matrix of the shorter side, ascending."""
    height, width = windows.shape[-2:]
    a = windows if height >= width else windows.mH  # (B, n, k), n >= k
    if preferred(a.shape[-1], a.device.type):
        return eigvalsh(_upper_gram(a), overwrite=True)
    if windows.is_cuda and windows.is_complex():
        # Batched complex64 eigensolvers on CUDA have an open defect (pytorch#192483).
        a = a.to(torch.complex128)
    return torch.linalg.eigvalsh(_upper_gram(a), UPLO="U")


def _upper_gram(a: Tensor) -> Tensor:
    """A^H A for (B, n, k); of the part below the diagonal only small blocks are filled."""
    k = a.shape[-1]
    if k < _BLOCKED or a.is_cuda:
        return a.mH @ a
    gram = a.new_zeros(*a.shape[:-2], k, k)
    _fill_upper(a, gram)
    return gram


def _fill_upper(a: Tensor, gram: Tensor) -> None:
    k = a.shape[-1]
    if k < _BLOCKED:
        torch.matmul(a.mH, a, out=gram) if gram.is_contiguous() else gram.copy_(a.mH @ a)
        return
    half = k // 2
    left, right = a[..., :half], a[..., half:]
    _fill_upper(left, gram[..., :half, :half])
    gram[..., :half, half:] = left.mH @ right
    _fill_upper(right, gram[..., half:, half:])


def _is_double(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float64, torch.complex128)


def _prepare(windows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Windows (..., h, w) of any dtype, flattened, scaled and converted: (B, h, w)."""
    target = dtype.to_complex() if windows.is_complex() else dtype
    flat = windows.reshape(-1, *windows.shape[-2:])
    # float32 has not the range of float64: such weights are scaled before they are converted.
    wide = _is_double(windows)
    flat = (flat * scale).to(target) if wide else flat.to(target) * scale.to(dtype)
    # A layer with a value that is not finite has scale 0: it must not stop the solver.
    return torch.nan_to_num(flat, 0.0, 0.0, 0.0) if windows.is_cuda else flat


# --- all layers ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """Windows ``start:stop`` of slices ``chosen`` of a task, written to ``out[start:stop]``."""

    task: Task
    start: int
    stop: int
    out: Tensor  # (P, S, k)
    dtype: torch.dtype
    chosen: Tensor | range  # indices, or consecutive ones, which are read as a view

    @property
    def windows(self) -> int:
        return (self.stop - self.start) * len(self.chosen)

    @property
    def flops(self) -> float:
        return self.windows * _flops(self.task)

    @property
    def _index(self) -> Tensor | slice:
        c = self.chosen
        return slice(c.start, c.stop) if isinstance(c, range) else c

    def gather(self) -> Tensor:
        windows = self.task.grid.gather(self.task.slices[self._index], self.start, self.stop)
        return _prepare(windows, self.task.scale, self.dtype)

    def write(self, values: Tensor) -> None:
        shape = (self.stop - self.start, -1, values.shape[-1])
        values = _settle(values.reshape(shape).to(self.dtype))
        self.out[self.start : self.stop, self._index] = values


_Work = tuple[Task, Tensor, Tensor | None]  # a task, where its eigenvalues go, which windows


def _flops(task: Task) -> float:
    """Floating-point operations of one window: Gram matrix and tridiagonalization."""
    k, n = task.grid.eigenvalues, max(task.grid.height, task.grid.width)
    return (4.0 if task.slices.is_complex() else 1.0) * (k * k * n + 4 / 3 * k**3)


def _bytes(task: Task, dtype: torch.dtype) -> int:
    """Extra memory of one window: its copies, the Gram matrix, the solver's own copy of that."""
    source = task.slices.element_size()
    size = torch.finfo(dtype).bits // 8 * (2 if task.slices.is_complex() else 1)
    k, n = task.grid.eigenvalues, max(task.grid.height, task.grid.width)
    solver = size * k * k
    if preferred(k, task.slices.device.type):
        solver = workspace_bytes(k, dtype.to_complex() if task.slices.is_complex() else dtype, True)
    return (source + 2 * max(source, size)) * n * k + size * k * k + solver


def _jobs(
    task: Task, out: Tensor, mask: Tensor | None, dtype: torch.dtype, size: int
) -> list[_Job]:
    """The task's windows in jobs of about ``size`` windows."""
    slices, positions = task.slices.shape[0], task.grid.positions
    mask = None if mask is None else mask.cpu()
    if mask is not None and not mask.all():  # few: a job a position, of the marked slices only
        return [
            _Job(task, p, p + 1, out, dtype, part)
            for p in mask.any(-1).nonzero().flatten().tolist()
            for part in mask[p].nonzero().flatten().split(size)
        ]
    if slices > size:
        return [
            _Job(task, p, p + 1, out, dtype, range(s, min(s + size, slices)))
            for p in range(positions)
            for s in range(0, slices, size)
        ]
    step = max(1, size // slices)
    return [
        _Job(task, p, min(p + step, positions), out, dtype, range(slices))
        for p in range(0, positions, step)
    ]


def _compute(
    tasks: Sequence[tuple[Task, Tensor | None]],
    budget: int,
    dtype: torch.dtype,
    progress: Callable[[float], None] | None,
    workers: int | None,
) -> list[Tensor]:
    outs: list[Tensor] = []
    on_cpu: list[_Work] = []
    on_device: list[_Work] = []
    for task, mask in tasks:
        shape = (task.grid.positions, task.slices.shape[0], task.grid.eigenvalues)
        out = torch.full(shape, float("nan"), dtype=dtype, device=task.slices.device)
        outs.append(out)
        (on_cpu if task.slices.device.type == "cpu" else on_device).append((task, out, mask))
    if on_cpu:
        _compute_cpu(on_cpu, budget, dtype, progress, workers or torch.get_num_threads())
    if on_device:
        _compute_batched(on_device, budget, dtype, progress)
    return outs


def _compute_batched(
    tasks: list[_Work], budget: int, dtype: torch.dtype, progress: Callable[[float], None] | None
) -> None:
    """Windows of one shape from all layers in one call, in chunks of the budget."""
    by_shape: dict[tuple[object, ...], list[_Job]] = {}
    for task, out, mask in tasks:
        size = min(_MAX_BATCH, max(1, budget // _bytes(task, dtype)))
        key = (task.grid.height, task.grid.width, task.slices.is_complex(), task.slices.device)
        by_shape.setdefault(key, []).extend(_jobs(task, out, mask, dtype, size))
    jobs_flops = sum(job.flops for jobs in by_shape.values() for job in jobs)
    for jobs in by_shape.values():
        limit = min(_MAX_BATCH, max(1, budget // _bytes(jobs[0].task, dtype)))
        for chunk in _chunks(jobs, limit):
            values = _eigenvalues_or_nan(torch.cat([job.gather() for job in chunk]))
            for job, part in zip(chunk, values.split([j.windows for j in chunk]), strict=True):
                job.write(part)
            _report(progress, chunk, jobs_flops)


def _chunks(jobs: Iterable[_Job], limit: int) -> Iterator[list[_Job]]:
    """Consecutive jobs of at most ``limit`` windows together."""
    chunk: list[_Job] = []
    for job in jobs:
        if chunk and sum(j.windows for j in chunk) + job.windows > limit:
            yield chunk
            chunk = []
        chunk.append(job)
    if chunk:
        yield chunk


def _compute_cpu(
    tasks: list[_Work],
    budget: int,
    dtype: torch.dtype,
    progress: Callable[[float], None] | None,
    workers: int,
) -> None:
    workers = workers if _pin_thread_calls() else 1
    largest = max(_bytes(task, dtype) for task, _, _ in tasks)
    workers = max(1, min(workers, budget // largest))
    jobs: list[_Job] = []
    for task, out, mask in tasks:
        if not task.scale:  # not finite: stays NaN
            continue
        size = min(_JOB_FLOPS / _flops(task), budget / workers / _bytes(task, dtype))
        jobs += _jobs(task, out, mask, dtype, max(1, int(size)))
    jobs.sort(key=lambda job: job.flops, reverse=True)
    total = sum(job.flops for job in jobs)
    left = deque(jobs)
    one_at_a_time = threading.Lock()

    def drain() -> None:
        while True:
            try:
                job = left.popleft()
            except IndexError:
                return
            _run(job)
            with one_at_a_time:
                _report(progress, [job], total)

    if workers == 1 or len(jobs) == 1:
        drain()
        return
    # This thread works too where it is pinned, instead of waiting for the others.
    joins = torch.get_num_threads() == 1
    others = workers - joins
    with ThreadPoolExecutor(others, "tempbalance", initializer=_pin_this_thread) as pool:
        running = [pool.submit(drain) for _ in range(others)]
        if joins:
            drain()
        for each in running:
            each.result()


def _report(progress: Callable[[float], None] | None, jobs: Iterable[_Job], total: float) -> None:
    if progress is not None:
        progress(sum(job.flops for job in jobs) / total)


@torch.no_grad()  # per thread
def _run(job: _Job) -> None:
    job.write(_eigenvalues_or_nan(job.gather()))


def _eigenvalues_or_nan(windows: Tensor) -> Tensor:
    """(B, h, w) -> (B, k): NaN for a window whose eigenvalues do not converge."""
    with contextlib.suppress(torch.linalg.LinAlgError):
        return _eigenvalues(windows)
    rows = []
    for window in windows:
        try:
            rows.append(_eigenvalues(window.unsqueeze(0))[0])
        except torch.linalg.LinAlgError:
            rows.append(window.abs().new_full((min(window.shape),), float("nan")))
    return torch.stack(rows)


# --- precision and threads -----------------------------------------------------------------------


@contextlib.contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Matrix products in IEEE float32 (no TF32, no bf16) and without autocast, then as before.

    A user's ``torch.set_float32_matmul_precision("high")`` would square its error in the Gram.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend, value in zip(backends, before, strict=True):
            if value != "ieee":
                backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            if value != "ieee":
                backend.fp32_precision = value


@functools.cache
def _pin_thread_calls() -> tuple[Callable[[int], object], ...]:
    """Calls that set the number of threads for the calling thread alone; empty where unknown.

    ``torch.set_num_threads`` is no substitute: it sets a default that every thread started later
    inherits, and resetting it switches off MKL's dynamic mode for good.
    """
    lib = os.path.join(os.path.dirname(torch.__file__), "lib")
    calls = []
    for pattern, symbol in (
        ("libgomp*.so*", "omp_set_num_threads"),
        ("libtorch_cpu.so", "MKL_Set_Num_Threads_Local"),
    ):
        for path in glob.glob(os.path.join(lib, pattern)):
            with contextlib.suppress(OSError, AttributeError):
                calls.append(getattr(ctypes.CDLL(path), symbol))
                break
    # Without OpenMP's own call ATen would still start a team in each worker.
    return tuple(calls) if calls and calls[0].__name__ == "omp_set_num_threads" else ()


def pinned(function: Callable[[], T]) -> T:
    """Call a function in a thread of its own with one intra-op thread.

    The threads that OpenMP leaves behind a parallel operation spin for a while and would take
    cores from the pool: small operations before it are faster without them.
    """
    if not _pin_thread_calls() or torch.get_num_threads() == 1:
        return function()
    with ThreadPoolExecutor(1, "tempbalance", initializer=_pin_this_thread) as pool:
        return pool.submit(function).result()


def _pin_this_thread() -> None:
    # ATen sets the number of threads once for each new thread, when first asked: let it do so now.
    torch.get_num_threads()
    for call in _pin_thread_calls():
        call(1)
