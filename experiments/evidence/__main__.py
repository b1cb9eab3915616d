"""Run what is missing of a cell of the second part of the study; it goes on where it stopped.

    python -m experiments.evidence                         # the cells, and how much is done
    python -m experiments.evidence fno_factorial --jobs 2
    python -m experiments.evidence lm_tiny --list          # what is wanted next

A row is one run of ``python -m experiments.train``, whose overrides stand at its end; it is added
to the cell's file in docs/results as soon as it is done.
"""

from __future__ import annotations

import argparse
import functools
import shlex
from collections.abc import Sequence
from pathlib import Path

from experiments import extras  # noqa: F401  (first: says what to install)

# isort: split
from rich.console import Console

from experiments import pool, rows
from experiments.evidence.cells import CELLS, Cell
from experiments.evidence.report import path_of
from experiments.evidence.run import overrides, run
from experiments.evidence.search import Row, missing
from experiments.study.files import RESULTS


def fill(cell: Cell, jobs: int, folder: Path, console: Console) -> int:
    """Run all that is missing of a cell; how many runs failed."""
    path = path_of(cell, folder)
    return pool.fill(
        lambda: missing(cell, rows.read(path, Row)),
        functools.partial(run, cell=cell.name),
        lambda _, row: rows.append(path, row),
        jobs,
        console,
        title=lambda key: f"{cell.name}: {'tuning' if key.seed in cell.tuning else 'final seeds'}",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 where a run failed."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cells", nargs="*", choices=[*CELLS, []], help="default: tell of all")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--list", action="store_true", help="name what is wanted next, run nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    given = parser.parse_args(arguments)
    console = Console(stderr=True)
    failed = 0
    for cell in [CELLS[name] for name in given.cells or CELLS]:
        done = rows.read(path_of(cell, given.results), Row)
        if not given.cells:
            console.print(f"{cell.name:<16} {len(done):>5} runs   {cell.title}", highlight=False)
        elif given.list:
            for key in missing(cell, done):
                console.print("python -m experiments.train", shlex.join(overrides(cell, key)),
                              soft_wrap=True, highlight=False, markup=False)  # fmt: skip
        else:
            failed += fill(cell, given.jobs, given.results, console)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
