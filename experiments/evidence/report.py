"""The page and the picture of the study's second part, from the rows that were run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments import rows as rows_csv
from experiments import statistics
from experiments.evidence.cells import CELLS, Cell
from experiments.evidence.search import Point, Row, missing, tune
from experiments.pictures import blank
from experiments.study.files import RESULTS
from experiments.study.numbers import compare


@dataclass(frozen=True)
class Line:
    """A variant at one point, against uniform at its own."""

    variant: str
    point: Point
    values: Mapping[int, float]  # test metric by final seed
    difference: statistics.Paired | None  # percent of uniform's mean, or points
    subsets: statistics.Paired | None  # the same over means of the seeds that share a subset
    p: float | None = None  # corrected within the table


def path_of(cell: Cell, folder: Path = RESULTS) -> Path:
    """The file of a cell's rows."""
    return folder / f"evidence_{cell.name}.csv"


def write(folder: Path = RESULTS) -> list[Path]:
    """Write evidence.md beside the folder of results, and its picture; their paths."""
    page = folder.parent / "evidence.md"
    found = {c.name: rows_csv.read(path_of(c, folder), Row) for c in CELLS.values()}
    if not any(found.values()):
        return []
    paths = [page]
    drawn = {
        name: own(CELLS[name], of, best_points(CELLS[name], of)) for name, of in found.items() if of
    }
    drawn = {name: lines for name, lines in drawn.items() if any(x.difference for x in lines)}
    if drawn:
        paths.append(folder.parent / "images" / "evidence.png")
        paths[1].parent.mkdir(parents=True, exist_ok=True)
        picture(drawn, paths[1])
    page.write_text(markdown(found, folder, picture=bool(drawn)))
    return paths


def markdown(found: Mapping[str, Sequence[Row]], folder: Path, picture: bool) -> str:
    """The whole page; `evidence-conclusions.md` of the folder comes first."""
    text = [
        "# Results, second part",
        "",
        "Made by `python -m experiments.report` from `results/evidence_*.csv`, which hold every "
        "run; the design, written before them, is [evidence-design.md](evidence-design.md). To "
        "make a run again: `python -m experiments.train` with the overrides at the end of its row.",
    ]
    conclusions = folder / "evidence-conclusions.md"
    if conclusions.is_file():
        text += ["", conclusions.read_text().strip()]
    if picture:
        text += ["", "![differences from tuned uniform, every cell](images/evidence.png)"]
    for name, cell in CELLS.items():
        text += ["", f"## {cell.title}", "", *section(cell, found.get(name, ()))]
    return "\n".join(text) + "\n"


def section(cell: Cell, rows: Sequence[Row]) -> list[str]:
    """What was run of a cell, and its tables."""
    command = f"`python -m experiments.evidence {cell.name}`"
    if not rows:
        return [f"Not run: {command}."]
    wanted = missing(cell, rows)
    text = [f"{command}; {len(rows)} runs ({_makers(rows)})."]
    if wanted:
        text += ["", f"**Not finished**: {len(wanted)} more runs are wanted next. A table with "
                 "a row of fewer seeds than planned has no p."]  # fmt: skip
    best = best_points(cell, rows)
    lines = own(cell, rows, best)
    if not lines:
        return [*text, "", "No final seed was run yet."]
    text += ["", "Each at its own best rate and decay:", "", *_table(cell, lines)]
    if shared := at_uniform(cell, rows, best):
        text += ["", "At the rate and decay of uniform's best:", "", *_table(cell, shared)]
    return text


def best_points(cell: Cell, rows: Sequence[Row]) -> dict[str, Point]:
    """The best point of each variant whose search is over."""
    found = {name: tune(cell, name, rows)[0] for name in cell.variants}
    return {name: point for name, point in found.items() if point is not None}


def own(cell: Cell, rows: Sequence[Row], best: Mapping[str, Point]) -> list[Line]:
    """Every variant at its own best point, p corrected together where all seeds are there."""
    return _lines(cell, rows, best, best)


def at_uniform(cell: Cell, rows: Sequence[Row], best: Mapping[str, Point]) -> list[Line]:
    """Every variant at the best point of the uniform one that it is compared with."""
    points = {name: best[root] for name in cell.variants if (root := cell.root(name)) in best}
    return _lines(cell, rows, points, best)


def _lines(
    cell: Cell, rows: Sequence[Row], points: Mapping[str, Point], best: Mapping[str, Point]
) -> list[Line]:
    values: dict[tuple[str, Point], dict[int, float]] = {}
    for row in rows:
        if row.seed in cell.finals:
            values.setdefault((row.variant, row.point), {})[row.seed] = row.value
    lines = []
    for name, point in points.items():
        root = cell.root(name)
        mine, base = values.get((name, point), {}), values.get((root, best[root]), {})
        if not mine:
            continue
        difference = over = None
        if name != root:
            difference = compare(mine, base, cell.mode)
        if name != root and cell.subset_of:
            over = compare(_by_subset(cell, mine), _by_subset(cell, base), cell.mode)
        lines.append(Line(name, point, mine, difference, over))
    return _corrected(cell, lines)


def _by_subset(cell: Cell, values: Mapping[int, float]) -> dict[int, float]:
    """Means over the seeds of each subset of which all are there."""
    groups: dict[int, list[float]] = {}
    for seed, value in values.items():
        groups.setdefault(seed // cell.subset_of, []).append(value)
    return {k: math.fsum(v) / len(v) for k, v in groups.items() if len(v) == cell.subset_of}


def _corrected(cell: Cell, lines: list[Line]) -> list[Line]:
    few = any(len(line.values) < len(cell.finals) for line in lines)
    if few or len(lines) < len(cell.variants):
        return lines
    tested = [i for i, x in enumerate(lines) if x.difference and x.difference.p is not None]
    p = statistics.holm([lines[i].difference.p for i in tested])  # type: ignore[misc, union-attr]
    by_index = dict(zip(tested, p, strict=True))
    return [Line(**{**vars(x), "p": by_index.get(i)}) for i, x in enumerate(lines)]


def _table(cell: Cell, lines: Sequence[Line]) -> list[str]:
    unit = "points" if cell.mode == "max" else "% of uniform's mean"
    heads = ["method", "rate", "decay", "seeds", "test", f"difference ({unit})", "95% interval",
             "p (Holm)", "wins", "detectable"]  # fmt: skip
    heads += ["over subsets"] if cell.subset_of else []
    text = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for line in lines:
        d = line.difference
        found = [
            line.variant,
            f"{line.point[0]:.3g}",
            f"{line.point[1]:.3g}",
            str(len(line.values)),
            _value(cell, line.values),
            "" if d is None else f"{d.mean:+.2f}",
            _interval(d),
            "" if line.p is None else f"{line.p:.2g}",
            "" if d is None else f"{d.wins}/{d.n}",
            "" if d is None or d.se is None else f"{statistics.detectable(d.se, d.n):.2f}",
        ]
        if cell.subset_of:
            s = line.subsets
            found.append("" if s is None else f"{s.mean:+.2f} ({_interval(s)})")
        text.append("| " + " | ".join(found) + " |")
    return text


def _interval(d: statistics.Paired | None) -> str:
    return "" if d is None or d.low is None else f"{d.low:+.2f} to {d.high:+.2f}"


def _value(cell: Cell, values: Mapping[int, float]) -> str:
    finite = [v for v in values.values() if math.isfinite(v)]
    if not finite:
        return "diverged"
    scale, places = (100, 2) if cell.mode == "max" else (1, 4)
    lost = "" if len(finite) == len(values) else f" ({len(values) - len(finite)} diverged)"
    return f"{scale * statistics.mean(finite).mean:.{places}f}{lost}"


def _makers(rows: Sequence[Row]) -> str:
    commits = dict.fromkeys(row.commit for row in rows)
    devices = dict.fromkeys(row.device for row in rows)
    return f"commit {', '.join(commits)}; {', '.join(devices)}"


def picture(cells: Mapping[str, Sequence[Line]], path: Path) -> None:
    """A panel a cell: each variant against uniform, both at their own best; mean and interval."""
    most = max(len(lines) for lines in cells.values())
    across = min(2, len(cells))
    down = -(-len(cells) // across)
    figure = blank(5.6 * across, (0.9 + 0.24 * most) * down)
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for axis in axes[len(cells) :]:
        axis.axis("off")
    for axis, (name, lines) in zip(axes, cells.items(), strict=False):
        shown = [x for x in lines if x.difference is not None][::-1]
        for y, line in enumerate(shown):
            d = line.difference
            assert d is not None
            if d.low is not None and d.high is not None:
                axis.plot([d.low, d.high], [y, y], color="#1a73e8", lw=2)
            axis.plot([d.mean], [y], "D", color="#1a73e8", ms=4)
        axis.set_yticks(range(len(shown)), [f"{x.variant} (n={len(x.values)})" for x in shown])
        axis.axvline(0, color="black", lw=0.8)
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(labelsize=7)
        better = "points, right is better" if CELLS[name].mode == "max" else "%, left is better"
        axis.set_xlabel(f"difference from uniform, {better}", fontsize=7)
        axis.set_title(name, fontsize=9, loc="left")
    figure.savefig(path, dpi=130)
