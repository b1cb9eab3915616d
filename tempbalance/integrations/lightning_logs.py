"""What a Lightning run shows of balancing: files, curves, spectra, W&B extras, warnings.

Lightning is not imported: its objects are told apart by the names of their classes, since
``lightning.pytorch`` and ``pytorch_lightning`` hold the same classes twice.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tempbalance.balance.tracker import Tracker
from tempbalance.integrations.lightning_checks import is_a
from tempbalance.integrations.traps import TrapLog
from tempbalance.measure.measurement import LayerRecord
from tempbalance.runs import write as history
from tempbalance.runs.read import Run, read_run
from tempbalance.words import some

logger = logging.getLogger("tempbalance")

Log = Literal["auto", "layers", "summary", "none"]
LOGS = ("auto", "layers", "summary", "none")
# Up to so many layers each has its own curves in the logger.
_CURVES = 64
_NAMES = 5
# Theory is quoted on alphas that are known at least so well (standard error).
_SURE = 0.1
# W&B cuts longer tables off.
_TABLE_ROWS = 10_000


class RunLog:
    """The log of one fit.

    Args:
        curves: what the trainer's loggers get at each measurement.
        esd: keep the eigenvalues of the first and the last one.
        warn: name over-trained and under-trained layers at the end.
    """

    def __init__(self, curves: Log, esd: bool, warn: bool) -> None:
        self.curves, self.esd, self.warn = curves, esd, warn
        self._folder: Path | None = None
        self._began = 0.0
        self._seen: Counter[str] = Counter()

    def start(self) -> None:
        """Forget the fit before."""
        self._folder, self._began = None, time.perf_counter()
        self._seen.clear()

    def open(self, trainer: Any) -> None:
        """Find the folder, on every rank: Lightning broadcasts its name."""
        self._folder = _folder(trainer)

    def measured(
        self,
        trainer: Any,
        balancers: Sequence[Tracker],
        multipliers: Mapping[str, float],
        rates: Mapping[str, float],
        decays: Mapping[str, float],
        traps: TrapLog,
    ) -> None:
        """Write a measurement that was just made to file and loggers."""
        alphas = {name: alpha for b in balancers for name, alpha in b.alphas.items()}
        self._seen.update(name for name, alpha in alphas.items() if alpha is not None)
        if not trainer.loggers or not trainer.is_global_zero:
            return
        if self._folder is not None:
            epoch, step = trainer.current_epoch, trainer.global_step
            history.append(self._folder, epoch, step, alphas, multipliers, rates)
        if self.curves == "none":
            return
        by_layer = self.curves == "layers" or (self.curves == "auto" and len(alphas) <= _CURVES)
        figures = history.summary(alphas, multipliers) | traps.figures(by_layer)
        if by_layer:
            figures |= history.by_layer(alphas, multipliers, rates)
            figures |= {f"weight_decay/{name}": value for name, value in decays.items()}
        elapsed = time.perf_counter() - self._began
        figures["time_share"] = sum(b.seconds for b in balancers) / max(elapsed, 1e-9)
        named = {f"tempbalance/{name}": value for name, value in figures.items()}
        named["epoch"] = float(trainer.current_epoch)
        for each in trainer.loggers:
            each.log_metrics(named, step=trainer.global_step)

    def save_esd(
        self, trainer: Any, balancers: Sequence[Tracker], *, last: bool, keep: bool = False
    ) -> None:
        """Eigenvalues of every layer, written by rank 0; sharded weights need every rank.

        Layers that cannot be measured are left out.

        Args:
            keep: leave a file that is there already as it is.
        """
        if not (self.esd and trainer.loggers) or trainer.fast_dev_run:
            return
        together = any(balancer.sharded for balancer in balancers)
        file = history.ESD_FILES[last]
        kept = keep and self._folder is not None and (self._folder / file).exists()
        if not together and (kept or self._folder is None):
            return
        results = [balancer.spectra() for balancer in balancers]
        if self._folder is None or kept:
            return
        failures = {name: error for result in results for name, error in result.failures.items()}
        if failures:
            logger.warning(
                "TempBalance: %s is without %s, which could not be measured (%s)",
                *(file, some(list(failures)), next(iter(failures.values()))),
            )
        records = [record for result in results for record in result.records]
        if records:
            history.save_esd(self._folder, records, last)

    def interrupted(self, trainer: Any, balancers: Sequence[Tracker]) -> None:
        """As :meth:`finish`, by what this process alone can still do."""
        if trainer.world_size == 1 and self._seen:
            self.finish(trainer, balancers)

    def finish(self, trainer: Any, balancers: Sequence[Tracker]) -> None:
        """The last spectra, W&B's table and picture, and the warnings; nothing if none measured."""
        if not self._seen:
            return
        self.save_esd(trainer, balancers, last=True)
        if not trainer.is_global_zero:
            return
        if self._folder is not None and self.curves != "none":
            for each in trainer.loggers:
                if is_a(each, "WandbLogger"):
                    _to_wandb(each, self._folder)
        if self.warn and not trainer.fast_dev_run:
            self._warn(balancers)

    def _warn(self, balancers: Sequence[Tracker]) -> None:
        """One warning of each kind, about layers that had time to move and whose alpha is sure."""
        settled = {
            record.name
            for balancer in balancers
            for record in balancer.records.values()
            if self._seen[record.name] >= 2 and _standard_error(record) <= _SURE
        }
        over: list[str] = []
        under: list[str] = []
        for balancer in balancers if settled else ():  # the marks cost a measurement
            marks = balancer.theory_marks()
            over += [name for name in marks[0] if name in settled]
            under += [name for name in marks[1] if name in settled]
        if over:
            logger.warning(
                "TempBalance: alpha lies under 2 and under that of a random matrix of the shape in "
                "%s. Theory calls this over-training, others found it in networks that do well: "
                "held-out data decide.",
                some(over),
            )
        if under:
            logger.warning(
                "TempBalance: alpha is still that of a random matrix, the mark of under-training, "
                "in %s. Train longer, or check that gradients reach these layers.",
                some(under),
            )


def _folder(trainer: Any) -> Path | None:
    """Where the first logger keeps this run, as ``ModelCheckpoint`` finds it."""
    if not trainer.loggers or trainer.fast_dev_run:
        return None
    first = trainer.loggers[0]
    if is_a(first, "CSVLogger", "TensorBoardLogger"):
        folder = trainer.log_dir  # a broadcast: on every rank
        return Path(folder) if folder and trainer.is_global_zero else None
    if not trainer.is_global_zero:
        return None
    # The save_dir of a WandbLogger holds all runs.
    version = first.version if isinstance(first.version, str) else f"version_{first.version}"
    return Path(first.save_dir or trainer.default_root_dir) / str(first.name) / version


def _to_wandb(wandb_logger: Any, folder: Path) -> None:
    """All measurements as a table, and alpha by layer and epoch as a picture.

    What fails here must not fail a training that is done.
    """
    try:
        run = read_run(folder)
        rows = _rows(run)
        wandb_logger.log_table("tempbalance/measurements", columns=list(history.COLUMNS), data=rows)
        from tempbalance.runs.plot import alpha_heatmap

        figure = alpha_heatmap(run)
        figure.canvas.draw()
        pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]  # type: ignore[attr-defined]
        wandb_logger.log_image("tempbalance/alpha_by_layer", [pixels])
    except Exception as error:
        logger.warning("TempBalance: W&B did not get the whole of table and picture: %s", error)


def _rows(run: Run) -> list[list[Any]]:
    """A row a measurement and layer; of too many measurements evenly spread ones."""
    count = len(run.epochs)
    most = max(1, min(count, _TABLE_ROWS // len(run.layers)))
    times = np.unique(np.linspace(count - 1, 0, most).round().astype(int))
    return [
        [int(run.epochs[t]), int(run.steps[t]), name,
         *(None if np.isnan(x) else float(x)
           for x in (run.alphas[i, t], run.multipliers[i, t], run.rates[i, t]))]
        for t in times
        for i, name in enumerate(run.layers)
    ]  # fmt: skip


def _standard_error(record: LayerRecord) -> float:
    """Of the exponent: (alpha - 1) / sqrt(n), with n eigenvalues in the tail.

    Source: Clauset, Shalizi and Newman 2009.
    """
    if record.alpha is None or not record.n_tail:
        return float("inf")
    return (record.alpha - 1) / record.n_tail**0.5
