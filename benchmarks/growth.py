"""How the time of a measurement grows: with width, depth and the number of windows.

    python -m benchmarks.growth --device cuda

A fitted exponent for each series (1 is linear), and seconds a window by its side, which is what
``benchmarks.model`` counts with. Nothing may grow faster than the operations do: the cube of the
width for one whole matrix, linear in the number of layers and of windows.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from benchmarks import agreement
from benchmarks.clocks import compare
from benchmarks.command import Record, console, no_cuda, parser, progress, read, threads_kept
from tempbalance import Farms
from tempbalance.layers.find import find_layers
from tempbalance.measure.measurement import measure
from tempbalance.spectra.windows import Windows

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "benchmark_growth.png"
# Room above the exponent of the operations, for caches that overflow.
MARGIN = 0.25


@dataclass(frozen=True)
class Series:
    """One thing that grows, and how its operations do."""

    name: str
    what: str
    sizes: tuple[int, ...]  # of a quick run
    more: tuple[int, ...]  # added by a full run
    count: Callable[[int, str], int]  # layers or windows, on a kind of device
    build: Callable[[int, int], nn.Module]  # of a size and a count
    windows: Callable[[int], Windows]
    exponent: float  # of the operations


def _in_batch(side: int, device: str) -> int:
    """Windows enough to keep all cores of a device busy."""
    return max(2, min(256, (2**25 if device == "cuda" else 2**21) // side**2))


def _squares(side: int, count: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(count)))


SERIES = (
    Series("width", "one n x n layer, Farms()", (128, 256, 512, 1024), (2048,),
           lambda n, _: 1, _squares, lambda n: Farms(), 3.0),
    Series("depth", "L layers of 128 x 128, Farms()", (1, 2, 4, 8, 16, 32, 64), (128, 256),
           lambda n, _: n, lambda n, count: _squares(128, count), lambda n: Farms(), 1.0),
    Series("windows", "n x n layer in windows of 64", (512, 1024, 2048), (4096,),
           lambda n, _: (n // 64) ** 2, lambda n, _: _squares(n, 1), lambda n: Farms(rows=64), 1.0),
    Series("rates", "windows of k x k in one batch", (64, 128, 256, 512, 768, 1024), (1536, 2048),
           _in_batch, lambda k, count: nn.Linear(k, k * count, bias=False),
           lambda k: Farms(rows=k), 3.0),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a series grows faster than its operations."""
    made = parser("growth", __doc__)
    made.add_argument("--series", nargs="+", choices=[s.name for s in SERIES])
    made.add_argument("--largest", type=int, help="leave out sizes above")
    made.add_argument("--repeats", type=int, help="default: 5; 9 when full")
    made.add_argument("--picture", default=str(PICTURE), help="where to draw; empty for nowhere")
    options = made.parse_args(argv)
    if reason := no_cuda(options.device):
        print(reason)
        return 1
    options.repeats = options.repeats or (9 if options.full else 5)
    chosen = [s for s in SERIES if options.series is None or s.name in options.series]
    chosen = [s for s in chosen if _sizes(s, options)]
    out, record = console(), Record("growth", options.device)
    with progress(sum(len(_sizes(s, options)) for s in chosen)) as step, threads_kept():
        rows = [_series(each, options, step) for each in chosen]
    file = record.save(rows, {"repeats": options.repeats}, options.json)
    _print(out, rows)
    if options.picture:
        draw(_by_device(file), Path(options.picture))
    out.print(f"written to {file}", highlight=False)
    return int(any(row["too_fast"] for row in rows))


def _sizes(series: Series, options: argparse.Namespace) -> list[int]:
    sizes = series.sizes + (series.more if options.full or options.device == "cuda" else ())
    return [n for n in sizes if options.largest is None or n <= options.largest]


def _series(
    series: Series, options: argparse.Namespace, step: Callable[[str], None]
) -> dict[str, Any]:
    device = torch.device(options.device)
    points: list[dict[str, Any]] = []
    for size in _sizes(series, options):
        step(f"{series.name} {size}")
        torch.manual_seed(0)
        windows, count = series.windows(size), series.count(size, device.type)
        layers = find_layers(series.build(size, count).to(device)).layers
        error = agreement.require(layers, windows, f"{series.name} {size}")
        times = compare(
            {"measure": lambda layers=layers, w=windows: measure(layers, windows=w)},  # type: ignore
            options.repeats,
            device,
        )["measure"]
        middle = statistics.median(times)
        points.append({"size": size, "windows": count, "alpha_error": error, "times": times,
                       "seconds": middle, "seconds_a_window": middle / count})  # fmt: skip
    x = [float(p["windows" if series.name == "windows" else "size"]) for p in points]
    y = [p["seconds_a_window" if series.name == "rates" else "seconds"] for p in points]
    fitted, last = exponent(x, y), exponent(x[-2:], y[-2:])
    return {
        "series": series.name,
        "what": series.what,
        "points": points,
        "exponent": fitted,
        "exponent_of_last_two": last,
        "exponent_of_operations": series.exponent,
        "too_fast": fitted > series.exponent + MARGIN,
    }


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The power p of y ~ x^p, by least squares of the logarithms; 0 for a single point."""
    if len(x) < 2:
        return 0.0
    log_x, log_y = [math.log(v) for v in x], [math.log(v) for v in y]
    return statistics.linear_regression(log_x, log_y).slope


def _by_device(file: Path) -> dict[str, Sequence[dict[str, Any]]]:
    """Rows by the name of the device, from this file and its sister of the other device."""
    found = {}
    for device in ("cpu", "cuda"):
        content = read("growth", device, file.parent)
        if content is not None:
            machine = content["machine"]
            found[machine.get("gpu") or f"CPU, {machine['threads']} threads"] = content["rows"]
    return found


def _print(out: Any, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(box=None)
    for title in ("series", "sizes", "ms", "exponent", "last two", "of the operations", "error"):
        table.add_column(title)
    for row in rows:
        points = row["points"]
        color = "red" if row["too_fast"] else "green"
        table.add_row(
            f"{row['series']}: {row['what']}",
            f"{points[0]['size']} to {points[-1]['size']}",
            f"{1000 * points[0]['seconds']:.3g} to {1000 * points[-1]['seconds']:.3g}",
            f"[{color}]{row['exponent']:.2f}[/]",
            f"{row['exponent_of_last_two']:.2f}",
            f"{row['exponent_of_operations']:g}",
            f"{max(p['alpha_error'] for p in points):.1e}",
        )
    out.print(table)


def draw(by_device: dict[str, Sequence[dict[str, Any]]], path: Path) -> None:
    """A panel a series on logarithmic axes, with the slope of the operations dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = {"width": "width n", "depth": "layers", "windows": "windows of 64 x 64"}
    found = {row["series"] for rows in by_device.values() for row in rows}
    panels = [s for s in SERIES if s.name in labels and s.name in found]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.4), squeeze=False)
    for axis, series in zip(axes[0], panels, strict=True):
        ticks: set[int] = set()
        for color, (where, rows) in zip(("#1f5f8b", "#c1571a"), by_device.items(), strict=False):
            for row in (r for r in rows if r["series"] == series.name):
                x = [p["windows" if series.name == "windows" else "size"] for p in row["points"]]
                y = [1000 * p["seconds"] for p in row["points"]]
                label = f"{where}: power {row['exponent']:.2f}"
                axis.loglog(x, y, "o-", color=color, label=label)
                line = [y[-1] * (v / x[-1]) ** series.exponent for v in x]
                axis.loglog(x, line, "--", color=color, alpha=0.4)
                ticks |= set(x)
        axis.set_xticks(sorted(ticks), [f"{v}" for v in sorted(ticks)], fontsize=8,
                        rotation=45 if len(ticks) > 5 else 0)  # fmt: skip
        axis.minorticks_off()
        axis.set_xlabel(labels[series.name])
        axis.set_title(series.what, fontsize=9)
        axis.legend(fontsize=7, frameon=False)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("one measurement, ms")
    slopes = ", ".join(f"{s.exponent:g}" for s in panels)
    figure.suptitle(f"dashed: the growth of the operations (powers {slopes})", fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
