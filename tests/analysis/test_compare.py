"""Comparison: a change in units of what two random matrices differ by."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import tempbalance as tb


def random_net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(*[nn.Linear(40, 40, bias=False) for _ in range(12)])
    for weight in net.parameters():
        nn.init.normal_(weight)
    return net


def test_two_random_networks_differ_by_about_one_unit() -> None:
    a, b = (tb.analyze(random_net(seed)) for seed in (0, 1))
    result = tb.compare(a, b)
    units = np.array([x.units for x in result.layers], dtype=float)
    # 12 differences of standard deviation 1, whose unit is itself known to a quarter.
    assert 0.5 < units.std() < 1.7
    assert not result.moved
    assert "0 moved by more than 3 units" in result.summary()[1]


def test_a_layer_that_moved_is_named() -> None:
    net = random_net(0)
    a = tb.analyze(net)
    with torch.no_grad():
        net[3].weight.mul_(torch.exp(torch.randn(40, 1)))  # type: ignore[index, operator]
        net[5].weight.mul_(2.0)  # type: ignore[index, operator]
    result = tb.compare(a, tb.analyze(net))
    assert [x.name for x in result.moved] == ["3"]
    by_name = {x.name: x for x in result.layers}
    assert by_name["5"].units == pytest.approx(0, abs=1e-3)
    assert by_name["5"].norm_ratio == pytest.approx(2.0)
    (far,) = result.moved
    assert far.difference is not None and far.noise is not None
    assert far.units == pytest.approx(far.difference / far.noise)
    json.dumps(result.to_dict(), allow_nan=False)


def test_the_unit_is_the_noise_of_two_random_matrices() -> None:
    net = random_net(0)
    result = tb.compare(tb.analyze(net), tb.analyze(random_net(1)))
    for layer in result.layers:
        null = tb.null_alpha(layer.shape)
        assert layer.random == null.mean
        assert layer.noise == pytest.approx(null.std * 2**0.5)


def test_reports_of_different_methods_do_not_compare() -> None:
    net = random_net(0)
    with pytest.raises(ValueError, match="different ways"):
        tb.compare(tb.analyze(net), tb.analyze(net, min_eigs=5))
