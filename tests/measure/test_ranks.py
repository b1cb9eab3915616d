"""Ranks: where their collectives run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tempbalance.measure import ranks


def on(device: str) -> Any:
    where = torch.device(device)
    return SimpleNamespace(device=where, is_cuda=where.type == "cuda")


def test_nccl_runs_where_the_weights_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the current device: with one process a GPU it is the first one for all of them."""
    group: Any = object()
    monkeypatch.setattr(ranks.dist, "get_backend", lambda _: "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    near: list[Tensor] = [on("cpu"), on("cuda:3"), on("cuda:1")]
    assert ranks.collective_device(group, near) == torch.device("cuda", 3)
    assert ranks.collective_device(group, [on("cpu")]) == torch.device("cuda", 0)
    monkeypatch.setattr(ranks.dist, "get_backend", lambda _: "gloo")
    assert ranks.collective_device(group, near) == torch.device("cpu")
