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

import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from tempbalance.spectra import cpu as cpu_pool
from tempbalance.spectra import gram
from tempbalance.spectra.batches import Job, Task, Work, bytes_of, is_double, jobs_of
from tempbalance.spectra.cpu import pinned
from tempbalance.spectra.gram import full_precision, reduced

__all__ = [
    "Task",
    "full_precision",
    "needs_float64",
    "on_pool",
    "pinned",
    "reduced",
    "spectra",
    "spectra_float64",
    "unit_scale",
    "unit_scales",
]

log = logging.getLogger("tempbalance")

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
# torch.linalg refuses batches of 65,536 on CUDA; half of it is safe.
_MAX_BATCH = 32_768


def unit_scale(tensor: Tensor) -> Tensor:
    """The power of two near 1 / max|entry|: float64, shape (), on the tensor's device, no sync.

    1 for an all-zero tensor and 0 for one with a NaN or an infinity.
    """
    return unit_scales([tensor])[0]


def unit_scales(tensors: Sequence[Tensor], workers: int = 1) -> list[Tensor]:
    """:func:`unit_scale` of tensors on one device: one kernel each, and a few for all of them.

    ``workers`` is the number of threads on a CPU.
    """
    extremes = _all_extremes(tensors, workers)
    found: list[Tensor | None] = [None] * len(tensors)
    # The scale must itself be a number in the precision that multiplies by it.
    for double, limit in ((False, 126), (True, 1000)):
        places = [i for i, tensor in enumerate(tensors) if is_double(tensor) == double]
        if not places:
            continue
        ends = [extremes[i] for i in places]
        # Stacking promotes: bf16 beside float32 becomes float32, and each keeps its value.
        low, high = (torch.stack(some).double() for some in zip(*ends, strict=True))
        largest = torch.maximum(-low, high)  # a NaN stays one
        scale = torch.exp2(-torch.floor(torch.log2(largest)).clamp(-limit, limit))
        scale = torch.where(largest == 0, torch.ones_like(scale), scale)
        scale = torch.where(torch.isfinite(largest), scale, torch.zeros_like(scale))
        for i, value in zip(places, scale.unbind(), strict=True):
            found[i] = value
    return [scale for scale in found if scale is not None]


def _all_extremes(tensors: Sequence[Tensor], workers: int) -> dict[int, tuple[Tensor, Tensor]]:
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def find(i: int) -> None:
        found[i] = _extremes(tensors[i])

    places = sorted(range(len(tensors)), key=lambda i: tensors[i].numel(), reverse=True)
    in_pool = bool(tensors) and on_pool(tensors[0].device)
    cpu_pool.in_threads(find, places, workers if in_pool else 1)
    return found


def _extremes(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest entry, a NaN where there is one.

    In memory order, and both at once: several times faster than a norm.
    """
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    dense = tensor.permute(order)
    low, high = torch.aminmax(torch.view_as_real(dense) if tensor.is_complex() else dense)
    return low, high


def on_pool(device: torch.device) -> bool:
    """Whether windows there are measured one by one in threads, rather than in batches."""
    return device.type == "cpu"


def spectra(
    tasks: Sequence[Task],
    budget: int,
    progress: Callable[[float], None] | None = None,
    workers: int | None = None,
    wait: bool = True,
) -> list[Tensor]:
    """Eigenvalues of every window of each task in float32: a list of (P, S, k), ascending in k.

    They belong to the scaled weight: divide by ``scale ** 2`` for those of the weight itself.
    Nothing is dropped but windows of zeros: float32 cannot tell a tiny eigenvalue from a zero, and
    :func:`needs_float64` says when that matters; until then rounding below zero is lifted to a
    positive floor. Windows that the solver could not do are NaN.

    Args:
        tasks: all on one device.
        budget: bound on the extra memory, in bytes. A single window that needs more is done all
            the same, and named in the log.
        progress: called with the share of the work (0 to 1) that a finished job was.
        workers: threads on a CPU; default as many as torch uses.
        wait: whether an eigensolver may be used that waits for the device.
    """
    whole = [(task, None) for task in tasks]
    return _compute(whole, budget, torch.float32, progress, workers, wait)


def spectra_float64(
    tasks: Sequence[tuple[Task, Tensor, Tensor]], budget: int, workers: int | None = None
) -> list[Tensor]:
    """The windows marked in ``mask`` (P, S) redone in float64, the others kept from (P, S, k).

    ``tasks`` holds (task, float32 eigenvalues, mask); the mask on the CPU, since it decides what
    is computed. In what is redone, all that is zero to rounding is exactly 0.
    """
    marked = [(task, mask.cpu()) for task, _, mask in tasks]
    redone = _compute(marked, budget, torch.float64, None, workers, True)
    return [
        torch.where(mask.to(old.device).unsqueeze(-1), new, old.double())
        for new, (_, old, mask) in zip(redone, tasks, strict=True)
    ]


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


# --- all layers ----------------------------------------------------------------------------------


def _compute(
    tasks: Sequence[tuple[Task, Tensor | None]],
    budget: int,
    dtype: torch.dtype,
    progress: Callable[[float], None] | None,
    workers: int | None,
    wait: bool,
) -> list[Tensor]:
    work: list[Work] = []
    for task, mask in tasks:
        shape = (task.grid.positions, task.slices.shape[0], task.grid.eigenvalues)
        out = torch.full(shape, float("nan"), dtype=dtype, device=task.slices.device)
        work.append((task, out, mask))
        if bytes_of(task, dtype) > budget:
            _say_over(task.name, *task.grid.shape, bytes_of(task, dtype), budget)
    if on_pool(tasks[0][0].slices.device):
        cpu_pool.compute(work, budget, dtype, progress, workers or torch.get_num_threads())
    else:
        _compute_batched(work, budget, dtype, progress, wait)
    return [out for _, out, _ in work]


@functools.cache  # said once
def _say_over(name: str, height: int, width: int, need: int, budget: int) -> None:
    log.warning(
        "layer %r: one window of %d x %d needs %d MiB, over the budget of %d MiB, and takes it; "
        "smaller windows need less: windows=Farms(rows=%d)",
        name, height, width, need >> 20, budget >> 20, max(64, height // 8),
    )  # fmt: skip


def _compute_batched(
    tasks: Sequence[Work],
    budget: int,
    dtype: torch.dtype,
    progress: Callable[[float], None] | None,
    wait: bool,
) -> None:
    """Windows of one shape from all layers in one call, in chunks of the budget."""
    by_shape: dict[tuple[object, ...], list[Job]] = {}
    for task, out, mask in tasks:
        size = min(_MAX_BATCH, max(1, budget // bytes_of(task, dtype)))
        key = (task.grid.height, task.grid.width, task.slices.is_complex())
        by_shape.setdefault(key, []).extend(jobs_of(task, out, mask, dtype, size))
    total = sum(job.flops for jobs in by_shape.values() for job in jobs)
    for jobs in by_shape.values():
        size = max(bytes_of(job.task, dtype) for job in jobs)  # by the dtype of the weight
        most = min(_MAX_BATCH, max(1, budget // size))
        count = sum(job.windows for job in jobs)
        for chunk in _chunks(jobs, math.ceil(count / math.ceil(count / most))):  # of one size
            if chunk[0].large:
                values = torch.cat([gram.large_window(job, wait) for job in chunk])
            else:
                values = gram.eigenvalues(_gathered(chunk), wait)
            values = gram.settled(values.to(dtype))
            for job, part in zip(chunk, values.split([j.windows for j in chunk]), strict=True):
                job.write(part)
            if progress is not None:
                progress(sum(job.flops for job in chunk) / total)


def _chunks(jobs: Iterable[Job], limit: int) -> Iterator[list[Job]]:
    """Consecutive jobs of at most ``limit`` windows together; a large one alone."""
    chunk: list[Job] = []
    for job in jobs:
        if chunk and (job.large or sum(j.windows for j in chunk) + job.windows > limit):
            yield chunk
            chunk = []
        chunk.append(job)
    if chunk:
        yield chunk


def _gathered(jobs: Sequence[Job]) -> Tensor:
    """The windows of all jobs, scaled and converted: (B, h, w), zero where not finite."""
    counts = [job.windows for job in jobs]
    first = jobs[0]
    shape = (sum(counts), first.task.grid.height, first.task.grid.width)
    batch = torch.empty(shape, dtype=first.target, device=first.out.device)
    scales = []
    for job, part in zip(jobs, batch.split(counts), strict=True):
        windows, scale = job.read(), job.task.scale
        if is_double(windows):
            windows, scale = windows * scale, torch.ones_like(scale)
        part.view(windows.shape).copy_(windows)
        scales.append(scale.expand(job.windows))
    batch.mul_(torch.cat(scales).to(first.dtype)[:, None, None])
    # A layer with a value that is not finite has scale 0: it must not stop the solver.
    reals = torch.view_as_real(batch) if batch.is_complex() else batch
    torch.nan_to_num(reals, 0.0, 0.0, 0.0, out=reals)
    return batch
