"""A picture of perplexity by sparsity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Line:
    """Perplexities of one allocation by sparsity, one a seed."""

    panel: str
    label: str
    points: Mapping[float, Sequence[float]] = field(default_factory=dict)


def by_sparsity(lines: Sequence[Line], path: Path) -> None:
    """A panel a pruner, a line an allocation through the geometric means, a dot a seed."""
    panels = list(dict.fromkeys(line.panel for line in lines))
    labels = list(dict.fromkeys(line.label for line in lines))
    figure = Figure(figsize=(4.4 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, axis in zip(panels, axes, strict=True):
        for line in (line for line in lines if line.panel == panel):
            color = f"C{labels.index(line.label) % 10}"
            totals = sorted(line.points)
            means = [_geometric(line.points[total]) for total in totals]
            axis.plot([100 * t for t in totals], means, "-", color=color, label=line.label)
            for total in totals:
                values = line.points[total]
                axis.plot([100 * total] * len(values), values, "o", ms=3.5, color=color)
        axis.set_yscale("log")
        axis.set_title(panel, fontsize=9, wrap=True)
        axis.set_xlabel("weights removed (%)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("perplexity")
    axes[-1].legend(fontsize=8)
    figure.savefig(path, dpi=150)


def from_runs(runs: Iterable[dict[str, Any]], path: Path) -> list[Path]:
    """The picture of the pruning runs among some results; nothing where there is none."""
    lines: dict[tuple[str, str], dict[float, list[float]]] = {}
    for run in runs:
        if (told := run.get("pruning")) is not None:
            panel = f"{told['method']}, {told['split']} text"
            points = lines.setdefault((panel, told["allocation"]), {})
            points.setdefault(told["total"], []).append(run["value"])
    if not lines:
        return []
    by_sparsity([Line(*key, points) for key, points in lines.items()], path)
    return [path]


def _geometric(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
