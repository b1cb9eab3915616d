"""Fused: weights that are several projections in one, told by the user or by name and shape."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from typing import Literal

from torch import nn

from tempbalance.layers.walk import join
from tempbalance.layers.weight import Weight
from tempbalance.readers import Matrix, split

Fused = Mapping[str, int | tuple[int, ...]]


class Splitter:
    """Cuts fused weights into their parts, and remembers which patterns were of use.

    Args:
        fused: as for :func:`~tempbalance.layers.find.find_layers`.
    """

    def __init__(self, fused: Fused | Literal[False] | None) -> None:
        self.fused: Fused = fused or {}
        self.alone = fused is not False  # whether a qkv is found without being told
        self.unmatched = set(self.fused)

    def parts(self, name: str, parent: nn.Module | None, weight: Weight) -> Iterator[Weight]:
        """The parts of a weight of the module ``name``, or the weight itself."""
        matrix = weight.matrix
        cut: Iterator[Matrix] = iter([matrix])
        if not matrix.part and not matrix.reason:
            pattern = self._pattern(name, join(name, matrix.parameter))
            if pattern is not None:
                self.unmatched.discard(pattern)
                cut = split(matrix, self.fused[pattern])
            elif self.alone and _is_qkv(name, parent, weight):
                cut = split(matrix, 3, _heads(parent))
        return (Weight(weight.module, part) for part in cut)

    def _pattern(self, *names: str) -> str | None:
        return next((p for p in self.fused if any(fnmatch.fnmatchcase(n, p) for n in names)), None)


def _is_qkv(name: str, parent: nn.Module | None, weight: Weight) -> bool:
    """Whether a weight is query, key and value in one: by name, type and shape."""
    if name.rpartition(".")[2] != "qkv" or not isinstance(_innermost(weight.module), nn.Linear):
        return False
    if getattr(parent, "val_dim", None) != getattr(parent, "key_dim", None):
        return False  # values are wider than queries and keys
    form = weight.form()
    return not form.reason and form.shape[1] == 3 * form.shape[2]


def _heads(parent: nn.Module | None) -> int | None:
    """How many heads keep their q, k and v together: timm's MaxViT, CoAtNet and TinyViT."""
    if getattr(parent, "head_first", False) or hasattr(parent, "val_dim"):
        return int(getattr(parent, "num_heads", 1))
    return None


def _innermost(module: nn.Module) -> nn.Module:
    """The layer inside of LoRA."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module
