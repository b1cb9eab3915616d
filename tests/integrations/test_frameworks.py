"""The recipes of docs/recipes.md and docs/guides in the loops of others: exact, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from optimizers import Kind, net, weights
from torch.optim import lr_scheduler as lrs

import tempbalance as tb
from tempbalance import StepHooks, TempBalanceLR

FACTORS = {"0": 0.5, "2": 1.5}
ADAMW = Kind(torch.optim.AdamW, options=(("lr", 0.01),))
pytestmark = pytest.mark.filterwarnings("ignore")


def by_hand(steps: int, accumulate: int = 1) -> torch.Tensor:
    model, optimizer = ADAMW.build(split=True)
    for group, factor in zip(optimizer.param_groups, FACTORS.values(), strict=True):
        group["lr"] = group["lr"] * factor
    cosine = lrs.CosineAnnealingLR(optimizer, 20)
    for i in range(steps):
        for j in range(accumulate):
            loss(model, i * accumulate + j).div(accumulate).backward()
        optimizer.step()
        cosine.step()
        optimizer.zero_grad()
    return weights(model)


def loss(model: Any, index: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(index)
    x, y = (torch.randn(8, n, generator=generator) for n in (12, 10))
    return torch.nn.functional.mse_loss(model(x), y)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("when", ["before", "after", "hooks"])
def test_accelerate(tmp_path: Path, when: str, accumulate: int) -> None:
    accelerate = pytest.importorskip("accelerate")

    def build() -> Any:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        model, optimizer = ADAMW.build()
        schedule: Any = lrs.CosineAnnealingLR(optimizer, 20)
        if when == "before":
            schedule = TempBalanceLR(optimizer, model, schedule, fixed=FACTORS)
        model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
        if when == "after":
            schedule = TempBalanceLR(optimizer, model, schedule, fixed=FACTORS)
            accelerator.register_for_checkpointing(schedule)
        if when == "hooks":
            accelerator.register_for_checkpointing(StepHooks(optimizer, model, fixed=FACTORS))
        return accelerator, model, optimizer, schedule

    def go(things: Any, start: int, stop: int) -> None:
        accelerator, model, optimizer, schedule = things
        for i in range(start, stop):
            with accelerator.accumulate(model):
                accelerator.backward(loss(model, i))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

    first = build()
    go(first, 0, 4 * accumulate)
    first[0].save_state(str(tmp_path / "a"))
    go(first, 4 * accumulate, 8 * accumulate)
    whole = weights(first[0].unwrap_model(first[1]))
    torch.testing.assert_close(whole, by_hand(8, accumulate), rtol=0, atol=1e-7)
    again = build()
    again[0].load_state(str(tmp_path / "a"))
    go(again, 4 * accumulate, 8 * accumulate)
    assert weights(again[0].unwrap_model(again[1])).equal(whole)


def lightning_fabric() -> Any:
    """Of whichever of the two packages is installed."""
    try:
        from lightning import fabric
    except ImportError:
        fabric = pytest.importorskip("lightning_fabric")
    return fabric


def test_fabric(tmp_path: Path) -> None:
    fabric = lightning_fabric().Fabric(accelerator="cpu", devices=1)

    def build() -> Any:
        model, optimizer = fabric.setup(*ADAMW.build())
        cosine = lrs.CosineAnnealingLR(optimizer.optimizer, 20)
        scheduler = TempBalanceLR(optimizer, model, cosine, fixed=FACTORS)
        return {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    def go(state: Any, start: int, stop: int) -> torch.Tensor:
        for i in range(start, stop):
            fabric.backward(loss(state["model"], i))
            state["optimizer"].step()
            state["scheduler"].step()
            state["optimizer"].zero_grad()
        return weights(state["model"])

    first, again = build(), build()
    go(first, 0, 4)
    fabric.save(tmp_path / "a.ckpt", first)
    assert go(first, 4, 8).equal(by_hand(8))
    fabric.load(tmp_path / "a.ckpt", again)
    assert go(again, 4, 8).equal(by_hand(8))


def test_ignite() -> None:
    pytest.importorskip("ignite")
    from ignite.engine import Engine, Events
    from ignite.handlers.param_scheduler import LRScheduler

    model, optimizer = ADAMW.build()
    scheduler = TempBalanceLR(optimizer, model, lrs.CosineAnnealingLR(optimizer, 20), fixed=FACTORS)

    def update(_: Any, index: int) -> None:
        loss(model, index).backward()
        optimizer.step()
        optimizer.zero_grad()

    wrong = Engine(lambda *_: None)
    wrong.add_event_handler(Events.ITERATION_STARTED, LRScheduler(scheduler))
    with pytest.raises(TypeError, match=r"Ignite add_event_handler\(event"):
        wrong.run(range(1))
    trainer = Engine(update)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda _: scheduler.step())
    trainer.run(range(8))
    assert weights(model).equal(by_hand(8))


def test_the_pattern_of_timms_script() -> None:
    """Hooks beside its optimizer and schedule: its groups, rates and logs stay its own."""
    timm_optim = pytest.importorskip("timm.optim")
    timm_scheduler = pytest.importorskip("timm.scheduler")

    def run(hooked: bool) -> Any:
        model = net()
        optimizer = timm_optim.create_optimizer_v2(model, opt="lamb", lr=0.01, weight_decay=0.05)
        hooks = StepHooks(optimizer, model, fixed=FACTORS) if hooked else None
        schedule = timm_scheduler.CosineLRScheduler(optimizer, 5, warmup_t=1, warmup_lr_init=1e-3)
        rates = []
        for epoch in range(4):
            for i in range(3):
                loss(model, 3 * epoch + i).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step_update(3 * epoch + i)
            schedule.step(epoch + 1, 0.5)
            rates.append([group["lr"] for group in optimizer.param_groups])
        return weights(model), rates, hooks

    (plain, rates, _), (balanced, same, hooks) = run(False), run(True)
    assert rates == same and len(same[0]) == 2
    assert not balanced.equal(plain) and hooks.balancer.tick == 12


def test_muon_with_adamw() -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has no Muon")
    torch.manual_seed(0)
    model = net()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    muon, adamw = torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.01)
    twin = net()
    by_layer = [{"params": [x.weight], "lr": 0.02 * f} for x, f in ((twin[0], 0.5), (twin[2], 1.5))]
    theirs = torch.optim.Muon(by_layer), torch.optim.AdamW([twin[0].bias, twin[2].bias], lr=0.01)
    StepHooks(muon, model, fixed=FACTORS)
    for i in range(5):
        for network, pair in ((model, (muon, adamw)), (twin, theirs)):
            loss(network, i).backward()
            for optimizer in pair:
                optimizer.step()
                optimizer.zero_grad()
    assert weights(model).equal(weights(twin))
    assert tb.TempBalanceLR(muon, model).multipliers
