"""Grokking in one picture: accuracy, alpha by layer and traps over the steps of a run.

python -m experiments.train experiment=grokking            (draws outputs/.../grokking.png)
python -m experiments.train experiment=grokking_addition
python -m experiments.grokking FOLDER [FOLDER ...] --out grokking.png   (runs beside each other)

Memorizing shows where accuracy on training data is high and that on test data is not; grokking
where the second follows.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
from matplotlib.figure import Figure
from rich.console import Console

from experiments.pictures import blank, read_metrics
from tempbalance.plots.style import COLORS

_ACCURACY = {"train/accuracy": "training data", "val/accuracy": "test data"}
_BY_LAYER = {
    "alpha": "alpha",
    "trap_units": "largest shuffled eigenvalue\nabove the random edge (TW units)",
    "traps": "traps",
}
_SUMMARY = ("min", "median", "max", "measured_share")

Curves = dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]


class Picture(pl.Callback):
    """Draw `grokking.png` in the folder of a run when its training ends."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw, where the run has logged anything."""
        if trainer.is_global_zero and (self.folder / "metrics.csv").is_file():
            draw([self.folder]).savefig(self.folder / "grokking.png", dpi=130)


def draw(folders: Sequence[Path]) -> Figure:
    """Runs beside each other, a column each; steps on a logarithmic axis.

    Raises: FileNotFoundError for a folder without metrics.csv.
    """
    figure = blank(5.2 * len(folders) + 0.6, 10)
    axes = figure.subplots(1 + len(_BY_LAYER), len(folders), sharex="col", squeeze=False)
    for column, folder in zip(axes.T, folders, strict=True):
        rows = read_metrics(folder / "metrics.csv")
        accuracy = curves(rows, {key: [key] for key in _ACCURACY})
        for (key, label), color in zip(_ACCURACY.items(), ("black", COLORS[1]), strict=True):
            if key in accuracy:
                column[0].plot(*accuracy[key], color=color, label=label)
        column[0].set_ylabel("accuracy")
        column[0].set_title(folder.parent.name.replace("_", " "), fontsize=10)
        for axis, (kind, label) in zip(column[1:], _BY_LAYER.items(), strict=True):
            found = curves(rows, _layers(rows, f"tempbalance/{kind}/"))
            for i, (name, line) in enumerate(found.items()):
                axis.plot(*line, color=COLORS[i % len(COLORS)], label=name, lw=1.2)
            axis.set_ylabel(label)
        column[1].axhline(2, color="grey", lw=0.8, ls=":")
        column[2].set_yscale("symlog", linthresh=4)
        column[-1].set_xlabel("optimizer steps")
        for axis in column:
            axis.set_xscale("log")
            axis.grid(alpha=0.3)
            axis.tick_params(labelsize=8)
        for axis in column[:2]:
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=7)
    return figure


def curves(rows: Sequence[Mapping[str, float]], keys: Mapping[str, Sequence[str]]) -> Curves:
    """By name, steps and values of the rows that have one of its keys; step 0 is drawn at 1."""
    found: Curves = {}
    for name, wanted in keys.items():
        points = [(max(1.0, row["step"]), row[key]) for row in rows for key in wanted if key in row]
        if points:
            steps, values = np.array(points).T
            found[name] = (steps, values)
    return found


def _layers(rows: Sequence[Mapping[str, float]], prefix: str) -> dict[str, list[str]]:
    """Keys that begin with the prefix, by layer, without the summaries over layers."""
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith(prefix))
    names = {key: key.removeprefix(prefix).removeprefix("model.") for key in keys}
    return {name: [key] for key, name in names.items() if name not in _SUMMARY}


def main(arguments: Sequence[str] | None = None) -> Any:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.grokking")
    parser.add_argument("folders", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--out", type=Path, default=Path("grokking.png"))
    chosen = parser.parse_args(arguments)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    draw(chosen.folders).savefig(chosen.out, dpi=130)
    Console().print(f"written: {chosen.out}")


if __name__ == "__main__":
    main()
