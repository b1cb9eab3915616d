"""TempBalanceLR: rate = base rate x multiplier under every schedule, and no way to break a run."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from releases import SWA_STATE_IS_PLAIN, TENSOR_RATE_IN_SEQUENCE, needs_names
from schedules import (
    ASSIGNMENTS,
    OPTIMIZERS,
    SCHEDULES,
    advance,
    net,
    rates,
    train_step,
    weights,
)
from torch import nn
from torch.optim import lr_scheduler as lrs

import tempbalance as tb
from tempbalance import BalanceWarning, TempBalanceLR


def expected(scheduler: TempBalanceLR, base_rate: float) -> list[float]:
    factors = scheduler.grouping.factors(scheduler.multipliers)
    return [base_rate if f == 1.0 else base_rate * f for f in factors]


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_rate_is_base_times_multiplier(name: str, optimizer_name: str) -> None:
    """Against a twin optimizer that runs the schedule alone, at every step, exactly."""
    if optimizer_name == "adamw_tensor_lr" and name in ("multiplicative", "onecycle", "cyclic"):
        pytest.skip("the schedule itself does not take a tensor rate")
    if (name, optimizer_name) == ("sequential", "adamw_tensor_lr") and not TENSOR_RATE_IN_SEQUENCE:
        pytest.skip("SequentialLR itself goes wrong with a tensor rate before torch 2.8")
    model, twin = net(), net()
    make, schedule = OPTIMIZERS[optimizer_name], SCHEDULES[name]
    optimizer, plain = make(model.parameters()), make(twin.parameters())
    scheduler = TempBalanceLR(optimizer, model, schedule(optimizer), every=2)
    alone = schedule(plain)
    assert len({round(r, 9) for r in rates(optimizer)}) > 1, "the multipliers must differ"
    for i in range(12):
        train_step(model, optimizer, i)
        train_step(twin, plain, i)
        base = plain.param_groups[0]["lr"]
        wanted = expected(scheduler, base)
        assert [float(w) for w in wanted] == rates(optimizer), f"step {i}"
        assert [float(r) for r in scheduler.get_base_lr()] == [float(base)] * len(wanted)
        for key in ("momentum", "betas"):  # cycled by OneCycleLR and CyclicLR
            if key in plain.param_groups[0]:
                assert all(g[key] == plain.param_groups[0][key] for g in optimizer.param_groups)
        advance(scheduler, name, i)
        advance(alone, name, i)


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_every_assignment_gives_positive_finite_rates(name: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = TempBalanceLR(
        optimizer, model, lrs.CosineAnnealingLR(optimizer, 5), assign=ASSIGNMENTS[name]
    )
    for i in range(5):
        train_step(model, optimizer, i)
        assert all(math.isfinite(r) and r > 0 for r in rates(optimizer))
        scheduler.step()
    assert set(scheduler.multipliers) == {"0", "3", "8", "10"}


def test_hand_worked_rates() -> None:
    """Four layers whose multipliers are given by hand, under StepLR."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layers = ("0", "3", "8", "10")
    factors = dict(zip(layers, (0.5, 0.75, 1.0, 1.5), strict=True))
    scheduler = TempBalanceLR(optimizer, model, lrs.StepLR(optimizer, 2, 0.1), fixed=factors)
    assert scheduler.multipliers == factors
    optimizer.step()
    scheduler.step()  # 0.1
    assert rates(optimizer) == pytest.approx([0.05, 0.075, 0.1, 0.15], abs=1e-15)
    scheduler.step()  # 0.01
    assert rates(optimizer) == pytest.approx([0.005, 0.0075, 0.01, 0.015], abs=1e-15)
    assert scheduler.layer_rates == dict(zip(layers, rates(optimizer), strict=True))


@pytest.mark.parametrize("name", SCHEDULES)
def test_resume_is_bit_for_bit(name: str) -> None:
    """2N steps equal N, save with weights_only in mind, load into fresh objects, N more."""
    if name == "swa" and not SWA_STATE_IS_PLAIN:
        pytest.skip("the state of SWALR holds a function before torch 2.8")

    def build(seed: int) -> tuple:
        model = net(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.99))
        scheduler = TempBalanceLR(
            optimizer, model, SCHEDULES[name](optimizer), every=2, ramp=2, assign=tb.SigmoidMap(1.0)
        )
        return model, optimizer, scheduler

    def run(model, optimizer, scheduler, start: int, stop: int) -> list[list[float]]:
        seen = []
        for i in range(start, stop):
            train_step(model, optimizer, i)
            advance(scheduler, name, i)
            seen.append(rates(optimizer))
        return seen

    model, optimizer, scheduler = build(0)
    before = run(model, optimizer, scheduler, 0, 5)
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()], buffer)
    after = run(model, optimizer, scheduler, 5, 11)
    assert before and after

    again, optimizer2, scheduler2 = build(1)
    measured = scheduler2.balancer.measurements
    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)
    for thing, state in zip((again, optimizer2, scheduler2), states, strict=True):
        thing.load_state_dict(state)
    assert scheduler2.balancer.measurements == 3, measured  # at 0, 2 and 4; none on loading
    assert rates(optimizer2) == before[-1]
    assert run(again, optimizer2, scheduler2, 5, 11) == after
    assert torch.equal(weights(again), weights(model))


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(set(SCHEDULES) - {"none"})),
    cut=st.integers(0, 9),
    every=st.integers(1, 4),
    ramp=st.integers(0, 3),
    start=st.integers(0, 3),
    split=st.booleans(),
    order=st.permutations([0, 1, 2]),
)
def test_resume_anywhere(name, cut, every, ramp, start, split, order) -> None:
    """Whatever the schedule, the options, the groups, the step, and the order of loading."""

    def build() -> list:
        model = net()
        parameters = list(model.parameters())
        groups = [{"params": parameters}]
        if split:
            groups = [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
                {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
            ]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        base = SCHEDULES[name](optimizer)
        options = {"every": every, "ramp": ramp, "start": start, "stop": 8}
        return [model, optimizer, TempBalanceLR(optimizer, model, base, **options)]

    def run(objects: list, start: int, stop: int) -> None:
        for i in range(start, stop):
            train_step(objects[0], objects[1], i)
            advance(objects[2], name, i)

    whole = build()
    run(whole, 0, cut)
    states = [copy.deepcopy(x.state_dict()) for x in whole]
    run(whole, cut, 10)
    resumed = build()
    for i in order:
        resumed[i].load_state_dict(states[i])
    run(resumed, cut, 10)
    assert rates(resumed[1]) == rates(whole[1])
    assert torch.equal(weights(resumed[0]), weights(whole[0]))


# --- groups ---------------------------------------------------------------------------------------


def test_splitting_keeps_options_and_state() -> None:
    model = net()
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 0.02}],
        lr=0.01,
        betas=(0.8, 0.9),
    )
    for i in range(2):
        train_step(model, optimizer, i)
    state = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    groups = optimizer.param_groups
    scheduler = TempBalanceLR(optimizer, model)
    assert optimizer.param_groups is groups
    names = [g["name"] for g in groups]
    assert names == ["0", "3", "8", "10", "0|no_decay", "3|no_decay", "8|no_decay", "10|no_decay"]
    for group in groups:
        assert group["params"] and group["betas"] == (0.8, 0.9)
        assert group["weight_decay"] == (0.0 if "no_decay" in group["name"] else 0.1)
    assert [float(r) for r in scheduler.get_base_lr()] == [0.01] * 4 + [0.02] * 4
    assert [p for g in groups[:4] for p in g["params"]] == decay
    assert {p for g in groups for p in g["params"]} == set(model.parameters())
    for p, s in state.items():
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in s.items())
    norm = model[1].weight  # follows the convolution before it
    assert any(norm is p for g in groups if g["name"] == "0|no_decay" for p in g["params"])


def test_split_is_idempotent_and_rates_do_not_compound() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = TempBalanceLR(optimizer, model)
    wanted = rates(optimizer)
    with pytest.warns(BalanceWarning, match="balanced already"):
        second = TempBalanceLR(optimizer, model)
    assert rates(optimizer) == wanted
    assert [g["name"] for g in optimizer.param_groups] == ["0", "3", "8", "10"]
    second.detach()
    assert rates(optimizer) == [0.1] * 4
    del first


@needs_names
def test_named_parameters_and_user_names_survive() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    TempBalanceLR(optimizer, model)
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            assert model.get_parameter(name) is p
    optimizer.load_state_dict(optimizer.state_dict())

    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "name": "matrices"},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "name": "vectors"},
        ],
        lr=0.1,
    )
    TempBalanceLR(optimizer, model)
    names = [g["name"] for g in optimizer.param_groups]
    assert names[4:] == ["0|vectors", "3|vectors", "8|vectors", "10|vectors"]
    assert len(set(names)) == len(names)


def test_empty_groups_disappear_and_the_rest_keeps_its_rate() -> None:
    model = nn.Sequential(nn.Linear(20, 20), nn.Embedding(5, 20))
    optimizer = torch.optim.SGD([{"params": []}, {"params": model.parameters()}], lr=0.1)
    schedule = lrs.LambdaLR(optimizer, [lambda e: 1.0, lambda e: 0.5**e])
    TempBalanceLR(optimizer, model, schedule, assign=tb.Constant(0.5))
    assert [(g["name"], g["lr"]) for g in optimizer.param_groups] == [("0", 0.05), ("other", 0.1)]
    assert len(schedule.lr_lambdas) == len(schedule.base_lrs) == 2
    assert schedule.lr_lambdas[0](1) == 0.5


def test_group_added_later_is_scheduled_and_balanced() -> None:
    model = net()
    head, body = list(model[10].parameters()), list(model[:10].parameters())
    for base in ("lambda", "cosine", "onecycle", "cyclic", "sequential", "plateau"):
        optimizer = torch.optim.SGD(body, lr=0.1, momentum=0.9)
        scheduler = TempBalanceLR(optimizer, model, SCHEDULES[base](optimizer))
        advance(scheduler, base, 0)
        optimizer.add_param_group({"params": head, "lr": 0.01})
        for i in range(6):
            train_step(model, optimizer, i)
            advance(scheduler, base, i)
        assert [g["name"] for g in optimizer.param_groups] == ["0", "3", "8", "10"]
        assert "10" in scheduler.multipliers
        assert rates(optimizer) == [
            float(b) * f
            for b, f in zip(
                scheduler.get_base_lr(),
                scheduler.grouping.factors(scheduler.multipliers),
                strict=True,
            )
        ], base


def test_group_added_since_the_last_step_is_saved_and_shown() -> None:
    """A schedule that steps once an epoch, and a checkpoint in the middle of one."""
    model = net()
    head, body = list(model[10].parameters()), list(model[:10].parameters())

    def build() -> tuple[torch.optim.Optimizer, TempBalanceLR]:
        optimizer = torch.optim.SGD(body, lr=0.1, momentum=0.9)
        return optimizer, TempBalanceLR(optimizer, model, SCHEDULES["cosine"](optimizer))

    def add(optimizer: torch.optim.Optimizer) -> None:
        optimizer.add_param_group({"params": head, "lr": 0.01})

    optimizer, scheduler = build()
    train_step(model, optimizer, 0)
    add(optimizer)
    assert list(scheduler.layer_groups) == ["0", "3", "8", "10"]
    assert "10" in scheduler.summary()
    for saves_optimizer_first in (True, False):
        optimizer, scheduler = build()
        add(optimizer)
        if saves_optimizer_first:
            state = [optimizer.state_dict(), scheduler.state_dict()]
        else:
            state = [scheduler.state_dict(), optimizer.state_dict()][::-1]
        assert len(scheduler.get_base_lr()) == len(scheduler.get_last_lr()) == 4
        other, loaded = build()
        add(other)
        other.load_state_dict(state[0])
        loaded.load_state_dict(state[1])
        assert rates(other) == rates(optimizer)
    optimizer, scheduler = build()
    add(optimizer)
    train_step(model, optimizer, 0)
    assert [g["name"] for g in optimizer.param_groups] == ["0", "3", "8", "10"]


@pytest.mark.parametrize("base", ["onecycle", "cyclic"])
def test_rate_of_an_added_group_is_the_largest_of_its_cycle(base: str) -> None:
    model = net()
    head, body = list(model[10].parameters()), list(model[:10].parameters())
    optimizer = torch.optim.SGD(body, lr=0.1, momentum=0.9)
    scheduler = TempBalanceLR(optimizer, model, SCHEDULES[base](optimizer), start=10**6)
    optimizer.add_param_group({"params": head, "lr": 1e-3})
    largest, pairs = 0.0, []
    for i in range(8):
        advance(scheduler, base, i)
        *first, last = scheduler.get_base_lr()
        pairs.append((float(first[0]), float(last)))
        largest = max(largest, float(last))
    assert 2e-4 < largest <= 1e-3 * (1 + 1e-9)
    share = [last / first for first, last in pairs]
    assert share == pytest.approx([share[0]] * len(share), rel=1e-6)


def test_other_states_are_not_taken_for_a_schedule() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = TempBalanceLR(optimizer, model, SCHEDULES["cosine"](optimizer))
    whole = {"model": model.state_dict(), "scheduler": scheduler.state_dict()}
    for state in (whole, optimizer.state_dict(), {}):
        with pytest.raises(ValueError, match=r"no scheduler's state.*scheduler.state_dict\(\)"):
            scheduler.load_state_dict(state)


def test_summary_says_what_each_group_is_and_what_follows() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = TempBalanceLR(optimizer, model)
    header, *lines = scheduler.summary().splitlines()
    assert header.split() == ["group", "alpha", "multiplier", "rate", "norms"]
    assert [line.split()[0] for line in lines] == ["0", "3", "8", "10"]
    assert [line.split()[4:] for line in lines] == [["1"], ["4"], [], []]
    for line in lines:
        name, alpha, multiplier, rate = line.split()[:4]
        assert float(alpha) == pytest.approx(scheduler.alphas[name], abs=5e-4)
        assert float(multiplier) == pytest.approx(scheduler.multipliers[name], abs=5e-4)
        assert float(rate) == pytest.approx(scheduler.layer_rates[name], rel=1e-3)


def test_freezing_and_unfreezing() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = TempBalanceLR(optimizer, model)
    model[3].requires_grad_(False)
    scheduler.step()
    assert "3" not in scheduler.multipliers and scheduler.layer_rates["3"] == 0.1
    model[3].requires_grad_(True)
    scheduler.step()
    assert "3" in scheduler.multipliers


# --- taking over, refusing ---------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"none"}))
def test_unbalanced_checkpoint_is_taken_over(name: str) -> None:
    def plain() -> list:
        model = net()
        parameters = list(model.parameters())
        optimizer = torch.optim.SGD(
            [{"params": parameters[::2]}, {"params": parameters[1::2], "lr": 0.05}],
            lr=0.1,
            momentum=0.9,
        )
        return [model, optimizer, SCHEDULES[name](optimizer)]

    old = plain()
    for i in range(4):
        train_step(old[0], old[1], i)
        advance(old[2], name, i)
    states = [copy.deepcopy(x.state_dict()) for x in old]
    model, optimizer, base = plain()
    scheduler = TempBalanceLR(optimizer, model, base)
    for thing, state in zip((model, optimizer, scheduler), states, strict=True):
        thing.load_state_dict(state)
    for p, q in zip(model.parameters(), old[0].parameters(), strict=True):
        assert torch.equal(
            optimizer.state[p]["momentum_buffer"], old[1].state[q]["momentum_buffer"]
        )
    for i in range(4, 8):
        base_rates = dict.fromkeys(range(2))
        for k in base_rates:
            base_rates[k] = float(old[1].param_groups[k]["lr"])
        source = scheduler.grouping.source
        assert [float(r) for r in scheduler.get_base_lr()] == [base_rates[k] for k in source]
        train_step(old[0], old[1], i)
        train_step(model, optimizer, i)
        advance(old[2], name, i)
        advance(scheduler, name, i)


def test_state_of_another_model_is_refused_by_name() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = TempBalanceLR(optimizer, model)
    other = nn.Sequential(nn.Linear(24, 20), nn.Linear(20, 31))
    optimizer2 = torch.optim.SGD(other.parameters(), lr=0.1)
    state = TempBalanceLR(optimizer2, other).state_dict()
    with pytest.raises(ValueError, match=r"only in the checkpoint.*'1'"):
        scheduler.load_state_dict(state)
    wide = net()
    wide[8], wide[10] = nn.Linear(24, 30), nn.Linear(30, 10)
    optimizer3 = torch.optim.SGD(wide.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"of another shape: 8 \(\[1, 20, 24\]"):
        TempBalanceLR(optimizer3, wide).load_state_dict(scheduler.state_dict())
    before = rates(optimizer)
    state = scheduler.state_dict()
    optimizer4 = torch.optim.SGD(wide.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="no base schedule"):
        TempBalanceLR(optimizer4, wide, lrs.StepLR(optimizer4, 2)).load_state_dict(state)
    assert rates(optimizer) == before


class ClosedTuple(lrs.LRScheduler):
    def __init__(self, optimizer):
        self.scales = tuple(0.5 for _ in optimizer.param_groups)
        super().__init__(optimizer)

    def get_lr(self):
        return [b * s for b, s in zip(self.base_lrs, self.scales, strict=True)]


def test_a_schedule_that_is_refused_leaves_all_as_it_was() -> None:
    model = net()
    optimizer, twin = (
        torch.optim.SGD(
            [{"params": m[:6].parameters()}, {"params": m[6:].parameters(), "lr": 0.02}], lr=0.1
        )
        for m in (model, net())
    )
    parts = [lrs.ConstantLR(optimizer, 0.5, 3), ClosedTuple(optimizer)]
    base = lrs.SequentialLR(optimizer, parts, [2])
    plain = lrs.SequentialLR(twin, [lrs.ConstantLR(twin, 0.5, 3), ClosedTuple(twin)], [2])
    held = list(optimizer.param_groups)
    with pytest.raises(ValueError, match="ClosedTuple cannot follow"):
        TempBalanceLR(optimizer, model, base)
    assert all(a is b for a, b in zip(optimizer.param_groups, held, strict=True))
    assert [set(g) for g in optimizer.param_groups] == [set(g) for g in twin.param_groups]
    for _ in range(4):
        optimizer.step()
        base.step()
        twin.step()
        plain.step()
        assert rates(optimizer) == rates(twin)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda m, o: TempBalanceLR(o, m, every=0), ValueError, "every"),
        (lambda m, o: TempBalanceLR(o, m, start=3, stop=2), ValueError, "stop"),
        (lambda m, o: TempBalanceLR(o, m, unit="tree"), ValueError, "unit"),
        (lambda m, o: TempBalanceLR(o, net()), ValueError, "none of this model's parameters"),
        (lambda m, o: TempBalanceLR(o, nn.ReLU()), ValueError, "none of this model's"),
        (lambda m, o: TempBalanceLR(o, m, min_eigs=10_000), ValueError, "min_eigs=10000"),
        (lambda m, o: TempBalanceLR(m, o), TypeError, "optimizer must be"),
        (lambda m, o: TempBalanceLR(o, m, "cosine"), TypeError, "base must be"),
        (lambda m, o: TempBalanceLR(o, m, ClosedTuple(o)), ValueError, "ClosedTuple cannot follow"),
        (lambda m, o: TempBalanceLR(o, m, TempBalanceLR(o, m)), TypeError, "inside it"),
        (
            lambda m, o: TempBalanceLR(torch.optim.LBFGS(m.parameters()), m),
            ValueError,
            "LBFGS cannot",
        ),
        (
            lambda m, o: TempBalanceLR(
                o, m, lrs.StepLR(torch.optim.SGD(m.parameters(), lr=1.0), 2)
            ),
            ValueError,
            "another optimizer",
        ),
    ],
)
def test_misuse_is_refused_at_construction(make, error, match) -> None:
    model = net()
    with pytest.raises(error, match=match):
        make(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_model_without_matrices_is_refused_with_reasons() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Embedding(4, 8))
    with pytest.raises(ValueError, match="no weight matrix.*embedding"):
        TempBalanceLR(torch.optim.SGD(model.parameters(), lr=0.1), model)


# --- bad layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_bad_layer_keeps_its_rate_and_is_named_once(value: float) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = TempBalanceLR(optimizer, model, lrs.ExponentialLR(optimizer, 0.5))
    with torch.no_grad():
        model[3].weight.fill_(value)
    optimizer.step()
    with pytest.warns(BalanceWarning, match=r"'3' \(9 x 24 x 16\).*base learning rate"):
        scheduler.step()
    assert scheduler.layer_rates["3"] == 0.05
    assert scheduler.alphas["3"] is None
    assert all(math.isfinite(r) and r > 0 for r in rates(optimizer))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        scheduler.step()
    torch.save(scheduler.state_dict(), io.BytesIO())


def test_few_eigenvalues_do_not_vote() -> None:
    """A layer of three eigenvalues is not among the alphas, whatever it would read."""
    model = nn.Sequential(nn.Linear(3, 40), nn.Linear(40, 40), nn.Linear(40, 40))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = TempBalanceLR(optimizer, model, windows=tb.WholeMatrix())
    assert set(scheduler.alphas) == {"1", "2"}
    assert scheduler.layer_rates["0"] == 0.1


# --- clocks -------------------------------------------------------------------------------------


def test_start_stop_every_and_ramp() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = TempBalanceLR(optimizer, model, start=2, stop=6, every=2, ramp=2)
    seen, counts = [], []
    alphas = {r.name: r.alpha for r in tb.analyze(model)}
    smallest = min(alphas, key=lambda name: alphas[name])
    for _ in range(10):
        seen.append(scheduler.layer_rates[smallest])
        counts.append(scheduler.balancer.measurements)
        optimizer.step()
        scheduler.step()
    assert counts == [0, 0, 1, 1, 2, 2, 2, 2, 2, 2]
    assert seen[:3] == [0.1] * 3  # the ramp starts at the first measurement
    assert seen[4] == pytest.approx(0.05)  # the smallest alpha, after two steps of ramp
    assert seen[3] == pytest.approx(0.075)
    assert seen[7] == pytest.approx(0.075)
    assert seen[8:] == [0.1, 0.1]


def test_frozen_measures_once() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = TempBalanceLR(optimizer, model, assign=tb.Frozen(tb.LinearMap()))
    first = scheduler.multipliers
    for i in range(3):
        train_step(model, optimizer, i)
        scheduler.step()
    assert scheduler.multipliers == first and scheduler.balancer.measurements == 1


def test_units_share_one_rate_and_vote_once() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(16, 16, 3), nn.Linear(32, 32)),
        nn.Sequential(nn.Conv2d(16, 16, 3), nn.Linear(32, 32)),
    )
    for unit, together in (
        ("block", [("0.0", "0.1"), ("1.0", "1.1")]),
        ("type", [("0.0", "1.0"), ("0.1", "1.1")]),
        (lambda name: name[-1], [("0.0", "1.0"), ("0.1", "1.1")]),
    ):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = TempBalanceLR(optimizer, model, unit=unit)
        m = scheduler.multipliers
        assert sorted(m.values()) == [0.5, 0.5, 1.5, 1.5]
        assert all(m[a] == m[b] for a, b in together)
        scheduler.detach()


def test_normalize_keeps_the_mean_rate_over_parameters() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = TempBalanceLR(optimizer, model, normalize=True)
    sizes = {layer.name: layer.numel for layer in scheduler.balancer.layers}
    m = scheduler.multipliers
    assert sum(m[n] * sizes[n] for n in m) / sum(sizes.values()) == pytest.approx(1.0, abs=1e-12)
    assert len(set(m.values())) > 1


def test_one_wild_alpha_does_not_squeeze_the_rest_when_clipped() -> None:
    alphas = [2.0, 2.2, 2.4, 2.6, 40.0]
    plain = tb.LinearMap()(alphas)
    clipped = tb.Clipped(tb.LinearMap(), 3.0)(alphas)
    assert plain[:4].max() < 0.52
    assert clipped[:4].max() - clipped[:4].min() > 0.4


# --- other loops ---------------------------------------------------------------------------------


def test_skipped_scaler_steps_and_gradient_accumulation() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = TempBalanceLR(optimizer, model, lrs.LinearLR(optimizer, 0.1, total_iters=4))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for i in range(4):
        for _part in range(2):
            x = torch.randn(4, 3, 8, 8)
            loss = model(x).square().mean() * (float("inf") if i == 1 else 1.0)
            scaler.scale(loss / 2).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scheduler.step()
    assert torch.isfinite(weights(model)).all()
    assert [float(r) for r in scheduler.get_base_lr()] == pytest.approx([0.1] * 4)


def test_two_optimizers_on_one_model() -> None:
    model = net()
    first = torch.optim.SGD(model[:6].parameters(), lr=0.1)
    second = torch.optim.AdamW(model[6:].parameters(), lr=0.01)
    a, b = TempBalanceLR(first, model), TempBalanceLR(second, model)
    assert set(a.multipliers) == {"0", "3"} and set(b.multipliers) == {"8", "10"}


def test_compiled_and_wrapped_names_are_clean() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = TempBalanceLR(optimizer, torch.compile(model))
    assert set(scheduler.multipliers) == {"0", "3", "8", "10"}


def test_tied_weights_have_one_group() -> None:
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24))
    model[2].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = TempBalanceLR(optimizer, model)
    assert set(scheduler.multipliers) == {"0", "1"}
    assert [g["name"] for g in optimizer.param_groups] == ["0", "1", "other"]


def test_attention_parts_share_the_rate_of_their_weight() -> None:
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = TempBalanceLR(optimizer, model)
    m = scheduler.multipliers
    assert {"self_attn.q", "self_attn.k", "self_attn.v"} <= set(m)
    mean = (m["self_attn.q"] + m["self_attn.k"] + m["self_attn.v"]) / 3
    assert scheduler.layer_rates["self_attn"] == pytest.approx(0.1 * mean, rel=1e-12)


def test_muon_where_torch_has_it() -> None:
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        pytest.skip("this torch has no Muon")
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 16, bias=False))
    optimizer = muon(model.parameters(), lr=0.02)
    scheduler = TempBalanceLR(optimizer, model, lrs.CosineAnnealingLR(optimizer, 5))
    for _ in range(3):
        model(torch.randn(4, 32)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    base = float(scheduler.get_base_lr()[0])
    assert sorted(r / base for r in rates(optimizer)) == pytest.approx([0.5, 1.5])


def test_hand_written_schedule_becomes_the_base() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = TempBalanceLR(optimizer, model, every=100)
    for value in (0.2, 0.05):
        for group in optimizer.param_groups:
            group["lr"] = value
        scheduler.step()
        assert scheduler.get_base_lr() == [value] * 4
    for group in optimizer.param_groups:
        group["lr"] *= 0.1
    scheduler.step()
    assert scheduler.get_base_lr() == pytest.approx([0.005] * 4)


def test_tensor_rates_are_filled_in_place_and_not_shared() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1))
    scheduler = TempBalanceLR(optimizer, model, lrs.ExponentialLR(optimizer, 0.5))
    tensors = [g["lr"] for g in optimizer.param_groups]
    assert len({t.data_ptr() for t in tensors}) == len(tensors)
    scheduler.step()
    assert all(g["lr"] is t for g, t in zip(optimizer.param_groups, tensors, strict=True))


def test_nothing_is_left_behind() -> None:
    """The optimizer can be copied and pickled, the model never gets into a state."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = TempBalanceLR(optimizer, model, lrs.CosineAnnealingLR(optimizer, 5))
    pickle.dumps(optimizer)
    copy.deepcopy(optimizer)
    assert not any(isinstance(v, nn.Module) for v in _leaves(scheduler.state_dict()))
    assert isinstance(scheduler, lrs.LRScheduler)


def _leaves(value):
    if isinstance(value, dict):
        for v in value.values():
            yield from _leaves(v)
    elif isinstance(value, list | tuple):
        for v in value:
            yield from _leaves(v)
    else:
        yield value


# --- hooks ---------------------------------------------------------------------------------------


def test_step_hooks_compose_with_any_schedule() -> None:
    for name in SCHEDULES:
        model, twin = net(), net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        other = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
        base = SCHEDULES[name](optimizer)
        groups = optimizer.param_groups
        hooks = tb.StepHooks(optimizer, model, every=3)
        scheduler = TempBalanceLR(other, twin, SCHEDULES[name](other), every=3)
        for i in range(9):
            assert optimizer.param_groups is groups and len(groups) == 1  # the user's own
            train_step(model, optimizer, i)
            train_step(twin, other, i)
            advance(base, name, i)
            advance(scheduler, name, i)
            assert hooks.multipliers == scheduler.multipliers
        assert torch.equal(weights(model), weights(twin)), name


def test_step_hooks_survive_a_closure_that_raises() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooks = tb.StepHooks(optimizer, model)

    def closure():
        raise RuntimeError("lost batch")

    with pytest.raises(RuntimeError, match="lost batch"):
        optimizer.step(closure)
    train_step(model, optimizer, 0)
    assert rates(optimizer) == [0.1]
    hooks.detach()
    train_step(model, optimizer, 1)
