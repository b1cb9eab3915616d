"""Depth: the blocks of a network by the names of its layers, and rates by depth, without alpha."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tempbalance.assign.contract import Alphas, Population, check_positive, vector


def block_of(name: str) -> str:
    """The block of a layer: its name up to the first numbered module that holds more than it.

    >>> block_of("layer1.0.downsample.0"), block_of("h.3.attn.c_attn"), block_of("conv1")
    ('layer1.0', 'h.3', 'conv1')
    """
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if _numbered(part):
            return ".".join(parts[: i + 1])
    return ".".join(parts[:-1]) or name


def _numbered(part: str) -> bool:
    return re.fullmatch(r"(.*_)?\d+", part) is not None


def role_of(name: str) -> str:
    """What a layer does in its block: the last part of its name that is no number or wrapper.

    >>> role_of("model.layers.3.self_attn.q_proj"), role_of("features.0")
    ('q_proj', 'features')
    >>> role_of("base_model.model.layers.3.self_attn.q_proj.base_layer")  # of peft
    'q_proj'
    """
    parts = [p for p in name.split(".") if not p.isdigit() and p not in ("base_layer", "default")]
    return parts[-1] if parts else name


def heights(names: Sequence[str]) -> list[int]:
    """How many blocks lie above each layer, from its name; layers in definition order.

    Blocks are the numbered modules that hold layers (``layer1.0``, ``h.3``). Layers before the
    first block (embedding, stem) lie one below it; a layer after a block that belongs to none
    (head, pooler) lies with the block before. Without a block, every layer is one.

    >>> heights(["embed", "h.0.a", "h.0.b", "h.1.a", "h.1.b", "head"])
    [2, 1, 1, 0, 0, 0]
    """
    blocks = [block_of(name) for name in names]
    in_one = [
        block != name and _numbered(block.rpartition(".")[2])
        for block, name in zip(blocks, names, strict=True)
    ]
    if not any(in_one):
        return list(range(len(names)))[::-1]
    places: dict[str, int] = {}
    depth, found = 0, []
    for block, inside in zip(blocks, in_one, strict=True):
        if inside:
            depth = places.setdefault(block, len(places) + 1)
        found.append(depth)
    return [len(places) - depth for depth in found]


class _ByDepth:
    uses_alphas = False
    once = True

    def __call__(self, alphas: Alphas, kinds: Sequence[str] | None = None) -> Tensor:
        count = len(vector(alphas))
        above = heights(Population.of(kinds, count).named(self))
        return self._rates(torch.tensor(above, dtype=torch.float64, device="cpu"))

    def _rates(self, above: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class DepthDecay(_ByDepth):
    """Layer-wise rate decay: ``rate`` to the power of the blocks above a layer.

    The last block and the head have 1, each block below ``rate`` times that of the next, and what
    comes before the first block ``rate`` times its own. Embeddings are not measured, so that they
    are no part of an assignment: name them in ``fixed``, ``rate`` to the number of blocks.

    Raises:
        ValueError: if rate is not positive, or when called without the names of the layers.

    Source: ULMFiT (Howard and Ruder 2018), as BERT and vision transformers are fine-tuned.
    """

    rate: float = 0.9

    def __post_init__(self) -> None:
        check_positive(self, rate=self.rate)

    def _rates(self, above: Tensor) -> Tensor:
        return self.rate**above


@dataclass(frozen=True)
class DepthLinear(_ByDepth):
    """``s1`` at the lowest block, ``s2`` at the last, linear in blocks between.

    The control of a gain by alpha in networks whose alpha follows depth.

    Raises:
        ValueError: if s1 or s2 is not positive, or when called without the names of the layers.
    """

    s1: float = 0.5
    s2: float = 1.5

    def __post_init__(self) -> None:
        check_positive(self, s1=self.s1, s2=self.s2)

    def _rates(self, above: Tensor) -> Tensor:
        if not len(above) or not above.any():
            return torch.ones_like(above)
        share = above / above.max()
        return self.s1 * share + self.s2 * (1 - share)
