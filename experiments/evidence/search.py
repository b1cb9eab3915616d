"""Which runs are wanted next: a search of rate and decay from the middle outwards, then the finals.

All is decided from the rows that are there, so that a table that was interrupted goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from experiments.evidence.cells import DECAY, RATE, Cell

_MOVES = 6  # of a search, at most


@dataclass(frozen=True)
class Key:
    """What sets a row apart within its cell."""

    variant: str
    rate: float
    decay: float
    seed: int

    @property
    def point(self) -> tuple[float, float]:
        return self.rate, self.decay


@dataclass(frozen=True)
class Row(Key):
    """A run, and what came of it."""

    value: float  # test metric after the last step
    held_out: float  # validation metric after the last step
    seconds: float
    measuring: float  # share of the time
    commit: str
    device: str
    overrides: str

    @property
    def key(self) -> Key:
        return Key(self.variant, self.rate, self.decay, self.seed)


Point = tuple[float, float]


def missing(cell: Cell, rows: Sequence[Row]) -> list[Key]:
    """The next runs: all that the searches want now, or the finals where they are over."""
    done = {row.key for row in rows}
    wanted: list[Key] = []
    best: dict[str, Point] = {}
    for name in cell.variants:
        found, keys = tune(cell, name, rows)
        wanted += keys
        if found is not None:
            best[name] = found
    if len(best) == len(cell.variants):
        wanted = [key for name in best for key in finals(cell, name, best)]
        wanted.sort(key=lambda key: key.seed)  # one that is interrupted has fewer seeds of all
    return [key for key in dict.fromkeys(wanted) if key not in done]


def finals(cell: Cell, name: str, best: dict[str, Point]) -> list[Key]:
    """At a variant's own best, and at that of the uniform variant that it is compared with."""
    points = dict.fromkeys((best[name], best[cell.root(name)]))
    return [Key(name, *point, seed) for point in points for seed in cell.finals]


def tune(cell: Cell, name: str, rows: Sequence[Row]) -> tuple[Point | None, list[Key]]:
    """The best point of a variant, or None and the runs that are wanted to find it.

    From the starting point to the best of its neighbours, until none is better.
    """
    steps, keys = _tuned(cell, name, rows)
    return (None if steps is None else _point(cell, name, steps)), keys


_Steps = tuple[int, int]  # of rate and decay, from the start of the uniform variant


def _tuned(cell: Cell, name: str, rows: Sequence[Row]) -> tuple[_Steps | None, list[Key]]:
    variant = cell.variants[name]
    centre: _Steps | None = (0, 0)
    if variant.of is not None:
        centre, _ = _tuned(cell, variant.of, rows)
    if centre is None:
        return None, []
    scores = _scores(cell, name, rows)
    for _ in range(_MOVES):
        around = [centre, *_beside(centre, variant.axes)]
        points = {steps: _point(cell, name, steps) for steps in around}
        keys = [Key(name, *p, s) for p in points.values() if p not in scores for s in cell.tuning]
        if keys:
            return None, keys
        best = min(around, key=lambda steps: (scores[points[steps]], around.index(steps)))
        if best == centre:
            break
        centre = best
    return centre, []


def _beside(steps: _Steps, axes: Iterable[str]) -> list[_Steps]:
    rate, decay = steps
    out: list[_Steps] = []
    for axis in axes:
        for step in (-1, 1):
            out.append((rate + step, decay) if axis == RATE else (rate, decay + step))
    return out


def _point(cell: Cell, name: str, steps: _Steps) -> Point:
    start = cell.variants[cell.root(name)].start
    assert start is not None
    factors = cell.factors[RATE], cell.factors[DECAY]
    rate, decay = (float(f"{s * f**n:.3g}") for s, f, n in zip(start, factors, steps, strict=True))
    return rate, decay


def _scores(cell: Cell, name: str, rows: Iterable[Row]) -> dict[Point, float]:
    """Mean validation metric over the tuning seeds, less is better, of points with all of them."""
    found: dict[Point, dict[int, float]] = {}
    for row in rows:
        if row.variant == name and row.seed in cell.tuning:
            found.setdefault(row.point, {})[row.seed] = row.held_out
    sign = -1.0 if cell.mode == "max" else 1.0
    return {
        point: sign * math.fsum(values.values()) / len(values)
        if all(map(math.isfinite, values.values()))
        else math.inf
        for point, values in found.items()
        if len(values) == len(cell.tuning)
    }
