"""Walk: names and tensors of a model behind compile, DDP, FSDP2 and parametrizations.

Names are those of ``model.named_modules()`` without the wrappers' own (``_orig_mod.`` of
``torch.compile``, ``module.`` of DDP), so that they are the same in every setting.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# of torch.compile, activation checkpoints, FSDP, and Lightning Fabric
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module")
_WRAPPERS = (
    nn.parallel.DistributedDataParallel,
    nn.DataParallel,
    torch.optim.swa_utils.AveragedModel,
)


def named_modules(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` in definition order, wrappers left out of the names."""
    yield from _walk(model, name, set())


def _walk(module: nn.Module, name: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    module = unwrap(module)
    if id(module) in seen:
        return
    seen.add(id(module))
    yield name, module
    for child_name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, join(name, child_name), seen)


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``, DDP, checkpoint and averaging wrappers."""
    while True:
        inner = next((module._modules[w] for w in _WRAPPED if w in module._modules), None)
        if inner is None and isinstance(module, _WRAPPERS):
            inner = module.module
        if inner is None:
            return module
        module = inner


def join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters under clean names, shared ones under their first name alone."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, module in named_modules(model):
        for local, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), (join(name, local), parameter))
    return dict(found.values())


def real_numel(tensor: Tensor) -> int:
    """Number of real numbers: a complex entry is two. 0 for an uninitialized parameter."""
    if isinstance(tensor, nn.parameter.UninitializedParameter):
        return 0
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Direct parameters, those behind a parametrization of the module included."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter
    if parametrize.is_parametrized(module):
        for name, parameter in module.parametrizations.named_parameters():  # type: ignore
            yield f"parametrizations.{name}", parameter


def is_parametrized(module: nn.Module, path: str) -> bool:
    return "." not in path and parametrize.is_parametrized(module, path)


def without_side_effects(module: nn.Module, name: str) -> Tensor:
    """A parametrized weight, computed in eval mode.

    Spectral normalization steps its power iteration whenever the weight is read in training mode;
    measuring must not change a run.
    """
    inner = [m for m in module.parametrizations[name].modules() if m.training]  # type: ignore
    for m in inner:
        m.training = False
    try:
        weight: Tensor = getattr(module, name)
    finally:
        for m in inner:
            m.training = True
    return weight


def owner_of(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, local = path.rpartition(".")
    return unwrap(module.get_submodule(parent)) if parent else module, local


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, any other as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor (DTensor) gathered from all ranks, any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_inside(name: str, ancestor: str) -> bool:
    return ancestor == "" or name.startswith(ancestor + ".")


def kind_of(module: nn.Module) -> str:
    """The type's name, without what parametrizing and FSDP2 add to it."""
    name = type(module).__name__
    return name.removeprefix("Parametrized").removeprefix("FSDP")
