"""Time of one measurement against a plain loop of one ``svdvals`` a window.

    python -m benchmarks.measure --networks resnet18 vgg16 --repeats 7

Agreement comes first: alpha of every layer against the loop in float64; a network that disagrees
gets no time. Then both run in turn, in this process, at its own thread settings, and the ratio is
taken pair by pair.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from benchmarks import loop
from benchmarks.machine import describe, load, peak_extra_memory
from benchmarks.networks import NETWORKS, Network, trained_like
from tempbalance import Farms, analyze
from tempbalance.layers import Layer, find_layers
from tempbalance.measure import DEFAULT_BUDGET, measure

RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1e-4  # relative, of alpha


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a network disagrees or, with ``--check``, is under its target."""
    options = _parse(argv)
    if options.threads and os.environ.get("OMP_NUM_THREADS") != str(options.threads):
        # Before torch is loaded: torch.set_num_threads would slow MKL down for good.
        count = str(options.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.measure", *sys.argv[1:]],
                  environment)  # fmt: skip
    console = Console()
    if not console.is_terminal:  # a pipe has no width to fit into
        console = Console(width=140)
    machine = describe(options.device)
    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(options.networks) * len(options.weights))
        for name in options.networks:
            for weights in options.weights:
                bar.update(task, description=f"{name}, {weights} weights")
                rows.append(_bench(NETWORKS[name], weights, options))
                bar.advance(task)
    machine["load_average_after"] = load()
    content = {"machine": machine, "repeats": options.repeats, "networks": rows}
    file = Path(options.json or RESULTS / f"measure_{options.device}.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    _print(console, machine, rows, options.repeats)
    console.print(f"written to {file}", highlight=False)
    failed = any("times" not in row for row in rows)
    missed = any(row.get("reached") is False for row in rows)
    return int(failed or (options.check and missed))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.measure",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    usual = [name for name in NETWORKS if name != "gpt2_full"]
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=usual)
    parser.add_argument("--weights", nargs="+", choices=("random", "trained-like"),
                        default=["random"])  # fmt: skip
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="default: as the process finds them")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", metavar="FILE", help="default: benchmarks/results/")
    parser.add_argument("--check", action="store_true", help="fail where a target is missed")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    return parser.parse_args(argv)


# --- one network ---------------------------------------------------------------------------------


def _bench(network: Network, weights: str, options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    try:
        model = _model(network, weights).to(device)
    except ImportError as error:
        return {"network": network.name, "weights": weights, "note": f"not run: {error}"}
    layers = find_layers(model).layers
    row: dict[str, Any] = {
        "network": network.name,
        "weights": weights,
        "note": network.note,
        "layers": len(layers),
        "windows": _counts(layers, network),
        "alpha_error": _error(layers, network),
    }
    if not row["alpha_error"] <= TOLERANCE:
        return {**row, "note": f"alpha is off by {row['alpha_error']:.1e}: no time is given"}

    def ours() -> None:
        measure(layers, windows=network.windows)

    def plain() -> None:
        loop.alphas(layers, network.windows.pool)

    row["times"] = _compare({"loop": plain, "measure": ours}, options.repeats, device)
    pairs = zip(row["times"]["loop"], row["times"]["measure"], strict=True)
    ratios = [old / new for old, new in pairs]
    row["ratio"] = statistics.median(ratios)
    row["ratio_range"] = [min(ratios), max(ratios)]
    row["ratio_of_minima"] = min(row["times"]["loop"]) / min(row["times"]["measure"])
    row["target"] = network.target
    if network.target is not None and device.type == "cpu":
        row["reached"] = max(row["ratio"], row["ratio_of_minima"]) >= network.target
    # What a user calls: every window that covers the matrices, the spectra kept.
    other = {"analyze": lambda: analyze(model, windows=Farms())}
    row["times"] |= _compare(other, max(3, options.repeats // 2), device)
    if device.type == "cuda":
        row |= _cuda_counts(ours)
    elif not options.no_memory:
        row["peak_extra_bytes"] = _in_fresh_process(network.name, weights)
        row["budget_bytes"] = DEFAULT_BUDGET
    return row


def _model(network: Network, weights: str) -> nn.Module:
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


def _error(layers: Sequence[Layer], network: Network) -> float:
    """The largest relative error of alpha against the loop in float64, over measured layers."""
    truth = loop.alphas(layers, network.windows.pool, torch.float64)
    records = measure(layers, windows=network.windows)
    errors = [
        abs(record.alpha - alpha) / alpha
        for record, alpha in zip(records, truth, strict=True)
        if record.alpha is not None
    ]
    return max(errors) if errors else math.inf


# --- clocks --------------------------------------------------------------------------------------


def _compare(
    works: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each, ``repeats`` times in turn, the order reversed each time."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for i in range(repeats):
        for name in list(works) if i % 2 == 0 else reversed(list(works)):
            times[name].append(_seconds(works[name], device))
    return times


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def _cuda_counts(work: Callable[[], object]) -> dict[str, Any]:
    """Peak memory and host synchronizations of one measurement."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.set_warn_always(True)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.set_warn_always(False)
    synchronizations = sum("synchroniz" in str(w.message) for w in caught)
    peak = torch.cuda.max_memory_allocated() - before
    return {
        "synchronizations": synchronizations,
        "peak_extra_bytes": peak,
        "budget_bytes": DEFAULT_BUDGET,
    }


def _in_fresh_process(name: str, weights: str) -> int | None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak, name, weights).result()


def _peak(name: str, weights: str) -> int | None:
    network = NETWORKS[name]
    measure(find_layers(nn.Linear(300, 300)).layers)  # what torch and MKL load once
    layers = find_layers(_model(network, weights)).layers
    return peak_extra_memory(functools.partial(measure, layers, windows=network.windows))


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
                  "analyze ms", "peak MiB"):  # fmt: skip
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        label = row["network"] + (", trained-like" if row["weights"] != "random" else "")
        if "times" not in row:
            table.add_row(label, row["note"])
            continue
        low, high = row["ratio_range"]
        reached = row.get("reached")
        color = "default" if reached is None else "green" if reached else "red"
        peak = row.get("peak_extra_bytes")
        table.add_row(
            label,
            *(f"{1000 * statistics.median(row['times'][k]):.1f}" for k in ("loop", "measure")),
            f"[{color}]{row['ratio']:.2f}[/] ({low:.2f} to {high:.2f})",
            f"{row['ratio_of_minima']:.2f}",
            "" if row["target"] is None else f"{row['target']:.1f}",
            f"{row['alpha_error']:.1e}",
            f"{1000 * statistics.median(row['times']['analyze']):.1f}",
            "" if peak is None else f"{peak / 2**20:.0f} of {row['budget_bytes'] / 2**20:.0f}",
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
