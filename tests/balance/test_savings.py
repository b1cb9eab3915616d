"""Less work: who is left out of a measurement, for how long, and that it is never silent."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from schedules import net, train_step
from simulation import move, simulate, stack
from test_async import stored
from torch import Tensor, nn

import tempbalance as tb
from tempbalance import Balancer, TempBalanceLR
from tempbalance.balance import overhead
from tempbalance.balance.overhead import Interval
from tempbalance.balance.sketch import changes, decode, encode, sketches
from tempbalance.layers.find import find_layers
from tempbalance.measure import attempt
from tempbalance.runs import write as history


def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The layers of every measurement from here on."""
    seen: list[list[str]] = []
    whole = attempt.measured

    def watched(layers: Any, **options: Any) -> Any:
        seen.append([layer.name for layer in layers])
        return whole(layers, **options)

    monkeypatch.setattr(attempt, "measured", watched)
    return seen


# --- the sketch ----------------------------------------------------------------------------------


def sketch_of(weight: Tensor) -> Tensor:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight)
    return next(iter(sketches(find_layers(layer).layers).values()))


def estimate(now: Tensor, before: Tensor) -> float:
    return float(changes([sketch_of(now)], [sketch_of(before)])[0])


def exact(now: Tensor, before: Tensor) -> float:
    now, before = now.double(), before.double()
    scale = (now * before).sum() / before.square().sum()
    return float((now - scale * before).norm() / now.norm())


def _change(kind: str, rows: int, cols: int, g: torch.Generator) -> Tensor:
    noise = torch.randn(rows, cols, generator=g)
    i, j = (int(torch.randint(n, (), generator=g)) for n in (rows, cols))
    out = torch.zeros(rows, cols)
    if kind == "row":
        out[i] = noise[i]
    elif kind == "column":
        out[:, j] = noise[:, j]
    elif kind == "entry":
        out[i, j] = 1.0
    elif kind == "rank one":
        out = torch.outer(noise[:, 0], noise[0])
    elif kind == "sign":
        out = noise.sign()
    elif kind == "constant":
        out += 1.0
    else:
        out = noise
    return out


@pytest.mark.parametrize("threshold", [1e-3, 1e-2, 0.1])
@pytest.mark.parametrize(
    ("kind", "spread"),
    [("dense", 0.016), ("sign", 0.016), ("row", 0.13), ("column", 0.13), ("rank one", 0.13),
     ("entry", 0.13), ("constant", 0.13)],
)  # fmt: skip
def test_the_sketch_sees_every_change(kind: str, spread: float, threshold: float) -> None:
    """Over many changes: right on average, and within the standard deviation that is claimed."""
    g = torch.Generator().manual_seed(5)
    rows, cols = 150, 210
    ratios = []
    for _ in range(40):
        before = torch.randn(rows, cols, generator=g)
        change = _change(kind, rows, cols, g)
        now = 0.8 * (before + threshold * change * before.norm() / change.norm())
        ratios.append(estimate(now, before) / exact(now, before))
    errors = torch.tensor(ratios) - 1
    # Of changes that differ in length alone (one constant) one draw of signs is all there is.
    assert abs(errors.mean()) < (3 * spread if kind == "constant" else 3 * spread / 40**0.5 + 0.01)
    assert errors.square().mean().sqrt() < (3 * spread if kind == "constant" else 1.3 * spread)


def test_the_sketch_sees_a_change_of_the_diagonal() -> None:
    """Far off if both sides of the weight had the same signs."""
    before = torch.randn(200, 200, generator=torch.Generator().manual_seed(0))
    now = before + 0.1 * torch.eye(200)
    assert estimate(now, before) == pytest.approx(exact(now, before), rel=0.05)


def test_the_sketch_leaves_scale_out_and_sees_what_is_not_finite() -> None:
    weight = torch.randn(40, 30)
    assert estimate(weight * 0.5, weight) < 1e-6
    assert estimate(weight * -3e20, weight) < 1e-6
    assert estimate(weight, weight) < 1e-6
    for broken in (weight * math.nan, weight / 0.0):
        assert not estimate(broken, weight) < 1.0
    assert not estimate(weight, torch.zeros(40, 30)) < 1.0


def test_the_sketch_is_of_the_weight_whatever_its_dtype_and_layout() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(24, 40, 3)
    whole = sketches(find_layers(conv).layers)["weight"]
    expected = conv.weight.square().sum().sqrt()
    assert whole.shape == (64, 64) and whole.norm() == pytest.approx(expected.item(), rel=0.05)
    half = sketches(find_layers(nn.Conv2d.to(conv, torch.bfloat16)).layers)["weight"]
    assert (half - whole).norm() < 0.005 * whole.norm()
    double = sketches(find_layers(conv.double()).layers)["weight"]
    assert torch.allclose(double, half, atol=1e-5)  # the same values, summed in other ways
    complex_layer = nn.Linear(20, 30, dtype=torch.complex64)
    found = sketches(find_layers(complex_layer).layers)["weight"]
    assert found.norm() == pytest.approx(complex_layer.weight.norm().item(), rel=0.1)


def test_large_weights_are_sketched_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(100, 80, dtype=torch.bfloat16)
    whole = sketch_of(weight)
    monkeypatch.setattr(tb.sketch, "_CHUNK", 7 * 80)
    assert torch.allclose(sketch_of(weight), whole, rtol=1e-5, atol=1e-5)


def test_the_signs_are_those_of_a_known_stream() -> None:
    """The published first outputs of SplitMix64 from seed 1234567."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    found = tb.sketch._splitmix64(1234567, 4, torch.device("cpu"))
    assert [n % 2**64 for n in found.tolist()] == known
    signs = tb.sketch._Signs()
    first = signs.take(0, 100, torch.device("cpu"), torch.float32).clone()
    longer = signs.take(0, 5000, torch.device("cpu"), torch.float32)
    assert torch.equal(longer[:100], first) and set(longer.unique().tolist()) == {-1.0, 1.0}
    assert longer.mean(0).abs().max() < 5 / 5000**0.5
    products = longer.T @ longer / 5000 - torch.eye(64)
    assert products.abs().max() < 5 / 5000**0.5


def test_a_sketch_survives_as_text() -> None:
    sketch = sketch_of(torch.randn(30, 20))
    assert torch.equal(decode(encode(sketch)), sketch)
    assert len(encode(sketch)) < 22_000


# --- who is measured -----------------------------------------------------------------------------

OPTIONS = st.fixed_dictionaries(
    {"every": st.integers(1, 3)},
    optional={
        "delay": st.integers(1, 3),
        "start": st.integers(0, 2),
        "stop": st.integers(6, 12),
        "ramp": st.integers(1, 3),
        "moved": st.just(0.01),
        "per_update": st.integers(1, 5) | st.sampled_from([0.2, 0.5, 1.0]),
    },
)


@settings(max_examples=60, deadline=None)
@given(options=OPTIONS, max_age=st.none() | st.integers(1, 3), cut=st.integers(0, 12))
def test_as_the_plain_simulation_and_resumed(
    options: dict[str, Any], max_age: int | None, cut: int
) -> None:
    """All options together, against whole copies and lists; and resumed from a file anywhere."""
    options["delay"] = min(options.get("delay", 0), options["every"])
    if "moved" in options:
        options["max_age"] = max_age
    expected = list(simulate(stack(), 12, **options))
    model = stack()
    whole = Balancer(model, **options)
    whole.begin()
    both = [whole]
    for tick in range(13):
        if tick:
            move(model, tick)
            for each in both:
                each.step()
        for each in both:
            assert (each.alphas, each.multipliers, each.ages) == expected[tick], tick
        if tick == cut:
            both.append(Balancer(model, **options))
            both[1].load_state_dict(stored(whole.state_dict()))
    assert both[0].state_dict() == both[1].state_dict()
    for each in both:
        each.cancel()


@settings(max_examples=30, deadline=None)
@given(
    limit=st.integers(1, 6) | st.floats(0.05, 1.0),
    moved=st.none() | st.just(0.01),
    max_age=st.integers(1, 4),
)
def test_every_layer_is_refreshed_within_its_bound(
    limit: int | float, moved: float | None, max_age: int
) -> None:
    model = stack()
    turn = math.ceil(5 / limit) if isinstance(limit, int) else math.ceil(1 / limit - 1e-9)
    turn = min(turn, 5)
    extra: dict[str, Any] = {} if moved is None else {"moved": moved, "max_age": max_age}
    balancer = Balancer(model, per_update=limit, **extra)
    balancer.begin()
    largest = 0
    for tick in range(1, 25):
        move(model, tick)
        balancer.step()
        largest = max(largest, *balancer.ages.values())
    assert largest <= (turn - 1 if moved is None else max_age + turn)


def test_still_layers_keep_their_alpha_up_to_the_age(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stack()
    balancer = Balancer(model, moved=0.01, max_age=2)
    balancer.begin()
    seen = measured(monkeypatch)
    first = balancer.alphas
    records = dict(balancer.records)
    for tick in range(1, 8):
        with torch.no_grad():
            for layer in model:
                layer.weight.mul_(0.99)  # decay alone
            if tick == 2:
                model[3].weight.add_(torch.randn_like(model[3].weight), alpha=0.01)
        balancer.step()
    names = ["0", "1", "2", "4"]
    assert seen == [["3"], names, ["3"], names]  # at ticks 2, 3, 5 and 6
    assert balancer.ages == {"0": 1, "1": 1, "2": 1, "3": 2, "4": 1}
    assert {n: balancer.alphas[n] for n in names} == pytest.approx({n: first[n] for n in names})
    assert set(balancer.records) == set(records)


def test_a_small_drift_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The change is counted from the last measurement, not from the last look."""
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
    balancer = Balancer(model, moved=0.01, max_age=100)
    balancer.begin()
    seen = measured(monkeypatch)
    direction = torch.randn(30, 30)
    direction /= direction.norm() / model[0].weight.detach().norm()
    for _ in range(10):
        with torch.no_grad():
            model[0].weight.add_(direction, alpha=0.003)
        balancer.step()
    assert seen in ([["0"]] * 2, [["0"]] * 3)  # each 4 steps of 0.3%


def test_what_has_no_alpha_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stack()
    torch.nn.init.zeros_(model[1].weight)
    balancer = Balancer(model, moved=0.01)
    with pytest.warns(tb.BalanceWarning):
        balancer.begin()
    seen = measured(monkeypatch)
    balancer.step()
    with torch.no_grad():
        model[1].weight.normal_()
        model[4].weight.fill_(math.nan)
    with pytest.warns(tb.BalanceWarning, match="NaN"):
        balancer.step()
    assert seen == [["1"], ["1", "4"]]
    assert balancer.alphas["1"] is not None and balancer.alphas["4"] is None


def test_a_layer_that_failed_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    balancer = Balancer(stack(), moved=0.01)
    whole = attempt.measured

    def failing(layers: Any, **options: Any) -> Any:
        if any(layer.name == "3" for layer in layers):
            raise torch.OutOfMemoryError("no room")
        return whole(layers, **options)

    monkeypatch.setattr(attempt, "measured", failing)
    with pytest.warns(tb.BalanceWarning):
        balancer.begin()
    monkeypatch.setattr(attempt, "measured", whole)
    seen = measured(monkeypatch)
    balancer.step()
    balancer.step()
    assert seen == [["3"]] and "3" in balancer.multipliers


def test_a_layer_that_cannot_be_read_any_more() -> None:
    model = stack()
    balancer = Balancer(model, moved=0.01)
    balancer.begin()

    def no_room() -> Any:
        raise torch.OutOfMemoryError("no room")

    object.__setattr__(balancer.layers[3], "_read", no_room)
    with pytest.warns(tb.BalanceWarning, match="layer '3' could not be measured.*no room"):
        balancer.step()
    assert set(balancer.multipliers) == {"0", "1", "2", "4"}


def test_layers_frozen_and_unfrozen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stack()
    balancer = Balancer(model, per_update=2, moved=0.5, max_age=50)
    balancer.begin()
    seen = measured(monkeypatch)
    model[2].requires_grad_(False)
    balancer.step()
    assert "2" not in balancer.ages and balancer.alphas["2"] is None
    assert "2" not in balancer.multipliers
    model[2].requires_grad_(True)
    balancer.step()
    assert seen == [["2"]] and balancer.ages["2"] == 0 and "2" in balancer.multipliers


def test_a_state_without_ages_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """As saved without these options: all is measured, in turn or at once."""
    plain = Balancer(stack())
    plain.begin()
    state = plain.state_dict()
    for key in ("ages", "sketches", "pending", "interval", "measured"):
        del state[key]
    seen = measured(monkeypatch)
    for options, expected in (({"moved": 0.5}, [[*"01234"]]), ({"per_update": 3}, [[*"012"]])):
        balancer = Balancer(stack(), **options)  # type: ignore[arg-type]
        balancer.load_state_dict(state)
        seen.clear()
        balancer.step()
        assert seen == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moved": 0.0}, "moved must be a share between 0 and 1, such as 0.01, got 0.0"),
        ({"moved": 1}, "moved must be a share"),
        ({"moved": "1%"}, "moved must be a share"),
        ({"max_age": 3}, "max_age bounds how often moved leaves a layer out: set moved too"),
        ({"moved": 0.01, "max_age": 0}, "max_age must be an integer of at least 1, got 0"),
        ({"per_update": 0}, "per_update must be a number of layers .* got 0"),
        ({"per_update": 1.5}, "per_update must be a number of layers"),
        ({"per_update": True}, "per_update must be a number of layers"),
        ({"max_overhead": 1}, "max_overhead must be a share of the time .* got 1"),
        ({"max_overhead": 0.0}, "max_overhead must be a share of the time"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Balancer(stack(), **options)


# --- the share of time ---------------------------------------------------------------------------


class Clock:
    """Time that passes only where the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost: float, a_layer: float = 0.0) -> None:
        self.now, self.cost, self.a_layer = 0.0, cost, a_layer
        monkeypatch.setattr(overhead, "clock", lambda: self.now)
        whole = attempt.measured

        def timed(layers: Any, **options: Any) -> Any:
            self.now += self.cost + self.a_layer * len(layers)
            return whole(layers, **options)

        monkeypatch.setattr(attempt, "measured", timed)


def run(balancer: Balancer, clock: Clock, ticks: int, tick: float = 1.0) -> None:
    for _ in range(ticks):
        clock.now += tick
        balancer.step()


def test_the_interval_grows_and_shrinks_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock(monkeypatch, cost=0.5)
    balancer = Balancer(stack(), every=5, max_overhead=0.01)
    clock.cost = 50.0  # the first loads libraries, and is not counted
    balancer.begin()
    clock.cost = 0.5
    assert balancer.interval == 5
    run(balancer, clock, 5)
    # 0.5 / (0.5 + n) <= 0.01 from n = 49.5 on: 50, the next multiple of 5.
    assert balancer.interval == 50 and balancer.measured_at == [0, 5]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert re.search(
        r"takes 0.5 s, 9.1% of the time at one measurement every 5 ticks of 1 s; "
        r"max_overhead is 1%. It now measures every 50 ticks",
        record.message,
    )
    run(balancer, clock, 110)
    assert balancer.measured_at == [0, 5, 55, 105] and len(caplog.records) == 1
    share = balancer.seconds - 50
    assert share / (clock.now - 50) < 0.02

    clock.cost = 0.0  # the mean of the last measurements falls
    with caplog.at_level(logging.INFO):
        run(balancer, clock, 400)
    assert balancer.interval == 5
    steps = [int(r.message.split()[-2]) for r in caplog.records]
    assert steps == [50, 25, 10, 5]  # shortened by a half or more at a time


def test_the_interval_is_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, cost=0.5)
    balancer = Balancer(stack(), every=5, max_overhead=0.01)
    balancer.begin()
    run(balancer, clock, 20)
    other = Balancer(stack(), every=5, max_overhead=0.01)
    other.load_state_dict(stored(balancer.state_dict()))
    assert other.interval == 50 and other.measured_at == [0, 5]
    run(other, clock, 60)
    assert other.measured_at == [0, 5, 55]
    for options in ({"every": 3, "max_overhead": 0.01}, {"every": 5}):
        changed = Balancer(stack(), **options)  # type: ignore[arg-type]
        changed.load_state_dict(balancer.state_dict())
        assert changed.interval == options["every"]


def test_pauses_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour of validation, or of a debugger, says nothing about a tick."""
    clock = Clock(monkeypatch, cost=0.1)
    balancer = Balancer(stack(), every=5, max_overhead=0.01)
    balancer.begin()
    run(balancer, clock, 3)
    clock.now += 3600
    run(balancer, clock, 2)
    assert balancer.interval == 10


def test_with_savings_the_mean_cost_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, cost=0.0, a_layer=0.1)
    balancer = Balancer(stack(), per_update=2, max_overhead=0.1)
    balancer.begin()
    run(balancer, clock, 6)
    assert balancer.interval == 2  # 0.2 / (0.2 + 2)


@pytest.mark.parametrize(("pause", "interval"), [(0.0, 12), (3600.0, 20)])
def test_in_the_background_what_slows_training_counts(
    pause: float, interval: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ticks beside it took longer, though not longer than the measurement ran."""
    clock = Clock(monkeypatch, cost=0.0)
    meter = Interval(4, 0.1)
    for tick in range(12):
        busy = tick % 4 in (1, 2)  # of a measurement that begins at 0, 4, 8
        clock.now += 1.6 if busy else 1.0
        clock.now += pause if busy else 0.0
        meter.enter(busy)
        if tick % 4 == 2:
            meter.took_effect(None, beside=2.0)
        meter.leave()
    # 1.2 / (1.2 + n) <= 0.1 from n = 10.8 on, and with 2.0 from 18 on.
    assert meter.ticks == interval


def test_only_the_copy_counts_where_nothing_is_slowed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, cost=0.0)
    balancer = Balancer(stack(), every=4, delay=2, max_overhead=0.1)
    balancer.begin()
    run(balancer, clock, 12)
    assert balancer.measured_at == [0, 4, 8, 12] and balancer.seconds == 0.0
    balancer.cancel()


def test_without_a_limit_nothing_is_kept() -> None:
    balancer = Balancer(stack())
    balancer.begin()
    balancer.step()
    assert balancer.measured_at == [] and balancer.interval == 1


# --- never silent --------------------------------------------------------------------------------


def test_the_summary_tells_ages() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = TempBalanceLR(optimizer, model, per_update=1)
    for i in range(2):
        train_step(model, optimizer, i)
        scheduler.step()
    header, *lines = scheduler.summary().splitlines()
    assert header.split() == ["group", "alpha", "age", "multiplier", "rate", "norms"]
    ages = {line.split()[0]: line.split()[2] for line in lines}
    assert {n: ages[n] for n in ("0", "3", "8", "10")} == {"0": "1", "3": "0", "8": "2", "10": "2"}


def test_the_file_and_the_curves_tell_ages(tmp_path: Path) -> None:
    history.append(tmp_path, 0, 0, {"a": 2.0, "b": None}, {}, {}, {"a": 3})
    with (tmp_path / history.FILE).open() as file:
        assert [row["age"] for row in csv.DictReader(file)] == ["3", ""]
    figures = history.summary({"a": 2.0, "b": 3.0}, {}, {"a": 3, "b": 0})
    assert figures["alpha/kept_share"] == 0.5 and figures["alpha/oldest"] == 3
    assert "alpha/oldest" not in history.summary({"a": 2.0}, {})


def test_states_are_plain() -> None:
    model = stack()
    balancer = Balancer(model, every=2, delay=1, moved=0.01, per_update=2, max_overhead=0.01)
    balancer.begin()
    for tick in (1, 2):
        move(model, tick)
        balancer.step()
    state = balancer.state_dict()
    assert state["pending"]["due"] == 3 and len(state["sketches"]) == 5
    json.dumps(state, allow_nan=False)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == state
    balancer.cancel()
