"""``tempbalance analyze CHECKPOINT``: alpha of every layer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tempbalance.analysis.report import Report
from tempbalance.cli import options as given
from tempbalance.cli import work
from tempbalance.cli.options import UsageError
from tempbalance.cli.tables import print_report
from tempbalance.measure.measurement import MeasurementError


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "analyze",
        help="alpha of every layer of a checkpoint",
        description="Measure every layer of a checkpoint: the exponent alpha of its spectrum's "
        "power-law tail, its norms and its stable rank. Without --model the layers are told from "
        "names and shapes, and what was guessed is said.",
        epilog="examples: tempbalance analyze model.safetensors --html report.html; "
        "tempbalance analyze resnet.pt --model torchvision.models:resnet18 "
        "--model-arg num_classes=100 --plot pictures. The JSON is described in docs/json.md.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=given.CHECKPOINT)
    given.add_model(parser)
    given.add_method(parser)
    parser.add_argument(
        "--traps", action="store_true",
        help="look for correlation traps: atypical entries, told by the shuffled weight",
    )  # fmt: skip
    parser.add_argument(
        "--preset", choices=("weightwatcher",),
        help="the columns, names and methods of WeightWatcher (the method options have no say)",
    )  # fmt: skip
    given.add_output(parser, "the overview", ("depth", "name", "alpha"))
    parser.add_argument("--html", metavar="FILE", help="write the report as a page in one file")
    parser.add_argument(
        "--plot-layer", action="append", default=[], metavar="NAME",
        help="with --plot, draw this layer's spectrum too (may be repeated)",
    )  # fmt: skip
    given.add_strict(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    given.check_output(options)
    if options.preset is not None:
        return _details(options)
    report = work.report(options, options.checkpoint)
    if options.json:
        work.write_json(options.json, {"checkpoint": options.checkpoint, **report.to_dict()})
    if options.json != "-":
        print_report(report, options.sort)
    if options.html is not None:
        report.to_html(options.html, title=Path(options.checkpoint).name)
        work.note(f"page in {options.html}")
    if options.plot is not None and report.measured:
        _draw(report, options)
    if not report.measured:
        first = report.layers[0].message if report.layers else "the model has no weight matrix"
        raise MeasurementError(f"no layer has an alpha: {first}")
    return work.OK


def _details(options: argparse.Namespace) -> int:
    for name in ("html", "plot", "strict"):
        if getattr(options, name):
            raise UsageError(f"--{name} has no meaning with --preset {options.preset}")
    found = work.details(options, options.checkpoint)
    if options.json:
        work.write_json(options.json, {"checkpoint": options.checkpoint, **found.to_dict()})
    if options.json != "-":
        sys.stdout.write(f"{found}\n")
    return work.OK


def _draw(report: Report, options: argparse.Namespace) -> None:
    overview = work.pictures(options.plot, "alphas.png")
    try:
        report.plot(overview)
        for name in options.plot_layer:
            own = f"esd_{_file_name(name)}{overview.suffix}"
            if overview.name != "alphas.png":
                own = f"{overview.stem}_{own}"
            report.plot(overview.with_name(own), layer=name)
    except KeyError as error:
        raise UsageError(f"--plot-layer: {error.args[0]}") from error
    several = options.plot_layer or overview.name == "alphas.png"
    work.note(f"pictures in {overview.parent}" if several else f"picture in {overview}")


def _file_name(layer: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in layer) or "layer"
