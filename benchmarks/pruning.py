"""Time to measure the shapes of a 7B model for pruning, and what a pruner takes on them.

    python -m benchmarks.pruning                 # KS and pruners on the smaller sizes
    python -m benchmarks.pruning --full          # KS on all pooled eigenvalues, pruners on all

Random weights. A block has seven matrices of three shapes; one of each is measured, and the model's
time is that of all its blocks. Of the windows that FARMS was published with (2,000 rows, 10 or 15
along each side) four are measured a shape: the others take as long, since all are of one size. What
is timed and what is reckoned from it stand apart in the table.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from benchmarks.clocks import wall_seconds
from benchmarks.command import Record, console, no_cuda, parser, threads_kept
from benchmarks.llm import MODELS, Transformer, work
from tempbalance.layers.find import find_layers
from tempbalance.measure.measurement import measure
from tempbalance.pruning import Magnitude, SparseGPT, Wanda
from tempbalance.pruning.method import Method
from tempbalance.spectra.powerlaw import Fit, Hill, KSFit, PeakFit
from tempbalance.spectra.windows import Farms, WholeMatrix, Windows

FITS: dict[str, Fit] = {"hill": Hill(), "peak": PeakFit(), "ks": KSFit()}
TIMED = 2  # windows along each side that are measured of the published ones
_ROWS = 2048  # inputs that a pruner's statistic is made of


@dataclass(frozen=True)
class Strategy:
    """Windows as they are used, and those of them that are timed."""

    name: str
    used: Windows
    timed: Windows


def strategies(rows: int = 2000) -> list[Strategy]:
    """Whole matrices, the default windows, and the published ones."""
    few = Farms.released_linear(rows, 1.0, TIMED)
    return [
        Strategy("whole", WholeMatrix(), WholeMatrix()),
        Strategy("farms", Farms(), Farms()),
        *(Strategy(f"{rows} x {k}", Farms.released_linear(rows, 1.0, k), few) for k in (10, 15)),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = parser("pruning", __doc__).parse_args(argv)
    if reason := no_cuda(options.device):
        sys.stderr.write(f"{reason}\n")
        return 0
    device, model = torch.device(options.device), MODELS[0]
    with threads_kept() as threads:
        record = Record("pruning", options.device)
        measured = measuring(model, strategies(), device)
        fitted = fitting((20_000, 450_000) if options.full else (20_000,), device)
        pruned = pruning(_shapes(model, options.full), device)
    parts = {"measuring": measured, "fitting": fitted, "pruning": pruned}
    rows = [{"part": part, **row} for part, some in parts.items() for row in some]
    record.save(rows, {"model": model.name, "full": options.full}, options.json)
    for title, rows in parts.items():
        console().print(_table(f"{title}, {model.name} shapes, {threads} thread(s)", rows))
    return 0


def measuring(
    model: Transformer, chosen: Sequence[Strategy], device: torch.device
) -> list[dict[str, Any]]:
    """Seconds of one matrix of each shape, and reckoned from them those of the whole model."""
    weights = [w for w in model.weights() if w.name != "head"]
    shapes = list(dict.fromkeys(w.shape for w in weights))
    known: dict[tuple[Windows, tuple[int, ...]], float] = {}
    rows = []
    for strategy in chosen:
        total = 0.0
        for shape in shapes:
            same = [w for w in weights if w.shape == shape]
            key = (strategy.timed, shape)
            if key not in known:
                known[key] = _measure(shape, strategy.timed, device)
            share = work(same[0], strategy.used).windows / work(same[0], strategy.timed).windows
            total += known[key] * share * len(same)
        rows.append(
            {
                "strategy": strategy.name,
                "windows_of_the_model": sum(work(w, strategy.used).windows for w in weights),
                "timed_s": sum(known[strategy.timed, shape] for shape in shapes),
                "reckoned_model_s": total,
            }
        )
    return rows


def _measure(shape: tuple[int, ...], windows: Windows, device: torch.device) -> float:
    with torch.device(device):
        layer = nn.Linear(shape[2], shape[1], bias=False)
    layers = find_layers(layer).layers
    return wall_seconds(lambda: measure(layers, windows=windows), device)


def fitting(sizes: Sequence[int], device: torch.device) -> list[dict[str, Any]]:
    """Seconds of each fit on one spectrum of so many eigenvalues (450,000: 15 x 15 of 2,000)."""
    rows = []
    for size in sizes:
        values = _spectrum(size).to(device)
        first = torch.zeros(1, dtype=torch.long, device=device)
        for name, fit in FITS.items():
            rows.append({"fit": name, "eigenvalues": size, "s": _fit(fit, values, first)})
    return rows


def _fit(fit: Fit, values: Tensor, first: Tensor) -> float:
    start = time.perf_counter()
    float(fit(values, first).alpha)
    return time.perf_counter() - start


def _spectrum(size: int) -> Tensor:
    """Marchenko-Pastur-like bulk with a Pareto tail, ascending: (1, size) float64."""
    generator = torch.Generator().manual_seed(0)
    bulk = torch.rand(size - size // 4, generator=generator, dtype=torch.float64).square()
    tail = torch.rand(size // 4, generator=generator, dtype=torch.float64).pow(-1 / 2.5)
    return torch.cat([bulk + 1e-6, tail]).sort().values.unsqueeze(0)


def pruning(shapes: Sequence[tuple[int, int]], device: torch.device) -> list[dict[str, Any]]:
    """Seconds of a pruner on one matrix (out, in), its statistic included."""
    methods: dict[str, Method] = {
        "magnitude": Magnitude(),
        "wanda": Wanda(),
        "sparsegpt": SparseGPT(),
    }
    rows = []
    for out, inputs in shapes:
        weight = torch.randn(out, inputs, device=device)
        batch = torch.randn(1, _ROWS, inputs, device=device)
        for name, method in methods.items():
            seconds = wall_seconds(lambda m=method: _prune(m, weight, batch), device)  # type: ignore[misc]  # noqa: B023
            rows.append({"pruner": name, "out": out, "in": inputs, "s": seconds})
    return rows


def _prune(method: Method, weight: Tensor, batch: Tensor) -> Tensor:
    statistic = method.statistic(weight)
    if statistic is not None:
        statistic.add(batch)
    return method(weight, 0.7, statistic)


def _shapes(model: Transformer, full: bool) -> list[tuple[int, int]]:
    square = (model.width, model.width)
    return [square, (model.ffn, model.width), (model.width, model.ffn)] if full else [square]


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{v:,.2f}" if isinstance(v, float) else f"{v}" for v in row.values()))
    return table


if __name__ == "__main__":
    raise SystemExit(main())
