"""Rates by depth: blocks, not layers, counted from the top."""

from __future__ import annotations

import pytest
from torch import nn

import tempbalance as tb
from tempbalance.layers.find import find_layers


def by_depth(assign: tb.DepthDecay | tb.DepthLinear, names: list[str]) -> dict[str, float]:
    about = tb.Population(("Linear",) * len(names), names=tuple(names))
    return dict(zip(names, assign([2.0] * len(names), about).tolist(), strict=True))


BERT = [
    "embeddings.projection",
    *(f"encoder.layer.{i}.{part}" for i in range(4) for part in ("query", "output.dense")),
    "pooler.dense",
    "classifier",
]


def test_rates_fall_by_blocks_from_the_top() -> None:
    got = by_depth(tb.DepthDecay(0.5), BERT)
    for i in range(4):
        assert got[f"encoder.layer.{i}.query"] == got[f"encoder.layer.{i}.output.dense"]
        assert got[f"encoder.layer.{i}.query"] == 0.5 ** (3 - i)
    assert got["embeddings.projection"] == 0.5**4
    assert got["pooler.dense"] == got["classifier"] == 1.0


def test_the_linear_control_spans_both_ends() -> None:
    got = by_depth(tb.DepthLinear(0.5, 1.5), BERT)
    blocks = [got[f"encoder.layer.{i}.query"] for i in range(4)]
    assert [got["embeddings.projection"], *blocks] == [0.5, 0.75, 1.0, 1.25, 1.5]
    assert got["classifier"] == 1.5
    assert by_depth(tb.DepthLinear(), ["h.0.a", "h.0.b", "head"]) == dict.fromkeys(
        ["h.0.a", "h.0.b", "head"], 1.0
    )


def test_stages_count_on_and_a_shortcut_is_of_its_block() -> None:
    names = ["conv1", "layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.down.0", "fc"]
    got = by_depth(tb.DepthDecay(0.5), names)
    assert list(got.values()) == [0.125, 0.25, 0.5, 1.0, 1.0, 1.0]


def test_without_blocks_every_layer_is_one() -> None:
    model = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20), nn.Linear(20, 5))
    names = [layer.name for layer in find_layers(model).layers]
    assert list(by_depth(tb.DepthDecay(0.5), names).values()) == [0.25, 0.5, 1.0]
    assert by_depth(tb.DepthDecay(), []) == {}


def test_errors_name_the_cure() -> None:
    with pytest.raises(ValueError, match=r"DepthDecay needs the names.*Population"):
        tb.DepthDecay()([2.0, 3.0], ["Linear", "Linear"])
    with pytest.raises(ValueError, match="DepthDecay: rate must be positive"):
        tb.DepthDecay(0.0)
    with pytest.raises(ValueError, match="DepthLinear: s2 must be positive"):
        tb.DepthLinear(0.5, -1.0)
