"""The figures that the published pruning codes print: see tests/golden/methods/README.md."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

METHODS = Path(__file__).resolve().parents[1] / "golden" / "methods"


@cache
def figures(name: str) -> dict[str, Any]:
    return dict(json.loads((METHODS / f"{name}.json").read_text()))


@cache
def arrays() -> dict[str, Tensor]:
    with np.load(METHODS / "pruning.npz") as found:
        return {name: torch.from_numpy(found[name]) for name in found}


def by_block(alphas: list[float], sizes: list[float]) -> tuple[Tensor, Tensor]:
    """Mean alpha and size of each block of seven matrices."""
    a, p = torch.tensor(alphas, dtype=torch.float64), torch.tensor(sizes, dtype=torch.float64)
    return a.view(-1, 7).mean(1), p.view(-1, 7).sum(1)


def network() -> nn.Module:
    """The matrices of pruning.npz as a model with an embedding, norms and a head."""
    model = nn.Module()
    model.embed = nn.Embedding(200, 96)
    model.layers = nn.ModuleList()
    for name in figures("pruning")["order"]:
        block, group, projection = name.split(".")
        while len(model.layers) <= int(block):
            model.layers.append(nn.ModuleDict({"norm": nn.LayerNorm(96)}))
        parts = model.layers[int(block)]
        if group not in parts:
            parts[group] = nn.ModuleDict()
        weight = arrays()[f"W/{name}"]
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight.clone()
        parts[group][projection] = linear
    model.head = nn.Linear(96, 200)
    return model
