"""Batches: which windows of which layers are computed together, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tempbalance.spectra.grid import Grid

# A window of more entries is converted and multiplied in parts (of 32 MiB in float32).
LARGE = 2**23


@dataclass(frozen=True)
class Task:
    """One layer's windows: ``slices`` (S, rows, cols) in any dtype, and where to look.

    ``scale`` () is the power of two that brings the largest entry near 1, so that neither tiny nor
    huge weights under- or overflow when squared; 0 marks a layer with a value that is not finite.
    ``name`` is for messages. ``wide``: float32 products cannot be relied on, so float64 ones.
    ``solver``: (B, h, w) -> (B, k) on a CPU, where it is not to be :mod:`.gram`.
    """

    slices: Tensor
    grid: Grid
    scale: Tensor
    name: str = ""
    wide: bool = False
    solver: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Batch:
    """Windows ``start:stop`` of slices ``chosen`` of a task, written to ``out[start:stop]``."""

    task: Task
    start: int
    stop: int
    out: Tensor  # (P, S, k)
    dtype: torch.dtype  # real
    chosen: Tensor | range  # indices, or consecutive ones, which are read as a view

    @property
    def windows(self) -> int:
        """How many."""
        return (self.stop - self.start) * len(self.chosen)

    @property
    def flops(self) -> float:
        """Work of all its windows."""
        return self.windows * flops_of(self.task)

    @property
    def large(self) -> bool:
        """Whether its one window is better never converted as a whole."""
        return is_large(self.task)

    @property
    def target(self) -> torch.dtype:
        """What the windows are converted to."""
        return self.dtype.to_complex() if self.task.slices.is_complex() else self.dtype

    @property
    def _index(self) -> Tensor | slice:
        c = self.chosen
        return slice(c.start, c.stop) if isinstance(c, range) else c

    def read(self) -> Tensor:
        """Its windows (P, S, h, w) in the weight's dtype: a view, or a copy of several."""
        return self.task.grid.gather(self.task.slices[self._index], self.start, self.stop)

    def views(self) -> list[Tensor]:
        """Its windows a position, (S, h, w) each, in the weight's dtype and memory."""
        slices, places = self.task.slices[self._index], range(self.start, self.stop)
        return [self.task.grid.gather(slices, p, p + 1)[0] for p in places]

    def write(self, values: Tensor) -> None:
        """Put eigenvalues (B, k) in their place."""
        shape = (self.stop - self.start, -1, values.shape[-1])
        self.out[self.start : self.stop, self._index] = values.reshape(shape)


Work = tuple[Task, Tensor, Tensor | None]  # a task, where its eigenvalues go, which windows


def is_double(tensor: Tensor) -> bool:
    """Whether a weight has the range of float64: it is scaled before it is converted."""
    return tensor.dtype in (torch.float64, torch.complex128)


def converted(windows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Windows of any dtype, scaled and of another: a copy."""
    if is_double(windows):
        return (windows * scale).to(dtype)
    return windows.to(dtype, copy=True).mul_(scale.to(dtype.to_real()))


def is_large(task: Task) -> bool:
    """Whether a window is to be multiplied in parts."""
    return task.grid.height * task.grid.width > LARGE


def flops_of(task: Task) -> float:
    """Floating-point operations of one window: Gram matrix and tridiagonalization."""
    k, n = task.grid.eigenvalues, max(task.grid.height, task.grid.width)
    return (4.0 if task.slices.is_complex() else 1.0) * (k * k * n + 4 / 3 * k**3)


def bytes_of(task: Task, dtype: torch.dtype) -> int:
    """Extra memory of one window: its copies, the Gram matrix, and what the solver needs."""
    source = task.slices.element_size()
    real = torch.finfo(dtype).bits // 8
    size = real * (2 if task.slices.is_complex() else 1)
    k, n = task.grid.eigenvalues, max(task.grid.height, task.grid.width)
    matrix = size * k * k
    if is_large(task):  # read as a view, a part at a time
        part = size + (source if is_double(task.slices) else 0)
        return part * LARGE + 2 * matrix + (2 * size * (LARGE + k * k) if task.wide else 0)
    if task.slices.device.type == "cpu":
        return (source + 2 * max(source, size)) * n * k + 2 * matrix
    # Complex windows are multiplied and solved in double precision there, others with ``wide``
    # multiplied. Each stage lets go of what the one before has made.
    exact = 16 if task.slices.is_complex() else 8 if task.wide else size
    gathered = max(source + size, size + exact if exact > size else 0) * n * k
    solved = 3 * k * k * (exact if task.slices.is_complex() else size)
    return max(gathered, exact * (n * k + k * k), solved)


def batches_of(
    task: Task, out: Tensor, mask: Tensor | None, dtype: torch.dtype, size: int
) -> list[Batch]:
    """The task's windows in batches of about ``size`` windows; ``mask`` (P, S) is on the CPU."""
    slices, positions = task.slices.shape[0], task.grid.positions
    size = 1 if is_large(task) else size
    if mask is not None and not mask.all():  # few: a batch a position, of the marked slices only
        return [
            Batch(task, p, p + 1, out, dtype, part)
            for p in mask.any(-1).nonzero().flatten().tolist()
            for part in mask[p].nonzero().flatten().split(size)
        ]
    if slices > size:
        return [
            Batch(task, p, p + 1, out, dtype, range(s, min(s + size, slices)))
            for p in range(positions)
            for s in range(0, slices, size)
        ]
    step = max(1, size // slices)
    return [
        Batch(task, p, min(p + step, positions), out, dtype, range(slices))
        for p in range(0, positions, step)
    ]
