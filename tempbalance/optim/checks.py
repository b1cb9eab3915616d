"""Checks: which optimizers and schedules can be balanced, in words."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from tempbalance.optim.groups import parameters_of


def check_optimizer(optimizer: Optimizer, fields: Iterable[str] = ("lr",)) -> None:
    """Refuse kinds of optimizer that cannot have several groups, and groups without a field.

    Raises:
        ValueError: naming the kind and the cure.
    """
    kinds = {cls.__name__ for cls in type(optimizer).__mro__}
    if kinds & {"LBFGS", "ZeroRedundancyOptimizer"}:
        raise ValueError(
            f"{type(optimizer).__name__} cannot have a learning rate per layer; use SGD, "
            "AdamW or another optimizer with param groups of its own"
        )
    for i, group in enumerate(optimizer.param_groups):
        for field in fields:
            value = group.get(field)
            if isinstance(value, bool) or not isinstance(value, Real | Tensor):
                what, cure = {
                    "lr": (
                        "learning rate",
                        "Give the optimizer a rate of its own (for Adafactor relative_step=False "
                        "and lr=...)",
                    ),
                }.get(field, (field, "Use an optimizer that has one, such as AdamW"))
                raise ValueError(
                    f"param group {group.get('name', i)} of {type(optimizer).__name__} has the "
                    f"{what} {value!r}: there is nothing to multiply. {cure}"
                )


def check_decay(optimizer: Optimizer) -> None:
    """Raises ValueError where no group has a weight decay."""
    if not any(float(group.get("weight_decay") or 0.0) for group in optimizer.param_groups):
        raise ValueError(
            f"no param group of {type(optimizer).__name__} has a weight decay: there is nothing to "
            "multiply. Give the optimizer a weight_decay above 0"
        )


def check_parameters(optimizer: Optimizer, model: Any) -> None:
    """Refuse an optimizer that holds none of the model's parameters, and what is no model.

    Raises:
        TypeError, ValueError: with the cure.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for p in parameters_of(optimizer)):
        raise ValueError(
            "the optimizer holds none of this model's parameters: build the optimizer from this "
            "model (after moving, wrapping or sharding it), and pass both. One that trains copies "
            "of the weights, in another precision or on another device, cannot be balanced: use "
            "one of the weights themselves (for mixed precision with torch.autocast)"
        )


def check_flag(name: str, value: Any) -> None:
    """Raises TypeError for what is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_clock(clock: Any) -> None:
    """Raises ValueError for a clock that there is not."""
    if clock not in ("step", "manual"):
        raise ValueError(f"clock must be 'step' or 'manual', got {clock!r}")
