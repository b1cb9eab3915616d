"""Run what is missing of the pruning table; it goes on where it stopped.

    python -m experiments.prune.table SmolLM2.gguf --jobs 2             # all of it: hours
    python -m experiments.prune.table SmolLM2.gguf --methods wanda --totals 0.6
    python -m experiments.prune.table SmolLM2.gguf --list               # what is missing

A row is one run of ``python -m experiments.prune``; it is added to docs/results/pruning.csv as soon
as it is done. The rows that choose the spread on validation text come first, those on test text
where they are complete. ``--set`` changes the settings of all rows (text.test.windows=2), and then
``--results`` must name another file, so that the table holds rows of one design.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments import extras  # noqa: F401  (first: says what to install)

# isort: split
from hydra import compose, initialize_config_dir
from rich.console import Console

from experiments import pool, rows, sweep
from experiments.prune import grid
from experiments.prune.grid import Key, Row


def missing(done: Sequence[Row], cells: Iterable[tuple[str, str, str, float]]) -> list[Key]:
    """The next rows to run of some cells: those of the search, or else those on test text.

    One spread of every allocation before the next, so that a search that is interrupted compares
    allocations all the same.
    """
    keys = {row.key for row in done}
    wanted: list[Key] = []
    for cell in cells:
        model, method, allocation, total = cell
        best = grid.chosen(done, *cell)
        if best is not None:
            wanted += grid.finals(best, method)
        else:
            wanted += grid.search(
                done, model, grid.SPREAD_OF.get(method, method), allocation, total
            )
    spreads = (None, *grid.SPREADS)
    todo = [key for key in dict.fromkeys(wanted) if key not in keys]
    return sorted(todo, key=lambda key: (key.split == "test", spreads.index(key.spread)))


def result_of(key: Key, path: str, settings: Sequence[str]) -> dict[str, Any]:
    """One run, in this process, which keeps the dense model for the next."""
    from experiments.prune.run import run

    with initialize_config_dir(str(sweep.CONF), version_base="1.3"):
        cfg = compose("prune", overrides=[*key.overrides(path), *settings])
    return run(cfg)


def fill(
    path: str, cells: Sequence[tuple[str, str, str, float]], results: Path,
    settings: Sequence[str], jobs: int, console: Console,
) -> int:  # fmt: skip
    """Run all that is missing of some cells; how many rows failed."""
    return pool.fill(
        lambda: missing(grid.read(results), cells),
        functools.partial(result_of, path=path, settings=settings),
        lambda key, result: rows.append(results, grid.row_of(key, result, settings)),
        jobs,
        console,
        title=lambda key: f"{key.split} rows",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 where a row failed."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.prune.table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a GGUF file, or a folder that save_pretrained wrote")
    parser.add_argument("--methods", nargs="+", choices=grid.METHODS, default=grid.METHODS)
    parser.add_argument(
        "--allocations", nargs="+", choices=grid.ALLOCATIONS, default=grid.ALLOCATIONS
    )
    parser.add_argument("--totals", nargs="+", type=float, choices=grid.TOTALS, default=grid.TOTALS)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--results", type=Path, default=grid.RESULTS, help="the file of the rows")
    parser.add_argument("--device", default="cpu", help="where the model is (default: cpu)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--list", action="store_true", help="name what is missing, run nothing")
    given = parser.parse_args(arguments)
    if given.settings and given.results == grid.RESULTS:
        parser.error("--set needs --results: the table holds rows of one design")
    console = Console(stderr=True)
    name = Path(given.model).stem
    cells = [
        (name, method, allocation, total)
        for method, total, allocation in itertools.product(
            given.methods, given.totals, given.allocations
        )
    ]
    if given.list:
        for key in missing(grid.read(given.results), cells):
            console.print("python -m experiments.prune", *key.overrides(given.model),
                          soft_wrap=True, highlight=False, markup=False)  # fmt: skip
        return 0
    settings = [
        *given.settings,
        *([] if given.device == "cpu" else [f"model.device={given.device}"]),
    ]
    return int(fill(given.model, cells, given.results, settings, given.jobs, console) > 0)


if __name__ == "__main__":
    raise SystemExit(main())
