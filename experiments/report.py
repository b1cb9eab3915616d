"""Tables and a plot from the runs of a sweep.

    python -m experiments.report outputs/cifar100_resnet18 [MORE FOLDERS] --out report
    python -m experiments.report                # docs/results.md, from the files of the study

Mean and standard error over seeds of each method, its paired difference from uniform with a t
interval, wins, wall time and the share of it spent measuring; as Markdown, CSV and a PNG.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments import extras  # noqa: F401  (first: says what to install)

# isort: split
from rich.console import Console
from rich.table import Table

from experiments.pictures import differences
from experiments.results import Report, load, summarize
from experiments.study.write import write_study

HEADER = (
    "experiment", "method", "metric", "seeds", "mean", "se", "best epoch", "difference", "low",
    "high", "p (Holm)", "wins", "seconds", "measuring",
)  # fmt: skip


def table(report: Report) -> list[list[str]]:
    """Cells of the table as text, a line a row of the report.

    As many decimals as the spread of the seeds warrants: two digits of it.
    """
    lines = []
    for row in report.rows:
        d = row.difference
        places = _places(row.value.se, row.value.mean)
        wide = places if d is None else _places(d.se, d.mean)
        lines.append(
            [
                row.cell.title,
                row.method,
                row.cell.metric,
                str(row.value.n),
                _number(row.value.mean, places),
                _number(row.value.se, places),
                _number(row.best.mean if row.best else None, places),
                _number(d.mean if d else None, wide, "+"),
                _number(d.low if d else None, wide, "+"),
                _number(d.high if d else None, wide, "+"),
                "" if row.p_corrected is None else f"{row.p_corrected:.2g}",
                f"{d.wins}/{d.n}" if d else "",
                f"{row.seconds:.1f}",
                "" if row.share is None else f"{100 * row.share:.2f}%",
            ]
        )
    return lines


def _places(spread: float | None, value: float) -> int:
    """Decimals that show two digits of the spread, or four of the value where there is none."""
    scale, digits = (spread, 2) if spread else (abs(value), 4)
    if not scale or not math.isfinite(scale):
        return 4
    return max(0, min(9, digits - 1 - math.floor(math.log10(scale))))


def _number(value: float | None, places: int, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.{places}f}"


def markdown(report: Report) -> str:
    """The table and the notes in Markdown."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)]
    lines += ["| " + " | ".join(row) + " |" for row in table(report)]
    lines += [
        "",
        f"`mean` and `se` are over seeds, of the last epoch on test data. `difference` is the mean "
        f"over the seeds shared with `{report.baseline}`, `low` to `high` its "
        f"{100 * report.confidence:g}% t interval, not corrected for the number of rows; the "
        f"two-sided p is (Holm). `seconds` is the mean time of training, `measuring` the share of "
        "it spent on spectra.",
    ]
    if report.notes:
        lines += ["", "Notes:", *(f"- {note}" for note in report.notes)]
    return "\n".join(lines) + "\n"


def rich_tables(report: Report) -> list[Table]:
    """A table a cell for a terminal: the columns that tell most."""
    tables: dict[int, Table] = {}
    interval = f"difference ± {100 * report.confidence:g}%"
    for row, line in zip(report.rows, table(report), strict=True):
        text = dict(zip(HEADER, line, strict=True))
        shown = tables.get(id(row.cell))
        if shown is None:
            title = f"{row.cell.title}: {row.cell.metric}"
            shown = tables[id(row.cell)] = Table(title=title, title_justify="left")
            for name in ("method", "n", "mean ± se", interval, "wins", "time", "measuring"):
                shown.add_column(name, justify="left" if name == "method" else "right")
        d = row.difference
        reach = ""
        if d is not None and d.high is not None:
            reach = f" ± {_number(d.high - d.mean, _places(d.se, d.mean))}"
        shown.add_row(
            text["method"],
            text["seeds"],
            text["mean"] + (f" ± {text['se']}" if text["se"] else ""),
            text["difference"] + reach,
            text["wins"],
            f"{text['seconds']} s",
            text["measuring"],
        )
    return list(tables.values())


def records(report: Report) -> list[list[Any]]:
    """Cells of the table as numbers, unrounded, for other programs; None where there is none."""
    lines = []
    for row in report.rows:
        d = row.difference
        gaps = (d.mean, d.low, d.high) if d else (None, None, None)
        lines.append(
            [
                row.cell.title,
                row.method,
                row.cell.metric,
                row.value.n,
                row.value.mean,
                row.value.se,
                row.best.mean if row.best else None,
                *gaps,
                row.p_corrected,
                f"{d.wins}/{d.n}" if d else None,
                row.seconds,
                row.share,
            ]
        )
    return lines


def write(report: Report, out: Path) -> list[Path]:
    """Write report.md, report.csv and report.png into a folder; their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "report.md", out / "report.csv", out / "report.png"]
    paths[0].write_text(markdown(report))
    with paths[1].open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        writer.writerows(records(report))
    differences(report, paths[2])
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 where there is nothing to report."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report", description="Tables and a plot from a sweep."
    )
    parser.add_argument(
        "outputs", nargs="*", type=Path, help="folders of runs, searched in depth; none: the study"
    )
    parser.add_argument("--out", type=Path, help="where to write (default: the first folder)")
    parser.add_argument("--baseline", default="none", help="method to compare with (default: none)")
    parser.add_argument("--confidence", type=float, default=0.95, help="of the interval")
    chosen = parser.parse_args(arguments)
    if not 0 < chosen.confidence < 1:
        parser.error("--confidence must lie between 0 and 1")
    from experiments.evidence import report as evidence
    from experiments.prune import pictures
    from experiments.prune import report as pruning

    console = Console()
    if not chosen.outputs:
        _say(console, [*write_study(), *evidence.write(), *pruning.write()])
        return 0
    try:
        cells, notes = load(chosen.outputs)
    except (FileNotFoundError, ValueError) as error:
        Console(stderr=True).print(str(error), style="red", markup=False, soft_wrap=True)
        return 1
    report = summarize(cells, notes, chosen.baseline, chosen.confidence)
    for shown in rich_tables(report):
        console.print(shown)
    console.print(
        f"difference: from '{chosen.baseline}', paired by seed; interval: "
        f"{100 * chosen.confidence:g}%; time: of training (share of it spent measuring)"
    )
    for note in report.notes:
        console.print(f"- {note}", markup=False, highlight=False)
    out = chosen.out or chosen.outputs[0]
    runs = [run for cell in cells for seeds in cell.runs.values() for run in seeds.values()]
    _say(console, [*write(report, out), *pictures.from_runs(runs, out / "perplexity.png")])
    return 0


def _say(console: Console, written: Iterable[Path]) -> None:
    for path in written:
        console.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    raise SystemExit(main())
