"""``tempbalance compare A B``: what moved between two checkpoints of a training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tempbalance.analysis.compare import compare
from tempbalance.cli import options as given
from tempbalance.cli import work
from tempbalance.cli.tables import print_comparison
from tempbalance.measure.measurement import MeasurementError


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="alpha of every layer in two checkpoints of one model",
        description="Measure two checkpoints of one model and show what moved, in units of the "
        "noise of alpha: the standard deviation of the difference between two random matrices of "
        "the layer's shape.",
        epilog="example: tempbalance compare epoch1.pt epoch200.pt --sort change",
    )
    parser.add_argument("a", metavar="A", help=given.CHECKPOINT)
    parser.add_argument("b", metavar="B", help="a later one, say")
    given.add_model(parser)
    given.add_method(parser)
    given.add_output(parser, "both", ("depth", "name", "alpha", "change"))
    given.add_strict(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    given.check_output(options)
    a, b = (work.report(options, path) for path in (options.a, options.b))
    with work.progress("simulating random matrices") as bar:
        result = compare(a, b, progress=bar)
    if options.json:
        content = result.to_dict()
        for side in "ab":
            content[side] = {"checkpoint": getattr(options, side), **content[side]}
        work.write_json(options.json, content)
    if options.json != "-":
        print_comparison(result, options.sort)
    common = any(row.difference is not None for row in result.layers)
    if options.plot is not None and common:
        from tempbalance.plots.report import plot_compare

        names = (Path(options.a).name, Path(options.b).name)
        path = work.pictures(options.plot, "compare.png")
        level = {row.name: row.random for row in result.layers if row.random is not None}
        plot_compare(a.layers, b.layers, path, names if names[0] != names[1] else ("A", "B"), level)
        work.note(f"picture in {path}")
    if not common:
        raise MeasurementError("nothing to compare: no layer has an alpha in both")
    return work.OK
