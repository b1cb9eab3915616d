"""AlphaDecay and ``decay=``: weight decay by layer, held against loops written by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from optimizers import Kind, net, weights
from schedules import SCHEDULES
from torch import nn

import tempbalance as tb
from tempbalance import AlphaDecay, Constant, StepHooks, TempBalanceLR
from tempbalance.balance import tracker

FACTORS = {"0": 0.5, "2": 3.0}
ADAMW = Kind(torch.optim.AdamW, options=(("lr", 0.01), ("weight_decay", 0.2)))
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")


def decays(optimizer: Any) -> list[float]:
    return [group["weight_decay"] for group in optimizer.param_groups]


@pytest.mark.parametrize("hooked", [False, True])
def test_decay_by_layer_is_that_of_groups_by_hand(hooked: bool) -> None:
    model, optimizer = ADAMW.build(split=True)
    for group, factor in zip(optimizer.param_groups, FACTORS.values(), strict=True):
        group["weight_decay"] = group["weight_decay"] * factor
    here, mine = ADAMW.build()
    if hooked:
        StepHooks(mine, here, assign=Constant(1.0), decay={"fixed": FACTORS})
    else:
        AlphaDecay(mine, here, fixed=FACTORS)
        assert decays(mine) == decays(optimizer) == [0.1, pytest.approx(0.6)]
    for i in range(6):
        ADAMW.step(model, optimizer, i)
        ADAMW.step(here, mine, i)
    assert weights(here).equal(weights(model))


def test_the_published_loop_by_hand() -> None:
    """Measured every ``every`` steps; 2/3 to 5 between the extremes, linear between them."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(24, 24, bias=False) for _ in range(4)))
    twin = copy.deepcopy(model)
    mine = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    hand = torch.optim.AdamW([{"params": [x.weight]} for x in twin], lr=0.02, weight_decay=0.1)
    decay = AlphaDecay(mine, model, every=3)
    seen = []
    for i in range(10):
        if i % 3 == 0:
            found = tb.analyze(twin)
            alphas = torch.tensor([x.alpha for x in found], dtype=torch.float64)
            share = (alphas - alphas.min()) / (alphas.max() - alphas.min())
            factors = (2 / 3 + share * (5 - 2 / 3)).tolist()
            for group, factor in zip(hand.param_groups, factors, strict=True):
                group["weight_decay"] = 0.1 * factor
        assert decays(mine) == pytest.approx(decays(hand), rel=1e-12)
        seen.append(tuple(decays(mine)))
        for network, optimizer in ((model, mine), (twin, hand)):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(i)
            network(torch.randn(8, 24, generator=generator)).square().sum().backward()
            optimizer.step()
        decay.step()
    torch.testing.assert_close(weights(model), weights(twin), rtol=0, atol=1e-7)
    assert len(set(seen)) == 4
    assert {group["lr"] for group in mine.param_groups} == {0.02}


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """As practitioners write them: no decay for biases."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    return [
        {"params": matrices, "weight_decay": 0.2},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


def test_groups_without_decay_stay_without() -> None:
    model = net()
    optimizer = torch.optim.AdamW(_groups(model), lr=0.01)
    AlphaDecay(optimizer, model, fixed=FACTORS)
    by_id = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert [by_id[id(p)] for p in model.parameters()] == [0.1, 0.0, pytest.approx(0.6), 0.0]
    plain = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    with pytest.raises(ValueError, match=r"no param group.*weight_decay above 0"):
        AlphaDecay(plain, model)


def test_normalize_keeps_the_mean_over_parameters() -> None:
    torch.manual_seed(0)
    sizes = [(40, 20), (20, 60), (60, 12)]
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    AlphaDecay(optimizer, model, normalize=True)
    counts = [sum(p.numel() for p in g["params"]) for g in optimizer.param_groups]
    mean = sum(n * d for n, d in zip(counts, decays(optimizer), strict=True)) / sum(counts)
    assert mean == pytest.approx(0.1, rel=1e-12)
    assert len(set(decays(optimizer))) == 3


@pytest.mark.parametrize("order", ["rate first", "decay first", "decay alone"])
def test_saved_at_any_step(order: str) -> None:
    """With a schedule built before, in either order of construction."""

    def build(seed: int) -> Any:
        model, optimizer = ADAMW.build()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(seed)
        cosine = SCHEDULES["cosine"](optimizer)
        made: dict[str, Any] = {}
        if order == "decay first":
            made["decay"] = AlphaDecay(optimizer, model, every=3, ramp=2)
        if order != "decay alone":
            made["rate"] = TempBalanceLR(optimizer, model, cosine, every=2)
        if "decay" not in made:
            made["decay"] = AlphaDecay(optimizer, model, every=3, ramp=2)
        return [model, optimizer, made.get("rate", cosine), made["decay"]]

    def go(things: Any, start: int, stop: int) -> list[Any]:
        model, optimizer, schedule, decay = things
        seen = []
        for i in range(start, stop):
            ADAMW.step(model, optimizer, i)
            schedule.step()
            decay.step()
            seen.append([(g["lr"], g["weight_decay"]) for g in optimizer.param_groups])
        return seen

    whole = build(0)
    seen: list[Any] = []
    saved = {}
    for step in (0, 1, 4, 7, 10):
        seen += go(whole, len(seen), step)
        saved[step] = [copy.deepcopy(x.state_dict()) for x in whole]
    for step in (0, 1, 4, 7):
        again = build(1)
        for thing, state in zip(again, saved[step], strict=True):
            thing.load_state_dict(state)
        assert go(again, step, 10) == seen[step:]
        assert weights(again[0]).equal(weights(whole[0]))
    assert len({decay for row in seen for _, decay in row}) > 2
    assert len({rate for row in seen for rate, _ in row}) > 5


@pytest.mark.parametrize("decay_first", [False, True])
def test_together_with_rates_a_weight_is_measured_once(
    decay_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tempbalance.balance import shared

    calls = []
    attempt = shared.attempt

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return attempt(*arguments)

    monkeypatch.setattr(shared, "attempt", counted)
    monkeypatch.setattr(tracker, "attempt", counted)
    model, optimizer = ADAMW.build()
    makers: list[Any] = [
        lambda: TempBalanceLR(optimizer, model, every=2),
        lambda: AlphaDecay(optimizer, model, every=2),
    ]
    both = [make() for make in (makers[::-1] if decay_first else makers)]
    assert len(calls) == 1
    for i in range(4):
        ADAMW.step(model, optimizer, i)
        for one in both:
            one.step()
    assert len(calls) == 3
    assert both[0].alphas == both[1].alphas
    both[0].detach()
    both[1].detach()
    assert decays(optimizer) == [0.2, 0.2]
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.01]


@pytest.mark.parametrize("name", ["cosine", "onecycle", "sequential", "lambda"])
def test_a_schedule_that_was_built_before_goes_on(name: str) -> None:
    model, optimizer = ADAMW.build()
    schedule = SCHEDULES[name](optimizer)
    twin, other = ADAMW.build()
    alone = SCHEDULES[name](other)
    AlphaDecay(optimizer, model, fixed=FACTORS)
    for i in range(8):
        ADAMW.step(model, optimizer, i)
        ADAMW.step(twin, other, i)
        schedule.step()
        alone.step()
        assert {group["lr"] for group in optimizer.param_groups} == {other.param_groups[0]["lr"]}
    assert decays(optimizer) == [0.1, pytest.approx(0.6)]


def test_tied_weights_have_one_decay() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"in": nn.Embedding(32, 16), "mid": nn.Linear(16, 16), "out": nn.Linear(16, 32, bias=False)}
    )
    model["out"].weight = model["in"].weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    AlphaDecay(optimizer, model, fixed={"in": 3.0, "mid": 0.5})
    held = [g for g in optimizer.param_groups if any(p is model["in"].weight for p in g["params"])]
    assert [group["weight_decay"] for group in held] == [pytest.approx(0.3)]


# --- the rate without the decay, and clocks that end ---------------------------------------------


@pytest.mark.parametrize("hooked", [False, True])
def test_keep_decay_scales_the_gradients_part_alone(hooked: bool) -> None:
    """AdamW takes rate x decay off a weight: without a gradient that is the plain run's."""
    model, optimizer = ADAMW.build()
    how: Any = StepHooks if hooked else TempBalanceLR
    how(optimizer, model, fixed=FACTORS, keep_decay=True)
    start = weights(model).clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(weights(model), start * (1 - 0.01 * 0.2))


@pytest.mark.parametrize("how", [TempBalanceLR, StepHooks])
def test_hold_keeps_the_multipliers_of_its_tick(how: Any) -> None:
    model, optimizer = ADAMW.build()
    balance = how(optimizer, model, every=1, hold=3)
    seen = []
    for i in range(6):
        ADAMW.step(model, optimizer, i)
        balance.step() if how is TempBalanceLR else None
        seen.append(sorted(balance.multipliers.items()))
    assert seen[2:] == [seen[2]] * 4 and balance.balancer.measurements == 3


def test_ends_are_counted_among_what_is_balanced_or_what_can_be_measured() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), *(nn.Linear(16, 16) for _ in range(3)))
    found = {}
    for ends in ("balanced", "measurable"):
        balancer = tb.Balancer(model, skip_first=True, ends=ends)
        found[ends] = [layer.name for layer in balancer.layers]
    assert found == {"balanced": ["2", "3"], "measurable": ["1", "2", "3"]}


@pytest.mark.parametrize("both", [False, True])
def test_hooks_with_decay_are_resumed(both: bool) -> None:
    def build() -> Any:
        model, optimizer = ADAMW.build()
        assign: Any = tb.LinearMap() if both else Constant(1.0)
        return [
            model,
            optimizer,
            StepHooks(optimizer, model, every=2, assign=assign, decay={"every": 3}),
        ]

    whole, first = build(), build()
    for i in range(9):
        ADAMW.step(*whole[:2], i)
    for i in range(4):
        ADAMW.step(*first[:2], i)
    again = build()
    for thing, state in zip(again, [copy.deepcopy(x.state_dict()) for x in first], strict=True):
        thing.load_state_dict(state)
    for i in range(4, 9):
        ADAMW.step(*again[:2], i)
    assert weights(again[0]).equal(weights(whole[0]))
    assert again[2].decay_multipliers == whole[2].decay_multipliers != {}
