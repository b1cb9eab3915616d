"""The Lightning callback: it works with what people have, resumes exactly, shows what it does."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from schedules import SCHEDULES, rates, weights

pytest.importorskip("lightning.pytorch")

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning_modules import Manual, Plain, loader
from torch import nn
from torch.optim import lr_scheduler as lrs

import tempbalance as tb
from tempbalance.integrations.lightning import TempBalanceCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*logging interval",
    "ignore:.*lr_scheduler.step.*before",
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
@pytest.mark.parametrize("crash", [1, 2, 3])
@pytest.mark.parametrize("name", RESUMED)
def test_resume_matches_bit_for_bit(tmp_path: Path, name: str, crash: int, steps: bool) -> None:
    def build() -> tuple[Any, Any, dict[str, Any]]:
        callback = TempBalanceCallback(every_n_steps=3 if steps else None, ramp=2)
        interval = "step" if steps else "epoch"
        return callback, Plain(SCHEDULES[name], interval, adam=True), {}

    def fit(callback: Any, model: Any, epochs: int, ckpt: str | None = None) -> Any:
        keep = ModelCheckpoint(tmp_path / str(epochs), save_top_k=-1, filename="{epoch}")
        t = trainer(tmp_path, callback, keep, epochs=epochs)
        t.fit(model, loader(), ckpt_path=ckpt)
        return t

    callback, model, _ = build()
    whole = fit(callback, model, 4)
    callback2, model2, _ = build()
    fit(callback2, model2, crash)
    callback3, model3, _ = build()
    with torch.no_grad():
        for p in model3.parameters():
            p.add_(1.0)  # what is not restored will show
    saved = str(tmp_path / str(crash) / f"epoch={crash - 1}.ckpt")
    resumed = fit(callback3, model3, 4, saved)
    assert rates(resumed.optimizers[0]) == rates(whole.optimizers[0])
    assert torch.equal(weights(model3), weights(model))
    assert callback3.balancers[0].measurements == callback.balancers[0].measurements


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
    callback, swa = TempBalanceCallback(), StochasticWeightAveraging(0.01, swa_epoch_start=2)
    t = trainer(tmp_path, callback, swa, epochs=5)
    with caplog.at_level(logging.WARNING, "tempbalance"):
        t.fit(Plain(cosine), loader())
    assert "SWALR has taken over" in caplog.text
    assert len({round(r, 12) for r in rates(t.optimizers[0])}) == 1


def test_early_stopping_accumulation_and_bf16(tmp_path: Path) -> None:
    callback = TempBalanceCallback(every_n_steps=1)
    stop = EarlyStopping("loss", patience=1, min_delta=1e9)
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
        trainer(tmp_path, BackboneFinetuning(), TempBalanceCallback()).fit(Finetuned(), loader())

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


def test_logs(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "tb")]
    t = trainer(tmp_path, TempBalanceCallback(), logger=loggers)
    t.fit(Plain(cosine), loader())
    folder = Path(t.log_dir)
    with (folder / "metrics.csv").open() as file:
        metrics = [row for row in csv.DictReader(file) if row.get("tempbalance/alpha/net.0")]
    assert [row["epoch"] for row in metrics] == ["0.0", "1.0", "2.0"]
    for name in ("alpha/net.3", "multiplier/net.3", "lr/net.3", "alpha/median", "time_share"):
        assert float(metrics[-1][f"tempbalance/{name}"]) > 0
    with (folder / "tempbalance.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert {row["layer"] for row in rows} == {"net.0", "net.3", "net.8", "net.10"}
    assert (folder / "esd_first.npz").exists()
    assert (folder / "esd_last.npz").exists()


def test_summary_and_no_logger(tmp_path: Path) -> None:
    t = trainer(tmp_path, TempBalanceCallback(log="summary"), logger=CSVLogger(tmp_path))
    t.fit(Plain(cosine), loader())
    text = (Path(t.log_dir) / "metrics.csv").read_text()
    assert "tempbalance/alpha/max" in text
    assert "alpha/net.0" not in text
    quiet = tmp_path / "quiet"
    quiet.mkdir()
    trainer(quiet, TempBalanceCallback()).fit(Plain(cosine), loader())
    assert list(quiet.iterdir()) == []


def test_observer_changes_nothing(tmp_path: Path) -> None:
    callback, model, twin = TempBalanceCallback(observe=True), Plain(cosine), Plain(cosine)
    t, t2 = trainer(tmp_path, callback, logger=CSVLogger(tmp_path)), trainer(tmp_path)
    t.fit(model, loader())
    t2.fit(twin, loader())
    assert torch.equal(weights(model), weights(twin))
    assert len(t.optimizers[0].param_groups) == 1
    assert callback.balancers[0].measurements == 3
    assert type(t.lr_scheduler_configs[0].scheduler) is lrs.CosineAnnealingLR


def test_compiled_module(tmp_path: Path) -> None:
    callback = TempBalanceCallback()
    model = torch.compile(Plain(cosine), backend="eager")
    trainer(tmp_path, callback, epochs=1).fit(model, loader())
    assert set(callback.schedulers[0].multipliers) == {"net.0", "net.3", "net.8", "net.10"}


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"every_n_epochs": 0}, ValueError, "every_n_epochs must be a positive"),
        ({"every_n_steps": 1.5}, ValueError, "every_n_steps"),
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

    for model, match in ((Twice(), "ChainedScheduler"), (Already(), "not both")):
        with pytest.raises(ValueError, match=match):
            trainer(tmp_path, TempBalanceCallback()).fit(model, loader())


def test_theory_warnings(tmp_path: Path, caplog: Any) -> None:
    """A layer that stays random is named as under-trained, one of heavy tail as over-trained."""
    model = Plain()
    model.net[10] = nn.Linear(20, 64)
    model.net[8] = nn.Linear(24, 20)
    with torch.no_grad():
        u, _, v = torch.linalg.svd(model.net[3].weight.flatten(2).permute(2, 0, 1))
        s = torch.arange(1, 17).float() ** -3.0
        heavy = u[..., :16] @ torch.diag(s) @ v
        model.net[3].weight.copy_(heavy.permute(1, 2, 0).reshape(24, 16, 3, 3))
        nn.init.normal_(model.net[10].weight)
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=1e-12)
    with caplog.at_level(logging.WARNING, "tempbalance"):
        trainer(tmp_path, TempBalanceCallback(), epochs=1).fit(model, loader())
    over, under = (r.getMessage() for r in caplog.records[-2:])
    assert "over-training" in over and "net.3" in over
    assert "under-training" in under and "net.10" in under and "net.3" not in under
