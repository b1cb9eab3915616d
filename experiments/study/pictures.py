"""Pictures of the study: differences by cell, and validation metric by rate."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from experiments.pictures import blank
from experiments.study.cells import METHODS
from experiments.study.files import mean_by_rate
from experiments.study.numbers import Cellwise

_METHOD, _CONTROL = "#1a73e8", "#80868b"


def overview(cells: Sequence[Cellwise], path: Path) -> None:
    """A panel a cell: each variant against uniform, both at their own rate; mean and interval."""
    shown = [(c, [r for r in c.own if r.difference is not None]) for c in cells]
    shown = [(c, rows) for c, rows in shown if rows]
    across = min(2, len(shown))
    down = -(-len(shown) // across)
    most = max(len(rows) for _, rows in shown)
    figure = blank(5.6 * across, (0.8 + 0.24 * most) * down)
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for axis in axes[len(shown) :]:
        axis.axis("off")
    for axis, (found, rows) in zip(axes, shown, strict=False):
        ends = [
            abs(end)
            for row in rows
            if (d := row.difference) and row.variant != "uniform"
            for end in (d.mean, d.low or 0.0, d.high or 0.0)
        ]
        reach = 1.1 * max(ends, default=0.0) or 1.0
        for y, row in enumerate(reversed(rows)):
            d = row.difference
            assert d is not None
            colour = _METHOD if row.variant.startswith(METHODS) else _CONTROL
            if abs(d.mean) > reach:  # a rate far from the best would squeeze all the others
                axis.text(reach, y, f"{d.mean:+.0f} >", fontsize=7, ha="right", va="center")
                continue
            if d.low is not None and d.high is not None:
                axis.plot([d.low, d.high], [y, y], color=colour, lw=2)
            axis.plot([d.mean], [y], "D", color=colour, ms=5)
        axis.set_xlim(-reach, reach)
        axis.set_ylim(-0.7, len(rows) - 0.3)
        axis.set_yticks(range(len(rows)), [f"{r.variant} {r.rate:g} (n={r.n})" for r in rows[::-1]])
        axis.axvline(0, color="black", lw=0.8)
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(labelsize=7)
        better = "points of accuracy, right is better"
        if found.cell.mode == "min":
            better = "% of uniform's error, left is better"
        axis.set_xlabel(better, fontsize=7)
        title = found.cell.title + ("" if found.complete else " (not finished)")
        axis.set_title(textwrap.fill(title, 52), fontsize=9, loc="left")
    figure.savefig(path, dpi=130)


def by_rate(found: Cellwise, path: Path) -> None:
    """Mean validation metric over the tuning seeds, by rate, for uniform and the methods."""
    figure = blank(6.5, 4)
    axis = figure.subplots()
    for variant in ("uniform", *METHODS, "pertype"):
        means = mean_by_rate(found.runs, variant)
        if means:
            width = 2.5 if variant == "uniform" else 1.2
            axis.plot(list(means), list(means.values()), "o-", lw=width, ms=4, label=variant)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("learning rate")
    axis.set_ylabel("validation metric, mean over tuning seeds")
    axis.set_title(textwrap.fill(found.cell.title, 52), fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
