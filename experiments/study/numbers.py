"""The study's results in numbers: what each variant of a cell did against another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments import statistics
from experiments.study.cells import LATER, TUNING_SEED, UNTUNED, Cell
from experiments.study.files import FACTOR, RESULTS, Run, best_rate, load, mean_by_rate, path_of

# Beside each change of the sensitivity table stand these, at the same rate and seeds.
_BESIDE = ("uniform", "farms_sigmoid", "shuffled", "pertype", "constant")


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
    late: list[Row]  # against uniform at their rate

    @property
    def complete(self) -> bool:
        """Whether every variant has all seeds that the design gives it, at its own rate."""
        rows = {row.variant: row for row in self.own if row.rate == self.rates[row.variant]}
        return all(name in rows and rows[name].n == n for name, n in self.cell.seeds.items())

    @property
    def level(self) -> list[Row]:
        """All at one rate: that of the rates tried by all at which uniform does best on test.

        Chosen with hindsight, in favour of uniform; free of which of two nearly equal rates a few
        tuning seeds preferred. Of equal ones the rate that is best on validation data. Empty while
        there is none.
        """
        sign = -1.0 if self.cell.mode == "max" else 1.0

        def uniform(rows: list[Row]) -> float:
            values = next(row for row in rows if row.variant == "uniform").values.values()
            # Rounded: equal accuracies of several seeds must tie.
            return sign * round(statistics.mean(list(values)).mean, 6) if values else math.inf

        return min(
            self.matched.values(), key=uniform, default=[]
        )  # the best on validation is first

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
    if any(row.n < cell.seeds.get(row.variant, cell.seeds["uniform"]) for row in rows):
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
        same = rows([(name, rate) for name in (*cell.seeds, *LATER)], against) if against else []
        known = [row for row in same if row.variant in cell.seeds]
        whole = all(row.n >= cell.seeds[row.variant] for row in known)
        if len(known) == len(cell.seeds) and (whole or rate == best):
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
    late = []
    if against := final(runs, "uniform", cell.late_rate):
        late = rows([(name, cell.late_rate) for name in cell.late], against)
        if late:
            late = [
                *rows([(name, cell.late_rate) for name in ("uniform", "frozen")], against),
                *late,
            ]
    return Cellwise(
        cell=cell,
        runs=runs,
        rates=rates,
        edges=edges,
        own=_corrected(cell, rows(rates.items())) + rows(beside),
        matched=matched,
        untuned=untuned,
        extra=extra,
        late=late,
    )
