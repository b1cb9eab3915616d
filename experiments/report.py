"""Tables and a plot from the runs of a sweep.

    python -m experiments.report outputs/cifar100_resnet18 [MORE FOLDERS] --out report
    python -m experiments.report                # docs/results.md, from the files of the study

Mean and standard error over seeds of each method, its paired difference from uniform with a t
interval, wins, wall time and the share of it spent measuring; as Markdown, CSV and a PNG.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import extras  # noqa: F401  (first: says what to install)

# isort: split
from rich.console import Console
from rich.table import Table

from experiments import statistics
from experiments.study_cells import CELLS
from experiments.study_files import RESULTS
from experiments.sweep import failures, unfinished

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cell:
    """Runs that are compared: one experiment at one setting, by method and seed."""

    name: str
    settings: tuple[str, ...]
    metric: str
    mode: str
    runs: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Experiment and what sets the cell apart."""
        return " ".join([self.name, *self.settings])

    def values(self, method: str, best: bool = False) -> dict[int, float]:
        """Metric of each seed: that of the last epoch, or of the best one by validation."""
        found = {}
        for seed, run in self.runs.get(method, {}).items():
            value = _best(run) if best else run.get("value")
            if value is not None:
                found[seed] = float(value)
        return found


@dataclass(frozen=True)
class Row:
    """One method in one cell."""

    cell: Cell
    method: str
    value: statistics.Mean
    best: statistics.Mean | None
    difference: statistics.Paired | None
    p_corrected: float | None
    seconds: float
    share: float | None


@dataclass(frozen=True)
class Report:
    """Rows and what a reader must know about them."""

    rows: list[Row]
    notes: list[str]
    baseline: str
    confidence: float


def load(folders: Iterable[Path]) -> tuple[list[Cell], list[str]]:
    """Cells of all finished runs under the folders, and notes on what was left out.

    Raises: FileNotFoundError for a folder that is not there or holds no finished run.
    """
    cells: dict[tuple[Any, ...], Cell] = {}
    notes: list[str] = []
    paths: set[Path] = set()
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; give the outputs of a sweep")
        paths |= {p.resolve() for p in folder.rglob("result.json") if not _replaced(p)}
        notes += [f"failed: {name} ({error})" for name, error in failures(folder).items()]
        notes += [f"not finished (killed, or running): {name}" for name in unfinished(folder)]
    for path in sorted(paths):
        try:
            run = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is no readable JSON ({error}); run that job again") from error
        if run.get("fast_dev_run") or run.get("value") is None:
            notes.append(f"left out: {path.parent.name} has no test metric or was a trial run")
            continue
        key = (run["name"], tuple(run["settings"]), run["metric"]["name"], run["metric"]["mode"])
        seeds = cells.setdefault(key, Cell(*key)).runs.setdefault(run["method"], {})
        if run["seed"] in seeds:
            raise ValueError(
                f"{path}: a second run of {run['method']} with seed {run['seed']} in the same "
                "cell; give folders that hold each run once"
            )
        seeds[run["seed"]] = run
    if not cells:
        names = ", ".join(map(str, folders))
        raise FileNotFoundError(f"no finished run (result.json) under {names}")
    return list(cells.values()), notes


def _replaced(path: Path) -> bool:
    return any(part.startswith("replaced-") for part in path.parts)


def _best(run: dict[str, Any]) -> float | None:
    entries = [entry for entry in (run.get("best") or {}).values() if entry]
    return entries[0]["value"] if entries else None


def summarize(
    cells: Sequence[Cell],
    notes: Sequence[str] = (),
    baseline: str = "none",
    confidence: float = 0.95,
) -> Report:
    """Rows of all cells, the baseline first; differences are paired by seed."""
    rows: list[Row] = []
    said = list(notes)
    for cell in cells:
        reference = cell.values(baseline)
        if not reference:
            said.append(f"{cell.title}: no run of '{baseline}', so no differences")
        methods = sorted(cell.runs, key=lambda name: (name != baseline, name))
        for method in methods:
            rows.append(_row(cell, method, reference, baseline, confidence))
        said += _cautions(cell, rows[-len(methods) :], baseline)
    tests = [i for i, row in enumerate(rows) if row.difference and row.difference.p is not None]
    corrected = statistics.holm([rows[i].difference.p for i in tests])  # type: ignore[union-attr, misc]
    for index, p in zip(tests, corrected, strict=True):
        rows[index] = Row(**{**vars(rows[index]), "p_corrected": p})
    return Report(rows, said, baseline, confidence)


def _row(
    cell: Cell, method: str, reference: dict[int, float], baseline: str, confidence: float
) -> Row:
    values, best = cell.values(method), cell.values(method, best=True)
    runs = cell.runs[method].values()
    shares = [run["measuring_share"] for run in runs if run.get("measuring_share") is not None]
    difference = None
    if method != baseline and reference:
        difference = statistics.paired(values, reference, cell.mode, confidence)
    return Row(
        cell=cell,
        method=method,
        value=statistics.mean(list(values.values())),
        best=statistics.mean(list(best.values())) if best else None,
        difference=difference,
        p_corrected=None,
        seconds=sum(run["seconds"] for run in runs) / len(runs),
        share=sum(shares) / len(shares) if shares else None,
    )


def _cautions(cell: Cell, rows: Sequence[Row], baseline: str) -> list[str]:
    said = []
    for row in rows:
        where = f"{cell.title}, {row.method}"
        if row.value.n == 1:
            said.append(f"{where}: one seed, so no standard error and no interval")
        if row.difference is not None and row.difference.unpaired:
            seeds = ", ".join(map(str, row.difference.unpaired))
            said.append(f"{where}: seeds {seeds} have no partner and are not in the difference")
        if row.difference is not None and 1 < row.difference.n < 5:
            said.append(
                f"{where}: {row.difference.n} pairs; an interval of so few leans on the normal law"
            )
        if row.difference is None and row.method != baseline and cell.values(baseline):
            said.append(f"{where}: no seed in common with '{baseline}', so no difference")
    runs = [run for seeds in cell.runs.values() for run in seeds.values()]
    for key, what in (("commit", "commits"), ("device", "devices")):
        different = sorted({str(run.get(key)) for run in runs})
        if len(different) > 1:
            said.append(f"{cell.title}: runs of different {what}: {', '.join(different)}")
    if any(run.get("changed") for run in runs):
        said.append(f"{cell.title}: runs from a working tree with changes after the commit")
    if any(run.get("best_on") == "test" for run in runs):
        said.append(f"{cell.title}: 'best' was picked on the test set; the last epoch counts")
    return said


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
    from experiments.pictures import differences

    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "report.md", out / "report.csv", out / "report.png"]
    paths[0].write_text(markdown(report))
    with paths[1].open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        writer.writerows(records(report))
    differences(report, paths[2])
    return paths


def write_study(folder: Path = RESULTS) -> list[Path]:
    """Write results.md beside the folder of the study's results, and its pictures; their paths."""
    from experiments import study_numbers, study_pictures, study_table

    images = folder.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    paths = [folder.parent / "results.md"]
    found = [cell for cell in (study_numbers.read(c, folder) for c in CELLS.values()) if cell]
    if found:
        paths += [images / "study.png", images / "study_rates.png"]
        study_pictures.overview(found, paths[1])
        study_pictures.by_rate(found[0], paths[2])
    paths[0].write_text(study_table.markdown(folder))  # names the pictures that are there
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
    from experiments.prune import pictures
    from experiments.prune import report as pruning

    console = Console()
    if not chosen.outputs:
        _say(console, [*write_study(), *pruning.write()])
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
