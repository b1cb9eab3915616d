"""``tempbalance plot RUN_DIR``: pictures of a training run."""

from __future__ import annotations

import argparse
from typing import Any

from tempbalance.cli import work


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "plot",
        help="pictures of a training run",
        description="Draw what TempBalanceCallback wrote in a run: alpha by layer over the epochs, "
        "the learning-rate multipliers over time, and the spectra of some layers at the first and "
        "the last measurement. PNG files.",
        epilog="example: tempbalance plot lightning_logs/version_3 --layers 'layer1.*' fc",
    )
    parser.add_argument(
        "run_dir", metavar="RUN_DIR",
        help="the folder that holds tempbalance.csv, or one with exactly one such run below it",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="DIR", help="where to write (default: the folder plots in the run's)"
    )
    parser.add_argument(
        "--layers", nargs="+", default=[], metavar="PATTERN",
        help="layers whose spectra are drawn, * for any letters (default: those of smallest, "
        "median and largest alpha, and the one that changed most)",
    )  # fmt: skip
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from tempbalance.runs.plot import plot_run

    for path in plot_run(options.run_dir, options.out, options.layers):
        work.note(f"drew {path}")
    return work.OK
