"""Traps over a training: named where they persist and grow, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tempbalance.analysis.watch import TrapWatch
from tempbalance.layers import find_layers


def test_traps_that_persist_and_grow_are_named() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict(
        {name: nn.Linear(100, 100) for name in ("grows", "stays", "shrinks", "none")}
    )
    layers = find_layers(net).layers
    watch = TrapWatch(looks=3)
    said = []
    with torch.no_grad():
        for size in (6, 8, 10):  # a single entry, in units of ten standard deviations
            net["grows"].weight[3, 4] = size * 0.3  # type: ignore[index, operator]
            net["stays"].weight[3, 4] = 3.0  # type: ignore[index, operator]
            net["shrinks"].weight[3, 4] = (16 - size) * 0.3  # type: ignore[index, operator]
            found = watch.look(layers)
            said.append(watch.message())
    assert found["grows"].traps == found["stays"].traps == 1 and found["none"].traps == 0
    assert said[:2] == ["", ""]
    assert watch.rising() == ["grows"]
    assert "3 looks and grow in grows." in said[2]


def test_a_trap_that_comes_and_goes_is_not_named() -> None:
    net = nn.ModuleDict({"fc": nn.Linear(100, 100)})
    watch = TrapWatch(looks=2)
    with torch.no_grad():
        for size in (3.0, 0.0, 4.0):
            net["fc"].weight[3, 4] = size  # type: ignore[index, operator]
            watch.look(find_layers(net).layers)
            assert not watch.message()
    with pytest.raises(ValueError, match="at least 2"):
        TrapWatch(looks=1)
