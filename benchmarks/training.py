"""Share of the training time that measuring takes: by division, and by really training.

    python -m benchmarks.training --device cuda --cases resnet18

By division: seconds of one update over those of the steps between updates. Really: two replicas,
one with ``TempBalanceLR`` and one without, train blocks of steps in turn, and the difference of
their wall-clock time is the share. Options of the scheduler that this version does not have are
left out, by name.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.table import Table

from benchmarks import agreement
from benchmarks.cases import CPU, CUDA, TINY, Case
from benchmarks.clocks import compare, quartiles, wall_seconds
from benchmarks.command import Record, console, no_cuda, parser, progress, threads_kept
from tempbalance import Farms, TempBalanceLR

TARGET = 0.01
# Options beyond ``every``, by how often is measured.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "epoch": {"": {}},
    "100": {"": {}, "delay=10": {"delay": 10}},
    "1": {"": {}, "delay=1": {"delay": 1}},
}
_SHORT = 5  # steps of a block that measures each step


class Replica:
    """A network in training, with or without balancing."""

    def __init__(self, case: Case, device: torch.device, options: dict[str, Any] | None) -> None:
        torch.manual_seed(0)
        self.case, self.device = case, device
        self.model = case.build().to(device)
        batches = [tuple(t.to(device) for t in case.batch()) for _ in range(4)]
        if case.bf16 and batches[0][0].ndim == 4:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            batches = [(x.to(memory_format=torch.channels_last), y) for x, y in batches]
        self.batches = itertools.cycle(batches)
        self.optimizer = case.optimizer(self.model)
        self.scheduler = (
            None if options is None else TempBalanceLR(self.optimizer, self.model, **options)
        )

    def step(self) -> None:
        """One training step, and the scheduler's."""
        x, y = next(self.batches)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.case.bf16):
            output = self.model(x)
        self.case.loss(output.float(), y).backward()
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()

    def train(self, steps: int) -> None:
        """So many steps, and whatever goes on beside them: no other block shall pay for it."""
        for _ in range(steps):
            self.step()
        for thread in threading.enumerate():
            if thread.name.startswith("tempbalance-background"):
                thread.join(60)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 with ``--check`` if measuring each epoch or 100 steps is above 1%."""
    made = parser("training", __doc__)
    made.add_argument("--cases", nargs="+", choices=[c.name for c in CPU])
    made.add_argument("--repeats", type=int, help="pairs; default: 2, 3 on CUDA; 7 when full")
    made.add_argument("--block-seconds", type=float, help="longer blocks are not trained")
    made.add_argument("--tiny", action="store_true", help="two small layers, to try this command")
    made.add_argument("--check", action="store_true", help="fail above 1%%")
    options = made.parse_args(argv)
    if reason := no_cuda(options.device):
        print(reason)
        return 1
    on_gpu = options.device == "cuda"
    options.repeats = options.repeats or (7 if options.full else 3 if on_gpu else 2)
    usual = 120.0 if options.full else 20.0 if on_gpu else 8.0
    options.block_seconds = usual if options.block_seconds is None else options.block_seconds
    usable: Sequence[Case] = CUDA if options.device == "cuda" else CPU
    usable = TINY if options.tiny else usable
    cases = [c for c in usable if not options.cases or c.name in options.cases]
    out, record = console(), Record("training", options.device)
    rows = []
    with progress(len(cases) * sum(map(len, VARIANTS.values()))) as step, threads_kept():
        for case in cases:
            try:
                rows.append(bench(case, options, step))
            except ImportError as error:
                rows.append({"case": case.name, "note": f"not run: {error}"})
    settings = {"repeats": options.repeats, "block_seconds": options.block_seconds}
    file = record.save(rows, settings, options.json)
    _print(out, rows)
    out.print(f"written to {file}", highlight=False)
    return int(options.check and any(_missed(row) for row in rows))


def bench(case: Case, options: argparse.Namespace, step: Callable[[str], None]) -> dict[str, Any]:
    """A row: seconds of a step and of an update, shares by division, and really trained."""
    device = torch.device(options.device)
    uniform = Replica(case, device, None)
    plain = Replica(case, device, {"every": 10**9})
    assert plain.scheduler is not None
    balancer = plain.scheduler.balancer
    error = agreement.require(balancer.layers, Farms(), case.name)
    times = compare({"step": uniform.step, "update": balancer.update}, max(5, options.repeats),
                    device, wall_seconds)  # fmt: skip
    one, update = (statistics.median(times[k]) for k in ("step", "update"))
    steps_of = {name: interval({"epoch": case.epoch}, name) for name in VARIANTS}
    row: dict[str, Any] = {
        "case": case.name,
        "note": case.note,
        "samples": case.samples,
        "epoch": case.epoch,
        "alpha_error": error,
        "times": times,
        "step_quartiles": quartiles(times["step"]),
        "update_quartiles": quartiles(times["update"]),
        "by_division": {name: update / (k * one) for name, k in steps_of.items()},
        "trained": [],
    }
    del plain, balancer
    for name, variants in VARIANTS.items():
        for variant, extra in variants.items():
            step(f"{case.name}, measured each {name} {variant}".strip())
            every = steps_of[name]
            steps = every if every > 1 else _SHORT
            expected = steps * (one + update / every)
            result = {"every": name, "variant": variant, "steps": steps}
            if expected > options.block_seconds:
                result["not_run"] = f"a block of {steps:,} steps takes {expected:,.0f} s"
            else:
                result |= _train(case, uniform, {"every": every, **extra}, steps, options)
            row["trained"].append(result)
    return row


def _train(
    case: Case, uniform: Replica, options: dict[str, Any], steps: int, run: argparse.Namespace
) -> dict[str, Any]:
    """Blocks with and without balancing in turn, a measurement in the middle of each block."""
    device = torch.device(run.device)
    balanced = Replica(case, device, {**options, "start": options["every"] // 2})
    assert balanced.scheduler is not None
    balanced.train(min(steps, 2))
    before, ticks = balanced.scheduler.balancer.measurements, balanced.scheduler.balancer.tick
    times = compare(
        {"uniform": lambda: uniform.train(steps), "balanced": lambda: balanced.train(steps)},
        run.repeats,
        device,
        wall_seconds,
        warm_up=False,
    )
    shares = [b / u - 1 for u, b in zip(times["uniform"], times["balanced"], strict=True)]
    fast = case.samples * steps
    return {
        "times": times,
        "share": statistics.median(shares),
        "share_range": [min(shares), max(shares)],
        "samples_per_second": {k: fast / statistics.median(v) for k, v in times.items()},
        "measurements": balanced.scheduler.balancer.measurements - before,
        "of_steps": balanced.scheduler.balancer.tick - ticks,
    }


def _missed(row: dict[str, Any]) -> bool:
    shares = [row.get("by_division", {}).get(k, 0.0) for k in ("epoch", "100")]
    return max(shares) > TARGET


def _print(out: Any, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(box=None)
    for title in ("training", "step ms", "update ms", "measured each", "options", "by division",
                  "really (range)", "samples/s without, with"):  # fmt: skip
        table.add_column(title)
    for row in rows:
        if "times" not in row:
            table.add_row(row["case"], row["note"])
            continue
        first = [row["case"], *(f"{1000 * row[k][1]:.1f}"
                                for k in ("step_quartiles", "update_quartiles"))]  # fmt: skip
        for result in row["trained"]:
            table.add_row(*first, *cells(row, result))
            first = ["", "", ""]
    out.print(table)


def interval(row: dict[str, Any], every: str) -> int:
    """Steps between measurements, as asked for."""
    return row["epoch"] if every == "epoch" else int(every)


def cells(row: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """Interval, options, share by division and really, samples a second without and with."""
    each = {"epoch": f"epoch ({row['epoch']} steps)", "100": "100 steps", "1": "step"}
    division = "" if result["variant"] else f"{100 * row['by_division'][result['every']]:.2g}%"
    start = [each[result["every"]], result["variant"], division]
    if "not_run" in result:
        return [*start, f"not run: {result['not_run']}", ""]
    if result["measurements"] * interval(row, result["every"]) < result["of_steps"]:
        start[1] += f": {result['measurements']} in {result['of_steps']} steps"
    low, high = (100 * v for v in result["share_range"])
    fast = result["samples_per_second"]
    return [
        *start,
        f"{100 * result['share']:+.2f}% ({low:+.2f} to {high:+.2f})",
        f"{fast['uniform']:,.0f}, {fast['balanced']:,.0f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
