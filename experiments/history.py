"""What a run keeps as it goes, over all attempts: metrics by epoch, time, random state."""

from __future__ import annotations

import csv
import math
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only


class ResumableCSVLogger(CSVLogger):
    """Lightning's CSV logger, writing `folder/metrics.csv`, which goes on after a resume.

    Lightning deletes the file of an earlier attempt; here `rewind` puts back its rows up to the
    checkpoint.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(save_dir=folder, name="", version="", flush_logs_every_n_steps=1)
        path = Path(folder) / "metrics.csv"
        self._earlier: list[dict[str, Any]] = []
        if path.is_file():
            with path.open(newline="") as file:
                self._earlier = list(csv.DictReader(file))

    @property
    def experiment(self) -> Any:
        """The writer; made without Lightning's warning that the folder is not empty."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Experiment logs directory")
            return super().experiment

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Take over the earlier attempt's rows up to the end of the epoch at optimizer step `step`.

        Of the rows at that very step those up to the epoch's own (it has `seconds`): what callbacks
        log at the start of the next epoch is logged again.
        """
        last = [int(row["step"]) == step and bool(row.get("seconds")) for row in self._earlier]
        end = last.index(True) + 1 if True in last else 0
        kept = [
            {key: value for key, value in row.items() if value not in ("", None)}
            for place, row in enumerate(self._earlier)
            if int(row["step"]) < step or (int(row["step"]) == step and place < end)
        ]
        self._earlier = []
        self.experiment.metrics = [*kept, *self.experiment.metrics]
        self.experiment.save()


@rank_zero_only
def rewind_alphas(folder: str | Path, step: int, epoch: int) -> None:
    """Drop the measurements that will be taken again: those after optimizer step `step`, and at
    that very step those of epoch `epoch`, which starts with it."""
    path = Path(folder) / "tempbalance.csv"
    if not path.is_file():
        return
    with path.open(newline="") as file:
        header, *lines = csv.reader(file)
    at = [header.index(name) for name in ("step", "epoch")]
    kept = [line for line in lines if tuple(int(line[i]) for i in at) < (step, epoch)]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *kept])


class History(pl.Callback):
    """Rows of metrics, an epoch each, and the seconds spent in training, over all attempts.

    The rows go to every logger at the end of the epoch, before the checkpoint is written.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._seconds = 0.0
        self._measuring: float | None = None
        self._started: float | None = None
        self._spent: Callable[[], float | None] = lambda: None

    @property
    def seconds(self) -> float:
        """Wall time of training and validation, without set-up and without the time between."""
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._seconds + running

    @property
    def measuring(self) -> float | None:
        """Seconds of these in which alphas were measured; None where no callback does."""
        now = self._spent()
        return now if now is None else now + (self._measuring or 0.0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; take over the logs of the interrupted attempt."""
        self._started = time.perf_counter()
        self._spent = lambda: _measuring_seconds(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, ResumableCSVLogger) and trainer.global_step > 0:
                logger.rewind(trainer.global_step)
        folder = trainer.log_dir  # on every rank: it is broadcast
        if folder is not None:
            rewind_alphas(folder, trainer.global_step, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the metrics of the epoch and send them to the loggers."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        row = {"epoch": float(trainer.current_epoch), **metrics}
        self.rows.append(row)
        for logger in trainer.loggers:
            logger.log_metrics({**row, "seconds": self.seconds}, step=trainer.global_step)
            logger.save()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._seconds, self._started = self.seconds, None

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Send the test metrics to the loggers."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
            logger.save()

    def best(self, monitor: str, mode: str) -> dict[str, float] | None:
        """Best finite value of a metric over the epochs, and its epoch; None where not logged."""
        rows = [row for row in self.rows if math.isfinite(row.get(monitor, math.nan))]
        if not rows:
            return None
        best = (max if mode == "max" else min)(rows, key=lambda row: row[monitor])
        return {"value": best[monitor], "epoch": best["epoch"]}

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"rows": self.rows, "seconds": self.seconds, "measuring": self.measuring}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the rows and the clock."""
        self.rows = [dict(row) for row in state_dict["rows"]]
        self._seconds = float(state_dict["seconds"])
        self._measuring = state_dict["measuring"]


def _measuring_seconds(trainer: pl.Trainer) -> float | None:
    """What the balancers of all callbacks have spent in this process."""
    spent = [
        balancer.seconds
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        for balancer in getattr(callback, "balancers", ())
    ]
    return sum(spent) if spent else None


class RandomState(pl.Callback):
    """Put the random generators back on resume, so that the data come in the same order.

    Lightning does not keep them. Python, NumPy, torch and CUDA; the process of rank 0 saves.
    """

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """States as tensors and plain values, which a `weights_only` load takes."""
        name, keys, *rest = np.random.get_state()
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {
            "python": random.getstate(),
            "numpy": (name, torch.tensor(np.asarray(keys, dtype=np.int64)), *rest),
            "torch": torch.get_rng_state(),
            "cuda": cuda,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until the fit starts: building the optimizer may draw numbers."""
        self._restored = state_dict

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the generators before the training loader draws its seed."""
        self._set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set them here under FSDP2, which restores callbacks after `on_fit_start`."""
        self._set()

    def _set(self) -> None:
        if self._restored is None:
            return
        state, self._restored = self._restored, None
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
