"""One run: what it writes, that it resumes bit for bit, that it can be reproduced."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from processes import Command
from standins import composed, substitute

from experiments import sweep
from experiments.train import train

SMALL = ("experiment=quickstart", "data.share=0.2", "model.width=4", "trainer.max_epochs=4")

CLOCKS = ("seconds", "tempbalance/time_share")  # what differs between equal runs


class Crash(pl.Callback):
    """Raises at the start of a batch, as a power cut would."""

    def __init__(self, epoch: int, batch: int = 1) -> None:
        self.epoch, self.batch = epoch, batch

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch == self.epoch and batch_idx == self.batch:
            raise RuntimeError("power cut")


def rows(folder: str | Path) -> list[dict[str, str]]:
    with (Path(folder) / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in CLOCKS} for row in csv.DictReader(file)]


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    path = Path(folder) / "checkpoints" / "last.ckpt"
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def with_random_data(cfg: DictConfig) -> DictConfig:
    """Data whose order comes from the global generator, and a network with dropout."""
    cfg.data = {
        "_target_": "standins.RandomData", "x": [3, 8, 8], "classes": 10, "n": 24, "share": 1,
        "val_fraction": 0.1,
    }  # fmt: skip
    cfg.model = {
        "_target_": "experiments.models.wideresnet.WideResNet", "depth": 10, "widen": 1,
        "num_classes": 10, "dropout": 0.3, "image_size": 8,
    }  # fmt: skip
    return cfg


def test_a_run_stores_its_result_and_where_it_came_from(tmp_path: Path) -> None:
    cfg = composed(tmp_path, *SMALL, "seed=5")
    result = sweep.run(cfg, train)
    assert result is not None
    folder = tmp_path / "quickstart" / Path(cfg.folder).name
    assert folder.name.startswith("none-seed5-data.share=0.2-model.width=4-trainer")
    assert json.loads((folder / "result.json").read_text()) == result
    assert (result["name"], result["method"], result["seed"]) == ("quickstart", "none", 5)
    assert "data.share=0.2" in result["settings"]
    assert not any(setting.startswith(("seed", "experiment")) for setting in result["settings"])
    assert 0 < result["value"] <= 1
    assert result["value"] == result["test"]["test/accuracy"]
    assert result["epochs"] == 4
    assert result["seconds"] > 0
    stored = OmegaConf.load(folder / "config.yaml")
    assert stored.optimizer.lr == cfg.optimizer.lr
    assert stored.data.seed == 5  # resolved
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["versions"]["torch"] == torch.__version__.split("+")[0]
    assert set(provenance) >= {"commit", "device", "command"}

    table = rows(folder)
    epochs = [row for row in table if row["train/loss"]]
    assert [float(row["epoch"]) for row in epochs] == [0, 1, 2, 3]
    assert float(table[-1]["test/accuracy"]) == pytest.approx(result["value"])
    validation = [float(row["val/accuracy"]) for row in epochs]
    best = result["best"]["val/accuracy"]
    assert best["value"] == pytest.approx(max(validation))
    assert validation[int(best["epoch"])] == pytest.approx(max(validation))
    assert result["last"]["val/accuracy"] == pytest.approx(validation[-1])


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path: Path) -> None:
    folders = {}
    for where, seed in (("a", 1), ("b", 1), ("c", 2)):
        cfg = composed(tmp_path / where, *SMALL, f"seed={seed}", "trainer.max_epochs=1")
        train(cfg)
        folders[where] = cfg.folder
    assert rows(folders["a"]) == rows(folders["b"])
    assert rows(folders["a"]) != rows(folders["c"])


@pytest.mark.parametrize(
    ("random_data", "balance", "ckpt_path"),
    [(True, "none", "auto"), (False, "farms", "last"), (True, "tb", "last")],
)
def test_a_run_cut_off_resumes_bit_for_bit(
    random_data: bool, balance: str, ckpt_path: str, tmp_path: Path
) -> None:
    def cfg_at(where: str, *more: str) -> DictConfig:
        cfg = composed(tmp_path / where, *SMALL, f"balance={balance}", *more)
        return with_random_data(cfg) if random_data else cfg

    whole = cfg_at("whole")
    sweep.run(whole, train)

    cut = cfg_at("cut")
    with pytest.raises(RuntimeError, match="power cut"):
        sweep.run(cut, lambda cfg: train(cfg, [Crash(epoch=2)]))
    state = json.loads((Path(cut.folder) / "run.json").read_text())
    assert state["status"] == "failed"
    assert state["error"] == "RuntimeError: power cut"
    assert "on_train_batch_start" in state["traceback"]

    again = cfg_at("cut", f"trainer.ckpt_path={ckpt_path}")
    assert again.folder == cut.folder
    result = sweep.run(again, train)
    assert result is not None
    assert result["resumed_from"].endswith("last.ckpt")
    assert (result["attempts"], result["epochs"]) == (2, 4)
    assert rows(cut.folder) == rows(whole.folder)
    alphas = [Path(folder) / "tempbalance.csv" for folder in (whole.folder, cut.folder)]
    assert [path.exists() for path in alphas] == [balance != "none"] * 2
    if balance != "none":
        assert alphas[0].read_text() == alphas[1].read_text()
    expected, found = weights(whole.folder), weights(cut.folder)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_null_starts_anew(tmp_path: Path) -> None:
    cut = composed(tmp_path, *SMALL)
    with pytest.raises(RuntimeError, match="power cut"):
        sweep.run(cut, lambda cfg: train(cfg, [Crash(epoch=2)]))
    result = sweep.run(composed(tmp_path, *SMALL, "trainer.ckpt_path=null"), train)
    assert result is not None
    assert result["resumed_from"] is None
    assert len([row for row in rows(cut.folder) if row["train/loss"]]) == 4


def test_resume_without_a_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"overrides of the run to resume"):
        train(composed(tmp_path, *SMALL, "trainer.ckpt_path=last"))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt: no such checkpoint"):
        train(composed(tmp_path, *SMALL, "trainer.ckpt_path=nowhere.ckpt"))


def test_options_of_no_method_are_refused(tmp_path: Path) -> None:
    cfg = composed(tmp_path, *SMALL, "balance=none", "+balance.every_n_epochs=5")
    with pytest.raises(ValueError, match=r"balance=none has no options.*every_n_epochs"):
        train(cfg)


def test_without_validation_data_the_test_set_is_watched_and_named(tmp_path: Path) -> None:
    result = train(composed(tmp_path, *SMALL, "data.val_fraction=0.0", "trainer.max_epochs=1"))
    assert result["best_on"] == "test"
    assert result["last"]["val/accuracy"] == pytest.approx(result["value"])


def test_without_validation_data_the_first_of_several_test_sets_is_watched(tmp_path: Path) -> None:
    cfg = composed(tmp_path, "experiment=darcy_fno", "data.val_fraction=0", "trainer.max_epochs=1")
    cfg = substitute(cfg)
    cfg.data = {**cfg.data, "tests": 2}
    result = train(cfg)
    assert {"test/relative_l2", "test_32/relative_l2"} <= set(result["test"])
    assert result["best_on"] == "test"


def test_wandb_has_a_run_a_job_and_it_is_ended(tmp_path: Path, monkeypatch: Any) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    for seed in (1, 2):
        cfg = composed(tmp_path, *SMALL, "logger=wandb", "trainer.max_epochs=1", f"seed={seed}")
        train(cfg)
        assert wandb.run is None
        found = list((Path(cfg.folder) / "wandb").glob("offline-run-*/*.wandb"))
        assert len(found) == 1
        assert found[0].stat().st_size > 0


def test_a_failure_ends_the_wandb_run_too(tmp_path: Path, monkeypatch: Any) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(RuntimeError, match="power cut"):
        train(composed(tmp_path, *SMALL, "logger=wandb"), [Crash(epoch=0)])
    assert wandb.run is None


@pytest.mark.ci
@pytest.mark.parametrize("trainer", ["ddp", "fsdp2"])
def test_two_processes_on_the_cpu(trainer: str, tmp_path: Path) -> None:
    overrides = [
        *SMALL, f"trainer={trainer}", "trainer.accelerator=cpu", "trainer.max_epochs=1",
        "trainer.enable_progress_bar=false", f"outputs={tmp_path}",
    ]  # fmt: skip
    command = Command(tmp_path / "log", "-m", "experiments.train", *overrides)
    _, said = command.finish(timeout=150)
    # Judged by what was written: torch can abort at exit after all work is done (pytorch#190489).
    results = list(tmp_path.rglob("result.json"))
    assert len(results) == 1, said
    result = json.loads(results[0].read_text())
    assert result["epochs"] == 1
    assert 0 <= result["value"] <= 1
    # Each of two processes sees half of the batches of the one-process run.
    single = train(composed(tmp_path / "single", *SMALL, "trainer.max_epochs=1"))
    assert single["epochs"] == 1
    (alone,) = (tmp_path / "single").rglob("metrics.csv")
    assert steps(results[0].parent) == -(-steps(alone.parent) // 2)


def steps(folder: Path) -> int:
    """Optimizer steps of a run."""
    return max(int(row["step"]) for row in rows(folder))
