"""The study's results in Markdown: docs/results.md from the files beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments import statistics
from experiments.study.cells import CELLS, METHODS, TUNING_SEED, VARIANTS, WITHOUT_SPECTRAL, Cell
from experiments.study.files import RESULTS, Run, mean_by_rate
from experiments.study.numbers import Cellwise, Row, read

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
_HEADER = (
    "method", "rate", "seeds", "test", "difference", "95% interval", "p (Holm)", "wins",
    "2nd test", "held out", "measuring",
)  # fmt: skip

_PICTURES = {
    "study.png": "differences from tuned uniform, each method at its own best rate",
    "study_rates.png": "validation metric by learning rate",
}


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
        "Each at its own best rate; the last rows are uniform at the rates beside its best:",
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
        seeds = max(row.n for row in found.extra)
        text = (
            "Sensitivity: one change at a time, at uniform's best rate, on the same seeds "
            f"(`python -m experiments.study {cell.name} --extra {seeds}`):"
        )
        lines += ["", text, ""]
        lines += _short(cell, found.extra, "farms")
    if found.late:
        text = (
            f"Started after a third of the training, at {cell.late_rate:g}; up to there these runs "
            "are those of uniform, so that smaller differences show (p not corrected; "
            f"`python -m experiments.study {cell.name} --late`):"
        )
        lines += ["", text, "", *_short(cell, found.late, "uniform")]
    return lines


def overview(cells: Sequence[Cellwise]) -> list[str]:
    """All complete cells beside each other, corrected together; nothing for fewer than two."""
    cells = [found for found in cells if found.complete and found.level]
    if len(cells) < 2:
        return []
    tables = {
        "Each at its own best rate, against uniform at its own:": [
            {r.variant: r for r in found.own if r.rate == found.rates[r.variant]} for found in cells
        ],
        "All at one rate a cell, that at which uniform does best on test data (a tie: held out):": [
            {row.variant: row for row in found.level} for found in cells
        ],
    }
    lines = [
        "## All complete cells",
        "",
        "Difference from uniform with its 95% interval, in percent of uniform's mean error (less "
        "is better), on digits in points of accuracy (more is better). Bold: p under 0.05 after "
        "correction for all entries of the table (Holm).",
    ]
    for title, columns in tables.items():
        names = [n for n in VARIANTS if n != "uniform" and any(n in rows for rows in columns)]
        entries = [(n, i) for n in names for i, rows in enumerate(columns) if n in rows]
        found = {key: d for key in entries if (d := columns[key[1]][key[0]].difference)}
        tested = {key: d.p for key, d in found.items() if d.p is not None}
        p = dict(zip(tested, statistics.holm(list(tested.values())), strict=True))
        uniform = [rows["uniform"] for rows in columns]
        lines += ["", title, "", *_heads("", *(cell.cell.name for cell in cells))]
        lines.append(_cells("uniform: rate, seeds", *(f"{r.rate:g}, {r.n}" for r in uniform)))
        for name in names:
            texts = []
            for i in range(len(cells)):
                d = found.get((name, i))
                text = "" if d is None else _difference(d)
                text += f" ({_interval(d)})" if _interval(d) else ""
                texts.append(f"**{text}**" if p.get((name, i), 1.0) < 0.05 else text)
            lines.append(_cells(name, *texts))
        lines.append(_cells("detectable", *(_detectable(rows) for rows in columns)))
    return [*lines, *_pooled(cells)]


def _detectable(rows: Mapping[str, Row]) -> str:
    """What farms against uniform could show with 80% power."""
    d = rows["farms"].difference if "farms" in rows else None
    if d is None or d.se is None:
        return ""
    return f"{statistics.detectable(d.se, d.n):.1f}"


def _pooled(cells: Sequence[Cellwise]) -> list[str]:
    """One mean over the Darcy cells, all at one rate a cell; nothing for fewer than two."""
    cells = [found for found in cells if found.cell.name.startswith("darcy")]
    if len(cells) < 2:
        return []
    lines = [
        "",
        "One mean over the Darcy cells, all at one rate a cell (weights of inverse variance; p: do "
        "the cells differ by more than their errors). It takes the cells as independent and one "
        "effect for all, and neither is so: they share their test fields and part of their "
        "training fields, and two architectures are mixed.",
        "",
        *_heads("", "cells", "pooled difference", "95% interval", "p of differing"),
    ]
    columns = [{row.variant: row for row in found.level} for found in cells]
    for name in VARIANTS:
        found = [
            d for rows in columns
            if name in rows and (d := rows[name].difference) is not None and d.se
        ]  # fmt: skip
        if len(found) > 1:
            one = statistics.pooled([d.mean for d in found], [d.se for d in found if d.se])
            lines.append(_cells(name, str(len(found)), f"{one.mean:+.2f}",
                                f"{one.low:+.2f} to {one.high:+.2f}",
                                f"{one.p_heterogeneity:.2g}"))  # fmt: skip
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
        "written before the runs, is [study.md](study.md).",
        "",
        "To make any run again: `pip install '.[experiments]'`, then `python -m experiments.train` "
        "with the overrides in its line of the file (quoted, where the shell reads brackets), at "
        "the commit of the line if in doubt. On a processor of the same kind and the same torch "
        "the result is the same to the last digit, elsewhere close to it ([study.md](study.md), "
        "end). Darcy flow needs the small set of neuraloperator; a run without it says how to "
        "fetch it.",
        "",
        "Columns of the files: `value`, `second` and `held_out` are the metric after the last "
        "epoch on test data, on the second test set, and on validation data; `curve` is the "
        f"latter by epoch; seeds from {TUNING_SEED} on are those that tune, and are in no table.",
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
        "that row alone; p is that of a paired t-test, corrected for all rows of its table (Holm) "
        "where its heading says so. `wins`: pairs in which the method is better. `2nd test`: the "
        "same difference on the "
        "second test set (for Darcy the same fields at 32x32: another resolution, not another "
        "sample); `held out`: on validation data. `measuring`: share of the time that measuring "
        "alphas took, on networks so small that the share says little about large ones. All "
        "intervals are over seeds; the test data are the same for all.",
    ]
    pictures = folder.parent / "images"
    for name, text in _PICTURES.items():
        if (pictures / name).is_file():
            lines += ["", f"![{text}](images/{name})"]
    results = [(cell, read(cell, folder)) for cell in CELLS.values()]
    lines += ["", *overview([found for _, found in results if found])]
    for cell, found in results:
        lines += ["", *(not_run(cell) if found is None else section(found))]
    return "\n".join(lines) + "\n"
