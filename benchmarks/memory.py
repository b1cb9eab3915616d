"""Peak extra memory of a measurement: on a CPU that of a fresh process, on a GPU the allocator's.

    python -m benchmarks.memory --cases llm_layer

Above the model itself, which is there before. One case is a layer of a large language model: its
windows go through in chunks of the budget, and no second copy of the weight is made.
"""

from __future__ import annotations

import functools
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import nn

from benchmarks import agreement
from benchmarks.clocks import wall_seconds
from benchmarks.command import Record, console, no_cuda, parser, progress, threads_kept
from benchmarks.machine import peak_extra_memory
from benchmarks.networks import NETWORKS
from tempbalance import Farms
from tempbalance.layers.find import find_layers
from tempbalance.measure.measurement import DEFAULT_BUDGET, measure
from tempbalance.spectra.windows import Windows


@dataclass(frozen=True)
class Case:
    """A network of the benchmarks, or a single bf16 layer of ``shape`` (out, in)."""

    name: str
    windows: Windows
    network: str = ""
    shape: tuple[int, int] = (0, 0)
    budget: int = DEFAULT_BUDGET

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        if self.network:
            return NETWORKS[self.network].build()
        return _bf16(self.shape)


def _bf16(shape: tuple[int, int]) -> nn.Module:
    out, into = shape
    with torch.device("meta"):
        layer = nn.Linear(into, out, bias=False, dtype=torch.bfloat16)
    layer = layer.to_empty(device="cpu")
    with torch.no_grad():  # a piece at a time: nothing larger than the weight ever exists
        for rows in layer.weight.split(256):
            rows.copy_(torch.randn(rows.shape) / into**0.5)
    return layer


_LLM = (28672, 8192)
CASES = (
    *(Case(n, Farms(), n) for n in ("resnet18", "vgg16", "wrn28_10", "gpt2_full", "fno64")),
    Case("llm_layer", Farms(rows=512), shape=_LLM),
    Case("llm_layer, budget 64 MiB", Farms(rows=512), shape=_LLM, budget=64 * 2**20),
)
# One window of the full width: minutes on a CPU.
LARGE = (Case("llm_layer, whole width", Farms(), shape=_LLM),)
TINY = (Case("tiny", Farms(rows=64), shape=(512, 256)),)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if the memory is above the budget and above a single window's."""
    made = parser("memory", __doc__)
    every = [c.name for c in (*CASES, *LARGE)]
    made.add_argument("--cases", nargs="+", choices=every)
    made.add_argument("--tiny", action="store_true", help="a small layer, to try this command")
    options = made.parse_args(argv)
    if reason := no_cuda(options.device):
        print(reason)
        return 1
    cases = CASES + (LARGE if options.full or options.device == "cuda" else ())
    if options.cases:
        cases = tuple(c for c in (*CASES, *LARGE) if c.name in options.cases)
    cases = TINY if options.tiny else cases
    out, record = console(), Record("memory", options.device)
    rows = []
    with progress(len(cases)) as step, threads_kept():
        for case in cases:
            step(case.name)
            rows.append(bench(case, options.device))
    file = record.save(rows, {}, options.json)
    _print(out, rows)
    out.print(f"written to {file}", highlight=False)
    return int(any(row["over_budget"] for row in rows))


def bench(case: Case, device: str) -> dict[str, Any]:
    """A row: bytes of the model, of the measurement above it, and the budget."""
    error: float | None
    if case.network:
        layers = find_layers(case.build().to(device)).layers
        error = agreement.require(layers, case.windows, case.name)
        del layers
    else:  # a corner, in the same dtype: the whole has thousands of windows
        side = max(case.windows.grid(*case.shape).width, 64)
        corner = _bf16((min(2 * side, case.shape[0]), min(side, case.shape[1])))
        small = find_layers(corner.to(device)).layers
        # A window of the full width takes a float64 solver many minutes.
        error = agreement.require(small, case.windows, case.name) if side <= 2048 else None
    if device == "cuda":
        figures = _on_cuda(case)
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            figures = pool.submit(_on_cpu, case).result()
    allowed = max(case.budget, figures["window_bytes"])
    peak = figures["peak_extra_bytes"]
    return {
        "case": case.name,
        "windows": named(case.windows),
        "alpha_error": error,
        "budget_bytes": case.budget,
        **figures,
        "over_budget": peak is not None and peak > 1.1 * allowed,
    }


def named(windows: Windows) -> str:
    """As one would write it: what differs from the defaults."""
    if not isinstance(windows, Farms):
        return repr(windows)
    default = Farms()
    changed = [f"{k}={v!r}" for k, v in vars(windows).items() if v != getattr(default, k)]
    return f"Farms({', '.join(changed)})"


def _figures(case: Case, model: nn.Module) -> dict[str, Any]:
    grids = [case.windows.grid(*layer.shape[1:]) for layer in find_layers(model).layers]
    largest = max(grid.height * grid.width for grid in grids)
    return {
        "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        # Two float32 copies, the Gram matrix and the solver's, and the stored form.
        "window_bytes": 6 * 4 * largest,
    }


def _on_cpu(case: Case) -> dict[str, Any]:
    measure(find_layers(nn.Linear(300, 300)).layers)  # what torch and MKL load once
    model = case.build()
    layers = find_layers(model).layers
    seconds = 0.0

    def work() -> None:
        nonlocal seconds
        run = functools.partial(measure, layers, windows=case.windows, budget=case.budget)
        seconds = wall_seconds(run, torch.device("cpu"))

    peak = peak_extra_memory(work)
    return {**_figures(case, model), "peak_extra_bytes": peak, "seconds": seconds}


def _on_cuda(case: Case) -> dict[str, Any]:
    model = case.build().to("cuda")
    layers = find_layers(model).layers
    run = functools.partial(measure, layers, windows=case.windows, budget=case.budget)
    measure(find_layers(nn.Linear(300, 300).to("cuda")).layers)  # the solver's own handles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds = wall_seconds(run, torch.device("cuda"))
    peak = torch.cuda.max_memory_allocated() - before
    return {**_figures(case, model), "peak_extra_bytes": peak, "seconds": seconds}


def _print(out: Any, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(box=None)
    for title in ("case", "windows", "model MiB", "extra MiB", "budget MiB", "one window", "s"):
        table.add_column(title, justify="left" if title in ("case", "windows") else "right")
    for row in rows:
        peak = row["peak_extra_bytes"]
        color = "red" if row["over_budget"] else "green"
        table.add_row(
            row["case"],
            row["windows"],
            f"{row['model_bytes'] / 2**20:.0f}",
            "unknown" if peak is None else f"[{color}]{peak / 2**20:.0f}[/]",
            f"{row['budget_bytes'] / 2**20:.0f}",
            f"{row['window_bytes'] / 2**20:.1f}",
            f"{row['seconds']:.2f}",
        )
    out.print(table)


if __name__ == "__main__":
    sys.exit(main())
