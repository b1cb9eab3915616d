"""Grid: windows of one shape in a slice, and what a window strategy must say.

A weight arrives as a stack of slices (..., rows, cols). Every slice is turned so that its rows are
the longer side, R x C with R >= C, and windows of one shape h x w are taken from it.
:meth:`Grid.gather` is the one place that touches a tensor, and it never writes to it.

Legend: R, C sides of the turned slice; h, w sides of a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

Pool = Literal["spectrum", "alpha"]

# Up to so many windows are stacked from views, which needs no index on the weight's device; on a
# GPU, where each view costs a launch, only a few.
_STACKED, _STACKED_ON_GPU = 64, 8


@dataclass(frozen=True)
class Grid:
    """Windows of one shape at fixed positions of a turned slice.

    ``height`` x ``width`` windows start at every pair of ``row_starts`` and ``col_starts``.
    ``transpose`` says whether the slice must be turned first. ``both`` adds the windows of the
    turned slice too: a square slice has no longer side, and windows that are not square would
    otherwise see one of its two orientations only.
    """

    height: int
    width: int
    row_starts: tuple[int, ...]
    col_starts: tuple[int, ...]
    transpose: bool = False
    both: bool = False

    @property
    def positions(self) -> int:
        """Windows in one slice."""
        return len(self.row_starts) * len(self.col_starts) * (2 if self.both else 1)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of a window."""
        return self.height, self.width

    @property
    def eigenvalues(self) -> int:
        """Eigenvalues of one window."""
        return min(self.height, self.width)

    def gather(self, slices: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Windows ``start:stop`` of every slice: (..., rows, cols) -> (stop - start, ..., h, w).

        A single window is a view; several are copied, once, in the dtype of the weight.
        """
        stop = self.positions if stop is None else stop
        turned = slices.mT if self.transpose else slices
        single = self.positions // 2 if self.both else self.positions
        if self.both and stop > single:
            flipped = self._pick(turned.mT, max(start - single, 0), stop - single)
            if start >= single:
                return flipped
            return torch.cat([self._pick(turned, start, single), flipped])
        return self._pick(turned, start, stop)

    def _pick(self, turned: Tensor, start: int, stop: int) -> Tensor:
        n_cols = len(self.col_starts)
        if stop - start <= (_STACKED_ON_GPU if turned.is_cuda else _STACKED):
            corners = [
                (self.row_starts[i // n_cols], self.col_starts[i % n_cols])
                for i in range(start, stop)
            ]
            views = [turned[..., r : r + self.height, c : c + self.width] for r, c in corners]
            return views[0].unsqueeze(0) if len(views) == 1 else torch.stack(views)
        places = range(start, stop)
        rows = _uploaded([self.row_starts[i // n_cols] for i in places], turned.device)
        cols = _uploaded([self.col_starts[i % n_cols] for i in places], turned.device)
        windows = turned.unfold(-2, self.height, 1).unfold(-2, self.width, 1)  # (..., R', C', h, w)
        windows = windows.movedim((-4, -3), (0, 1))
        return windows[rows, cols]


def _uploaded(values: list[int], device: torch.device) -> Tensor:
    """Indices on a device, without waiting for it."""
    if device.type != "cuda":
        return torch.tensor(values, device=device)
    pinned = torch.tensor(values, device="cpu").pin_memory()
    return pinned.to(device, non_blocking=True)


@runtime_checkable
class Windows(Protocol):
    """What the engine asks of a window strategy: a grid for a slice shape, and how to pool."""

    @property
    def pool(self) -> Pool:
        """``spectrum``: all windows' eigenvalues in one fit. ``alpha``: a fit a position, mean."""
        ...

    def grid(self, rows: int, cols: int) -> Grid:
        """The windows of a slice of ``rows`` x ``cols``."""
        ...
