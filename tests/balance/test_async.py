"""Measuring in the background: effects by ticks alone, whatever time a measurement takes."""

from __future__ import annotations

import gc
import io
import itertools
import json
import os
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from schedules import net, rates, train_step, weights
from simulation import move, simulate, stack
from torch import nn
from torch.optim import lr_scheduler as lrs

import tempbalance as tb
from tempbalance import Balancer, BalanceWarning, StepHooks, TempBalanceLR
from tempbalance.balance.background import Dropped, Job
from tempbalance.measure import engine
from tempbalance.measure.measurement import Measurement

ROOT = Path(__file__).resolve().parents[2]


def stored(state: Any) -> Any:
    """Through a file, and through JSON, which keeps plain values alone."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert json.loads(json.dumps(loaded, allow_nan=False)) == json.loads(json.dumps(state))
    return loaded


def background() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("tempbalance-background")]


def quiet() -> None:
    """Wait for threads that have been told to end."""
    for thread in background():
        thread.join(10)
    assert not background()


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Any:
    yield
    gc.collect()
    quiet()


def instead(monkeypatch: pytest.MonkeyPatch, wrapper: Callable[..., None]) -> None:
    """``wrapper(measurement, compute)`` in the place of every ``compute`` in the background."""
    whole = Measurement.compute

    def compute(self: Measurement) -> None:
        if threading.current_thread() in background():
            wrapper(self, whole)
        else:
            whole(self)

    monkeypatch.setattr(Measurement, "compute", compute)


class Gate:
    """Holds every measurement of a copy back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        self.dropped: list[bool] = []
        instead(monkeypatch, self.wait)

    def wait(self, measurement: Measurement, compute: Callable[[Measurement], None]) -> None:
        self.entered.set()
        progress = measurement._engine.progress
        assert progress is not None
        while not self.open.wait(0.002):
            try:
                progress(0.0)
            except Dropped:
                self.dropped.append(True)
                raise
        compute(measurement)


# --- what takes effect when ----------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    every=st.integers(1, 4),
    delay=st.integers(0, 4),
    start=st.integers(0, 3),
    stop=st.none() | st.integers(4, 12),
    ramp=st.integers(0, 3),
    cut=st.integers(0, 12),
    sigmoid=st.booleans(),
)
def test_as_measured_on_the_spot_and_applied_late(
    every: int,
    delay: int,
    start: int,
    stop: int | None,
    ramp: int,
    cut: int,
    sigmoid: bool,
) -> None:
    """Bit for bit, at every tick, and with a resume from a file at any of them."""
    assign = tb.SigmoidMap(1.0) if sigmoid else tb.LinearMap()
    options: dict[str, Any] = {"every": every, "delay": min(delay, every), "start": start}
    options |= {"stop": stop, "ramp": ramp, "assign": assign}
    expected = list(simulate(stack(), 12, **options))
    model = stack()
    whole = Balancer(model, **options)
    whole.begin()
    other: Balancer | None = None
    for tick in range(13):
        if tick:
            move(model, tick)
            whole.step()
            if other is not None:
                other.step()
        for each in (whole, other):
            if each is not None:
                assert (each.alphas, each.multipliers) == expected[tick][:2], tick
        if tick == cut:
            state = stored(whole.state_dict())
            measurements = whole.measurements
            other = Balancer(model, **options)
            other.load_state_dict(state)
            assert (other.measurements, other.pending) == (measurements, whole.pending)
    assert other is not None and other.state_dict() == whole.state_dict()
    whole.cancel()
    other.cancel()


def test_an_early_result_waits_for_its_tick_and_a_late_one_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate(monkeypatch)
    model = stack()
    balancer = Balancer(model, every=4, delay=2)
    balancer.begin()
    first = balancer.multipliers
    for tick in range(1, 5):
        move(model, tick)
        balancer.step()
    assert gate.entered.wait(10) and balancer.pending == 6
    gate.open.set()
    balancer.state_dict()  # it is done now
    balancer.step()
    assert balancer.multipliers == first and balancer.measurements == 1
    balancer.step()
    assert balancer.multipliers != first and balancer.measurements == 2
    assert balancer.waited < 0.1 and not caplog.records

    gate.open.clear()
    for _ in range(3):
        balancer.step()
    threading.Timer(0.25, gate.open.set).start()
    before = balancer.seconds
    balancer.step()
    assert balancer.measurements == 3 and balancer.pending is None
    assert 0.1 < balancer.waited <= balancer.seconds - before + 0.1
    assert len([r for r in caplog.records if "a larger delay hides it" in r.message]) == 1


@pytest.mark.parametrize("start", [0, 3])
def test_the_first_measurement_has_no_delay(start: int) -> None:
    balancer = Balancer(stack(), every=2, delay=2, start=start)
    balancer.begin()
    for _ in range(start):
        assert not balancer.multipliers
        balancer.step()
    assert balancer.measurements == 1 and balancer.pending is None
    balancer.restart(10)
    assert balancer.measurements == 1 and balancer.pending is None


def test_nothing_is_begun_that_would_come_too_late() -> None:
    balancer = Balancer(stack(), every=2, delay=2, stop=6)
    balancer.begin()
    begun = []
    for _ in range(6):
        balancer.step()
        begun.append(balancer.pending)
    assert begun == [None, 4, 4, None, None, None]


def test_refused() -> None:
    with pytest.raises(ValueError, match="delay=3 is longer than every=2.*at most 2"):
        Balancer(stack(), every=2, delay=3)
    with pytest.raises(ValueError, match="delay must be an integer of at least 0, got 0.5"):
        Balancer(stack(), every=2, delay=0.5)  # type: ignore[arg-type]
    Balancer(stack(), every=2, delay=2)


def test_assignments_without_alphas_have_nothing_to_wait_for() -> None:
    balancer = Balancer(stack(), every=2, delay=1, assign=tb.Constant(0.7))
    balancer.begin()
    for _ in range(4):
        balancer.step()
    assert balancer.pending is None and set(balancer.multipliers.values()) == {0.7}
    once = Balancer(stack(), delay=1, assign=tb.Frozen(tb.LinearMap()))
    once.begin()
    once.step()
    assert once.pending is None and once.measurements == 1


# --- what may happen meanwhile -------------------------------------------------------------------


def under_way(gate: Gate, model: nn.Module, **options: Any) -> Balancer:
    balancer = Balancer(model, **{"every": 4, "delay": 3, **options})
    balancer.begin()
    for tick in range(1, 5):
        move(model, tick)
        balancer.step()
    assert balancer.pending == 7 and gate.entered.wait(10)
    return balancer


@pytest.mark.parametrize("how", ["restart", "cancel", "update", "load", "forgotten"])
def test_a_measurement_that_is_not_wanted_any_more_ends(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    model = stack()
    balancer = under_way(gate, model)
    saved = Balancer(model, every=4, delay=3)
    saved.begin()
    state = saved.state_dict()
    multipliers = balancer.multipliers
    if how == "restart":
        balancer.restart(2)
        assert balancer.tick == 2 and balancer.measurements == 1
    elif how == "cancel":
        balancer.cancel()
        for _ in range(3):
            balancer.step()
        assert balancer.multipliers == multipliers and balancer.measurements == 1
    elif how == "update":
        balancer.update()
        assert balancer.measurements == 2 and balancer.multipliers != multipliers
    elif how == "load":
        balancer.load_state_dict(state)
        assert balancer.tick == 0
    else:
        del balancer
        gc.collect()
    quiet()
    assert gate.dropped == [True]
    if how != "forgotten":
        assert balancer.pending is None


def test_one_copy_is_made_and_freed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copies: list[weakref.ref[torch.Tensor]] = []
    model = stack()

    def one_copy(measurement: Measurement, compute: Any) -> None:
        assert measurement._taken is not None
        copies.extend(weakref.ref(s) for part in measurement._taken for s in part.slices.values())
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert not own & {ref().untyped_storage().data_ptr() for ref in copies}  # type: ignore[union-attr]
        compute(measurement)

    instead(monkeypatch, one_copy)
    balancer = Balancer(model, every=2, delay=1)
    balancer.begin()
    balancer.step()
    balancer.step()
    balancer.step()
    quiet()
    gc.collect()
    assert balancer.measurements == 2 and len(copies) == 5
    assert "trying layer by layer" not in caplog.text
    # A view's base holds the memory: none of them is left.
    assert all(ref() is None for ref in copies)


def test_the_model_may_change_move_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers frozen, added and unfrozen; a weight of another dtype; the numbers are of the copy."""
    gate = Gate(monkeypatch)
    model = stack()
    expected = list(simulate(stack(), 4, every=4))[-1][0]
    balancer = under_way(gate, model)
    model.double()
    model[0].requires_grad_(False)
    with torch.no_grad():
        model[1].weight.zero_()
    model.append(nn.Linear(18, 12))
    balancer.refresh()
    gate.open.set()
    for _ in range(3):
        balancer.step()
    assert balancer.measurements == 2 and balancer.pending is None
    assert balancer.alphas == {**expected, "5": None}
    assert set(balancer.multipliers) == {"1", "2", "3", "4"}  # frozen, and not measured yet
    balancer.step()  # measures again
    balancer.step()
    balancer.step()
    with pytest.warns(BalanceWarning, match="'1'.*every weight is zero"):
        balancer.step()
    assert set(balancer.multipliers) == {"2", "3", "4", "5"}


@pytest.mark.parametrize("later", [False, True])
def test_a_failure_costs_its_layer(later: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """While copying and while measuring, as without delay; also where it is resumed."""

    whole = engine.spectra

    def failing(tasks: Any, *rest: Any) -> Any:
        if threading.current_thread() in background() and any(t.name == "3" for t in tasks):
            raise torch.OutOfMemoryError("no room")
        return whole(tasks, *rest)

    model = stack()
    balancer = Balancer(model, every=2, delay=1)
    balancer.begin()
    if later:
        monkeypatch.setattr(engine, "spectra", failing)
    else:
        layer = balancer.layers[3]

        def no_room() -> Any:
            raise torch.OutOfMemoryError("no room")

        object.__setattr__(layer, "_read", no_room)
    move(model, 1)
    balancer.step()
    balancer.step()
    other = Balancer(model, every=2, delay=1)
    other.load_state_dict(stored(balancer.state_dict()))
    for each in (balancer, other):
        with pytest.warns(BalanceWarning, match="layer '3' could not be measured.*no room"):
            each.step()
        assert set(each.multipliers) == {"0", "1", "2", "4"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balancer.step()
        balancer.step()
    balancer.cancel()


@pytest.mark.parametrize("how", ["dropped", "failed"])
def test_a_job_that_ends_badly_keeps_nothing(how: str) -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def work(progress: Callable[[float], None]) -> None:
        copy = torch.zeros(1000)
        held.append(weakref.ref(copy))
        try:
            raise ValueError("first")
        except ValueError as error:
            if how == "dropped":
                raise Dropped from error
            raise RuntimeError("then") from error

    job = Job(work)
    while not job._future.done():
        time.sleep(0.01)
    quiet()
    gc.collect()
    assert held[0]() is None
    with pytest.raises(Dropped if how == "dropped" else RuntimeError) as raised:
        job.result()
    if how == "failed":  # and yet it says where
        assert "in work" in raised.value.__notes__[0]


def test_a_lost_thread_is_made_good(caplog: pytest.LogCaptureFixture) -> None:
    """The weights of the due tick are measured then, in a resumed run too."""
    model = stack()
    balancer = Balancer(model, every=2, delay=1)
    balancer.begin()
    balancer.step()
    balancer.step()

    def lost(_: Any) -> Any:
        raise RuntimeError("cannot start a thread")

    assert balancer._pending is not None
    balancer._pending.source = Job(lost)
    other = Balancer(model, every=2, delay=1)
    other.load_state_dict(stored(balancer.state_dict()))
    move(model, 4)
    balancer.step()
    other.step()
    assert "measuring in the background failed" in caplog.text
    assert balancer.measurements == 2 and balancer.multipliers == other.multipliers
    assert balancer.alphas == {x.name: x.alpha for x in tb.analyze(model)}


@pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"), reason="this torch has one setting for all"
)
def test_no_setting_is_touched_beside_the_training() -> None:
    """Where products run in bf16 or TF32, alphas are right and the training keeps its setting."""
    model = stack()
    expected = list(simulate(stack(), 4, every=2, delay=2))
    balancer = Balancer(model, every=2, delay=2)
    before = torch.get_float32_matmul_precision()
    seen = set()
    try:
        torch.set_float32_matmul_precision("medium")
        balancer.begin()
        for tick in range(1, 5):
            move(model, tick)
            balancer.step()
            while background():
                seen.add(torch.backends.mkldnn.matmul.fp32_precision)
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == {"bf16"}
    assert balancer.measurements == 2
    assert balancer.alphas == pytest.approx(expected[4][0], rel=1e-5)
    balancer.cancel()


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_interpreter_exits_in_the_middle() -> None:
    """Where the whole measurement would take a minute, and says nothing."""
    code = """
import time, torch, tempbalance as tb
from tempbalance.measure.measurement import Measurement
torch.set_num_threads(2)
model = torch.nn.Sequential(*(torch.nn.Linear(200, 200) for _ in range(3)))
balancer = tb.Balancer(model, every=2, delay=2)
balancer.begin()
whole = Measurement.compute
def slow(self):
    taken = list(self._taken)
    for _ in range(3000):
        self._taken = list(taken)
        whole(self)
Measurement.compute = slow
balancer.step(); balancer.step()
time.sleep(0.2)
assert balancer.pending == 4
print("end", flush=True)
"""
    started = time.monotonic()
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
    assert time.monotonic() - started < 40


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_steps_on() -> None:
    code = """
import os, time, torch, tempbalance as tb
from tempbalance.measure.measurement import Measurement
model = torch.nn.Sequential(*(torch.nn.Linear(20, 20) for _ in range(3)))
balancer = tb.Balancer(model, every=2, delay=1)
balancer.begin()
whole = Measurement.compute
def slow(self):
    time.sleep(0.5)
    whole(self)
Measurement.compute = slow
balancer.step(); balancer.step()
child = os.fork()
for _ in range(4):
    balancer.step()
assert balancer.measurements == 3, balancer.measurements
assert balancer.alphas == {x.name: x.alpha for x in tb.analyze(model)}
if child:
    assert os.waitpid(child, 0)[1] == 0
    print("parent", flush=True)
else:
    os._exit(0)
"""
    done = run_python(code)
    assert (done.returncode, done.stdout) == (0, "parent\n"), done.stderr


# --- in training ---------------------------------------------------------------------------------


def trained(things: Any, start: int, stop: int) -> list[list[float]]:
    model, optimizer, scheduler = things
    seen = []
    for i in range(start, stop):
        train_step(model, optimizer, i)
        if isinstance(scheduler, TempBalanceLR):
            scheduler.step()
            seen.append(rates(optimizer))
        else:
            seen.append(list(scheduler.multipliers.values()))
    return seen


def with_scheduler(seed: int, **options: Any) -> Any:
    model = net(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    cosine = lrs.CosineAnnealingLR(optimizer, 20)
    return model, optimizer, TempBalanceLR(optimizer, model, cosine, **options)


def with_hooks(seed: int, **options: Any) -> Any:
    model = net(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, StepHooks(optimizer, model, **options)


@pytest.mark.parametrize("build", [with_scheduler, with_hooks])
@pytest.mark.parametrize("cut", [2, 3, 4, 5])
def test_resume_in_training(cut: int, build: Callable[..., Any]) -> None:
    options = {"every": 3, "delay": 2, "ramp": 2}
    whole = build(0, **options)
    before = trained(whole, 0, cut)
    buffer = io.BytesIO()
    torch.save([thing.state_dict() for thing in whole], buffer)
    after = trained(whole, cut, 11)
    buffer.seek(0)
    again = build(1, **options)
    for thing, state in zip(again, torch.load(buffer, weights_only=True), strict=True):
        thing.load_state_dict(state)
    assert trained(again, cut, 11) == after and before
    assert torch.equal(weights(again[0]), weights(whole[0]))
    for _, _, scheduler in (whole, again):
        scheduler.detach()


@pytest.mark.parametrize("build", [with_scheduler, with_hooks])
def test_detaching_ends_the_thread(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    things = build(0, every=3, delay=2)
    trained(things, 0, 3)
    assert gate.entered.wait(10)
    things[2].detach()
    quiet()
    assert gate.dropped == [True]


def test_the_time_a_measurement_takes_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = with_scheduler(0, every=2, delay=2)
    expected = trained(alone, 0, 9)
    naps = itertools.cycle([0.03, 0.0, 0.01])

    def napping(measurement: Measurement, compute: Any) -> None:
        time.sleep(next(naps))
        compute(measurement)

    instead(monkeypatch, napping)
    slow = with_scheduler(0, every=2, delay=2)
    assert trained(slow, 0, 9) == expected
    for things in (alone, slow):
        things[2].detach()


def test_groups_added_in_the_window() -> None:
    model = net()
    head = model[10]
    body = [p for name, p in model.named_parameters() if not name.startswith("10.")]
    optimizer = torch.optim.SGD(body, lr=0.1)
    scheduler = TempBalanceLR(optimizer, model, every=3, delay=2)
    for i in range(3):
        train_step(model, optimizer, i)
        scheduler.step()
    optimizer.add_param_group({"params": list(head.parameters()), "lr": 0.1})
    for i in range(3, 9):
        train_step(model, optimizer, i)
        scheduler.step()
        assert scheduler.alphas.get("10") is None or i >= 7
    assert scheduler.alphas["10"] is not None
    scheduler.detach()
