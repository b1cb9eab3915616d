"""Pictures of runs: paired differences, curves, alphas by layer and epoch; PNG and terminal."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.color import Color
from rich.style import Style
from rich.text import Text

from experiments.results import Report

BLOCKS = " ▁▂▃▄▅▆▇█"


def blank(width: float, height: float) -> Figure:
    """An empty figure, in inches, that needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def differences(report: Report, path: Path) -> None:
    """A panel a cell: each method's paired differences from the baseline, mean and interval.

    A cell without differences shows the values themselves.
    """
    cells = list({id(row.cell): row.cell for row in report.rows}.values())
    groups = [[row for row in report.rows if row.cell is cell] for cell in cells]
    heights = [max(2, len(group)) for group in groups]
    figure = blank(7.5, 0.9 * len(cells) + 0.42 * sum(heights))
    axes = figure.subplots(len(cells), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, cell, group in zip(axes, cells, groups, strict=True):
        reference = cell.values(report.baseline)
        compared = [row for row in group if row.difference is not None]
        shown = compared or group
        for y, row in enumerate(reversed(shown)):
            values = cell.values(row.method)
            if row.difference is None:
                points, centre, reach = list(values.values()), row.value.mean, row.value.se
            else:
                shared = sorted(values.keys() & reference.keys())
                points = [values[seed] - reference[seed] for seed in shared]
                centre, low = row.difference.mean, row.difference.low
                reach = None if low is None else centre - low
            axis.plot(points, [y] * len(points), "o", color="#9aa0a6", ms=4, alpha=0.8, zorder=2)
            if reach is not None:
                axis.plot([centre - reach, centre + reach], [y, y], color="#1a73e8", lw=2, zorder=3)
            axis.plot([centre], [y], "D", color="#1a73e8", ms=6, zorder=4)
        axis.set_yticks(
            range(len(shown)), [f"{row.method} (n={_n(row)})" for row in reversed(shown)]
        )
        axis.set_ylim(-0.6, len(shown) - 0.4)
        axis.set_title(cell.title, fontsize=10, loc="left")
        axis.grid(axis="x", alpha=0.3)
        if compared:
            axis.axvline(0, color="black", lw=0.8)
            better = "right" if cell.mode == "max" else "left"
            axis.set_xlabel(
                f"{cell.metric}: difference from {report.baseline} ({better} is better); "
                f"diamond: mean, bar: {100 * report.confidence:g}% interval",
                fontsize=8,
            )
        else:
            axis.set_xlabel(f"{cell.metric}; diamond: mean, bar: standard error", fontsize=8)
        axis.tick_params(labelsize=8)
    figure.savefig(path, dpi=130)


def _n(row: Any) -> int:
    return int(row.difference.n if row.difference is not None else row.value.n)


@dataclass(frozen=True)
class Alphas:
    """Alpha by layer (rows) and epoch (columns); NaN where a layer was not measured."""

    layers: list[str]
    epochs: list[int]
    values: np.ndarray

    def some(self, count: int) -> Alphas:
        """At most so many layers, evenly spread in depth, the first and the last among them."""
        kept = np.unique(np.linspace(0, len(self.layers) - 1, count).round().astype(int))
        return Alphas([self.layers[i] for i in kept], self.epochs, self.values[kept])


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a metrics.csv, empty fields left out.

    Raises: FileNotFoundError where there is none.
    """
    with path.open(newline="") as file:
        return [
            {key: float(value) for key, value in row.items() if value not in ("", None)}
            for row in csv.DictReader(file)
        ]


def alphas(path: Path) -> Alphas | None:
    """Alphas in a run's tempbalance.csv, layers in the order of the model; None without the file.

    Of several measurements in one epoch the last counts.
    """
    if not path.is_file():
        return None
    found: dict[str, dict[int, float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            value = float(row["alpha"]) if row["alpha"] else math.nan
            found.setdefault(row["layer"], {})[int(row["epoch"])] = value
    epochs = sorted({epoch for row in found.values() for epoch in row})
    values = [[row.get(epoch, math.nan) for epoch in epochs] for row in found.values()]
    names = [name.removeprefix("model.") for name in found]
    return Alphas(names, epochs, np.array(values)) if found else None


def curves(
    series: Mapping[str, Sequence[Sequence[float]]], path: Path, label: str, title: str = ""
) -> None:
    """Mean over runs of a metric by epoch, a line a method, with the range of the runs shaded."""
    figure = blank(7.5, 4)
    axis = figure.subplots()
    for method, runs in series.items():
        length = min(map(len, runs))
        values = np.array([run[:length] for run in runs])
        epochs = np.arange(1, length + 1)
        (line,) = axis.plot(epochs, values.mean(0), label=f"{method} ({len(runs)} runs)")
        axis.fill_between(
            epochs, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, lw=0
        )
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylabel(label)
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=130)


def sparkline(values: Sequence[float], low: float, high: float) -> str:
    """One character a value, the height of its block between low and high."""
    span = (high - low) or 1.0
    top = len(BLOCKS) - 1
    return "".join(BLOCKS[max(1, min(top, round((v - low) / span * top)))] for v in values)


def terminal_heatmap(found: Alphas) -> Text:
    """The heatmap as coloured blocks, two columns an epoch, dark for small alpha."""
    low, high = float(np.nanmin(found.values)), float(np.nanmax(found.values))
    width = max(map(len, found.layers))
    text = Text()
    for name, row in zip(found.layers, found.values, strict=True):
        text.append(f"{name:>{width}} ")
        for value in row:
            text.append("  ", _shade(value, low, high))
        text.append(f"  {row[0]:.2f} to {row[-1]:.2f}\n")
    text.append(" " * width + " alpha ")
    for step in range(9):
        text.append("  ", _shade(low + (high - low) * step / 8, low, high))
    text.append(f" {low:.2f} to {high:.2f}, epoch {found.epochs[0]} to {found.epochs[-1]}")
    return text


def _shade(value: float, low: float, high: float) -> Style:
    if not math.isfinite(value):
        return Style()
    from matplotlib import colormaps

    red, green, blue, _ = colormaps["viridis"]((value - low) / ((high - low) or 1.0))
    return Style(bgcolor=Color.from_rgb(255 * red, 255 * green, 255 * blue))
