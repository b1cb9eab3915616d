"""Ranks: the processes that share a measurement, and what they must agree on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tempbalance.layers.find import Layer, Layers


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
