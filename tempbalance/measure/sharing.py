"""Sharing: which rank measures which layer, and how all ranks come to know all results."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from tempbalance.layers.find import Layer
from tempbalance.measure.ranks import collective_device
from tempbalance.spectra.by_layer import AnyWindows, windows_of

# Reducing a k x k matrix reads it k times over; at the sizes of windows that costs, beside the
# floating-point operations, as much as so many operations an entry (fitted to times of 64 to 768).
_AN_ENTRY = 500.0


def cost(layer: Layer, windows: AnyWindows) -> float:
    """Time of measuring a layer, to a constant factor: in floating-point operations, about."""
    grid = windows_of(windows, layer).grid(*layer.shape[1:])
    k, n = grid.eigenvalues, max(grid.height, grid.width)
    window = k * k * n + 4 / 3 * k**3 + _AN_ENTRY * k * k
    return layer.shape[0] * grid.positions * window


def owners(
    layers: Sequence[Layer], windows: AnyWindows, group: dist.ProcessGroup | None
) -> list[int]:
    """The rank that measures each layer: the costliest first, to the rank with least to do."""
    ranks = dist.get_world_size(group) if group is not None else 1
    return balanced([cost(layer, windows) for layer in layers], ranks)


def balanced(costs: Sequence[float], ranks: int) -> list[int]:
    """A rank for each item, the costliest first, to the rank with least to do."""
    load = [0.0] * ranks
    found = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        found[i] = load.index(min(load))
        load[found[i]] += costs[i]
    return found


def exchange(
    rows: npt.NDArray[np.float64],
    owner: Sequence[int],
    group: dist.ProcessGroup,
    near: Sequence[Tensor] = (),
) -> npt.NDArray[np.float64]:
    """The table (L, columns) with every layer's row from the rank that owns it.

    One all-gather of as many rows as the rank with most of them has: under 100 bytes a row.
    ``near``: tensors of this rank, one of whose devices NCCL is to use.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    of_rank = [[i for i, r in enumerate(owner) if r == each] for each in range(ranks)]
    most = max(map(len, of_rank))
    if not most:
        return rows
    mine = np.zeros((most, rows.shape[1]))
    mine[: len(of_rank[rank])] = rows[of_rank[rank]]
    sent = torch.as_tensor(mine).to(collective_device(group, near))
    received = [torch.empty_like(sent) for _ in range(ranks)]
    dist.all_gather(received, sent, group=group)
    every = torch.stack(received).cpu().numpy()
    out = np.zeros_like(rows)
    for places, part in zip(of_rank, every, strict=True):
        out[places] = part[: len(places)]
    return out
