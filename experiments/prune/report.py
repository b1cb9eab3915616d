"""The page and the picture of the pruning table, from the rows that were run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from experiments import statistics
from experiments.prune import grid
from experiments.prune.grid import Row
from experiments.prune.pictures import Line, by_sparsity

NOT_RUN = "not run"


def write(results: Path = grid.RESULTS) -> list[Path]:
    """Write pruning.md beside the rows, and a picture where test rows allow one; their paths."""
    rows = grid.read(results)
    if not rows:
        return []
    page = results.with_suffix(".md")
    paths = [page]
    picture = results.parent.parent / "images" / "pruning.png"
    lines = _lines(rows)
    if lines:
        picture.parent.mkdir(parents=True, exist_ok=True)
        by_sparsity(lines, picture)
        paths.append(picture)
    page.write_text(markdown(rows, picture=bool(lines)))
    return paths


def markdown(rows: Sequence[Row], picture: bool = False) -> str:
    """The tables, cells that were not run named as such."""
    text = [
        "# The pruning table",
        "",
        "Made by `python -m experiments.report` from [pruning.csv](pruning.csv), which holds every "
        "row that was run; [pruning-design.md](pruning-design.md) was written before them. "
        f"Perplexities; what says '{NOT_RUN}' was not run.",
    ]
    for model in sorted({row.model for row in rows}):
        of_model = [row for row in rows if row.model == model]
        text += ["", f"## {model}", "", *_progress(of_model, model)]
        if picture:
            text += ["", "![perplexity by sparsity](../images/pruning.png)"]
        for method in grid.METHODS:
            text += ["", f"### {method}: test text", "", *_test(of_model, model, method)]
            text += _search(of_model, model, method)
    return "\n".join(text) + "\n"


def _progress(rows: Sequence[Row], model: str) -> list[str]:
    cells = [
        (model, method, allocation, total)
        for method in grid.METHODS
        for allocation in grid.ALLOCATIONS
        for total in grid.TOTALS
    ]
    searched = [cell for cell in cells if cell[1] not in grid.SPREAD_OF]
    validation = sum(grid.rows_of_search(allocation) for _, _, allocation, _ in searched)
    test = sum(len(grid.seeds(method, allocation)) for _, method, allocation, _ in cells)
    done = [sum(row.split == split for row in rows) for split in ("validation", "test")]
    return [f"{done[0]} of {validation} rows on validation text were run, "
            f"{done[1]} of {test} on test text."]  # fmt: skip


def _test(rows: Sequence[Row], model: str, method: str) -> list[str]:
    """Geometric mean over seeds, the spread that was chosen, and what it gains on uniform."""
    lines = [
        "| allocation | " + " | ".join(f"{100 * total:g}%" for total in grid.TOTALS) + " |",
        "| --- |" + " ---: |" * len(grid.TOTALS),
    ]
    for allocation in grid.ALLOCATIONS:
        cells = [_cell(rows, model, method, allocation, total) for total in grid.TOTALS]
        lines.append("| " + " | ".join([allocation, *cells]) + " |")
    lines += [
        "",
        "Geometric means over the calibration seeds; in brackets the spread, then the difference "
        "from uniform in percent (paired by seed, 95% t interval).",
    ]
    return lines


def _cell(rows: Sequence[Row], model: str, method: str, allocation: str, total: float) -> str:
    logs = _logs(rows, model, method, allocation, total)
    if not logs:
        return NOT_RUN
    best = grid.chosen(rows, model, method, allocation, total)
    told = [] if best is None or best.spread is None else [f"{best.spread:g}"]
    reference = _logs(rows, model, method, "uniform", total)
    if reference and len(grid.seeds(method, "uniform")) == 1:  # the same for every seed
        reference = dict.fromkeys(logs, next(iter(reference.values())))
    d = statistics.paired(logs, reference, "min", 0.95)
    if allocation != "uniform" and d is not None:
        interval = "" if d.low is None else f", {_percent(d.low)} to {_percent(d.high)}"
        told.append(f"{_percent(d.mean)}%{interval}")
    mean = math.exp(sum(logs.values()) / len(logs))
    seeds = "" if len(logs) == len(grid.seeds(method, allocation)) else f" of {len(logs)} seed(s)"
    return f"{mean:.1f}{seeds}" + (f" ({'; '.join(told)})" if told else "")


def _percent(log: float | None) -> str:
    return "" if log is None else f"{100 * math.expm1(log):+.1f}"


def _logs(
    rows: Sequence[Row], model: str, method: str, allocation: str, total: float
) -> dict[int, float]:
    """Log perplexity on test text by seed."""
    return {
        row.seed: math.log(row.perplexity)
        for row in rows
        if (row.model, row.method, row.allocation) == (model, method, allocation)
        and row.total == total and row.split == "test"
    }  # fmt: skip


def _search(rows: Sequence[Row], model: str, method: str) -> list[str]:
    """The rows that choose the spread, for the sparsities where any was run."""
    lines = []
    spreads = sorted(grid.SPREADS)
    for total in grid.TOTALS:
        found = {
            (row.allocation, row.spread): row
            for row in rows
            if (row.model, row.method, row.total) == (model, method, total)
            and row.split == "validation"
        }
        if not found:
            continue
        lines += ["", f"### {method}, {100 * total:g}%: validation text, by spread", ""]
        lines += ["| allocation | " + " | ".join(f"{s:g}" for s in spreads) + " | zero |"]
        lines += ["| --- |" + " ---: |" * (len(spreads) + 1)]
        for allocation in grid.ALLOCATIONS:
            here = [found.get((allocation, spread)) for spread in spreads]
            if allocation == "uniform":
                here = [found.get((allocation, None))] * len(spreads)
            cells = [NOT_RUN if row is None else f"{row.perplexity:.1f}" for row in here]
            real = sorted({f"{row.sparsity:.4f}" for row in here if row is not None})
            shown = " to ".join(dict.fromkeys([*real[:1], *real[-1:]])) or "-"
            lines.append("| " + " | ".join([allocation, *cells, shown]) + " |")
        lines += ["", "`zero`: share of the weights that is zero afterwards."]
    return lines


def _lines(rows: Sequence[Row]) -> list[Line]:
    """A line an allocation and pruner, over the sparsities whose test rows were run."""
    lines = []
    keys = dict.fromkeys((row.model, row.method, row.allocation) for row in rows)
    for model, method, allocation in keys:
        points = {}
        for total in grid.TOTALS:
            if logs := _logs(rows, model, method, allocation, total):
                points[total] = [math.exp(value) for value in logs.values()]
        if points:
            lines.append(Line(f"{model}, {method}", allocation, points))
    return lines
