"""The demonstration: a small ResNet on digits, in minutes on a CPU; `make demo`.

    python -m experiments.quickstart

The bias of alpha by shape, a training with the one line and its alphas, and three methods over
three seeds: in the terminal, as pictures, and as a page. A second start shows the results again;
`--again` trains anew.
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

from experiments import bias, pictures, quickstart_page, report, results, sweep
from experiments.train import train

METHODS = {"none": "uniform", "tb": "TempBalance", "farms": "FARMS"}
SEEDS = (43, 37, 13)
SHOWN = 7  # layers in the terminal
LINE = "pl.Trainer(callbacks=[TempBalanceCallback()])"
COLUMNS = ["method", "seeds", "mean", "sd", "difference", "95% interval", "measuring"]
FEW = "Few seeds of a small task: this shows that it runs, not which method is better."


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
    with Progress(*columns, console=console, transient=True) as progress:
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


def shapes(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Alphas of random matrices by shape, in the terminal."""
    console.print("[bold]1. Alpha of a whole matrix follows its shape; windows take that out[/]")
    table = Table(box=None, padding=(0, 0, 0, 2), show_header=False)
    names = (("random matrix", "shape"), ("whole", "plain"), ("FARMS windows", "farms"))
    for label, key in names:
        cells = ["x".join(map(str, r[key])) if key == "shape" else f"{r[key][0]:.2f}" for r in rows]
        table.add_row(label, *cells, style="dim" if key == "shape" else "")
    console.print(table)


def training(run: Path, console: Console) -> None:
    """Alphas over the epochs of one run, in the terminal."""
    console.print("\n[bold]2. A training with the one line[/] (FARMS, first seed)", highlight=False)
    console.print(f"   {LINE}", markup=False)
    measured = pictures.alphas(run / "tempbalance.csv")
    assert measured is not None
    shown = measured.some(SHOWN)
    console.print(
        f"   alpha of {len(shown.layers)} of {len(measured.layers)} layers over the epochs"
    )
    console.print(pictures.terminal_heatmap(shown), no_wrap=True)


def comparison(found: results.Report) -> list[list[str]]:
    """Cells of the table of methods, as text, under `COLUMNS`."""
    lines = []
    order = list(METHODS)
    rows = sorted(found.rows, key=lambda row: (*order, row.method).index(row.method))
    for row in rows:
        d = row.difference
        reach = "" if d is None or d.low is None or d.high is None else _points(d.low, d.high)
        lines.append(
            [
                METHODS.get(row.method, row.method),
                str(row.value.n),
                f"{100 * row.value.mean:.2f}%",
                "" if row.value.sd is None else f"{100 * row.value.sd:.2f}",
                "" if d is None else _points(d.mean),
                reach,
                "" if row.share is None else f"{100 * row.share:.1f}%",
            ]
        )
    return lines


def _points(*shares: float) -> str:
    return " to ".join(f"{100 * share:+.2f}" for share in shares)


def show(outputs: Path, folders: Sequence[Path], random: Sequence[dict[str, Any]],
         console: Console) -> None:  # fmt: skip
    """What the runs say, in the terminal; pictures and the page under `outputs`."""
    cells, notes = results.load(folders)
    found = results.summarize(cells, notes)
    report.write(found, outputs)
    network = bias.both_alphas(folders[0] / "checkpoints" / "last.ckpt")
    ranks = bias.rankings(network)
    console.print(
        f"  {ranks['layers']} layers of a ResNet: rank correlation with rows / columns "
        f"{ranks['shape']:.2f} and {ranks['shape_farms']:.2f}",
        highlight=False,
    )
    balanced = next((f for f in folders if f.name.startswith("farms-")), None)
    if balanced is not None:
        training(balanced, console)
    console.print("\n[bold]3. Does it help?[/] Accuracy on test digits after the last epoch")
    table = Table(box=None, padding=(0, 1, 0, 1), pad_edge=True)
    for i, name in enumerate(COLUMNS):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for line in comparison(found):
        table.add_row(*line)
    console.print(table)
    console.print(FEW, style="yellow", soft_wrap=True)
    shape = {"random": random, "networks": {"this ResNet": {"after": network}}}
    path = quickstart_page.write(outputs, folders, shape, [COLUMNS, *comparison(found)], METHODS)
    console.print(f"\npage: {path}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"pictures: {outputs}", markup=False, highlight=False, soft_wrap=True)


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
    random = bias.random_alphas(draws=4)
    shapes(random, console)
    folders = run_all(overrides, chosen.methods.split(","), seeds, console)
    show(Path(chosen.outputs) / "quickstart", folders, random, console)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
