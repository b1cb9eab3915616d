"""Run the study of docs/study.md, a cell at a time, and keep its results in small files.

    python -m experiments.study                       # what there is, and how much of it is done
    python -m experiments.study darcy_fno_5 --jobs 2  # run what is missing of a cell

`experiments.study.run` says which stages a cell goes through.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments import extras  # noqa: F401  (first: says what to install)

# isort: split
import torch
from rich.console import Console

from experiments.study.cells import CELLS, LATER, VARIANTS
from experiments.study.files import RESULTS, load, path_of
from experiments.study.run import Study


def show(folder: Path, console: Console) -> None:
    """List the cells and the runs that each has."""
    for cell in CELLS.values():
        runs = load(path_of(cell, folder))
        console.print(f"{cell.name:<20} {len(runs):>5} runs   {cell.title}", highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.study", description="Run cells of the study."
    )
    parser.add_argument("cells", nargs="*", choices=[*CELLS, []], help="default: list them")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--extra", type=int, metavar="SEEDS", help="sensitivity instead")
    parser.add_argument("--late", action="store_true", help="the variants that start late instead")
    parser.add_argument("--neighbours", action="store_true", help="uniform beside its best alone")
    parser.add_argument("--at", type=float, metavar="RATE", help="final seeds at this rate instead")
    parser.add_argument("--only", nargs="+", choices=[*VARIANTS], help="of --at: these variants")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    chosen = parser.parse_args(arguments)
    console = Console()
    if not chosen.cells:
        show(chosen.results, console)
    for name in chosen.cells:
        if CELLS[name].gpu and not torch.cuda.is_available():
            raise SystemExit(f"{name} needs a GPU, and torch sees none")
        study = Study(CELLS[name], chosen.jobs, chosen.results, console)
        if chosen.extra is not None:
            study.extra(chosen.extra)
        elif chosen.at is not None:
            study.at(chosen.at, chosen.only or [*study.cell.seeds, *LATER])
        elif chosen.late:
            study.late()
        elif chosen.neighbours:
            study.neighbours()
        else:
            study.go()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
