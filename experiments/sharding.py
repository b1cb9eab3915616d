"""FSDP2 sharding of any model: parameters of each layer spread over the ranks."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Apply `fully_shard` in place, a direct child at a time, then to what is left.

    Raises: TypeError for a model whose parameters are complex in part: FSDP2 gathers parameters of
    one type at a time. `trainer=ddp` trains such a model.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(model, FSDPModule):  # configure_model runs once more for every fit
        return model
    types = {parameter.is_complex() for parameter in model.parameters()}
    if len(types) > 1:
        raise TypeError(
            f"{type(model).__name__} has real and complex parameters, which FSDP2 does not shard "
            "together: use trainer=ddp"
        )
    for child in model.children():
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model
