"""The Lightning callback: it works with what people have, resumes exactly, shows what it does."""

from __future__ import annotations

import copy
import csv
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_modules import Manual, Plain, loader, pl
from releases import needs_step_checkpoints, release
from schedules import SCHEDULES, rates, weights
from torch import nn
from torch.optim import lr_scheduler as lrs
from torch.utils.data import DataLoader, TensorDataset

import tempbalance as tb
from tempbalance.integrations.lightning import TempBalanceCallback

BaseFinetuning, ModelCheckpoint = pl.callbacks.BaseFinetuning, pl.callbacks.ModelCheckpoint
CSVLogger, LearningRateMonitor = pl.loggers.CSVLogger, pl.callbacks.LearningRateMonitor
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*logging interval",
    "ignore:.*lr_scheduler.step.*before",
    "ignore:A `OneCycleLR` scheduler is using 'interval'",
)


def trainer(tmp_path: Path, *callbacks: Any, epochs: int = 3, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "max_epochs": epochs,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "logger": False,
        "default_root_dir": str(tmp_path),
        "callbacks": list(callbacks),
        "log_every_n_steps": 1,
    }
    return pl.Trainer(**{**defaults, **options})


def history_of(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.rglob("tempbalance.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


def cosine(optimizer: Any) -> lrs.LRScheduler:
    return lrs.CosineAnnealingLR(optimizer, 4)


def test_one_line_is_all(tmp_path: Path) -> None:
    callback, model = TempBalanceCallback(), Plain(cosine)
    t = trainer(tmp_path, callback)
    t.fit(model, loader())
    names = [g["name"] for g in t.optimizers[0].param_groups]
    assert names == ["net.0", "net.3", "net.8", "net.10"]
    scheduler = callback.schedulers[0]
    assert t.lr_scheduler_configs[0].scheduler is scheduler
    assert t.lr_scheduler_configs[0].interval == "epoch"
    assert scheduler.balancer.measurements == 3  # at the start, and before epochs 1 and 2
    base = scheduler.get_base_lr()
    wanted = [
        b * f for b, f in zip(base, scheduler.grouping.factors(scheduler.multipliers), strict=True)
    ]
    assert rates(t.optimizers[0]) == wanted
    assert len(set(wanted)) > 1


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_measures_once_an_epoch_whatever_the_interval(tmp_path: Path, interval: str) -> None:
    callback = TempBalanceCallback()
    t = trainer(tmp_path, callback)
    t.fit(Plain(lambda o: lrs.LinearLR(o, 0.1, total_iters=8), interval), loader())
    assert callback.schedulers[0].balancer.measurements == 3
    expected = 12 if interval == "step" else 3
    assert callback.schedulers[0].last_epoch == expected


def test_measures_every_n_steps(tmp_path: Path) -> None:
    callback = TempBalanceCallback(every_n_steps=5)
    trainer(tmp_path, callback).fit(Plain(cosine), loader())
    assert callback.schedulers[0].balancer.measurements == 3  # at 0, 5 and 10 of 12 steps


def test_without_a_schedule_the_callback_drives_itself(tmp_path: Path) -> None:
    callback, monitor = TempBalanceCallback(), LearningRateMonitor()
    t = trainer(tmp_path, callback, monitor, logger=CSVLogger(tmp_path))
    t.fit(Plain(), loader())
    assert callback.schedulers[0].balancer.measurements == 3
    assert "lr-SGD/net.0" in monitor.lrs
    assert sorted(r / 0.1 for r in rates(t.optimizers[0]))[::3] == pytest.approx([0.5, 1.5])


RESUMED = ["none", "cosine", "lambda", "onecycle", "sequential", "step", "cyclic"]


@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("name", RESUMED)
def test_resume_matches_bit_for_bit(tmp_path: Path, name: str, steps: bool) -> None:
    def build() -> tuple[TempBalanceCallback, Plain]:
        callback = TempBalanceCallback(every_n_steps=3 if steps else None, ramp=2)
        interval = "step" if steps else "epoch"
        return callback, Plain(SCHEDULES[name], interval, adam=True)

    callback, model = build()
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    whole = trainer(tmp_path, callback, keep, epochs=4)
    whole.fit(model, loader())
    for epoch in (0, 1, 2):
        callback2, model2 = build()
        with torch.no_grad():
            for p in model2.parameters():
                p.add_(1.0)  # what is not restored will show
        resumed = trainer(tmp_path, callback2, epochs=4)
        resumed.fit(model2, loader(), ckpt_path=str(tmp_path / f"epoch={epoch}.ckpt"))
        assert rates(resumed.optimizers[0]) == rates(whole.optimizers[0]), epoch
        assert torch.equal(weights(model2), weights(model)), epoch
        assert callback2.balancers[0].measurements == callback.balancers[0].measurements


@pytest.mark.parametrize("step", [2, 5, 6])
def test_resume_in_the_middle_of_an_epoch(tmp_path: Path, step: int) -> None:
    """The checkpoint of a step goes on from the next batch (the loader is stateless here)."""
    keep = ModelCheckpoint(tmp_path / "c", save_top_k=-1, every_n_train_steps=1, filename="{step}")
    callback, model = TempBalanceCallback(every_n_steps=2), Plain(cosine, "step")
    trainer(tmp_path, callback, keep, epochs=2).fit(model, loader())
    callback2, model2 = TempBalanceCallback(every_n_steps=2), Plain(cosine, "step")
    t = trainer(tmp_path, callback2, epochs=2)
    t.fit(model2, loader(), ckpt_path=str(tmp_path / "c" / f"step={step}.ckpt"))
    assert callback2._clock == t.global_step
    assert callback2.balancers[0].tick == t.global_step


@needs_step_checkpoints
@pytest.mark.parametrize("step", [3, 4, 5])
def test_resume_while_a_measurement_is_under_way(tmp_path: Path, step: int) -> None:
    """Measured at step 3 in the background, in effect from step 5 on; two layers at a time."""
    x, y = next(iter(loader()))
    data = TensorDataset(x.repeat(4, 1, 1, 1), y.repeat(4))  # Lightning begins the epoch anew
    options: dict[str, Any] = {"every_n_steps": 3, "delay": 2, "ramp": 2}
    keep = ModelCheckpoint(tmp_path / "c", save_top_k=-1, every_n_train_steps=1, filename="{step}")
    callback, model = TempBalanceCallback(**options), Plain(cosine, "step", adam=True)
    t = trainer(tmp_path, callback, keep, epochs=3)
    t.fit(model, DataLoader(data, 8))
    callback2, model2 = TempBalanceCallback(**options), Plain(cosine, "step", adam=True)
    t2 = trainer(tmp_path, callback2, epochs=3)
    t2.fit(model2, DataLoader(data, 8), ckpt_path=str(tmp_path / "c" / f"step={step}.ckpt"))
    assert torch.equal(weights(model2), weights(model))
    assert rates(t2.optimizers[0]) == rates(t.optimizers[0])
    states = [c.schedulers[0].balancer.state_dict() for c in (callback, callback2)]
    assert states[0] == states[1] and states[0]["pending"]["due"] == 14


def test_an_epoch_late_in_the_background(tmp_path: Path) -> None:
    """The multipliers of an epoch are of the weights one epoch before."""
    logger = CSVLogger(tmp_path)
    late = TempBalanceCallback(delay=1)
    model = Plain(cosine)
    seen: list[dict[str, float | None]] = []

    class Look(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append({x.name: x.alpha for x in tb.analyze(pl_module)})

    trainer(tmp_path, Look(), late, epochs=4, logger=logger).fit(model, loader())
    found = history_of(tmp_path)
    alphas = [float(row["alpha"]) for row in found if row["layer"] == "net.3"]
    assert alphas == [seen[epoch]["net.3"] for epoch in range(3)]
    assert late.balancers[0].pending == 4
    assert late.balancers[0].alphas == seen[2]


@pytest.mark.parametrize("name", ["none", "cosine", "lambda", "onecycle", "sequential"])
def test_checkpoint_without_the_callback_is_continued(tmp_path: Path, name: str) -> None:
    keep = ModelCheckpoint(tmp_path / "c", filename="last")
    plain = Plain(SCHEDULES[name])
    trainer(tmp_path, keep, epochs=2).fit(plain, loader())
    callback, model = TempBalanceCallback(), Plain(SCHEDULES[name])
    t = trainer(tmp_path, callback, epochs=4)
    t.fit(model, loader(), ckpt_path=str(tmp_path / "c" / "last.ckpt"))
    twin = Plain(SCHEDULES[name])
    t2 = trainer(tmp_path, epochs=4)
    t2.fit(twin, loader(), ckpt_path=str(tmp_path / "c" / "last.ckpt"))
    base = [float(r) for r in callback.schedulers[0].get_base_lr()]
    assert base == pytest.approx([t2.optimizers[0].param_groups[0]["lr"]] * 4, rel=1e-12)
    assert callback.balancers[0].measurements == 2


def test_fit_again_and_validate_between(tmp_path: Path) -> None:
    callback, model = TempBalanceCallback(), Plain(cosine)
    t = trainer(tmp_path, callback, epochs=2)
    t.validate(model, loader(), verbose=False)
    t.fit(model, loader(), loader())
    t.test(model, loader(), verbose=False)
    t.fit_loop.max_epochs = 4
    t.fit(model, loader(), loader())
    assert len(t.optimizers[0].param_groups) == 4
    assert len({id(c) for c in callback.schedulers}) == 1


def test_the_same_optimizer_object_each_time(tmp_path: Path) -> None:
    class Keeps(Plain):
        def configure_optimizers(self) -> Any:
            if not hasattr(self, "kept"):
                self.kept = torch.optim.SGD(self.parameters(), lr=0.1)
            return self.kept

    model = Keeps()
    for _ in range(2):
        t = trainer(tmp_path, TempBalanceCallback(), epochs=1)
        t.fit(model, loader())
    assert sorted(r / 0.1 for r in rates(model.kept))[::3] == pytest.approx([0.5, 1.5])


def test_manual_optimization_with_two_optimizers(tmp_path: Path) -> None:
    callback, model = TempBalanceCallback(), Manual()
    t = trainer(tmp_path, callback, epochs=2)
    t.fit(model, loader())
    assert [set(s.multipliers) for s in callback.schedulers] == [
        {"generator.0", "generator.2"},
        {"critic.0", "critic.2"},
    ]
    assert callback.schedulers[0].get_base_lr() == pytest.approx([2.5e-4, 2.5e-4])
    assert callback.schedulers[1].get_base_lr() == pytest.approx([1e-3, 1e-3])


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("schedules", [0, 1, 2])
def test_manual_optimization_resumes_bit_for_bit(
    tmp_path: Path, schedules: int, every: int
) -> None:
    """Lightning keeps no state of a schedule that the module did not configure."""

    def fit(epochs: int, ckpt: str | None = None, **options: Any) -> Any:
        torch.manual_seed(0)
        model = Manual(schedules)
        callback = TempBalanceCallback(every_n_epochs=every, **options)
        t = trainer(tmp_path, callback, epochs=epochs)
        t.fit(model, loader(), ckpt_path=ckpt)
        return t, model, callback

    whole, model, callback = fit(4)
    for epoch in (1, 2):
        saved = str(tmp_path / f"{epoch}.ckpt")
        fit(epoch)[0].save_checkpoint(saved)
        resumed, model2, callback2 = fit(4, saved)
        assert torch.equal(weights(model2), weights(model))
        for i in range(2):
            assert rates(resumed.optimizers[i]) == rates(whole.optimizers[i])
            assert callback2.balancers[i].state_dict() == callback.balancers[i].state_dict()
    even, _, _ = fit(4, saved, assign=tb.Constant(1.0))
    assert all(len(set(rates(optimizer))) == 1 for optimizer in even.optimizers)


@needs_step_checkpoints
@pytest.mark.parametrize("options", [{}, {"every_n_steps": 3}])
@pytest.mark.parametrize("name", ["none", "exponential", "cosine"])
def test_resume_from_the_last_batch_of_an_epoch(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    """Lightning then goes on with the next epoch's first batch, without its beginning."""

    def fit(*callbacks: Any, ckpt: Any = None) -> Any:
        torch.manual_seed(0)
        model = Plain(SCHEDULES[name], adam=True)
        t = trainer(tmp_path, TempBalanceCallback(**options), *callbacks, epochs=3)
        t.fit(model, loader(), ckpt_path=ckpt)
        return t, model

    steps = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=4, filename="{step}")
    whole, model = fit(steps)
    resumed, model2 = fit(ckpt=str(tmp_path / "step=4.ckpt"))
    # An epoch's own schedule Lightning does not step then, with the callback or without.
    if name == "none":
        assert torch.equal(weights(model2), weights(model))
        assert rates(resumed.optimizers[0]) == rates(whole.optimizers[0])
    ticks = [c.balancers[0].measurements for c in (_callback(whole), _callback(resumed))]
    assert ticks[0] == ticks[1] == (5 if options else 3)


def _callback(t: Any) -> TempBalanceCallback:
    return next(c for c in t.callbacks if isinstance(c, TempBalanceCallback))


@pytest.mark.parametrize(
    ("options", "balanced"),
    [
        ({"stop": 2}, [False] * 3),
        ({"start": 2}, [True] * 3),
        ({"start": 4}, [False, True, True]),
        ({"start": 4, "every_n_epochs": 2}, [False, True, True]),
        ({"stop": 4}, [True, False, False]),
        ({"start": 12, "every_n_steps": 1}, [True] * 3),
    ],
)
def test_epochs_without_the_callback_count(
    tmp_path: Path, options: dict[str, Any], balanced: list[bool]
) -> None:
    seen: list[bool] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, t: Any, *_: Any) -> None:
            if t.is_last_batch:
                seen.append(len({round(r, 12) for r in rates(t.optimizers[0])}) > 1)

    keep = ModelCheckpoint(tmp_path / "c", filename="last")
    trainer(tmp_path, keep, epochs=3).fit(Plain(), loader())
    t = trainer(tmp_path, TempBalanceCallback(**options), Watch(), epochs=6)
    t.fit(Plain(), loader(), ckpt_path=str(tmp_path / "c" / "last.ckpt"))
    assert seen == balanced


@pytest.mark.parametrize("observe", [False, True])
def test_a_checkpoint_that_is_validated_is_not_resumed(tmp_path: Path, observe: bool) -> None:
    keep = ModelCheckpoint(tmp_path / "c", filename="last")
    options = {"observe": observe}
    trainer(tmp_path, TempBalanceCallback(**options), keep, epochs=4).fit(Manual(0), loader())

    class Validated(Manual):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    seen = []
    for before in (False, True):
        callback = TempBalanceCallback(**options)
        t = trainer(tmp_path, callback, epochs=2)
        if before:
            saved = str(tmp_path / "c" / "last.ckpt")
            t.validate(Validated(0), loader(), ckpt_path=saved, verbose=False)
        torch.manual_seed(0)
        t.fit(Validated(0), loader())
        seen.append([(b.tick, b.measurements, b.alphas) for b in callback.balancers])
    assert seen[0] == seen[1] and seen[0][0][:2] == (1, 2)


def test_rates_written_by_hand_before_a_step_are_balanced(tmp_path: Path) -> None:
    """Lightning's recipe for a warm-up: the module writes the rates in optimizer_step."""
    used: list[list[float]] = []

    class ByHand(Plain):
        def optimizer_step(self, epoch: int, i: int, optimizer: Any, closure: Any = None) -> None:
            for group in optimizer.param_groups:
                group["lr"] = min(1.0, (self.trainer.global_step + 1) / 6) * 0.1
            super().optimizer_step(epoch, i, optimizer, closure)
            used.append(rates(optimizer))

    callback = TempBalanceCallback()
    trainer(tmp_path, callback, epochs=2).fit(ByHand(), loader())
    for i, found in enumerate(used):
        assert max(found) == pytest.approx(0.15 * min(1, (i + 1) / 6))
        assert min(found) == pytest.approx(max(found) / 3)


def test_plateau_keeps_its_monitor(tmp_path: Path) -> None:
    """The same base rates as without the callback, after a resume too.

    Lightning saves the checkpoint of an epoch before it steps a plateau schedule, so a resumed run
    differs from an uninterrupted one with or without the callback.
    """

    def fit(epochs: int, *callbacks: Any, ckpt: Any = None) -> Any:
        folder = tmp_path / f"{len(callbacks)}"
        keep = ModelCheckpoint(folder, save_top_k=-1, filename=f"{epochs}")
        t = trainer(tmp_path, *callbacks, keep, epochs=epochs)
        t.fit(Plain(SCHEDULES["plateau"]), loader(), ckpt_path=ckpt and str(folder / ckpt))
        return t

    for ckpt in (None, "2.ckpt"):
        fit(2), fit(2, TempBalanceCallback())
        callback = TempBalanceCallback()
        t, plain = fit(5, callback, ckpt=ckpt), fit(5, ckpt=ckpt)
        assert t.lr_scheduler_configs[0].reduce_on_plateau
        assert t.lr_scheduler_configs[0].monitor == "loss"
        assert callback.schedulers[0].get_base_lr() == rates(plain.optimizers[0]) * 4
        assert plain.optimizers[0].param_groups[0]["lr"] < 0.1


def test_stochastic_weight_averaging_takes_over(tmp_path: Path, caplog: Any) -> None:
    callback, swa = (
        TempBalanceCallback(),
        pl.callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=2),
    )
    t = trainer(tmp_path, callback, swa, epochs=5)
    with caplog.at_level(logging.WARNING, "tempbalance"):
        t.fit(Plain(cosine), loader())
    assert "SWALR has taken over" in caplog.text
    assert len({round(r, 12) for r in rates(t.optimizers[0])}) == 1
    other = pl.callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=2)
    with pytest.raises(ValueError, match="put TempBalanceCallback before StochasticWeight"):
        trainer(tmp_path, other, TempBalanceCallback()).fit(Plain(cosine), loader())


def test_early_stopping_accumulation_and_bf16(tmp_path: Path) -> None:
    callback = TempBalanceCallback(every_n_steps=1)
    stop = pl.callbacks.EarlyStopping("loss", patience=1, min_delta=1e9)
    t = trainer(
        tmp_path, callback, stop, epochs=9, accumulate_grad_batches=2, precision="bf16-mixed"
    )
    t.fit(Plain(cosine), loader())
    assert t.current_epoch == 2 and t.global_step == 4
    assert callback.balancers[0].tick == t.global_step


class Head(BaseFinetuning):
    """Train the head alone for an epoch, then the backbone too."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, initial_denom_lr=2)


class Finetuned(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = self.net[:8], self.net[8:]
        self.net = nn.Sequential(self.backbone, self.head)

    def configure_optimizers(self) -> Any:
        trainable = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trainable, lr=0.1, momentum=0.9)
        return [optimizer], [lrs.ExponentialLR(optimizer, 0.9)]


def test_gradual_unfreezing_and_its_resume(tmp_path: Path) -> None:
    """Groups added by a callback are split and scheduled, and found again in a resumed run.

    Lightning leaves the backbone frozen after a resume (its issue 21901), with and without this
    callback, so the weights of the two runs differ; groups and base rates must not.
    """
    with pytest.raises(ValueError, match="put Head before TempBalanceCallback"):
        trainer(tmp_path, TempBalanceCallback(), Head()).fit(Finetuned(), loader())
    with pytest.raises(ValueError, match="BackboneFinetuning writes the rate"):
        trainer(tmp_path, pl.callbacks.BackboneFinetuning(), TempBalanceCallback()).fit(
            Finetuned(), loader()
        )

    def fit(epochs: int, ckpt: str | None = None) -> tuple[Any, Any]:
        callback, model = TempBalanceCallback(), Finetuned()
        keep = ModelCheckpoint(tmp_path / str(epochs), filename="last")
        t = trainer(tmp_path, Head(), callback, keep, epochs=epochs)
        t.fit(model, loader(), ckpt_path=ckpt)
        return t, callback

    def names(t: Any) -> list[str]:
        return [g["name"] for g in t.optimizers[0].param_groups]

    whole, callback = fit(4)
    assert len(names(whole)) == len(set(names(whole)))
    assert len(callback.schedulers[0].multipliers) == 4
    scheduler = callback.schedulers[0]
    factors = scheduler.grouping.factors(scheduler.multipliers)
    wanted = [b * f for b, f in zip(scheduler.get_base_lr(), factors, strict=True)]
    assert rates(whole.optimizers[0]) == wanted
    assert len(set(scheduler.get_base_lr())) == 2
    fit(3)
    resumed, callback2 = fit(4, str(tmp_path / "3" / "last.ckpt"))
    assert names(resumed) == names(whole)
    assert callback2.schedulers[0].get_base_lr() == scheduler.get_base_lr()


def test_observer_changes_nothing(tmp_path: Path) -> None:
    callback, model, twin = TempBalanceCallback(observe=True), Plain(cosine), Plain(cosine)
    t, t2 = trainer(tmp_path, callback, logger=CSVLogger(tmp_path)), trainer(tmp_path)
    t.fit(model, loader())
    t2.fit(twin, loader())
    assert torch.equal(weights(model), weights(twin))
    assert len(t.optimizers[0].param_groups) == 1
    assert callback.balancers[0].measurements == 3
    assert type(t.lr_scheduler_configs[0].scheduler) is lrs.CosineAnnealingLR


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_module(tmp_path: Path, in_place: bool) -> None:
    """The measurement reads the weights outside of what is traced; no code need be generated."""
    callback, model = TempBalanceCallback(), Plain(cosine)
    torch._dynamo.reset()
    if in_place:
        model.net.compile(backend="aot_eager")
    compiled = model if in_place else torch.compile(model, backend="aot_eager")
    trainer(tmp_path, callback, epochs=2).fit(compiled, loader())
    assert set(callback.schedulers[0].multipliers) == {"net.0", "net.3", "net.8", "net.10"}
    assert callback.balancers[0].measurements == 2
    assert len(set(rates(model.trainer.optimizers[0]))) == 4


class Searched(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.lr = 0.1

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        return [optimizer], [lrs.ExponentialLR(optimizer, 0.5)]


@pytest.mark.parametrize("how", ["tuner", "before", "after"])
def test_learning_rate_search(tmp_path: Path, how: str) -> None:
    """The search sees uniform rates; the fit then balances the rate that a plain run has."""

    def fit(*callbacks: Any) -> Any:
        model = Searched()
        finder = pl.callbacks.LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
        orders = {"tuner": callbacks, "before": (finder, *callbacks), "after": (*callbacks, finder)}
        t = trainer(tmp_path, *orders[how], epochs=2, enable_checkpointing=True)
        if how == "tuner":
            options: Any = {"num_training": 20, "early_stop_threshold": None}
            pl.tuner.Tuner(t).lr_find(model, loader(16), **options)
        t.fit(model, loader(16))
        return model.lr, rates(t.optimizers[0])

    callback = TempBalanceCallback()
    (found, plain), (same, balanced) = fit(), fit(callback)
    assert found == same != 0.1
    scheduler = callback.schedulers[0]
    assert scheduler.get_base_lr() == plain * 4
    factors = scheduler.grouping.factors(scheduler.multipliers)
    assert balanced == pytest.approx([plain[0] * f for f in factors])


@pytest.mark.parametrize(
    ("options", "measured"),
    [
        ({"fast_dev_run": True}, 1),
        ({"overfit_batches": 1}, 3),
        ({"limit_train_batches": 0}, 0),
        ({"epochs": 0}, 0),
        ({"max_steps": 9}, 3),
        ({"gradient_clip_val": 0.1, "accumulate_grad_batches": 3}, 3),
        ({"val_check_interval": 0.5, "reload_dataloaders_every_n_epochs": 1}, 3),
        ({"precision": "bf16-true"}, 3),
    ],
    ids=str,
)
def test_ways_to_run(tmp_path: Path, options: Any, measured: int) -> None:
    callback = TempBalanceCallback()
    t = trainer(tmp_path, callback, **options)
    t.fit(Plain(cosine), loader(), loader())
    assert callback.balancers[0].measurements == measured


def test_half_precision_on_a_cpu_is_bfloat16(tmp_path: Path) -> None:
    callback = TempBalanceCallback()
    with pytest.warns(UserWarning, match="Using `precision='bf16-mixed'` instead"):
        t = trainer(tmp_path, callback, precision="16-mixed")
    t.fit(Plain(cosine), loader())
    assert callback.balancers[0].measurements == 3


class Stopped(pl.Callback):
    def __init__(self, step: int, error: type[BaseException]) -> None:
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error("stopped")


def test_interrupted_by_the_user(tmp_path: Path) -> None:
    t = trainer(tmp_path, TempBalanceCallback(), Stopped(7, KeyboardInterrupt),
                logger=CSVLogger(tmp_path))  # fmt: skip
    with pytest.raises(SystemExit):
        t.fit(Plain(cosine), loader())
    assert (Path(t.log_dir) / "esd_last.npz").exists()


def test_resume_without_the_callback_says_what_to_do(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "c", filename="last")
    trainer(tmp_path, TempBalanceCallback(), keep, epochs=1).fit(Plain(cosine), loader())
    saved = str(tmp_path / "c" / "last.ckpt")
    with (
        pytest.warns(UserWarning, match=r"without balancing: assign=Constant\(1.0\)"),
        pytest.raises(ValueError, match="different number of parameter groups"),
    ):
        trainer(tmp_path, epochs=2).fit(Plain(cosine), loader(), ckpt_path=saved)
    observer = TempBalanceCallback(observe=True)
    with pytest.raises(ValueError, match=r"assign=tempbalance.Constant\(1.0\)"):
        trainer(tmp_path, observer, epochs=2).fit(Plain(cosine), loader(), ckpt_path=saved)
    trainer(tmp_path).validate(Plain(cosine), loader(), ckpt_path=saved, verbose=False)
    # The cure that the messages name: rates are uniform again.
    t = trainer(tmp_path, TempBalanceCallback(assign=tb.Constant(1.0)), epochs=2)
    t.fit(Plain(cosine), loader(), ckpt_path=saved)
    assert rates(t.optimizers[0]) == pytest.approx([0.05] * 4)


def test_resume_with_another_clock(tmp_path: Path) -> None:
    """From epochs to steps: measurements go on from here, none is made up for."""
    keep = ModelCheckpoint(tmp_path / "c", filename="last")
    trainer(tmp_path, TempBalanceCallback(), keep, epochs=2).fit(Plain(cosine), loader())
    callback = TempBalanceCallback(every_n_steps=2)
    t = trainer(tmp_path, callback, epochs=3)
    t.fit(Plain(cosine), loader(), ckpt_path=str(tmp_path / "c" / "last.ckpt"))
    assert callback._clock == t.global_step == 12
    assert callback.balancers[0].measurements == 2 + 2


def test_a_used_callback_can_be_pickled(tmp_path: Path) -> None:
    """As ddp_spawn does with a callback that another fit has used."""
    callback = TempBalanceCallback(every_n_epochs=2)
    trainer(tmp_path, callback).fit(Plain(), loader())
    for twin in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        trainer(tmp_path, twin).fit(Plain(), loader())
        assert twin.balancers[0].measurements == callback.balancers[0].measurements == 2


class Other:
    """The other package: its modules are not those of ``lightning.pytorch``."""

    def __init__(self, tmp_path: Path) -> None:
        self.pl = pytest.importorskip("pytorch_lightning")
        self.tmp_path = tmp_path

    def fit(self, *callbacks: Any, schedule: bool = True, frozen: bool = False, **fit: Any) -> Any:
        class Module(self.pl.LightningModule):  # type: ignore[name-defined]
            net = None

            def __init__(self) -> None:
                super().__init__()
                self.backbone = Plain().net[:8]
                self.head = Plain().net[8:]

            def configure_optimizers(self) -> Any:
                chosen = (self.head if frozen else self).parameters()
                optimizer = torch.optim.SGD(chosen, lr=0.1, momentum=0.9)
                return ([optimizer], [cosine(optimizer)]) if schedule else optimizer

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                logits = self.head(self.backbone(batch[0]))
                return nn.functional.cross_entropy(logits, batch[1])

        keep = [c for c in callbacks if type(c).__name__ == "ModelCheckpoint"]
        t = self.pl.Trainer(
            max_epochs=4, accelerator="cpu", callbacks=list(callbacks), logger=False,
            enable_checkpointing=bool(keep), enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=str(self.tmp_path),
        )  # fmt: skip
        module = Module()
        t.fit(module, loader(), **fit)
        return t, module


@pytest.mark.parametrize("schedule", [False, True])
def test_the_other_package(tmp_path: Path, schedule: bool) -> None:
    other = Other(tmp_path)
    keep = other.pl.callbacks.ModelCheckpoint(tmp_path / "c", save_top_k=-1, filename="{epoch}")
    t, whole = other.fit(TempBalanceCallback(), keep, schedule=schedule)
    (config,) = t.lr_scheduler_configs
    assert isinstance(config, other.pl.utilities.types.LRSchedulerConfig)
    saved = str(tmp_path / "c" / "epoch=1.ckpt")
    _, resumed = other.fit(TempBalanceCallback(), schedule=schedule, ckpt_path=saved)
    assert torch.equal(weights(whole), weights(resumed))


def test_the_other_packages_callbacks_are_known(tmp_path: Path, caplog: Any) -> None:
    other = Other(tmp_path)
    theirs = other.pl.callbacks

    class Unfreeze(theirs.BaseFinetuning):  # type: ignore[name-defined]
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.backbone)

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)

    with pytest.raises(ValueError, match="BackboneFinetuning writes the rate"):
        other.fit(theirs.BackboneFinetuning(), TempBalanceCallback())
    with pytest.raises(ValueError, match="put Unfreeze before TempBalanceCallback"):
        other.fit(TempBalanceCallback(), Unfreeze(), frozen=True)
    callback = TempBalanceCallback()
    other.fit(Unfreeze(), callback, frozen=True)
    assert len(callback.schedulers[0].multipliers) == 4
    with caplog.at_level(logging.WARNING, "tempbalance"):
        swa = theirs.StochasticWeightAveraging(0.01, swa_epoch_start=2)
        t, _ = other.fit(TempBalanceCallback(), swa)
    assert "SWALR has taken over" in caplog.text
    assert len({round(r, 12) for r in rates(t.optimizers[0])}) == 1


ALONE = """
import importlib, sys
import torch
name, *hidden = sys.argv[1:]
sys.modules.update(dict.fromkeys(hidden))  # importing them fails, as if they were not installed
from tempbalance.integrations.lightning import TempBalanceCallback
pl = importlib.import_module(name)
from lightning_modules import Plain, loader
callback, model = TempBalanceCallback(), Plain()
assert isinstance(callback, pl.Callback) and isinstance(model, pl.LightningModule)
off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
trainer = pl.Trainer(
    max_epochs=2, accelerator="cpu", callbacks=[callback], enable_model_summary=False, **off
)
trainer.fit(model, loader())
assert callback.balancers[0].measurements == 2
assert len({group["lr"] for group in trainer.optimizers[0].param_groups}) > 1
"""


@pytest.mark.ci
@pytest.mark.parametrize("name", ["pytorch_lightning", "lightning.pytorch"])
def test_with_one_of_the_two_packages_installed(tmp_path: Path, name: str) -> None:
    """In a process of its own, in which the other package cannot be imported."""
    packages = {"lightning": "lightning", "pytorch_lightning": "pytorch-lightning"}
    own = name.split(".")[0]
    if not release(packages.pop(own)):
        pytest.skip(f"{own} is not installed")
    hidden = [*packages, *(["lightning_fabric"] if own == "lightning" else [])]
    here = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", ALONE, name, *hidden]
    environment = {**os.environ, "PYTHONPATH": path}
    subprocess.run(command, check=True, timeout=120, cwd=tmp_path, env=environment)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"every_n_epochs": 0}, ValueError, "every_n_epochs must be a positive"),
        ({"every_n_steps": 1.5}, ValueError, "every_n_steps"),
        ({"every_n_epochs": 2, "every_n_steps": 3}, ValueError, "or every_n_steps, not both"),
        ({"log": "all"}, ValueError, "log must be"),
        ({"every": 3}, TypeError, "no option 'every'; there are every_n_epochs"),
        ({"alpha": 3}, TypeError, "no option 'alpha'"),
    ],
)
def test_bad_options_are_refused_at_once(options: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        TempBalanceCallback(**options)


def test_bad_configurations_are_refused_with_the_cure(tmp_path: Path) -> None:
    class Twice(Plain):
        def configure_optimizers(self) -> Any:
            o = torch.optim.SGD(self.parameters(), lr=0.1)
            return [o], [lrs.StepLR(o, 2), lrs.ExponentialLR(o, 0.9)]

    class Already(Plain):
        def configure_optimizers(self) -> Any:
            o = torch.optim.SGD(self.parameters(), lr=0.1)
            return [o], [tb.TempBalanceLR(o, self)]

    class OneTwice(Manual):
        def configure_optimizers(self) -> Any:
            optimizers, (first,) = super().configure_optimizers()
            b = optimizers[1]
            return optimizers, [first, lrs.ConstantLR(b), lrs.ExponentialLR(b, 0.9)]

    class Without(Plain):
        def configure_optimizers(self) -> Any:
            return None

    for model, match in (
        (Twice(), "ChainedScheduler"),
        (Already(), "not both"),
        (OneTwice(), "optimizer 1 has 2 schedules"),
        (Without(), "returns no optimizer"),
    ):
        with pytest.raises(ValueError, match=match):
            trainer(tmp_path, TempBalanceCallback()).fit(model, loader())
    pruning = pl.callbacks.ModelPruning("l1_unstructured", amount=0.3)
    with pytest.raises(ValueError, match="ModelPruning replaces every weight"):
        trainer(tmp_path, TempBalanceCallback(), pruning).fit(Plain(), loader())
