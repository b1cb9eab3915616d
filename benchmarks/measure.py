"""Time of one measurement against a plain loop of one ``svdvals`` a window.

    python -m benchmarks.measure --networks resnet18 vgg16 --repeats 7

Agreement comes first: alpha of every layer against float64 singular values; a network that
disagrees gets no time. Then both run in turn, in this process, at its own thread settings, and the
ratio is taken pair by pair.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import agreement, loop, on_cuda
from benchmarks.clocks import Work, compare
from benchmarks.command import Record, console, no_cuda, parser, progress, threads_kept
from benchmarks.networks import NETWORKS, Network, trained_like
from tempbalance import Farms, analyze
from tempbalance.layers.find import Layer, find_layers
from tempbalance.measure.measurement import measure

WEIGHTS = ("random", "trained-like")
# A quick run on a CPU has trained-like weights for one network of each kind.
_QUICK_TRAINED = ("resnet18", "gpt2", "fno")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a network disagrees or, with ``--check``, is under its target."""
    options = _parse(argv)
    if reason := no_cuda(options.device):
        print(reason)
        return 1
    if options.threads and os.environ.get("OMP_NUM_THREADS") != str(options.threads):
        # Before torch is loaded: torch.set_num_threads would slow MKL down for good.
        count = str(options.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.measure", *sys.argv[1:]],
                  environment)  # fmt: skip
    out, record = console(), Record("measure", options.device)
    rows: list[dict[str, Any]] = []
    with progress(len(options.cases)) as step:
        for name, weights in options.cases:
            step(f"{name}, {weights} weights")
            rows.append(bench(NETWORKS[name], weights, options))
    settings = {"repeats": options.repeats, "loop_repeats": options.loop_repeats}
    file = record.save(rows, settings, options.json)
    _print(out, record.machine, rows, options.repeats)
    out.print(f"written to {file}", highlight=False)
    failed = any(row.get("disagrees") for row in rows)
    missed = any(row.get("reached") is False for row in rows)
    return int(failed or (options.check and missed))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser("measure", __doc__)
    made.add_argument("--networks", nargs="+", choices=NETWORKS)
    made.add_argument("--weights", nargs="+", choices=WEIGHTS)
    made.add_argument("--repeats", type=int, help="default: 3; 11 when full")
    made.add_argument("--loop-repeats", type=int, help="on CUDA, where the loop takes seconds")
    made.add_argument("--threads", type=int, help="default: as the process finds them")
    made.add_argument("--check", action="store_true", help="fail where a target is missed")
    options = made.parse_args(argv)
    # Two blocks of GPT-2 small are enough for a ratio; a GPU is asked about the whole of it.
    leave_out = {"gpt2"} if options.full or options.device == "cuda" else {"gpt2_full"}
    every = options.full or options.device == "cuda" or bool(options.networks or options.weights)
    networks = options.networks or [name for name in NETWORKS if name not in leave_out]
    options.cases = [
        (name, weights)
        for name in networks
        for weights in options.weights or WEIGHTS
        if every or weights == "random" or name in _QUICK_TRAINED
    ]
    options.repeats = options.repeats or (11 if options.full else 3)
    few = 3 if options.full else 1
    options.loop_repeats = options.loop_repeats or (few if options.device == "cuda" else None)
    return options


# --- one network ---------------------------------------------------------------------------------


def bench(network: Network, weights: str, options: argparse.Namespace) -> dict[str, Any]:
    """A row: windows, agreement, times in turn, ratios, memory, threads."""
    device = torch.device(options.device)
    row: dict[str, Any] = {"network": network.name, "weights": weights, "note": network.note}
    try:
        model = build(network, weights).to(device)
    except ImportError as error:
        return {**row, "note": f"not run: {error}"}
    layers = find_layers(model).layers
    row |= {"layers": len(layers), "windows": _counts(layers, network)}
    try:
        row["alpha_error"] = agreement.require(layers, network.windows, network.name)
    except agreement.DisagreementError as error:
        return {**row, "note": str(error), "disagrees": True}

    def ours() -> None:
        measure(layers, windows=network.windows)

    def plain() -> None:
        loop.alphas(layers, network.windows.pool)

    with threads_kept() as threads:
        # On CUDA the loop takes seconds whatever the weights are: once is enough.
        slow = device.type == "cuda" and not options.full and weights != "random"
        row |= _ratios(network, ours, None if slow else plain, options)
        # What a user calls: every window that covers the matrices, the spectra kept.
        whole = {"analyze": lambda: analyze(model, windows=Farms())}
        row["times"] |= compare(whole, max(3, options.repeats // 2), device)
        row |= {"threads_before": threads, "threads_after": torch.get_num_threads()}
    if device.type == "cuda":
        row |= on_cuda.counts(ours)
    return row


def _ratios(
    network: Network, ours: Work, plain: Work | None, options: argparse.Namespace
) -> dict[str, Any]:
    device = torch.device(options.device)
    if plain is None:
        return {"times": compare({"measure": ours}, options.repeats, device)}
    if options.loop_repeats is None:
        times = compare({"loop": plain, "measure": ours}, options.repeats, device)
    else:
        times = compare({"measure": ours}, options.repeats, device)
        times |= compare({"loop": plain}, options.loop_repeats, device, warm_up=False)
    pairs = zip(times["loop"], times["measure"], strict=False)
    ratios = [old / new for old, new in pairs]
    minima = min(times["loop"]) / min(times["measure"])
    row: dict[str, Any] = {
        "times": times,
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "ratio_of_minima": minima,
        "target": network.target if device.type == "cpu" else None,
    }
    if row["target"] is not None:
        row["reached"] = max(row["ratio"], minima) >= row["target"]
    return row


def build(network: Network, weights: str) -> nn.Module:
    """A network of the benchmarks with one of ``WEIGHTS``, always the same."""
    torch.manual_seed(0)
    model = network.build()
    return trained_like(model) if weights == "trained-like" else model


def _counts(layers: Sequence[Layer], network: Network) -> dict[str, int]:
    """How many windows of which shape."""
    counts: dict[str, int] = {}
    for layer in layers:
        grid = network.windows.grid(*layer.shape[1:])
        shape = f"{grid.height}x{grid.width}"
        counts[shape] = counts.get(shape, 0) + layer.shape[0] * grid.positions
    return counts


# --- the table -----------------------------------------------------------------------------------


def _print(
    console: Console, machine: dict[str, Any], rows: Sequence[dict[str, Any]], repeats: int
) -> None:
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    table = Table(
        title=f"{where}, torch {machine['torch']}, {repeats} repeats, load "
        f"{machine['load_average']} to {machine['load_average_after']}",
        title_justify="left",
        box=None,
    )
    table.add_column("network")
    for title in ("loop ms", "ours ms", "ratio (range)", "of minima", "target", "alpha error",
                  "analyze ms", "peak MiB", "host waits"):  # fmt: skip
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        label = row["network"] + (", trained-like" if row["weights"] != "random" else "")
        if "times" not in row:
            table.add_row(label, row["note"])
            continue
        peak = row.get("peak_extra_bytes")  # these two on CUDA alone
        table.add_row(
            label,
            *(_ms(row["times"].get(k)) for k in ("loop", "measure")),
            *_ratio_cells(row),
            f"{row['alpha_error']:.1e}",
            _ms(row["times"]["analyze"]),
            "" if peak is None else f"{peak / 2**20:.0f} of {row['budget_bytes'] / 2**20:.0f}",
            str(row.get("synchronizations", "")),
        )
    console.print(table)


def _ratio_cells(row: dict[str, Any]) -> tuple[str, str, str]:
    if "ratio" not in row:
        return "", "", ""
    low, high = row["ratio_range"]
    reached = row.get("reached")
    color = "default" if reached is None else "green" if reached else "red"
    return (
        f"[{color}]{row['ratio']:.2f}[/] ({low:.2f} to {high:.2f})",
        f"{row['ratio_of_minima']:.2f}",
        "" if row["target"] is None else f"{row['target']:.1f}",
    )


def _ms(times: Sequence[float] | None) -> str:
    return "" if times is None else f"{1000 * statistics.median(times):.1f}"


if __name__ == "__main__":
    sys.exit(main())
