"""Prune: ratios and a method in, a model with that many zeros and what became of it out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tempbalance.pruning.linears import Linear, linears
from tempbalance.pruning.method import Method, Statistic
from tempbalance.pruning.walk import walk
from tempbalance.words import check_kind


@dataclass(frozen=True)
class PrunedLayer:
    """What became of one layer."""

    name: str
    numel: int
    ratio: float  # asked for
    zeros: int  # entries that are zero now
    zeros_before: int  # of them, those that were zero before

    @property
    def sparsity(self) -> float:
        """Share of the weight that is zero now."""
        return self.zeros / self.numel


@dataclass(frozen=True)
class Pruned:
    """What :func:`prune` did; ``print(pruned)`` shows it as a table."""

    layers: tuple[PrunedLayer, ...]

    @property
    def numel(self) -> int:
        """Weights in all the layers of ``ratios``."""
        return sum(layer.numel for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Share of them that is zero now, whatever made it so."""
        return sum(layer.zeros for layer in self.layers) / max(1, self.numel)

    @property
    def sparsity_before(self) -> float:
        """Share of them that was zero before (a quantized model has some)."""
        return sum(layer.zeros_before for layer in self.layers) / max(1, self.numel)

    def __getitem__(self, name: str) -> PrunedLayer:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r}; there are {[layer.name for layer in self.layers]}")

    def __str__(self) -> str:
        width = max([5, *(len(layer.name) for layer in self.layers)])
        lines = [f"{'layer':<{width}}  {'weights':>12}  {'asked':>7}  {'zero':>7}  {'before':>7}"]
        lines += [
            f"{x.name:<{width}}  {x.numel:>12,}  {x.ratio:>7.4f}  {x.sparsity:>7.4f}  "
            f"{x.zeros_before / x.numel:>7.4f}"
            for x in self.layers
        ]
        return "\n".join([*lines, "", f"{self.sparsity:.4f} of {self.numel:,} weights are zero, "
                          f"{self.sparsity_before:.4f} were before"])  # fmt: skip


def prune(
    model: nn.Module,
    ratios: Mapping[str, float],
    method: Method,
    batches: Iterable[Any] | None = None,
    *,
    keep_masks: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Pruned:
    """Zero a share of each layer's weights, in place; blocks in order, each fed by pruned ones.

    Any module does: one whose layers lie in a ``ModuleList`` of blocks (causal models and encoders
    of transformers) needs two passes and the activations of one block; any other, a pass a block.
    The model is in evaluation mode meanwhile. The same batches give the same weights.

    Args:
        ratios: share to remove by layer name, as from :func:`~tempbalance.pruning.sparsities`;
            layers that are not named are left alone.
        method: :class:`~tempbalance.pruning.Magnitude`, :class:`~tempbalance.pruning.Wanda` or
            :class:`~tempbalance.pruning.SparseGPT`, or another object of that form.
        batches: calibration data, each a mapping (by name), a tuple (in order) or one tensor; they
            are moved to the model's device. Not needed by ``Magnitude``.
        keep_masks: leave ``torch.nn.utils.prune`` masks, so that fine-tuning keeps the zeros.
        progress: called with the share of the layers (0 to 1) that were just pruned.

    Raises:
        TypeError: if the model is no module or the method no object of its kind.
        ValueError: for a layer that is not there, is not linear or holds NaN, a ratio out of
            range, missing batches, or batches that do not reach a layer; nothing is touched then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"prune needs a torch.nn.Module, got {type(model).__name__}")
    check_kind(
        "method", method, isinstance(method, Method), "an object such as Wanda() or SparseGPT()"
    )
    found = linears(model, ratios, method.pattern)
    before = {name: _zeros(linear) for name, linear in found.items()}
    done = progress or (lambda share: None)

    def remove(linear: Linear, statistic: Statistic | None) -> None:
        linear.write(method(linear.read(), linear.ratio, statistic), keep_masks)

    active = [linear for linear in found.values() if linear.ratio > 0]
    if not any(_needs_data(method, linear) for linear in active):
        for linear in active:
            remove(linear, None)
            done(1 / len(active))
    else:
        given = [] if batches is None else list(batches)
        if not given:
            raise ValueError(f"{method} needs batches: inputs of the model to calibrate on")
        walk(model, active, given, method, remove, done)
    layers = [
        PrunedLayer(name, linear.read().numel(), linear.ratio, _zeros(linear), before[name])
        for name, linear in found.items()
    ]
    return Pruned(tuple(layers))


def _needs_data(method: Method, linear: Linear) -> bool:
    return method.statistic(linear.read()[:1, :1]) is not None  # a corner: statistics are large


def _zeros(linear: Linear) -> int:
    return int((linear.read() == 0).sum())
