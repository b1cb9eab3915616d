"""Rates and decays of one optimizer whose param groups are not the same: who shares what."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

import tempbalance as tb

RATE, DECAY = 0.01, 0.1
NORMS = {"LayerNorm": 1.0}
# Norms with their layers for both, apart for one, for the other; a table and a layer by hand.
FIXED: list[tuple[dict[str, float] | None, dict[str, float] | None]] = [
    (None, None),
    (NORMS, None),
    (None, NORMS),
    (None, {"LayerNorm": 2.0}),
    ({"4": 2.0, "Embedding": 3.0}, None),
    (None, {"Embedding": 3.0, "4": 0.5}),
]


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Linear(24, 24), nn.LayerNorm(24), nn.Linear(24, 24), nn.LayerNorm(24),
            nn.Linear(24, 16), nn.Embedding(4, 24),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self[5](torch.arange(len(x)) % 4)
        for module in list(self)[:5]:
            x = module(x)
        return x


FOLLOWS = {"1": "0", "3": "2"}


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def train(model: nn.Module, optimizer: Any, index: int) -> None:
    generator = torch.Generator().manual_seed(index)
    optimizer.zero_grad()
    x = torch.randn(8, 24, generator=generator, dtype=torch.float64)
    model(x).square().mean().backward()
    optimizer.step()


def build(order: str, rates: Any, decays: Any, make: Any = AdamW) -> list[Any]:
    model = net()
    optimizer = make(model.parameters(), lr=RATE, weight_decay=DECAY)
    cosine = CosineAnnealingLR(optimizer, 20)
    makers = {
        "rate": lambda: tb.TempBalanceLR(optimizer, model, cosine, every=2, fixed=rates),
        "decay": lambda: tb.AlphaDecay(optimizer, model, every=3, fixed=decays),
    }
    made = {name: makers[name]() for name in order.split()}
    return [model, optimizer, made["rate"], made["decay"]]


def wanted(multipliers: dict[str, float], fixed: Any, name: str, follow: bool) -> float:
    """The multiplier of a parameter: its module's, or that of the layer which a norm follows."""
    module = name.partition(".")[0]
    if module in FOLLOWS and not (fixed and "LayerNorm" in fixed):
        return multipliers[FOLLOWS[module]] if follow else 1.0
    return multipliers.get(module, 1.0)


def factors(optimizer: Any, field: str, base: float) -> dict[int, float]:
    return {id(p): g[field] / base for g in optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize("fixed", FIXED, ids=str)
@pytest.mark.parametrize("order", ["rate decay", "decay rate"])
def test_each_parameter_has_its_own_rate_and_decay_to_the_end(order: str, fixed: Any) -> None:
    model, optimizer, rate, decay = build(order, *fixed)
    for index in range(7):
        base = rate.get_base_lr()[0]
        rates, decays = factors(optimizer, "lr", base), factors(optimizer, "weight_decay", DECAY)
        for name, p in model.named_parameters():
            assert rates[id(p)] == pytest.approx(wanted(rate.multipliers, fixed[0], name, True))
            assert decays[id(p)] == pytest.approx(wanted(decay.multipliers, fixed[1], name, False))
        train(model, optimizer, index)
        rate.step()
        decay.step()
    rate.detach()
    decay.detach()
    assert {g["weight_decay"] for g in optimizer.param_groups} == {DECAY}
    assert len({g["lr"] for g in optimizer.param_groups}) == 1


@pytest.mark.parametrize("fixed", FIXED, ids=str)
@pytest.mark.parametrize("order", ["rate decay", "decay rate"])
def test_resumed_where_their_groups_differ(order: str, fixed: Any) -> None:
    def go(things: list[Any], start: int, stop: int) -> None:
        for index in range(start, stop):
            train(things[0], things[1], index)
            things[2].step()
            things[3].step()

    whole, first, again = (build(order, *fixed) for _ in range(3))
    go(whole, 0, 8)
    go(first, 0, 4)
    with torch.no_grad():
        for p in again[0].parameters():
            p.add_(1.0)
    for thing, state in zip(again, [copy.deepcopy(x.state_dict()) for x in first], strict=True):
        thing.load_state_dict(state)
    go(again, 4, 8)
    for p, q in zip(whole[0].parameters(), again[0].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("make", [AdamW, Adam, SGD])
@pytest.mark.parametrize("fixed", FIXED, ids=str)
def test_hooks_are_the_two_objects(fixed: Any, make: Any) -> None:
    """The groups stay whole between steps, and every step is that of a group a layer."""
    model, optimizer, rate, decay = build("rate decay", *fixed, make)
    here = net()
    mine = make(here.parameters(), lr=RATE, weight_decay=DECAY)
    cosine = CosineAnnealingLR(mine, 20)
    hooks = tb.StepHooks(mine, here, every=2, fixed=fixed[0], decay={"every": 3, "fixed": fixed[1]})
    for index in range(7):
        train(model, optimizer, index)
        rate.step()
        decay.step()
        train(here, mine, index)
        cosine.step()
    assert hooks.decay_multipliers == pytest.approx(decay.multipliers, rel=1e-9)
    for p, q in zip(model.parameters(), here.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("how", [tb.TempBalanceLR, tb.StepHooks])
def test_keep_decay_is_true_or_false(how: Any) -> None:
    model = net()
    with pytest.raises(TypeError, match="keep_decay must be True or False, got 'yes'"):
        how(SGD(model.parameters(), RATE), model, keep_decay="yes")


@pytest.mark.parametrize("order", ["rate decay", "decay rate"])
def test_a_group_added_later_is_split_for_both(order: str) -> None:
    model, optimizer, rate, decay = build(order, None, None)
    model.append(nn.Linear(24, 24).double())
    model.append(nn.LayerNorm(24).double())
    late = [*model[6].parameters(), *model[7].parameters()]
    optimizer.add_param_group({"params": late, "lr": RATE})
    for index in range(7):
        train(model, optimizer, index)
        rate.step()
        decay.step()
    rates = factors(optimizer, "lr", rate.get_base_lr()[0])
    decays = factors(optimizer, "weight_decay", DECAY)
    assert rate.multipliers["6"] != 1.0 and decay.multipliers["6"] != 1.0
    for p in model[6].parameters():
        assert rates[id(p)] == pytest.approx(rate.multipliers["6"])
        assert decays[id(p)] == pytest.approx(decay.multipliers["6"])
    for p in model[7].parameters():
        assert rates[id(p)] == pytest.approx(rate.multipliers["6"])
        assert decays[id(p)] == pytest.approx(1.0)
    rate.detach()
    decay.detach()
    assert {g["weight_decay"] for g in optimizer.param_groups} == {DECAY}


@pytest.mark.parametrize("fixed", [None, NORMS], ids=str)
@pytest.mark.parametrize(
    ("saved", "order"), [("plain", "rate decay"), ("plain", "decay rate"), ("rate", "rate decay")]
)
def test_a_checkpoint_that_knows_no_decay_is_measured(saved: str, order: str, fixed: Any) -> None:
    """Of a run without balancing, or of one that balances rates alone in the same groups."""
    model = net()
    optimizer = AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    cosine = CosineAnnealingLR(optimizer, 20)
    rate = tb.TempBalanceLR(optimizer, model, cosine, fixed=NORMS) if saved == "rate" else cosine
    with torch.no_grad():
        for index, p in enumerate(model.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(index)))
    train(model, optimizer, 0)
    rate.step()
    things = build(order, NORMS, fixed)
    before = things[3].multipliers
    states = [x.state_dict() for x in (model, optimizer, rate)]
    for thing, state in zip(things, copy.deepcopy(states), strict=False):
        thing.load_state_dict(state)
    expected = tb.AlphaDecay(optimizer, model, fixed=fixed).multipliers
    assert things[3].multipliers == pytest.approx(expected, rel=1e-9)
    assert things[3].multipliers != before
    assert things[3].layer_decays["0"] == pytest.approx(DECAY * expected["0"])


RATES: dict[str, Any] = {
    "TempBalanceLR": lambda o, m: tb.TempBalanceLR(o, m, keep_decay=True),
    "StepHooks": lambda o, m: tb.StepHooks(o, m, keep_decay=True),
    "StepHooks with decay": lambda o, m: tb.StepHooks(o, m, decay={}),
}


@pytest.mark.parametrize(
    ("name", "decay_first"),
    [*((name, False) for name in RATES), ("TempBalanceLR", True), ("StepHooks", True)],
)
def test_two_that_would_write_the_decay(name: str, decay_first: bool, recwarn: Any) -> None:
    """keep_decay and an AlphaDecay, in either order: the second is refused, the first goes on."""
    model = net()
    optimizer = AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    makers = [RATES[name], tb.AlphaDecay]
    first, second = makers[::-1] if decay_first else makers
    kept = first(optimizer, model)
    before = [{**group} for group in optimizer.param_groups]
    owner = type(kept).__name__
    with pytest.raises(ValueError, match=rf"a {owner} writes the weight decay.*keep_decay.*detach"):
        second(optimizer, model)
    assert optimizer.param_groups == before and kept.multipliers
    assert not recwarn.list
    kept.detach()
    assert second(optimizer, model).multipliers


def test_hooks_with_decay_take_the_place_of_an_alpha_decay() -> None:
    model = net()
    optimizer = AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    first = tb.AlphaDecay(optimizer, model)
    with pytest.warns(tb.BalanceWarning, match="was balanced already"):
        hooks = tb.StepHooks(optimizer, model, decay={})
    assert not first.multipliers and hooks.decay_multipliers
    assert {group["weight_decay"] for group in optimizer.param_groups} == {DECAY}
