"""One run of the study, and the stages that a cell goes through.

Uniform over its grid of rates; every method at the rates around uniform's best; then all of them
on the final seeds, at uniform's rate and at their own, and uniform at the rates beside its best
too. Each stage is decided by the one before and by validation data alone. A best rate at an edge
widens the grid.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments import provenance, sweep
from experiments.study.cells import (
    COMMON,
    LATE_SEEDS,
    LATER,
    TUNING_SEED,
    UNTUNED,
    UNTUNED_SEEDS,
    VARIANTS,
    Cell,
)
from experiments.study.files import FACTOR, Run, best_rate, load, path_of, save, widened

# A grid of rates is widened so often at most.
_WIDER = 4


def overrides(cell: Cell, variant: str, rate: float, seed: int) -> list[str]:
    """The overrides of `python -m experiments.train` that make this run."""
    # Those of a variant come last: they may change what the cell says.
    return [*cell.overrides, *COMMON, *cell.own(variant), f"optimizer.lr={rate:g}", f"seed={seed}"]


# --- running -------------------------------------------------------------------------------------


def run_one(cell: Cell, variant: str, rate: float, seed: int, outputs: str) -> Run:
    """Train once, in this process."""
    from experiments.train import train

    chosen = overrides(cell, variant, rate, seed)
    cfg = sweep.compose([*chosen, f"outputs={outputs}"])
    try:
        result = sweep.run(cfg, train)
    except FloatingPointError as error:  # all other errors are the machine's, not the method's
        return _failed(variant, rate, seed, chosen, error)
    assert result is not None
    monitor = result["metric"]["monitor"]
    others = [
        value
        for name, value in result["test"].items()
        if name.split("/")[-1] == result["metric"]["name"].split("/")[-1]
        and name != result["metric"]["name"]
    ]
    step = int(cfg.trainer.check_val_every_n_epoch)
    curve = [(int(row["epoch"]) + 1, row[monitor]) for row in result["rows"] if monitor in row]
    return Run(
        variant=variant,
        rate=rate,
        seed=seed,
        value=float(result["value"]),
        second=float(others[0]) if others else math.nan,
        held_out=float(result["last"].get(monitor, math.nan)),
        curve=" ".join(f"{epoch}:{value:.4g}" for epoch, value in curve if epoch % step == 0),
        seconds=result["seconds"],
        measuring=result["measuring_share"] or 0.0,
        commit=(result["commit"] or "")[:12],
        changed=bool(result["changed"]),
        device=f"{result['device']}, torch {result['versions']['torch']}",
        overrides=" ".join(chosen),
    )


def _quiet() -> None:
    """Of a worker: hundreds of runs say the same."""
    for name in ("pytorch_lightning", "lightning_fabric", "tempbalance"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def _failed(variant: str, rate: float, seed: int, chosen: Sequence[str], error: Exception) -> Run:
    """A run that broke off counts as one that diverged."""
    code, nan = provenance.commit(), math.nan
    return Run(
        variant, rate, seed, nan, nan, nan, f"failed: {error!r}"[:200], nan, nan,
        (code["commit"] or "")[:12], bool(code["changed"]), provenance.device_name(),
        " ".join(chosen),
    )  # fmt: skip


class Study:
    """The runs of one cell: those that are there, and those still wanted."""

    def __init__(self, cell: Cell, jobs: int, folder: Path, console: Console) -> None:
        self.cell, self.jobs, self.console = cell, jobs, console
        self.path = path_of(cell, folder)
        self.runs = load(self.path)
        for run in self.runs.values():
            known = run.variant in {*VARIANTS, *cell.extra, *cell.late}
            if known and run.overrides.split() != overrides(cell, *run.key):
                raise SystemExit(
                    f"{self.path}: {run.variant} at {run.rate:g}, seed {run.seed}, was run with "
                    "other settings than the cell has now; delete its rows or restore the cell"
                )

    def go(self) -> None:
        """Run all stages."""
        tuning = [TUNING_SEED + i for i in range(self.cell.tuning_seeds)]
        uniform = self._tune(["uniform"], list(self.cell.rates), tuning)["uniform"]
        around = [uniform / FACTOR, uniform, uniform * FACTOR]
        others = [name for name in self.cell.seeds if name != "uniform"]
        own = {"uniform": uniform, **self._tune(others, around, tuning)}
        wanted = [
            (variant, rate, seed)
            # By seed first: an interrupted cell has all methods, with fewer seeds.
            for seed in range(max(self.cell.seeds.values()))
            for variant, count in self.cell.seeds.items()
            if seed < count
            for rate in dict.fromkeys((own[variant], uniform))
        ]
        self._run(wanted, "final seeds")
        self.neighbours()
        self.untuned()

    def neighbours(self) -> None:
        """Uniform at the rates beside its best on the final seeds: was it well chosen?

        And all variants at the better of these two, so that one rate serves all.
        """
        cell = self.cell
        best = best_rate(self.runs.values(), "uniform", cell.mode)
        rates = (best / FACTOR, best * FACTOR)
        seeds = range(cell.seeds["uniform"])
        self._run(
            [("uniform", rate, s) for s in seeds for rate in rates], "uniform beside its best"
        )
        second = best_rate(
            [run for run in self.runs.values() if run.rate in rates], "uniform", cell.mode
        )
        wanted = [(v, second, s) for s in seeds for v, count in cell.seeds.items() if s < count]
        self._run(wanted, "all at the rate beside it")

    def untuned(self) -> None:
        """Some variants at a rate far below the best."""
        if (rate := self.cell.untuned) is not None:
            wanted = [(name, rate, seed) for seed in range(UNTUNED_SEEDS) for name in UNTUNED]
            self._run(wanted, "untuned")

    def extra(self, seeds: int) -> None:
        """Run the cell's further variants at uniform's rate."""
        uniform = best_rate(self.runs.values(), "uniform", self.cell.mode)
        wanted = [(name, uniform, seed) for seed in range(seeds) for name in self.cell.extra]
        self._run(wanted, "sensitivity")

    def late(self) -> None:
        """Run the variants that start late, at the cell's rate for them."""
        cell = self.cell
        wanted = [(name, cell.late_rate, s) for s in range(LATE_SEEDS) for name in cell.late]
        self._run(wanted, "started late")

    def at(self, rate: float, variants: Sequence[str]) -> None:
        """Some variants on the final seeds at one rate, whatever was tuned."""
        counts = {**dict.fromkeys(LATER, self.cell.seeds["uniform"]), **self.cell.seeds}
        wanted = [(name, rate, seed) for name in variants for seed in range(counts[name])]
        self._run(sorted(wanted, key=lambda key: key[2]), f"all at {rate:g}")

    def _tune(
        self, variants: Sequence[str], rates: list[float], seeds: Sequence[int]
    ) -> dict[str, float]:
        """The best rate of each variant, with none at an edge of the rates that it was tried at."""
        grids = {variant: list(rates) for variant in variants}
        for widening in range(_WIDER + 1):
            wanted = [
                (v, rate, seed) for v, grid in grids.items() for rate in grid for seed in seeds
            ]
            self._run(wanted, "tuning" + " a wider grid" * (widening > 0))
            best = {v: best_rate(self.runs.values(), v, self.cell.mode) for v in variants}
            beyond = {v: widened(grids[v], best[v]) for v in variants}
            if not any(beyond.values()):
                return best
            for variant, more in beyond.items():
                grids[variant] += more
        edges = [v for v in variants if beyond[v]]
        self.console.print(f"{self.cell.name}: best at an edge for {edges}", style="yellow")
        return best

    def _run(self, wanted: Sequence[tuple[str, float, int]], what: str) -> None:
        wanted = [key for key in wanted if key not in self.runs]
        if not wanted:
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        spawn = multiprocessing.get_context("spawn")
        os.environ["OMP_NUM_THREADS"] = "1"  # of the workers; several share the machine
        with (
            tempfile.TemporaryDirectory() as outputs,
            Progress(*columns, TimeElapsedColumn(), console=self.console) as progress,
            ProcessPoolExecutor(self.jobs, spawn, initializer=_quiet) as pool,
        ):
            bar = progress.add_task(f"{self.cell.name}: {what}", total=len(wanted))
            futures = {pool.submit(run_one, self.cell, *key, outputs): key for key in wanted}
            for future in as_completed(futures):
                run = future.result()
                self.runs[run.key] = run
                save(self.path, self.runs.values())
                progress.advance(bar)
