"""``tempbalance rank A B C``: models of one series in order, by their spectra alone."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tempbalance.analysis.ranking import rank_reports
from tempbalance.cli import options as given
from tempbalance.cli import work
from tempbalance.cli.options import UsageError
from tempbalance.words import some


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "rank",
        help="metrics of several models side by side, and how well they order them",
        description="Measure several models of one series and show weighted alpha, log norms, "
        "stable rank, mean alpha, parameter count and depth beside each other, on the layers that "
        "all of them have; on whole matrices with the KS fit, unless told otherwise. With scores, "
        "Kendall's tau of every metric.",
        epilog="example: tempbalance rank small.pt medium.pt large.pt --scores accuracy.csv",
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help=given.CHECKPOINT)
    parser.add_argument(
        "--scores", metavar="CSV",
        help="a line a model: its path or file name, and a number (larger is better)",
    )  # fmt: skip
    parser.add_argument(
        "--lower-is-better", action="store_true", help="the scores are errors or losses"
    )
    given.add_model(parser)
    given.add_method(parser, windows="whole", fit="ks")  # the published method
    parser.set_defaults(run=_run)
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE",
        help="write JSON to a file, or instead of the table to stdout",
    )  # fmt: skip


def _run(options: argparse.Namespace) -> int:
    given.check_files(options)
    options.windows = options.windows or ["whole"]  # the published method
    paths: list[str] = options.checkpoints
    if len(paths) < 2:
        raise UsageError("rank needs at least two models")
    names = _names(paths)
    if len(set(names)) < len(names):
        raise UsageError(f"a model is given twice among {some(paths)}")
    scores = None if options.scores is None else _scores(options.scores, paths, names)
    reports = {name: work.report(options, path) for name, path in zip(names, paths, strict=True)}
    ranking = rank_reports(reports, scores, higher_is_better=not options.lower_is_better)
    if options.json:
        work.write_json(options.json, ranking.to_dict())
    if options.json != "-":
        sys.stdout.write(f"{ranking}\n")
    return work.OK


def _names(paths: Sequence[str]) -> list[str]:
    short = [Path(path).name for path in paths]
    return short if len(set(short)) == len(short) else list(paths)


def _scores(file: str, paths: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """The scores by the names of the models; a first line without a number is a heading."""
    known: dict[str, str] = {}
    for path, name in zip(paths, names, strict=True):
        known |= dict.fromkeys((path, name, Path(path).name, Path(path).stem), name)
    scores: dict[str, float] = {}
    with open(file, newline="", encoding="utf-8-sig") as lines:
        for i, row in enumerate(csv.reader(lines), 1):
            if not any(cell.strip() for cell in row):
                continue
            try:
                model, value = row[0].strip(), float(row[1])
            except (IndexError, ValueError) as error:
                if i == 1:
                    continue
                raise UsageError(
                    f"--scores {file}, line {i}: {','.join(row)!r} is not MODEL,NUMBER"
                ) from error
            if model in known:
                scores[known[model]] = value
    missing = [name for name in names if name not in scores]
    if missing:
        raise UsageError(f"--scores {file} has no line for {some(missing)}")
    return scores
