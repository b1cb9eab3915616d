"""Schedules and loops of others: they work, or the first call says which line to change."""

from __future__ import annotations

import copy
import gc
import warnings
from typing import Any

import pytest
import torch
from optimizers import Kind, weights
from schedules import SCHEDULES, Foreign
from torch import nn
from torch.optim import lr_scheduler as lrs

import tempbalance as tb
from tempbalance import BalanceWarning, StepHooks, TempBalanceLR

FACTORS = {"0": 0.5, "2": 1.5}
SGD = Kind(torch.optim.SGD, options=(("lr", 0.1), ("momentum", 0.9)))


# --- timm's schedulers, and other objects with a step --------------------------------------------


class Warmup(Foreign):
    """A schedule of nobody's: it writes rate and momentum of the groups that it was built on."""

    def write(self, group: dict[str, Any], value: float) -> None:
        group["lr"] = value * min(1.0, self.count / 5) * 0.9**self.count
        group["momentum"] = 0.5 + 0.01 * self.count


def _timm(optimizer: Any) -> Any:
    schedulers = pytest.importorskip("timm.scheduler")
    return schedulers.CosineLRScheduler(optimizer, t_initial=10, warmup_t=3, warmup_lr_init=1e-3)


def _advance(schedule: Any, name: str, index: int) -> None:
    if name == "timm":
        schedule.step_update(num_updates=index)
        schedule.step(index + 1, 0.5)
    else:
        schedule.step()


FOREIGN = {"timm": _timm, "own": Warmup}


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_schedule_of_another_library_is_followed_exactly(name: str, save: bool) -> None:
    """As groups by hand whose rate is the schedule's, times the factor, at every step."""
    model, optimizer = SGD.build(split=True)
    schedule = FOREIGN[name](optimizer)
    rates = []
    for i in range(10):
        base = [group["lr"] for group in optimizer.param_groups]
        for group, factor in zip(optimizer.param_groups, FACTORS.values(), strict=True):
            group["lr"] = group["lr"] * factor
        rates.append([group["lr"] for group in optimizer.param_groups])
        SGD.step(model, optimizer, i)
        for group, value in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = value
        _advance(schedule, name, i)

    def build() -> Any:
        model, optimizer = SGD.build()
        base = FOREIGN[name](optimizer)
        return model, optimizer, TempBalanceLR(optimizer, model, base, fixed=FACTORS)

    here, mine, scheduler = build()
    for i in range(10):
        if save and i == 4:
            states = [copy.deepcopy(x.state_dict()) for x in (here, mine, scheduler)]
            here, mine, scheduler = build()
            for thing, state in zip((here, mine, scheduler), states, strict=True):
                thing.load_state_dict(state)
        assert scheduler.get_last_lr() == rates[i]
        SGD.step(here, mine, i)
        _advance(scheduler, name, i)
    assert len({rate for pair in rates for rate in pair}) > 8
    assert weights(here).equal(weights(model))
    assert mine.param_groups[1]["momentum"] == optimizer.param_groups[1]["momentum"]


def test_what_has_no_step_is_no_schedule() -> None:
    model, optimizer = SGD.build()
    for base in (lambda step: 0.1, 0.1, model, torch.optim.SGD):
        with pytest.raises(TypeError, match="method step"):
            TempBalanceLR(optimizer, model, base)
    other = Kind(torch.optim.SGD).build()[1]
    with pytest.raises(ValueError, match="another optimizer"):
        TempBalanceLR(optimizer, model, Warmup(other))
    assert len(optimizer.param_groups) == 1


# --- built and not passed ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cosine", "onecycle", "sequential", "plateau", "timm"])
def test_a_schedule_that_was_built_and_not_passed_is_named(name: str) -> None:
    model, optimizer = SGD.build()
    schedule = (_timm if name == "timm" else SCHEDULES[name])(optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    if name == "plateau":  # it leaves no trace, and needs none: it writes to all groups
        TempBalanceLR(optimizer, model, fixed=FACTORS)
        return
    line = rf"a {type(schedule).__name__} was built.*TempBalanceLR\(optimizer, model, schedule\)"
    with pytest.raises(ValueError, match=line):
        TempBalanceLR(optimizer, model)
    assert optimizer.state_dict() == before
    StepHooks(optimizer, model, fixed=FACTORS).detach()  # the other way that it names
    TempBalanceLR(optimizer, model, schedule, fixed=FACTORS)  # and the line


def test_groups_that_are_written_as_they_were_before_the_split() -> None:
    model, optimizer = SGD.build()
    kept = TempBalanceLR(optimizer, model, fixed=FACTORS)  # noqa: F841
    optimizer.param_groups[0]["lr"] = 0.06
    with pytest.warns(BalanceWarning, match=r"first param group was written.*other 1 was not"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.param_groups[0]["lr"] = 0.04
        optimizer.step()  # once
        for group in optimizer.param_groups:
            group["lr"] = 0.03
        optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.015, 0.045]


# --- never stepped -------------------------------------------------------------------------------


def _loop(steps: int, every: int, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, optimizer = Kind(torch.optim.SGD).build()
        base = options.pop("base", lambda o: None)(optimizer)
        scheduler = TempBalanceLR(optimizer, model, base, **options)
        for i in range(1, steps + 1):
            optimizer.step()
            if every and i % every == 0:
                scheduler.step()
        del scheduler, base, optimizer
        gc.collect()
    return [str(w.message) for w in caught if issubclass(w.category, BalanceWarning)]


def test_a_schedule_that_is_never_stepped_is_reported_once() -> None:
    (said,) = _loop(300, every=0)
    assert "never stepped" in said and "300 steps" in said
    (said,) = _loop(10_500, every=0)
    assert "10,000 steps" in said
    (said,) = _loop(50, every=0, fixed=FACTORS, base=lambda o: lrs.StepLR(o, 3))
    assert "no base schedule moved" in said


def test_once_an_epoch_is_enough() -> None:
    assert not _loop(6000, every=3000)
    assert not _loop(0, every=0)
    assert not _loop(300, every=0, fixed=FACTORS)  # a step would do nothing
    assert not _loop(300, every=0, assign=tb.Constant(0.5))


# --- little to balance ---------------------------------------------------------------------------


def test_little_to_balance_says_how_little_and_why() -> None:
    table = nn.Sequential(nn.Embedding(400, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    with pytest.warns(BalanceWarning, match=r"layers with \d+% of the parameters.*0\.weight"):
        StepHooks(optimizer, table, exclude=["Embedding"])
    model, optimizer = SGD.build()
    with pytest.warns(BalanceWarning, match="one layer is left to balance"):
        StepHooks(optimizer, model, exclude=["0"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StepHooks(*SGD.build()[::-1])


# --- a step count in place of a state ------------------------------------------------------------


@pytest.mark.parametrize("tick", [0, 3, 7])
def test_steps_that_a_run_has_behind_it_count(tick: int) -> None:
    """For ``start``, ``stop`` and ``hold``, where a saver has no slot for the state."""

    def at(steps: int, **more: Any) -> list[bool]:
        model, optimizer = SGD.build()
        torch.manual_seed(1)
        hooks = StepHooks(optimizer, model, every=1, start=5, stop=9, **more)
        seen = []
        for i in range(steps):
            values = hooks.multipliers.values()
            seen.append(any(value != 1.0 for value in values))
            SGD.step(model, optimizer, i)
        return seen

    assert at(12)[tick:] == at(12 - tick, tick=tick)


def test_a_tick_out_of_range() -> None:
    model, optimizer = SGD.build()
    for tick in (-1, 1.5):
        with pytest.raises(ValueError, match="tick must be"):
            StepHooks(optimizer, model, tick=tick)  # type: ignore[arg-type]
