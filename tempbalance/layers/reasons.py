"""Reasons: why a parameter that no reader names is not measured."""

from __future__ import annotations

from torch import nn

from tempbalance.layers.walk import kind_of
from tempbalance.readers import Role, is_norm, real_shape, role

QUANTIZED = "a quantized module: analyze the float model it was made from"


def reason_of_rest(module: nn.Module, path: str, parameter: nn.Parameter) -> str:
    """What a parameter is, and where it could be a weight after all, what to do."""
    local = path.rpartition(".")[2]
    if is_norm(module):
        return Role.NORM.value
    if (what := role(module, local)) is not None:
        return what.value
    if len(real_shape(parameter)) < 2:
        return Role.BIAS.value
    if f"{path}_mask".replace("_orig", "") in module._buffers:
        return "pruned by torch.nn.utils.prune: make it permanent with its remove() to measure it"
    if local in ("weight_v", "weight_orig"):  # the weight itself is a stale tensor between steps
        return (
            "wrapped by torch.nn.utils.weight_norm or spectral_norm in their old form: use those "
            "of torch.nn.utils.parametrizations"
        )
    return f"no weight that the reader of {kind_of(module)} names; register another to measure it"


def is_quantized(module: nn.Module) -> bool:
    """Modules of ``torch.ao.nn.quantized`` keep packed weights that are no parameters."""
    return ".quantized" in type(module).__module__ and callable(getattr(module, "weight", None))
