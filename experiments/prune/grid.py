"""The grid of the pruning table: its rows, the file they are kept in, and which spread is chosen.

The design, written before any row was run, is docs/results/pruning-design.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from experiments import rows

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "pruning.csv"
TOTALS = (0.5, 0.6, 0.7, 0.8)
METHODS = ("magnitude", "wanda", "sparsegpt")
ALLOCATIONS = ("uniform", "alpha", "farms", "depth", "depth_alpha", "shuffled", "reversed")
SPREADS = (0.3, 0.2, 0.5, 0.1)  # in the order in which they are run
SPREAD_OF = {"sparsegpt": "wanda"}  # whose search chooses the spread of another pruner
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Key:
    """What sets a row apart."""

    model: str
    method: str
    allocation: str
    total: float
    spread: float | None  # of uniform: None
    seed: int
    split: str

    def overrides(self, path: str | Path) -> list[str]:
        """The command line of this row, after ``python -m experiments.prune``."""
        given = [f"model.path={path}", f"method={self.method}", f"allocation={self.allocation}"]
        given += [f"total={self.total}", f"seed={self.seed}", f"split={self.split}"]
        return given if self.spread is None else [*given, f"spread={self.spread}"]


@dataclass(frozen=True)
class Row(Key):
    """A row that was run."""

    perplexity: float
    tokens: int
    sparsity: float
    sparsity_before: float
    seconds: float
    device: str
    commit: str
    settings: str  # overrides beyond the design's, where there are any

    @property
    def key(self) -> Key:
        return Key(**{field.name: getattr(self, field.name) for field in fields(Key)})


def row_of(key: Key, result: dict[str, Any], settings: Sequence[str]) -> Row:
    """A row from what a run gave."""
    told = result["pruning"]
    return Row(
        **vars(key),
        perplexity=result["value"],
        tokens=told["tokens"],
        sparsity=told["sparsity"],
        sparsity_before=told["sparsity_before"],
        seconds=round(result["seconds"], 1),
        device=result["device"],
        commit=f"{(result['commit'] or '')[:8]}{'+' if result['changed'] else ''}",
        settings=" ".join(settings),
    )


def read(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file."""
    return rows.read(path, Row)


def search(
    done: Iterable[Row], model: str, method: str, allocation: str, total: float
) -> list[Key]:
    """The validation rows of one cell, as far as those that were run tell which are wanted.

    The two middle spreads, and then the next one on the side of the better.
    """
    if allocation == "uniform":
        return [Key(model, method, allocation, total, None, SEEDS[0], "validation")]
    keys = {s: Key(model, method, allocation, total, s, SEEDS[0], "validation") for s in SPREADS}
    smallest, small, large, largest = sorted(SPREADS)
    wanted = [keys[large], keys[small]]
    found = {row.key: row.perplexity for row in done if row.key in wanted}
    if len(found) == len(wanted):
        wanted.append(keys[smallest if found[keys[small]] <= found[keys[large]] else largest])
    return wanted


def chosen(
    done: Sequence[Row], model: str, method: str, allocation: str, total: float
) -> Row | None:
    """The validation row of least perplexity, the smaller spread of equals; None: not complete."""
    method = SPREAD_OF.get(method, method)
    wanted = search(done, model, method, allocation, total)
    found = [row for row in done if row.key in wanted]
    if len({row.key for row in found}) < rows_of_search(allocation):
        return None
    return min(found, key=lambda row: (row.perplexity, row.spread or 0.0))


def rows_of_search(allocation: str) -> int:
    """How many validation rows a cell has."""
    return 1 if allocation == "uniform" else 3


def seeds(method: str, allocation: str) -> tuple[int, ...]:
    """The seeds of a cell on test text: one, where nothing is drawn."""
    return SEEDS[:1] if method == "magnitude" and allocation != "shuffled" else SEEDS


def finals(best: Row, method: str) -> list[Key]:
    """The test rows of a cell whose spread is chosen."""
    same = (best.model, method, best.allocation, best.total, best.spread)
    return [Key(*same, seed, "test") for seed in seeds(method, best.allocation)]
