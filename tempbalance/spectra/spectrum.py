"""Eigenvalues of W W^H for every window of every layer, within a memory budget.

The eigenvalues come from a Gram matrix of the shorter side rather than from an SVD, which costs
less than half as much. A float32 Gram matrix loses what is small against the largest eigenvalue
(an error of up to 6e-8 of it), so the caller looks at the spectrum and asks for float64 on those
windows where it matters (:func:`needs_float64`).

On a CPU the windows are cut into batches for a pool of threads (:mod:`.cpu`); on an accelerator
those of one shape, from whichever layer, go into one call (:mod:`.gpu`).

Legend: P positions and S slices of a layer, k eigenvalues of a window, all ascending in k.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tempbalance.spectra import cpu, gpu, scale
from tempbalance.spectra.batches import Task, Work, bytes_of, is_double

logger = logging.getLogger("tempbalance")

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


def spectra(
    tasks: Sequence[Task],
    budget: int,
    progress: Callable[[float], None] | None = None,
    workers: int | None = None,
) -> list[Tensor]:
    """Eigenvalues of every window of each task: a list of (P, S, k), ascending in k.

    In float32, but for weights in float64, which are whole at once as :func:`spectra_float64` has
    them: who trains in float64 wants figures of that precision.

    They belong to the scaled weight: divide by ``scale ** 2`` for those of the weight itself.
    Nothing is dropped but windows of zeros: float32 cannot tell a tiny eigenvalue from a zero, and
    :func:`needs_float64` says when that matters; until then rounding below zero is lifted to a
    positive floor. Windows that the solver could not do are NaN.

    Args:
        tasks: all on one device.
        budget: bound on the extra memory, in bytes. A single window that needs more is done all
            the same, and named in the log.
        progress: called with the share of the work (0 to 1) that a finished batch was.
        workers: threads on a CPU; default as many as torch uses.
    """
    found: dict[int, Tensor] = {}
    for dtype in (torch.float32, torch.float64):
        some = [i for i, t in enumerate(tasks) if is_double(t.slices) == (dtype == torch.float64)]
        if some:
            share = len(some) / len(tasks)
            part = progress and functools.partial(_scaled, progress, share)
            of_some = _compute([(tasks[i], None) for i in some], budget, dtype, part, workers)
            found.update(zip(some, of_some, strict=True))
    return [found[i] for i in range(len(tasks))]


def _scaled(report: Callable[[float], None], share: float, done: float) -> None:
    report(done * share)


def spectra_float64(
    tasks: Sequence[tuple[Task, Tensor, Tensor]], budget: int, workers: int | None = None
) -> list[Tensor]:
    """The windows marked in ``mask`` (P, S) redone in float64, the others kept from (P, S, k).

    ``tasks`` holds (task, float32 eigenvalues, mask); the mask on the CPU, since it decides what
    is computed. In what is redone, all that is zero to rounding is exactly 0.
    """
    marked = [(task, mask.cpu()) for task, _, mask in tasks]
    redone = _compute(marked, budget, torch.float64, None, workers)
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


def _compute(
    tasks: Sequence[tuple[Task, Tensor | None]],
    budget: int,
    dtype: torch.dtype,
    progress: Callable[[float], None] | None,
    workers: int | None,
) -> list[Tensor]:
    work: list[Work] = []
    for task, mask in tasks:
        shape = (task.grid.positions, task.slices.shape[0], task.grid.eigenvalues)
        out = torch.full(shape, float("nan"), dtype=dtype, device=task.slices.device)
        work.append((task, out, mask))
        if bytes_of(task, dtype) > budget:
            _say_over(task.name, *task.grid.shape, bytes_of(task, dtype), budget)
    if scale.on_pool(tasks[0][0].slices.device):
        cpu.compute(work, budget, dtype, progress, workers or torch.get_num_threads())
    else:
        gpu.compute(work, budget, dtype, progress)
    return [out for _, out, _ in work]


@functools.cache  # said once
def _say_over(name: str, height: int, width: int, need: int, budget: int) -> None:
    logger.warning(
        "layer %r: one window of %d x %d needs %d MiB, over the budget of %d MiB, and takes it; "
        "smaller windows need less: windows=Farms(rows=%d)",
        name, height, width, need >> 20, budget >> 20, max(64, height // 8),
    )  # fmt: skip
