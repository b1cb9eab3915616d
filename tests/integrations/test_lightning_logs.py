"""What a Lightning run shows: curves, files, W&B's extras, warnings."""

from __future__ import annotations

import csv
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_modules import Plain, loader, pl
from test_lightning import cosine, trainer
from torch import nn
from torch.nn.utils import parametrize, prune

from tempbalance import BalanceWarning
from tempbalance.integrations import lightning_logs
from tempbalance.integrations.lightning import TempBalanceCallback
from tempbalance.measure import twins as marks
from tempbalance.measure.twins import random_twin
from tempbalance.runs.read import read_run

CSVLogger, ModelCheckpoint = pl.loggers.CSVLogger, pl.callbacks.ModelCheckpoint
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*logging interval"
)


def test_logs(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    loggers = [CSVLogger(tmp_path, "csv"), pl.loggers.TensorBoardLogger(tmp_path, "tb")]
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


def test_spectra_and_table_of_a_run_that_goes_on(tmp_path: Path) -> None:
    """A second fit of the same trainer adds to the files; the first spectra stay the first."""
    t = trainer(tmp_path, TempBalanceCallback(), epochs=2, logger=CSVLogger(tmp_path))
    model = Plain(cosine)
    t.fit(model, loader())
    first = (Path(t.log_dir) / "esd_first.npz").read_bytes()
    last = (Path(t.log_dir) / "esd_last.npz").read_bytes()
    t.fit_loop.max_epochs = 4
    t.fit(model, loader())
    assert (Path(t.log_dir) / "esd_first.npz").read_bytes() == first
    assert (Path(t.log_dir) / "esd_last.npz").read_bytes() != last
    np.testing.assert_array_equal(read_run(t.log_dir).epochs, range(4))


def test_spectra_after_weight_averaging_has_taken_over(tmp_path: Path) -> None:
    swa = pl.callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=1)
    t = trainer(tmp_path, TempBalanceCallback(), swa, logger=CSVLogger(tmp_path))
    t.fit(Plain(cosine), loader())
    assert set(read_run(t.log_dir).spectra[1]) == {"net.0", "net.3", "net.8", "net.10"}


class Unreadable(nn.Module):
    """A parametrization that from the start of training on fails outside of its steps."""

    training_began = False

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if self.training_began and not torch.is_grad_enabled():
            raise RuntimeError("no room")
        return weight.clone()


def test_a_layer_that_cannot_be_read_is_left_out_of_the_spectra(
    tmp_path: Path, caplog: Any
) -> None:
    class Begins(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.net[3].parametrizations.weight[0].training_began = True

    model = Plain(cosine)
    parametrize.register_parametrization(model.net[3], "weight", Unreadable())
    t = trainer(tmp_path, Begins(), TempBalanceCallback(), logger=CSVLogger(tmp_path))
    with pytest.warns(BalanceWarning, match="'net.3' could not be measured"):
        t.fit(model, loader())
    assert t.state.finished
    for spectra in read_run(t.log_dir).spectra:
        assert set(spectra) == {"net.0", "net.8", "net.10"}
    texts = [text for text in warned(caplog) if " is without " in text]
    assert [text.split()[1] for text in texts] == ["esd_first.npz", "esd_last.npz"]
    assert all("without net.3, which could not be measured" in text for text in texts)
    assert "no room" in texts[0]


def test_spectra_of_a_weight_that_is_pruned_after_the_last_measurement(tmp_path: Path) -> None:
    class Prunes(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            prune.l1_unstructured(pl_module.net[3], "weight", 0.1)

    t = trainer(tmp_path, TempBalanceCallback(), Prunes(), epochs=1, logger=CSVLogger(tmp_path))
    t.fit(Plain(cosine), loader())
    assert set(read_run(t.log_dir).spectra[1]) == {"net.0", "net.8", "net.10"}


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"limit_train_batches": 0}])
def test_nothing_is_left_by_a_run_that_trains_nothing(tmp_path: Path, options: Any) -> None:
    t = trainer(tmp_path, TempBalanceCallback(), logger=CSVLogger(tmp_path), **options)
    t.fit(Plain(cosine), loader())
    assert not list(tmp_path.rglob("tempbalance.csv")) + list(tmp_path.rglob("esd_*.npz"))


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: Any) -> Any:
    """W&B without key or network, and with nothing written outside of the test's folder."""
    module = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("CACHE", "DATA", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb_own"))
    yield module
    module.finish()


def test_wandb_gets_a_table_and_a_picture(tmp_path: Path, wandb: Any) -> None:
    log = pl.loggers.WandbLogger(project="p", save_dir=str(tmp_path), offline=True)
    keep = ModelCheckpoint()
    t = trainer(tmp_path, TempBalanceCallback(), keep, logger=log)
    t.fit(Plain(cosine), loader())
    assert wandb.run is not None, "ending the run is the user's"
    folder = Path(str(keep.dirpath)).parent  # a folder of this run alone
    run = read_run(folder)
    summary = dict(log.experiment.summary)
    assert summary["tempbalance/alpha/net.3"] == pytest.approx(run.alphas[1, -1])
    wandb.finish()
    (table,) = tmp_path.rglob("*/tempbalance/measurements*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["epoch", "step", "layer", "alpha", "multiplier", "lr"]
    with (folder / "tempbalance.csv").open() as file:
        wanted = [[row["layer"], float(row["lr"])] for row in csv.DictReader(file)]
    assert [[row[2], row[5]] for row in content["data"]] == wanted
    (picture,) = tmp_path.rglob("*/tempbalance/alpha_by_layer*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_wandb_failing_fails_no_training(tmp_path: Path, caplog: Any) -> None:
    class WandbLogger(CSVLogger):
        def log_table(self, *args: Any, **kwargs: Any) -> None:
            raise OSError("disk full")

    t = trainer(tmp_path, TempBalanceCallback(), logger=WandbLogger(tmp_path), epochs=1)
    with caplog.at_level(logging.WARNING, "tempbalance"):
        t.fit(Plain(cosine), loader())
    assert t.state.finished
    assert "W&B did not get the whole of table and picture: disk full" in caplog.text


def test_a_table_keeps_to_what_wandb_shows(tmp_path: Path) -> None:
    for epoch in range(50):
        lightning_logs.history.append(
            tmp_path, epoch, epoch, {f"l{i}": 2.0 if i else None for i in range(300)}, {}, {}
        )
    rows = lightning_logs._rows(read_run(tmp_path))
    epochs = sorted({row[0] for row in rows})
    assert len(rows) == 33 * 300 <= 10_000
    assert (epochs[0], epochs[-1]) == (0, 49)
    assert rows[0] == [0, 0, "l0", None, 1.0, None]


def marked(hidden: int = 1) -> Any:
    """Its net.3 has a heavy tail, and ``hidden`` layers after it are random; rates are nil."""
    model: Any = Plain()
    model.net[8] = nn.Linear(24, 300)
    model.net[10] = nn.Sequential(*(nn.Linear(300, 300) for _ in range(hidden)), nn.Linear(300, 10))
    with torch.no_grad():
        u, _, v = torch.linalg.svd(model.net[3].weight.flatten(2).permute(2, 0, 1))
        s = torch.arange(1, 17).float() ** -3.0
        heavy = u[..., :16] @ torch.diag(s) @ v
        model.net[3].weight.copy_(heavy.permute(1, 2, 0).reshape(24, 16, 3, 3))
        for layer in model.net[10]:
            nn.init.normal_(layer.weight)
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=1e-12)
    return model


def warned(caplog: Any) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "tempbalance" and r.levelno >= 30]


def test_theory_warnings(tmp_path: Path, caplog: Any) -> None:
    """A layer that stays random is named as under-trained, one of heavy tail as over-trained."""
    trainer(tmp_path, TempBalanceCallback(), epochs=2).fit(marked(7), loader())
    over, under = warned(caplog)
    assert "over-training" in over and "net.3." in over
    assert "under-training" in under and "net.3" not in under
    assert under.count("net.") == 5 and "more. Train longer" in under


def test_a_mark_that_cannot_be_measured_ends_no_fit(
    tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room() -> Any:
        raise torch.OutOfMemoryError("no room")

    def twin(layer: Any) -> Any:
        return replace(layer, _read=no_room) if layer.name == "net.3" else random_twin(layer)

    monkeypatch.setattr(marks, "random_twin", twin)
    t = trainer(tmp_path, TempBalanceCallback(), epochs=2)
    t.fit(marked(7), loader())
    assert t.state.finished
    failed, left_out, under = warned(caplog)
    assert "trying layer by layer" in failed
    assert "no mark for net.3: measuring a random matrix failed" in left_out
    assert "no room" in left_out
    assert "under-training" in under, "the others have theirs"


@pytest.mark.parametrize(
    "options",
    [{"epochs": 1}, {"fast_dev_run": 3, "every": 1}, {"warn": False}],
    ids=["measured once", "fast_dev_run", "warn=False"],
)
def test_no_warning_too_early(tmp_path: Path, caplog: Any, options: Any) -> None:
    options = {"epochs": 2, **options}
    callback = TempBalanceCallback(
        warn=options.pop("warn", True), every_n_steps=options.pop("every", None)
    )
    trainer(tmp_path, callback, **options).fit(marked(), loader())
    assert callback.balancers[0].measurements >= 1
    assert warned(caplog) == []


def test_no_warning_about_an_alpha_that_is_not_sure(tmp_path: Path, caplog: Any) -> None:
    """A dozen eigenvalues look random whatever they are: such layers are not named."""
    model = marked(0)
    model.net[8] = nn.Linear(24, 12)
    model.net[10] = nn.Sequential(*(nn.Linear(12, 12) for _ in range(8)))
    callback = TempBalanceCallback()
    trainer(tmp_path, callback, epochs=2).fit(model, loader())
    small = [r for r in callback.balancers[0].records.values() if r.name.startswith("net.10")]
    assert all(lightning_logs._standard_error(r) > 0.1 for r in small) and len(small) == 8
    over, under = callback.balancers[0].theory_marks()
    assert {*over, *under} & {r.name for r in small}
    assert not [text for text in warned(caplog) if "net.10" in text]
