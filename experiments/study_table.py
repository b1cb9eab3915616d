"""The study's results in numbers and in Markdown: docs/results.md from the files beside it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments import statistics
from experiments.study_cells import CELLS, METHODS, TUNING_SEED, UNTUNED, WITHOUT_SPECTRAL, Cell
from experiments.study_files import FACTOR, RESULTS, Run, best_rate, load, mean_by_rate, path_of

# Alpha is credited only where a method beats these too.
RIVALS = ("shuffled", "type_unit", "pertype", "constant")
# Pairs that answer a question of their own: windows, maps, spectral weights.
PAIRS = (
    ("farms", "tb"),
    ("farms_sigmoid", "tb_sigmoid"),
    ("tb_sigmoid", "tb"),
    ("farms_sigmoid", "farms"),
    *((f"{name}_rest", name) for name in METHODS),
    ("farms_gentle", "farms"),
    ("farms_gentle", "shuffled_gentle"),
)
# Beside each change of the sensitivity table stand these, at the same rate and seeds.
_BESIDE = ("uniform", "farms_sigmoid", "shuffled", "pertype", "constant")
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
    values: dict[int, float]  # test metric by seed of those that did not diverge
    diverged: int
    difference: statistics.Paired | None  # percent of uniform's, or points of accuracy
    second: statistics.Paired | None  # the same on the second test set
    held_out: statistics.Paired | None  # the same on validation data
    measuring: float  # share of the time, median
    p: float | None = None  # corrected within the table

    @property
    def n(self) -> int:
        return len(self.values) + self.diverged


@dataclass(frozen=True)
class Cellwise:
    """All that the report says of one cell."""

    cell: Cell
    runs: list[Run]
    rates: dict[str, float]  # the best rate of each variant that was tuned
    edges: list[str]  # variants whose best rate is the smallest or largest that was tried
    own: list[Row]
    matched: dict[float, list[Row]]  # by rate: all variants at this one rate, uniform too
    untuned: list[Row]
    extra: list[Row]  # against farms

    @property
    def complete(self) -> bool:
        """Whether every variant has all seeds that the design gives it, at its own rate."""
        rows = {row.variant: row for row in self.own if row.rate == self.rates[row.variant]}
        return all(name in rows and rows[name].n == n for name, n in self.cell.seeds.items())

    def pair(self, method: str, rival: str, rate: float | None = None) -> statistics.Paired | None:
        """A method against another in percent of the other's mean error, or in points.

        `rate`: of both; None for each one's own best.
        """
        if method not in self.rates or rival not in self.rates:
            return None
        a, b = (
            _by_seed(final(self.runs, n, self.rates[n] if rate is None else rate), "value")
            for n in (method, rival)
        )
        return compare(a, b, self.cell.mode)


def final(runs: Iterable[Run], variant: str, rate: float) -> list[Run]:
    """The runs of a variant on the final seeds at one rate."""
    return [r for r in runs if r.variant == variant and r.rate == rate and r.seed < TUNING_SEED]


def compare(
    method: Mapping[int, float], baseline: Mapping[int, float], mode: str
) -> statistics.Paired | None:
    """Paired difference: in percent of the baseline's mean for an error, in points of accuracy.

    (A mean of ratios would be above zero for two equal methods.)

    A diverged run (NaN) loses its pair; with any, there is no interval, and p is that of a sign
    test. None where no pair is finite.
    """
    shared = sorted(method.keys() & baseline.keys())
    finite = [s for s in shared if math.isfinite(method[s]) and math.isfinite(baseline[s])]
    if not finite:
        return None
    level = statistics.mean([baseline[s] for s in finite]).mean
    scale = 100.0 if mode == "max" else 100.0 / level
    pair = [{s: scale * of[s] for s in finite} for of in (method, baseline)]
    found = statistics.paired(pair[0], pair[1], mode)
    if found is None or len(finite) == len(shared):
        return found
    wins = found.wins + sum(math.isfinite(method[s]) > math.isfinite(baseline[s]) for s in shared)
    losses = found.losses + sum(
        math.isfinite(method[s]) < math.isfinite(baseline[s]) for s in shared
    )
    return replace(
        found, n=len(shared), se=None, low=None, high=None, wins=wins, losses=losses,
        p=statistics.sign_test(wins, losses),
    )  # fmt: skip


def _by_seed(runs: Iterable[Run], name: str) -> dict[int, float]:
    return {run.seed: float(getattr(run, name)) for run in runs}


def _row(cell: Cell, runs: Sequence[Run], base: Sequence[Run]) -> Row:
    differences = {
        name: compare(_by_seed(runs, name), _by_seed(base, name), cell.mode)
        for name in ("value", "second", "held_out")
    }
    first = runs[0]
    if (first.variant, first.rate) == (base[0].variant, base[0].rate):
        differences = dict.fromkeys(differences)
    shares = sorted(run.measuring for run in runs if math.isfinite(run.measuring))
    values = {s: v for s, v in _by_seed(runs, "value").items() if math.isfinite(v)}
    return Row(
        variant=first.variant,
        rate=first.rate,
        values=values,
        diverged=len(runs) - len(values),
        difference=differences["value"],
        second=differences["second"],
        held_out=differences["held_out"],
        measuring=shares[len(shares) // 2] if shares else 0.0,
    )


def _corrected(cell: Cell, rows: list[Row]) -> list[Row]:
    """With p-values corrected together; none while a row waits for seeds."""
    if any(row.n < cell.seeds[row.variant] for row in rows):
        return rows
    tested = [i for i, r in enumerate(rows) if r.difference and r.difference.p is not None]
    values = statistics.holm([rows[i].difference.p for i in tested])  # type: ignore[misc, union-attr]
    for i, p in zip(tested, values, strict=True):
        rows[i] = replace(rows[i], p=p)
    return rows


def read(cell: Cell, folder: Path = RESULTS) -> Cellwise | None:
    """A cell's tables; None where uniform has not been run on the final seeds."""
    runs = list(load(path_of(cell, folder)).values())
    tried = {name: mean_by_rate(runs, name) for name in cell.seeds}
    rates = {name: best_rate(runs, name, cell.mode) for name, means in tried.items() if means}
    edges = [name for name in rates if rates[name] in (min(tried[name]), max(tried[name]))]
    best = rates.get("uniform", math.nan)
    base = final(runs, "uniform", best)
    if not base:
        return None

    def rows(of: Iterable[tuple[str, float]], against: Sequence[Run] = base) -> list[Row]:
        found = [final(runs, name, rate) for name, rate in of]
        return [_row(cell, some, against) for some in found if some]

    beside = [("uniform", best / FACTOR), ("uniform", best * FACTOR)]
    matched = {}
    for _, rate in [("uniform", best), *beside]:
        against = final(runs, "uniform", rate)
        same = rows([(name, rate) for name in cell.seeds], against) if against else []
        if len(same) == len(cell.seeds):
            matched[rate] = _corrected(cell, same)
    untuned = []
    if cell.untuned is not None and (low := final(runs, "uniform", cell.untuned)):
        untuned = rows([(name, cell.untuned) for name in UNTUNED], low)
    extra = []
    if farms := final(runs, "farms", best):
        extra = rows([(name, best) for name in cell.extra], farms)
        if extra:
            seeds = set().union(*(row.values for row in extra))
            few = [run for run in runs if run.seed in seeds]
            found = [final(few, name, best) for name in ("farms", *_BESIDE)]
            extra = [*(_row(cell, some, farms) for some in found if some), *extra]
    return Cellwise(
        cell=cell,
        runs=runs,
        rates=rates,
        edges=edges,
        own=rows(beside) + _corrected(cell, rows(rates.items())),
        matched=matched,
        untuned=untuned,
        extra=extra,
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
    planned = cell.seeds.get(row.variant, row.n)
    return _cells(
        row.variant,
        f"{row.rate:g}",
        str(row.n) if row.n >= planned else f"{row.n} of {planned}",
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


def _heads(*texts: str) -> list[str]:
    return [_cells(*texts), "|" + " --- |" * len(texts)]


def _table(cell: Cell, rows: Sequence[Row]) -> list[str]:
    return [*_heads(*_HEADER), *(_line(cell, row) for row in rows)]


def _short(cell: Cell, rows: Sequence[Row], base: str) -> list[str]:
    """A table without correction: the p of each row is its own."""
    lines = _heads("variant", "seeds", "test", f"difference from {base}", "95% interval", "p",
                   "wins")  # fmt: skip
    for row in rows:
        d = row.difference
        p = "" if d is None or d.p is None else f"{d.p:.2g}"
        wins = "" if d is None else f"{d.wins}/{d.n}"
        lines.append(
            _cells(
                row.variant, str(row.n), _value(cell, row), _difference(d), _interval(d), p, wins
            )
        )
    return lines


def _against(d: statistics.Paired | None) -> str:
    if d is None:
        return ""
    interval = f" ({_interval(d)})" if _interval(d) else ""
    return f"{_difference(d)}{interval}, {d.wins}/{d.n}"


def _grid(found: Cellwise) -> str:
    means = mean_by_rate(found.runs, "uniform")
    scale, places = (100, 1) if found.cell.mode == "max" else (1, 4)
    return ", ".join(f"{rate:g}: {scale * value:.{places}f}" for rate, value in means.items())


def _made(runs: Sequence[Run]) -> str:
    makers = Counter(f"commit {run.commit}{'+' * run.changed} on {run.device}" for run in runs)
    return "; ".join(f"{n} runs at {name}" for name, n in makers.most_common())


def _pairs(found: Cellwise) -> list[str]:
    """Methods against controls, and against each other, at their own rates and at a common one."""
    common, votes = Counter(found.rates.values()).most_common(1)[0]
    rates: list[tuple[str, float | None]] = [("each at its own rate", None)]
    if common in found.matched and votes < len(found.rates):
        rates.append((f"both at {common:g}, the rate of {votes} of {len(found.rates)}", common))
    lines: list[str] = []
    methods = [n for n in (*METHODS, *WITHOUT_SPECTRAL, "farms_gentle") if n in found.rates]
    rivals = [n for n in RIVALS if n in found.rates]
    unit = "points" if found.cell.mode == "max" else "% of the other's mean error"
    for text, rate in rates:
        if methods and rivals:
            lines += ["", f"Methods against controls, {text} (difference in {unit}, wins):", ""]
            lines += _heads("", *rivals)
            for method in methods:
                against = [_against(found.pair(method, rival, rate)) for rival in rivals]
                lines.append(_cells(method, *against))
        pairs = [(a, b) for a, b in PAIRS if a in found.rates and b in found.rates]
        if pairs:
            lines += ["", f"Pairs of methods, {text}:", "", *_heads("pair", "difference, wins")]
            lines += [_cells(f"{a} - {b}", _against(found.pair(a, b, rate))) for a, b in pairs]
    return lines


def section(found: Cellwise) -> list[str]:
    """The Markdown of one cell."""
    cell = found.cell
    unit = "points of accuracy" if cell.mode == "max" else "% of uniform's mean error"
    lines = [f"## {cell.title}", ""]
    if not found.complete:
        lines += ["**Not finished**: fewer seeds than planned; no p-values until then.", ""]
    lines += [
        f"`python -m experiments.study {cell.name}`; {_made(found.runs)}. Differences in {unit}. "
        f"Uniform on validation data by rate: {_grid(found)}.",
        "",
        "Each at its own best rate:",
        "",
        *_table(cell, found.own),
    ]
    if found.edges:
        lines += ["", f"Best at an edge of the rates that were tried: {', '.join(found.edges)}."]
    for rate, rows in found.matched.items():
        which = " (uniform's best)" if rate == found.rates["uniform"] else ""
        lines += ["", f"All at one rate, {rate:g}{which}:", "", *_table(cell, rows)]
    lines += _pairs(found)
    if found.untuned:
        lines += ["", f"At a rate far below the best, {cell.untuned:g}:", ""]
        lines += _short(cell, found.untuned, "uniform")
    if found.extra:
        lines += ["", "Sensitivity: one change at a time, at uniform's best rate:", ""]
        lines += _short(cell, found.extra, "farms")
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
        "`test`: mean ± standard deviation over all seeds of the row, last epoch. `difference`: "
        "from uniform (at its own best rate, or at the one rate of the table) on the seeds that "
        "both have, in percent of uniform's mean there; negative is better for an error, positive "
        "for an accuracy. Rows of different numbers of seeds are not to be compared with each "
        "other; the tables of pairs do that on shared seeds. The interval is a 95% t interval of "
        "that row alone; p is corrected for all rows of its table (Holm), where its heading says "
        "so. `wins`: pairs in which the method is better. `2nd test`: the same difference on the "
        "second test set (for Darcy the same fields at 32x32: another resolution, not another "
        "sample); `held out`: on validation data. `measuring`: share of the time that measuring "
        "alphas took, on networks so small that the share says little about large ones. All "
        "intervals are over seeds; the test data are the same for all.",
    ]
    pictures = folder.parent / "images"
    for name, text in _PICTURES.items():
        if (pictures / name).is_file():
            lines += ["", f"![{text}](images/{name})"]
    for cell in CELLS.values():
        found = read(cell, folder)
        lines += ["", *(not_run(cell) if found is None else section(found))]
    return "\n".join(lines) + "\n"
