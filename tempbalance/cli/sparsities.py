"""``tempbalance sparsities CHECKPOINT --total 0.7``: how much to remove from which layer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from tempbalance.analysis.report import Report
from tempbalance.cli import options as given
from tempbalance.cli import work
from tempbalance.pruning import (
    by_depth,
    by_depth_and_alpha,
    linear_layers,
    reversed,
    shuffled,
    sparsities,
    uniform,
)
from tempbalance.pruning.allocate import LIMIT

_ALLOCATIONS: dict[str, Callable[..., dict[str, float]]] = {
    "alpha": sparsities,
    "depth": by_depth,
    "depth_alpha": by_depth_and_alpha,
    "uniform": uniform,
    "shuffled": shuffled,
    "reversed": reversed,
}


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "sparsities",
        help="how much of each layer to prune, from its alpha",
        description="Measure a checkpoint and give every linear layer inside its blocks the share "
        "of weights to remove: more where alpha is larger, the given total in all. Embeddings, "
        "head and norms are left alone.",
        epilog="example: tempbalance sparsities model.safetensors --total 0.7 --rows 2000 "
        "--per-dim 15",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=given.CHECKPOINT)
    parser.add_argument(
        "--total", type=float, required=True, metavar="S",
        help="share (0 to 1) of the weights of these layers to remove",
    )  # fmt: skip
    parser.add_argument(
        "--allocation", choices=tuple(_ALLOCATIONS), default="alpha",
        help="alpha (default), or a control",
    )  # fmt: skip
    parser.add_argument(
        "--spread", type=float, default=0.3, metavar="E",
        help="how far ratios lie apart, 0 to 1 (default: 0.3)",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=float, default=LIMIT, help=f"no ratio is above it (default: {LIMIT})"
    )
    parser.add_argument(
        "--unit", choices=("block", "layer", "type"), default="block",
        help="what shares a ratio (default: block)",
    )  # fmt: skip
    parser.add_argument(
        "--center", choices=("mean", "median"), help="of the alphas in a unit (default: mean)"
    )
    given.add_model(parser)
    given.add_method(parser)
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE",
        help="write JSON to a file, or instead of the table to stdout",
    )  # fmt: skip
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    given.check_files(options)
    report = work.report(options, options.checkpoint)
    ratios = _ratios(options, report)
    if options.json:
        told = {"checkpoint": options.checkpoint, "total": options.total, "ratios": ratios}
        work.write_json(options.json, told)
    if options.json != "-":
        sys.stdout.write(_table(report, ratios))
    return work.OK


def _ratios(options: argparse.Namespace, report: Report) -> dict[str, float]:
    allocation = _ALLOCATIONS[options.allocation]
    more: dict[str, Any] = {}
    if allocation is not uniform:
        more = {"spread": options.spread, "unit": options.unit, "limit": options.limit}
    if options.center is not None:
        if allocation in (uniform, by_depth):
            raise given.UsageError(f"--center has no meaning with {options.allocation}")
        more["center"] = options.center
    return allocation(report, options.total, **more)


def _table(report: Report, ratios: dict[str, float]) -> str:
    layers = [layer for layer in report.layers if layer.name in ratios]
    width = max([5, *(len(layer.name) for layer in layers)])
    lines = [f"{'layer':<{width}}  {'shape':>15}  {'alpha':>7}  {'remove':>7}"]
    for layer in layers:
        shape = " x ".join(map(str, layer.shape[1:]))
        alpha = "-" if layer.alpha is None else f"{layer.alpha:.3f}"
        lines.append(f"{layer.name:<{width}}  {shape:>15}  {alpha:>7}  {ratios[layer.name]:>7.4f}")
    sizes = {layer.name: layer.numel for layer in linear_layers(report)}
    removed = sum(ratios[name] * sizes[name] for name in ratios)
    weights = sum(sizes.values())
    lines += ["", f"{removed / weights:.4f} of {weights:,} weights in {len(ratios)} layers"]
    return "\n".join(lines) + "\n"
