"""Time of a measurement shared by 1 and by 2 ranks, and how much of it the exchange is.

    python -m benchmarks.ranks --networks resnet18

Processes of one thread each, joined by gloo, on one machine: with two cores both runs are fair.
A rank that has less to do waits for the other before the exchange; that wait is told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.command import Record, console, parser, progress, threads_kept
from benchmarks.networks import NETWORKS

_LIMIT = 300  # seconds that a pair of processes may take


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    if argv is None and sys.argv[1:2] == ["--rank"]:
        return _worker(sys.argv[1:])
    made = parser("ranks", __doc__, cuda=False)
    made.add_argument("--networks", nargs="+", choices=NETWORKS, default=["resnet18", "gpt2"])
    made.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    made.add_argument("--repeats", type=int, help="default: 3; 9 when full")
    options = made.parse_args(argv)
    options.repeats = options.repeats or (9 if options.full else 3)
    out, record, rows = console(), Record("ranks", "cpu"), []
    with progress(len(options.networks) * len(options.ranks)) as step, threads_kept():
        for name in options.networks:
            first = 0.0
            for ranks in options.ranks:
                step(f"{name}, {ranks} ranks")
                row = bench(name, ranks, options.repeats)
                first = first or row["seconds"]
                rows.append({**row, "speedup": first / row["seconds"]})
    file = record.save(rows, {"repeats": options.repeats, "threads_a_rank": 1}, options.json)
    _print(out, rows)
    out.print(f"written to {file}", highlight=False)
    return 0


def bench(name: str, ranks: int, repeats: int) -> dict[str, Any]:
    """A row, from as many processes: the slowest rank's seconds, wait and exchange.

    Raises:
        RuntimeError: if a process fails, with what it printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                       "WORLD_SIZE": str(ranks)}  # fmt: skip
        arguments = [name, str(repeats), folder]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.ranks", "--rank", str(rank), *arguments],
                env={**environment, "RANK": str(rank)},
                cwd=Path(__file__).resolve().parents[1],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(ranks)
        ]
        outputs = _outputs(processes)
        files = [Path(folder) / f"{rank}.json" for rank in range(ranks)]
        if not all(f.exists() for f in files):
            raise RuntimeError("a rank failed:\n" + "\n".join(outputs)[-4000:])
        each = [json.loads(f.read_text()) for f in files]
    if len({json.dumps(r["alphas"]) for r in each}) > 1:
        raise RuntimeError(f"{name}: the ranks hold different alphas")
    times = [max(t) for t in zip(*(r["times"] for r in each), strict=True)]
    total = statistics.median(times)
    return {
        "network": name,
        "ranks": ranks,
        "alpha_error": max(r["alpha_error"] for r in each),
        "times": times,
        "seconds": total,
        # The last rank to arrive waits for nobody.
        "wait": statistics.median(max(w) for w in zip(*(r["waits"] for r in each), strict=True)),
        "exchange": statistics.median(
            max(e) for e in zip(*(r["exchanges"] for r in each), strict=True)
        ),
        "layers": [r["layers"] for r in each],
    }


def _outputs(processes: Sequence[subprocess.Popen[str]]) -> list[str]:
    outputs, until = [], time.monotonic() + _LIMIT
    for process in processes:
        try:
            outputs.append(process.communicate(timeout=max(1, until - time.monotonic()))[0])
        except subprocess.TimeoutExpired:
            for each in processes:
                each.kill()
            outputs.append(process.communicate()[0])
    return outputs


def _worker(arguments: Sequence[str]) -> int:
    """One rank: its times, the part that it waited, and the part that the exchange took."""
    import torch.distributed as dist

    from benchmarks import agreement
    from benchmarks.measure import build
    from tempbalance.layers.find import find_layers
    from tempbalance.measure.measurement import measure
    from tempbalance.measure.ranks import owners

    made = argparse.ArgumentParser()
    made.add_argument("--rank", type=int)
    made.add_argument("network")
    made.add_argument("repeats", type=int)
    made.add_argument("folder")
    options = made.parse_args(arguments)
    network = NETWORKS[options.network]
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    layers = find_layers(build(network, "random")).layers
    error = agreement.require(layers, network.windows, network.name)
    measure_module: Any = sys.modules["tempbalance.measure.measurement"]
    exchange, waits, exchanges = measure_module.exchange, [], []

    def timed(*some: Any, **named: Any) -> Any:
        arrived = time.perf_counter()
        dist.barrier(group)
        together = time.perf_counter()
        result = exchange(*some, **named)
        waits.append(together - arrived)
        exchanges.append(time.perf_counter() - together)
        return result

    measure_module.exchange = timed
    times: list[float] = []
    records = measure(layers, windows=network.windows, group=group)  # warms up
    for _ in range(options.repeats):
        dist.barrier(group)
        start = time.perf_counter()
        records = measure(layers, windows=network.windows, group=group)
        times.append(time.perf_counter() - start)
    result = {
        "alphas": [r.alpha for r in records],
        "alpha_error": error,
        "times": times,
        "waits": waits[1:],
        "exchanges": exchanges[1:],
        "layers": owners(layers, network.windows, group).count(options.rank),
        "threads": torch.get_num_threads(),
    }
    (Path(options.folder) / f"{options.rank}.json").write_text(json.dumps(result))
    dist.barrier(group)
    sys.stdout.flush()
    os._exit(0)  # torch may abort at exit after gloo collectives (pytorch#190489)


def _print(out: Any, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(box=None)
    for title in ("network", "ranks", "ms", "speed-up", "waited ms", "exchange ms", "layers"):
        table.add_column(title, justify="left" if title == "network" else "right")
    for row in rows:
        table.add_row(
            row["network"],
            str(row["ranks"]),
            *(f"{1000 * row['seconds']:.0f}", f"{row['speedup']:.2f}"),
            *(f"{1000 * row['wait']:.1f}", f"{1000 * row['exchange']:.2f}"),
            " + ".join(map(str, row["layers"])),
        )
    out.print(table)


if __name__ == "__main__":
    sys.exit(main())
