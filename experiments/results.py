"""Finished runs of a sweep, compared: cells of runs, and a row a method in each.

Pictures and the report's tables show these; none of it is text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import statistics
from experiments.sweep import failures, unfinished


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
