"""What an update costs on large language models: a model, each of its assumptions named.

    python -m benchmarks.model
    python -m benchmarks.model --models 70B --gpus 64 256 --rows 512 1024 2048

Windows are counted by the library's own ``Farms.grid`` and shared among the ranks by its own
algorithm; seconds a window are those measured by ``benchmarks.growth`` where there is a file, and
rooflines, marked as assumed, where there is none. ``benchmarks.report`` puts the table into
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from rich.table import Table

from benchmarks.command import console
from benchmarks.llm import MODELS, Transformer, Weight, together, work
from benchmarks.rates import Rates, Roofline, measured
from tempbalance import Farms
from tempbalance.measure.measurement import DEFAULT_BUDGET
from tempbalance.measure.ranks import balanced, cost
from tempbalance.spectra import table as statistics
from tempbalance.spectra.batches import LARGE
from tempbalance.spectra.windows import Windows

GPUS = (8, 64, 256, 1024)
ROWS = (512, 1024, 2048, None)


@dataclass(frozen=True)
class Assumptions:
    """Everything that is neither counted nor measured. Bytes, seconds, operations a second."""

    peak_flops: float = 989e12  # dense bf16 of an H100 or H200, data sheet
    mfu: float = 0.40  # share of it in training; Llama 3 405B: 0.38 to 0.43 (2407.21783, table 4)
    tokens_per_step: float = 4e6  # the batch of Llama 2, and of Llama 3 405B at its start
    train_bytes_per_parameter: float = 16.0  # bf16 or float32 weight, gradient, two moments
    gpu_bytes: float = 141e9  # H200
    shard_bytes: int = 4  # FSDP2 keeps float32 shards under mixed precision, and gathers those
    node: int = 8  # GPUs that NVLink joins
    nvlink_bytes_per_second: float = 300e9  # of 450e9 each way
    network_bytes_per_second: float = 40e9  # a GPU between nodes, of 50e9 (400 Gbit/s)
    gather_everywhere: bool = True  # every rank gathers every weight, also those of others
    hop_seconds: float = 10e-6  # latency of one step of a collective
    launch_seconds: float = 50e-6  # a layer: Python, kernel launches


@dataclass(frozen=True)
class Update:
    """What one update needs, on one number of GPUs."""

    model: str
    windows: str
    gpus: int
    count: int  # windows
    gram_flops: float
    tridiagonal_flops: float
    tridiagonal_bytes: float
    device_seconds: float  # of all ranks together
    read_seconds: float
    compute_seconds: float  # of the rank with the most to do
    exchange_seconds: float
    imbalance: float  # most / mean over ranks
    gathered_bytes: float  # that a rank receives
    exchanged_bytes: float
    extra_bytes: float  # memory of a rank
    step_seconds: float

    @property
    def seconds(self) -> float:
        """One update, nothing overlapped with training or with itself."""
        return self.read_seconds + self.compute_seconds + self.exchange_seconds

    def share(self, every: int) -> float:
        """Of training time, measuring each ``every`` steps."""
        return self.seconds / (every * self.step_seconds)

    @property
    def every(self) -> int:
        """The fewest steps between measurements that keep the share under 1%."""
        return max(1, math.ceil(self.seconds / (0.01 * self.step_seconds)))


def owners(weights: Sequence[Weight], windows: Windows, ranks: int) -> list[int]:
    """The rank of each weight, by the library's own algorithm."""
    return balanced([cost(cast(Any, weight), windows) for weight in weights], ranks)


def window_bytes(n: int, k: int, stored: int) -> int:
    """Extra memory of a window: two float32 copies, its stored form, Gram matrix and solver's.

    Of a large window only a part is copied at a time.
    """
    copies = 4 * LARGE if n * k > LARGE else (stored + 2 * max(stored, 4)) * n * k
    return copies + 2 * 4 * k * k


def update(
    model: Transformer, windows: Windows, gpus: int, rates: Rates, a: Assumptions, label: str = ""
) -> Update:
    """The cost of one update of a model on so many GPUs."""
    weights = model.weights()
    works = [work(weight, windows) for weight in weights]
    loads = [[] for _ in range(gpus)]  # type: list[list[int]]
    for i, owner in enumerate(owners(weights, windows, gpus)):
        loads[owner].append(i)
    # Windows of one shape from all layers of a rank go through one call.
    seconds = [
        rates.seconds(together([works[i] for i in mine])) + a.launch_seconds * len(mine)
        for mine in loads
    ]
    everything = together(works)
    measured_bytes = float(a.shard_bytes * sum(w.numel for w in weights))
    gathered = measured_bytes * (gpus - 1) / gpus
    if not a.gather_everywhere:
        gathered /= gpus
    bandwidth = a.nvlink_bytes_per_second if gpus <= a.node else a.network_bytes_per_second
    exchanged = len(weights) * statistics.COLUMNS * 8
    largest = max(window_bytes(n, k, a.shard_bytes) for n, k in everything.sides)
    return Update(
        model=model.name,
        windows=label or repr(windows),
        gpus=gpus,
        count=everything.windows,
        gram_flops=everything.gram_flops,
        tridiagonal_flops=everything.tridiagonal_flops,
        tridiagonal_bytes=everything.tridiagonal_bytes,
        device_seconds=sum(seconds),
        read_seconds=gathered / bandwidth + len(weights) * math.log2(gpus) * a.hop_seconds,
        compute_seconds=max(seconds),
        exchange_seconds=2 * (exchanged / bandwidth + math.log2(gpus) * a.hop_seconds),
        imbalance=max(seconds) / (sum(seconds) / gpus),
        gathered_bytes=gathered,
        exchanged_bytes=exchanged,
        # What is gathered waits until half of the budget is full, and for its last weight.
        extra_bytes=DEFAULT_BUDGET / 2
        + max(w.numel for w in weights) * a.shard_bytes
        + max(DEFAULT_BUDGET, largest),
        step_seconds=6 * model.parameters * a.tokens_per_step / (gpus * a.peak_flops * a.mfu),
    )


def sweep(
    rates: Rates,
    a: Assumptions,
    models: Sequence[Transformer] = MODELS,
    gpus: Sequence[int] = GPUS,
    rows: Sequence[int | None] = ROWS,
) -> list[Update]:
    """All combinations that can train; ``None`` rows is the default ``Farms()``."""
    chosen = [("Farms()" if r is None else f"Farms(rows={r})", Farms(rows=r)) for r in rows]
    return [
        update(model, windows, count, rates, a, label)
        for model in models
        for label, windows in chosen
        for count in gpus
        if model.parameters * a.train_bytes_per_parameter <= count * a.gpu_bytes
    ]


def advice(updates: Sequence[Update], every: int = 100) -> list[str]:
    """For each model and number of GPUs: the largest windows under 1%."""
    lines = []
    for key in dict.fromkeys((u.model, u.gpus) for u in updates):
        some = [u for u in updates if (u.model, u.gpus) == key]
        cheap = [u for u in some if u.share(every) <= 0.01]
        if cheap:
            best = max(cheap, key=lambda u: u.gram_flops)
            cost = f"{100 * best.share(every):.2g}% measuring each {every} steps"
        else:
            best = min(some, key=lambda u: u.seconds)
            cost = f"1% when measured each {best.every} steps"
        lines.append(f"{key[0]} on {key[1]} GPUs: {best.windows}, {_two(best.seconds)} s, {cost}")
    return lines


COLUMNS = (
    *("model", "windows", "GPUs", "count", "TFLOP", "TB read", "GPU s in all", "gather s"),
    *(
        "compute s",
        "update s",
        "imbalance",
        "GiB a rank",
        "step s",
        "each 100 steps",
        "steps for 1%",
    ),
)


def cells(u: Update) -> list[str]:
    """One row of the table, in the order of ``COLUMNS``."""
    tera = (u.gram_flops + u.tridiagonal_flops) / 1e12
    return [
        u.model,
        u.windows,
        f"{u.gpus}",
        f"{u.count:,}",
        f"{tera:,.0f}",
        f"{u.tridiagonal_bytes / 1e12:,.1f}",
        f"{u.device_seconds:,.1f}",
        _two(u.read_seconds),
        _two(u.compute_seconds),
        _two(u.seconds),
        f"{u.imbalance:.2f}",
        f"{u.extra_bytes / 2**30:.1f}",
        _two(u.step_seconds),
        f"{_two(100 * u.share(100))}%",
        f"{u.every:,}",
    ]


def _two(value: float) -> str:
    """Two digits, without an exponent."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def assumptions(a: Assumptions, rates: Rates) -> list[str]:
    """Every assumption by name, those of the rates too where they are assumed."""
    named = dataclasses.asdict(a)
    if isinstance(rates, Roofline):
        named |= dataclasses.asdict(rates)
    return [
        f"{name} = {v:g}" if isinstance(v, float) else f"{name} = {v}" for name, v in named.items()
    ]


def default_rates() -> Rates:
    """Measured on a GPU if there is a file, else assumed."""
    return measured("cuda") or Roofline()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, what it assumes and what it advises."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=[m.name for m in MODELS])
    parser.add_argument("--gpus", nargs="+", type=int, default=list(GPUS))
    parser.add_argument("--rows", nargs="+", type=int, help="window rows; default: a choice")
    parser.add_argument("--mfu", type=float, default=Assumptions.mfu)
    parser.add_argument("--tokens-per-step", type=float, default=Assumptions.tokens_per_step)
    options = parser.parse_args(argv)
    a = Assumptions(mfu=options.mfu, tokens_per_step=options.tokens_per_step)
    models = [m for m in MODELS if not options.models or m.name in options.models]
    rates, out = default_rates(), console()
    updates = sweep(rates, a, models, options.gpus, options.rows or ROWS)
    table = Table(title=f"One update; seconds a window {rates.source}", box=None)
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if i < 2 else "right")
    for each in updates:
        table.add_row(*cells(each))
    out.print(table)
    out.print("\n".join(assumptions(a, rates)), highlight=False)
    out.print("\n".join(advice(updates)), highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
