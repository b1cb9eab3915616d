"""Multipliers that the released codes for language models print, from given alphas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tempbalance as tb
from tempbalance.assign import Assignment, block_of

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/methods/training.json").read_text())
LLR, CASES = GOLDEN["maps"], GOLDEN["maps"]["cases"]


def about(names: list[str]) -> tb.Population:
    return tb.Population(("Linear",) * len(names), names=tuple(names))


def ours(function: str, low: float, high: float) -> Assignment:
    """The object for a released function's name."""
    maps: dict[str, Assignment] = {
        "linear_map": tb.LinearMap(low, high),
        "sqrt": tb.SqrtShare(),
        "log2": tb.Log2Share(),
        "sigmoid": tb.StandardSigmoid(),
    }
    if function.startswith("negative_"):
        return tb.Reversed(tb.RankMap(low, high) if "step" in function else maps["linear_map"])
    assign = next(maps[name] for name in maps if function.endswith(name))
    return tb.PerBlock(assign) if function.startswith("layer") else assign


# Released in float32, but the linear map and the steps; sqrt and log2 reversed are no maps here:
# one is the inverse of the rate, the other multiplies by L where it should divide.
EXACT = {"tb_linear_map", "layer_linear_map", "negative_tb_linear_map", "negative_tb_step"}
APART = {"negative_tb_sqrt", "negative_tb_log2"}


@pytest.mark.parametrize("code", ["llr", "alphadecay"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['min_ratio']}-{c['max_ratio']}")
def test_maps(case: dict[str, Any], code: str) -> None:
    assert set(case["llr"]) == EXACT | APART | {
        *("tb_sqrt", "tb_log2", "sigmoid", "layer_sqrt", "layer_log2", "layerwise_sigmoid")
    }
    for function in case[code].keys() - APART:
        assign = ours(function, case["min_ratio"], case["max_ratio"])
        got = case["base"] * assign(case["alphas"], about(LLR["names"]))
        tolerance = 1e-12 if function in EXACT else 5e-7
        assert got.tolist() == pytest.approx(case[code][function], rel=tolerance), function


@pytest.mark.parametrize("case", GOLDEN["tb_sigmoid"], ids=lambda c: f"{c['unit']}-{c['func']}")
def test_blocks_of_model_balancing(case: dict[str, Any]) -> None:
    """``layer`` spreads 0.5 to 1.5 within a block; the last linear layer has no vote in blocks."""
    sigmoid = tb.SigmoidMap((case["sigmoid_min"], case["sigmoid_max"]), case["tau"])
    across: Assignment = {
        "sigmoid": sigmoid,
        "linear_map": tb.LinearMap(0.5, 1.5),
        "rank": tb.RankMap(0.5, 1.5),
    }[case["func"]]
    names, alphas = case["names"], case["alphas"]
    if case["unit"].startswith("per-layer"):
        assign = across
    else:
        alphas = [*alphas[:-1], float("nan")]
        inside = tb.LinearMap(0.5, 1.5) if case["unit"] == "layer" else tb.Constant(1.0)
        assign = tb.PerBlock(inside, across=across)
        assert block_of(names[0]) == "roberta.encoder.layer.0"
    got = case["base"] * assign(alphas, about(names))
    assert got.tolist() == pytest.approx(case["lr"], rel=1e-12)
