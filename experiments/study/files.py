"""Results of the study as small files: a CSV file a cell, a row a run; and the choice of rates."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from experiments import rows
from experiments.study.cells import TUNING_SEED, Cell

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
# The grid of rates goes on by this factor.
FACTOR = 2.0


@dataclass(frozen=True)
class Run:
    """One training run: what it was, and what came of it."""

    variant: str
    rate: float
    seed: int
    value: float  # test metric of the last epoch
    second: float  # of the second test set, NaN where there is one alone
    held_out: float  # validation metric of the last epoch
    curve: str  # epoch:validation metric
    seconds: float
    measuring: float  # share of the time
    commit: str
    changed: bool
    device: str
    overrides: str

    def __post_init__(self) -> None:
        # In memory as in the file, so that both lead to the same choice of rates.
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float):
                object.__setattr__(self, item.name, float(f"{value:.6g}"))

    @property
    def key(self) -> tuple[str, float, int]:
        """What identifies a run within its cell."""
        return (self.variant, self.rate, self.seed)


def path_of(cell: Cell, folder: Path = RESULTS) -> Path:
    """The file of a cell's results."""
    return folder / f"{cell.name}.csv"


def load(path: Path) -> dict[tuple[str, float, int], Run]:
    """Runs of a file by their key; none where there is no file."""
    return {run.key: run for run in rows.read(path, Run)}


def save(path: Path, runs: Iterable[Run]) -> None:
    """Write runs in the order of variant, rate and seed: the file is whole or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    names = [field.name for field in fields(Run)]
    with partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for run in sorted(runs, key=lambda run: run.key):
            writer.writerow([_text(getattr(run, name)) for name in names])
    partial.replace(path)


def _text(value: Any) -> Any:
    return repr(value) if isinstance(value, float) else value


# --- choosing rates ------------------------------------------------------------------------------


def mean_by_rate(runs: Iterable[Run], variant: str) -> dict[float, float]:
    """Mean validation metric over the tuning seeds, by rate; infinite where a run diverged."""
    found: dict[float, list[float]] = {}
    for run in runs:
        if run.variant == variant and run.seed >= TUNING_SEED:
            value = run.held_out if math.isfinite(run.held_out) else math.inf
            found.setdefault(run.rate, []).append(value)
    # Rounded: equal accuracies of several seeds must tie, whatever the order of their sum.
    return {rate: round(sum(v) / len(v), 9) for rate, v in sorted(found.items())}


def best_rate(runs: Iterable[Run], variant: str, mode: str) -> float:
    """The rate with the best mean on validation data; of equal ones the smallest."""
    means = mean_by_rate(runs, variant)
    sign = -1.0 if mode == "max" else 1.0
    return min(means, key=lambda rate: (_score(means[rate], sign), rate))


def _score(value: float, sign: float) -> float:
    return sign * value if math.isfinite(value) else math.inf


def widened(rates: Sequence[float], best: float) -> list[float]:
    """The rate beyond the edge that `best` lies on; none where it lies inside."""
    low, high = min(rates), max(rates)
    return [low / FACTOR] if best == low else [high * FACTOR] if best == high else []
