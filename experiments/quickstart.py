"""The demonstration: three methods, three seeds, a small ResNet on digits, in minutes on a CPU.

    python -m experiments.quickstart

A second start shows the results again; `--again` trains anew.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import extras  # noqa: F401  (first: says what to install)

# isort: split
import pytorch_lightning as pl
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from experiments import pictures, report, results, sweep
from experiments.train import train

METHODS = {"none": "uniform", "tb": "plain TempBalance", "farms": "FARMS"}
SEEDS = (43, 37, 13)


class Ticks(pl.Callback):
    """Moves a bar of ours by one at the end of each epoch."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self.progress, self.task = progress, task

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """One epoch done."""
        self.progress.advance(self.task)


def run_all(
    overrides: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    console: Console,
) -> list[Path]:
    """Train every method with every seed; the folders of the runs. Finished ones are skipped."""
    folders = []
    columns = (
        TextColumn("{task.description:<32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        configured = [
            sweep.compose([*overrides, f"balance={method}", f"seed={seed}"])
            for seed in seeds
            for method in methods
        ]
        epochs = [int(cfg.trainer.max_epochs) for cfg in configured]
        whole = progress.add_task("all runs, epochs", total=sum(epochs))
        for cfg, count in zip(configured, epochs, strict=True):
            ticks = Ticks(progress, whole)
            progress.update(
                whole, description=f"{METHODS.get(cfg.method, cfg.method)}, seed {cfg.seed}"
            )
            done = progress.tasks[0].completed
            sweep.run(cfg, lambda cfg, ticks=ticks: train(cfg, [ticks]))  # type: ignore[misc]
            progress.update(whole, completed=done + count)  # also where the run was skipped
            folders.append(Path(cfg.folder))
        progress.update(whole, description="all runs, epochs")
    return folders


def show(outputs: Path, folders: Sequence[Path], seeds: Sequence[int], console: Console) -> None:
    """Table and pictures, in the terminal and under `outputs`."""
    cells, notes = results.load(folders)
    found = results.summarize(cells, notes)
    table = Table(title="Test accuracy on digits, last epoch; difference: paired, from uniform")
    for name in ("method", "seeds", "mean", "sd", "difference", "95% interval", "measuring"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in found.rows:
        d = row.difference
        table.add_row(
            METHODS.get(row.method, row.method),
            str(row.value.n),
            f"{100 * row.value.mean:.2f}%",
            "" if row.value.sd is None else f"{100 * row.value.sd:.2f}",
            "" if d is None else f"{100 * d.mean:+.2f}",
            "" if d is None or d.low is None else f"{100 * d.low:+.2f} to {100 * d.high:+.2f}",  # type: ignore[operator]
            "" if row.share is None else f"{100 * row.share:.1f}%",
        )
    console.print(table)
    few = "A few seeds of a small task: this shows that it runs, not which method is better."
    console.print(few, style="yellow")
    written = report.write(found, outputs)

    logs = {folder: pictures.read_metrics(folder / "metrics.csv") for folder in folders}
    series: dict[str, list[list[float]]] = {}
    for folder, rows in logs.items():
        method = METHODS.get(folder.name.split("-")[0], folder.name)
        values = [row["val/accuracy"] for row in rows if "val/accuracy" in row]
        series.setdefault(method, []).append(values)
    written.append(outputs / "curves.png")
    pictures.curves(series, written[-1], "accuracy on validation data", "digits, small ResNet")
    console.print("\nAccuracy on validation data by epoch, mean of the seeds, 50% to 100%")
    for method, runs in series.items():
        means = [sum(values) / len(values) for values in zip(*runs, strict=False)]
        console.print(f"{method:>18} {pictures.sparkline(means, 0.5, 1.0)} {means[-1]:.3f}")

    for folder in folders:
        measured = pictures.alphas(folder / "tempbalance.csv")
        if measured is None or not folder.name.startswith(f"farms-seed{seeds[0]}"):
            continue
        written.append(outputs / "alphas.png")
        pictures.heatmap(measured, written[-1], f"alpha by layer and epoch, {folder.name}")
        console.print(f"\nAlpha by layer and epoch (FARMS, seed {seeds[0]})")
        console.print(pictures.terminal_heatmap(measured), no_wrap=True)
    console.print()
    for path in written:
        console.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.quickstart", description=__doc__)
    parser.add_argument("--again", action="store_true", help="train anew")
    parser.add_argument("--outputs", default="outputs", help="folder to write to")
    parser.add_argument("--methods", default=",".join(METHODS), help="configurations of balance")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("overrides", nargs="*", help="of the configuration, key=value")
    chosen = parser.parse_args(arguments)
    for name in ("pytorch_lightning", "lightning_fabric", "tempbalance"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="(pytorch_)?lightning")
    console = Console()
    seeds = [int(seed) for seed in chosen.seeds.split(",")]
    overrides = [
        "experiment=quickstart",
        f"outputs={chosen.outputs}",
        "trainer.enable_progress_bar=false",
        f"rerun={str(chosen.again).lower()}",
        *chosen.overrides,
    ]
    folders = run_all(overrides, chosen.methods.split(","), seeds, console)
    show(Path(chosen.outputs) / "quickstart", folders, seeds, console)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
