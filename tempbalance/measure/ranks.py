"""Ranks: the processes that share a measurement, who measures what, and how all come to know it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tempbalance.layers.find import Layer, Layers
from tempbalance.spectra.by_layer import AnyWindows, windows_of

# Reducing a k x k matrix reads it k times over; at the sizes of windows that costs, beside the
# floating-point operations, as much as so many operations an entry (fitted to times of 64 to 768).
_AN_ENTRY = 500.0


def found_group(model: nn.Module, found: Layers) -> dist.ProcessGroup | None:
    """Ranks that hold the same model and step together, where that can be seen."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return module.process_group
    return dist.group.WORLD if sharded(found.layers) else None


def world_size() -> int:
    """Processes of this job; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sharded(layers: Iterable[Layer]) -> bool:
    """Whether reading one of these takes several ranks."""
    return any(hasattr(p, "full_tensor") for layer in layers for p in layer.tensors())


def collective_device(group: dist.ProcessGroup, near: Iterable[Tensor] = ()) -> torch.device:
    """Where a tensor must be to be sent: for NCCL on this rank's GPU, else on the CPU.

    That is the GPU of the first tensor of ``near`` that is on one. ``current_device()`` is no
    answer where a process puts its model on its GPU without making that the current one.
    """
    if "nccl" not in dist.get_backend(group):
        return torch.device("cpu")
    devices = (tensor.device for tensor in near if tensor.is_cuda)
    return next(devices, None) or torch.device("cuda", torch.cuda.current_device())


def largest(values: Tensor, group: dist.ProcessGroup | None, near: Iterable[Tensor] = ()) -> Tensor:
    """The largest of every rank's values, by place: on the host, the same on every rank.

    One read of the device. A collective: every rank of the group must call.
    """
    if group is None:
        return values.cpu()
    shared = values.detach().to(collective_device(group, [values, *near]), copy=True)
    dist.all_reduce(shared, dist.ReduceOp.MAX, group=group)
    return shared.cpu()


def side_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A gloo group of the same ranks, for exchanges in a thread beside the training.

    Collectives of two threads on one group could meet in another order on another rank. It lives
    until ``destroy_process_group``. A collective: every rank of the group must call.

    Raises:
        RuntimeError: where torch has no gloo.
    """
    if not dist.is_gloo_available():
        raise RuntimeError(
            "delay on several ranks exchanges its results by gloo, which this torch was built "
            "without: use delay=0"
        )
    ranks = dist.get_process_group_ranks(group)
    side = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    assert isinstance(side, dist.ProcessGroup)  # another number on ranks that are not in it
    return side


# --- sharing -------------------------------------------------------------------------------------


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
