"""The study's results in numbers and in Markdown: docs/results.md from the files beside it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments import statistics
from experiments.study_cells import CELLS, METHODS, TUNING_SEED, Cell
from experiments.study_files import FACTOR, RESULTS, Run, best_rate, load, mean_by_rate, path_of

# Alpha is credited only where a method beats these too.
RIVALS = ("shuffled", "type_unit", "pertype")
_HEADER = (
    "method", "rate", "seeds", "test", "difference", "95% interval", "p (Holm)", "wins",
    "2nd test", "held out", "measuring",
)  # fmt: skip

_PICTURES = {
    "study.png": "differences from tuned uniform, each method at its own best rate",
    "study_rates.png": "validation metric by learning rate",
}


@dataclass(frozen=True)
class Row:
    """One variant of a cell at one rate, against uniform at its own."""

    variant: str
    rate: float
    values: dict[int, float]  # test metric by seed, diverged runs left out
    diverged: int
    difference: statistics.Paired | None  # percent of uniform's, or points of accuracy
    second: statistics.Paired | None  # the same on the second test set
    held_out: statistics.Paired | None  # the same on validation data
    measuring: float  # share of the time, median
    p: float | None = None  # corrected within the table


@dataclass(frozen=True)
class Cellwise:
    """All that the report says of one cell."""

    cell: Cell
    runs: list[Run]
    rates: dict[str, float]  # the best rate of each variant that was tuned
    own: list[Row]
    matched: dict[float, list[Row]]  # by rate: all at this one rate, uniform too
    rivals: list[tuple[str, str, statistics.Paired]]  # (method, rival, difference)
    extra: list[Row]


def final(runs: Iterable[Run], variant: str, rate: float) -> list[Run]:
    """The runs of a variant on the final seeds at one rate."""
    return [r for r in runs if r.variant == variant and r.rate == rate and r.seed < TUNING_SEED]


def compare(
    method: Mapping[int, float], baseline: Mapping[int, float], mode: str
) -> statistics.Paired | None:
    """Paired difference: percent of the baseline's value for an error, points for an accuracy."""
    if mode == "max":
        points = [{seed: 100 * v for seed, v in of.items()} for of in (method, baseline)]
        return statistics.paired(points[0], points[1], mode)
    shared = method.keys() & baseline.keys()
    relative = {seed: 100 * method[seed] / baseline[seed] for seed in shared}
    return statistics.paired(relative, dict.fromkeys(shared, 100.0), mode)


def _finite(runs: Iterable[Run], name: str) -> dict[int, float]:
    found = {run.seed: float(getattr(run, name)) for run in runs}
    return {seed: value for seed, value in found.items() if math.isfinite(value)}


def _row(cell: Cell, runs: Sequence[Run], base: Sequence[Run], variant: str) -> Row:
    differences = {
        name: compare(_finite(runs, name), _finite(base, name), cell.mode)
        for name in ("value", "second", "held_out")
    }
    if variant == "uniform" and runs[0].rate == base[0].rate:
        differences = dict.fromkeys(differences)
    shares = sorted(run.measuring for run in runs)
    return Row(
        variant=variant,
        rate=runs[0].rate,
        values=_finite(runs, "value"),
        diverged=sum(not math.isfinite(run.value) for run in runs),
        difference=differences["value"],
        second=differences["second"],
        held_out=differences["held_out"],
        measuring=shares[len(shares) // 2],
    )


def _beside(cell: Cell, runs: Sequence[Run], base: Sequence[Run], best: float) -> list[Row]:
    """Uniform at the rates beside its best, where that was run; no test, so no p."""
    found = [final(runs, "uniform", rate) for rate in (best / FACTOR, best * FACTOR)]
    return [_row(cell, some, base, "uniform") for some in found if some]


def _corrected(rows: list[Row]) -> list[Row]:
    tested = [i for i, r in enumerate(rows) if r.difference and r.difference.p is not None]
    values = statistics.holm([rows[i].difference.p for i in tested])  # type: ignore[misc, union-attr]
    for i, p in zip(tested, values, strict=True):
        rows[i] = Row(**{**vars(rows[i]), "p": p})
    return rows


def read(cell: Cell, folder: Path = RESULTS) -> Cellwise | None:
    """A cell's tables; None where uniform has not been run on the final seeds."""
    runs = list(load(path_of(cell, folder)).values())
    tuned = {name for name in cell.seeds if mean_by_rate(runs, name)}
    rates = {name: best_rate(runs, name, cell.mode) for name in cell.seeds if name in tuned}
    base = final(runs, "uniform", rates["uniform"]) if "uniform" in rates else []
    if not base:
        return None

    def rows(of: Mapping[str, float], against: Sequence[Run] = base) -> list[Row]:
        found = {name: final(runs, name, rate) for name, rate in of.items()}
        return [_row(cell, some, against, name) for name, some in found.items() if some]

    matched = {}
    for rate in (rates["uniform"] * factor for factor in (1, 1 / FACTOR, FACTOR)):
        against = final(runs, "uniform", rate)
        if against and len(some := rows(dict.fromkeys(rates, rate), against)) > 1:
            matched[rate] = _corrected(some)
    rivals = []
    for method in METHODS:
        for rival in RIVALS:
            if method in rates and rival in rates:
                pair = [_finite(final(runs, n, rates[n]), "value") for n in (method, rival)]
                difference = compare(pair[0], pair[1], cell.mode)
                if difference is not None:
                    rivals.append((method, rival, difference))
    return Cellwise(
        cell=cell,
        runs=runs,
        rates=rates,
        own=_beside(cell, runs, base, rates["uniform"]) + _corrected(rows(rates)),
        matched=matched,
        rivals=rivals,
        extra=rows(dict.fromkeys(cell.extra, rates["uniform"])),
    )


# --- Markdown ------------------------------------------------------------------------------------


def _value(cell: Cell, row: Row) -> str:
    found = statistics.mean(list(row.values.values())) if row.values else None
    if found is None:
        return "diverged"
    scale, places = (100, 2) if cell.mode == "max" else (1, 4)
    spread = "" if found.sd is None else f" ± {scale * found.sd:.{places}f}"
    lost = f" ({row.diverged} diverged)" if row.diverged else ""
    return f"{scale * found.mean:.{places}f}{spread}{lost}"


def _difference(found: statistics.Paired | None) -> str:
    return "" if found is None else f"{found.mean:+.2f}"


def _interval(found: statistics.Paired | None) -> str:
    if found is None or found.low is None:
        return ""
    return f"{found.low:+.2f} to {found.high:+.2f}"


def _line(cell: Cell, row: Row) -> str:
    d = row.difference
    return _cells(
        row.variant,
        f"{row.rate:g}",
        str(len(row.values) + row.diverged),
        _value(cell, row),
        _difference(d),
        _interval(d),
        "" if row.p is None else f"{row.p:.2g}",
        "" if d is None else f"{d.wins}/{d.n}",
        _difference(row.second),
        _difference(row.held_out),
        f"{100 * row.measuring:.1f}%" if row.measuring else "",
    )


def _cells(*texts: str) -> str:
    return "| " + " | ".join(texts) + " |"


def _table(cell: Cell, rows: Sequence[Row]) -> list[str]:
    return [_cells(*_HEADER), "|" + " --- |" * len(_HEADER), *(_line(cell, row) for row in rows)]


def _grid(found: Cellwise) -> str:
    means = mean_by_rate(found.runs, "uniform")
    scale, places = (100, 1) if found.cell.mode == "max" else (1, 4)
    return ", ".join(f"{rate:g}: {scale * value:.{places}f}" for rate, value in means.items())


def _made(runs: Sequence[Run]) -> str:
    commits = Counter(run.commit + "+" * run.changed for run in runs)
    devices = Counter(run.device for run in runs)
    return (
        f"{len(runs)} runs; commit "
        + ", ".join(f"{name} ({n})" for name, n in commits.most_common())
        + "; "
        + ", ".join(devices)
    )


def section(found: Cellwise) -> list[str]:
    """The Markdown of one cell."""
    cell = found.cell
    unit = "points of accuracy" if cell.mode == "max" else "% of uniform's error"
    lines = [
        f"## {cell.title}",
        "",
        f"`python -m experiments.study {cell.name}`; {_made(found.runs)}. Differences in {unit}. "
        f"Uniform on validation data by rate: {_grid(found)}.",
        "",
        "Each at its own best rate:",
        "",
        *_table(cell, found.own),
    ]
    for rate, rows in found.matched.items():
        which = "uniform's rate" if rate == found.rates["uniform"] else "one rate"
        lines += ["", f"All at {which}, {rate:g}:", "", *_table(cell, rows)]
    if found.rivals:
        lines += ["", "Methods against the controls, each at its own rate:", ""]
        lines += [_cells("method", "control", "difference", "95% interval", "p", "wins")]
        lines += ["|" + " --- |" * 6]
        for method, rival, d in found.rivals:
            p = "" if d.p is None else f"{d.p:.2g}"
            wins = f"{d.wins}/{d.n}"
            lines += [_cells(method, rival, _difference(d), _interval(d), p, wins)]
    if found.extra:
        at_uniform = found.matched.get(found.rates["uniform"], [])
        farms = next((r for r in at_uniform if r.variant == "farms"), None)
        shown = [*([farms] if farms else []), *found.extra]
        lines += ["", "Sensitivity: one change at a time, at uniform's rate (p not corrected):", ""]
        lines += _table(cell, shown)
    return lines


def not_run(cell: Cell) -> list[str]:
    """What stands in the place of a cell without results."""
    why = "no GPU was at hand" if cell.gpu else "not yet"
    return [f"## {cell.title}", "", f"Not run ({why}): `python -m experiments.study {cell.name}`."]


def markdown(folder: Path = RESULTS) -> str:
    """The whole of docs/results.md; `conclusions.md` and `bias.md` of the folder come first."""
    lines = [
        "# Results",
        "",
        "Made by `python -m experiments.report` from the files in [results/](results); the design, "
        "written before the runs, is [study.md](study.md). To make any run again: `python -m "
        "experiments.train` with the overrides in its line of the file.",
    ]
    for name in ("conclusions.md", "bias.md"):
        if (folder / name).is_file():
            lines += ["", (folder / name).read_text().strip()]
    lines += [
        "",
        "## How to read the tables",
        "",
        "`test`: mean ± standard deviation over seeds, last epoch. `difference`: from uniform (at "
        "its own best rate, or at the one rate of the table), paired by seed; negative is better "
        "for an error, positive for an accuracy. The interval is a 95% t interval of that row "
        "alone; p is corrected for all rows of its table (Holm). "
        "`wins`: pairs in which the method is better. `2nd test`: the same difference on the "
        "second test set (32x32 for Darcy); `held out`: on validation data. "
        "`measuring`: share of the time that measuring alphas took, on networks so small that "
        "the share says little about large ones.",
    ]
    pictures = folder.parent / "images"
    for name, text in _PICTURES.items():
        if (pictures / name).is_file():
            lines += ["", f"![{text}](images/{name})"]
    for cell in CELLS.values():
        found = read(cell, folder)
        lines += ["", *(not_run(cell) if found is None else section(found))]
    return "\n".join(lines) + "\n"
