"""The GPU: windows of one shape, from whichever layer, in one call, within the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from tempbalance.spectra import gram
from tempbalance.spectra.batches import Batch, Work, batches_of, bytes_of, is_double

# torch.linalg refuses batches of 65,536 on CUDA; half of it is safe.
_MAX_BATCH = 32_768


def computed_on(device: torch.device) -> bool:
    """Whether weights on a device are measured there; others are copied to the CPU for it.

    Not where there is no eigensolver or no float64, nor where the eigensolver of CUDA is slower
    than the CPU.
    """
    return device.type == "cpu" or (device.type == "cuda" and gram.worth_a_gpu())


def compute(
    tasks: Sequence[Work],
    budget: int,
    dtype: torch.dtype,
    progress: Callable[[float], None] | None,
) -> None:
    """Fill the tasks' outputs, in chunks of the budget."""
    by_shape: dict[tuple[object, ...], list[Batch]] = {}
    for task, out, mask in tasks:
        size = min(_MAX_BATCH, max(1, budget // bytes_of(task, dtype)))
        key = (task.grid.height, task.grid.width, task.slices.is_complex(), task.wide)
        by_shape.setdefault(key, []).extend(batches_of(task, out, mask, dtype, size))
    total = sum(batch.flops for batches in by_shape.values() for batch in batches)
    for batches in by_shape.values():
        size = max(bytes_of(batch.task, dtype) for batch in batches)  # by the dtype of the weight
        most = min(_MAX_BATCH, max(1, budget // size))
        count = sum(batch.windows for batch in batches)
        for chunk in _chunks(batches, math.ceil(count / math.ceil(count / most))):  # of one size
            if chunk[0].large:
                values = torch.cat([gram.large_window(batch) for batch in chunk])
            else:
                values = gram.eigenvalues(_gathered(chunk), wide=chunk[0].task.wide)
            values = gram.settled(values.to(dtype))
            for batch, part in zip(chunk, values.split([b.windows for b in chunk]), strict=True):
                batch.write(part)
            if progress is not None:
                progress(sum(batch.flops for batch in chunk) / total)


def _chunks(batches: Iterable[Batch], limit: int) -> Iterator[list[Batch]]:
    """Consecutive batches of at most ``limit`` windows together; a large one alone."""
    chunk: list[Batch] = []
    for batch in batches:
        if chunk and (batch.large or sum(b.windows for b in chunk) + batch.windows > limit):
            yield chunk
            chunk = []
        chunk.append(batch)
    if chunk:
        yield chunk


def _gathered(batches: Sequence[Batch]) -> Tensor:
    """The windows of all batches, scaled and converted: (B, h, w), zero where not finite."""
    counts = [batch.windows for batch in batches]
    first = batches[0]
    shape = (sum(counts), first.task.grid.height, first.task.grid.width)
    windows = torch.empty(shape, dtype=first.target, device=first.out.device)
    scales = []
    for batch, part in zip(batches, windows.split(counts), strict=True):
        read, scale = batch.read(), batch.task.scale
        if is_double(read):
            read, scale = read * scale, torch.ones_like(scale)
        part.view(read.shape).copy_(read)
        scales.append(scale.expand(batch.windows))
    windows.mul_(torch.cat(scales).to(first.dtype)[:, None, None])
    # A layer with a value that is not finite has scale 0: it must not stop the solver.
    reals = torch.view_as_real(windows) if windows.is_complex() else windows
    torch.nan_to_num(reals, 0.0, 0.0, 0.0, out=reals)
    return windows
