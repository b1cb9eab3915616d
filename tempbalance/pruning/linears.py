"""Linears: the layers to prune by name, their weight as (out, in), and writing it back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from tempbalance.layers.find import named_modules
from tempbalance.pruning.masks import Pattern
from tempbalance.readers import is_materialized
from tempbalance.words import some


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer: its module, and the share of its weight to remove."""

    name: str
    module: nn.Module
    ratio: float

    @property
    def turned(self) -> bool:
        """Whether the weight is stored as (in, out): GPT-2's Conv1D."""
        return not isinstance(self.module, nn.Linear)

    def read(self) -> Tensor:
        """The weight (out, in), detached, a view."""
        weight: Tensor = self.module.weight.detach()  # type: ignore[assignment, operator]
        return weight.mT if self.turned else weight

    def write(self, weight: Tensor, mask: bool) -> None:
        """Put a weight (out, in) back; with ``mask``, what is zero stays so under training.

        The mask is that of ``torch.nn.utils.prune``: ``weight_orig`` is trained, ``weight_mask``
        holds it down, and its ``remove(module, "weight")`` makes it permanent. A mask that is there
        already is kept.
        """
        weight = weight.mT if self.turned else weight
        masked = hasattr(self.module, "weight_mask")
        if masked:
            torch_prune.remove(self.module, "weight")
        with torch.no_grad():
            self.module.weight.copy_(weight)  # type: ignore[operator, union-attr]
        if mask or masked:
            torch_prune.custom_from_mask(self.module, "weight", self.module.weight != 0)


def linears(
    model: nn.Module, ratios: Mapping[str, float], pattern: Pattern | None
) -> dict[str, Linear]:
    """The layers that ratios name, in definition order, checked before anything is touched.

    Raises:
        ValueError: naming layers that are not there or are not linear, ratios out of range, and
            weights that cannot be pruned, with the cure.
    """
    # A model that is one linear layer is named for its weight, as in reports.
    whole = "weight" if "weight" in ratios else ""
    modules = {name or whole: module for name, module in named_modules(model)}
    if unknown := [name for name in ratios if name not in modules]:
        raise ValueError(f"no layer {some(unknown)}; see tempbalance.pruning.linear_layers(model)")
    found = {
        name: Linear(name, module, float(ratios[name]))
        for name, module in modules.items()
        if name in ratios
    }
    for linear in found.values():
        _check(linear, pattern)
    return found


def _check(linear: Linear, pattern: Pattern | None) -> None:
    name, module = linear.name, linear.module
    if not (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
        raise ValueError(
            f"layer {name!r} is a {type(module).__name__}; only linear ones are pruned"
        )
    if not 0 <= linear.ratio < 1:
        raise ValueError(
            f"layer {name!r}: a ratio lies from 0 to below 1, got {linear.ratio!r}; see limit of "
            "tempbalance.pruning.allocate"
        )
    if parametrize.is_parametrized(module, "weight"):
        raise ValueError(
            f"layer {name!r} is parametrized: make its weight plain with "
            "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
        )
    weight: Tensor = module.weight  # type: ignore[assignment]
    if reason := is_materialized(weight):
        raise ValueError(f"layer {name!r} cannot be pruned: {reason}")
    if not weight.is_floating_point():
        raise ValueError(f"layer {name!r} holds {weight.dtype}: prune the float model")
    if not torch.isfinite(weight).all():
        raise ValueError(f"layer {name!r} holds NaN or infinity: go back to a sound checkpoint")
    if pattern is not None:
        _check_pattern(linear, pattern)


def _check_pattern(linear: Linear, pattern: Pattern) -> None:
    keep, of = pattern
    if linear.ratio and abs(linear.ratio - (1 - keep / of)) > 1e-6:
        raise ValueError(
            f"layer {linear.name!r} has the ratio {linear.ratio:.4g}, but {keep}:{of} removes "
            f"{1 - keep / of:.4g} of every layer: use uniform(model, {1 - keep / of:.4g})"
        )
    if linear.read().shape[1] % of:
        raise ValueError(
            f"layer {linear.name!r} has {linear.read().shape[1]} inputs, no multiple of {of}: "
            f"leave it out for {keep}:{of}"
        )
