"""Time of the eigenvalues of a batch: the library, and each form of our own solver.

    python -m benchmarks.eigensolver --device cuda --repeats 15

Agreement comes first: every form against LAPACK in float64, in units of rounding of the largest
eigenvalue; one that disagrees gets no time. A case is one batch, or all batches of a network after
one another. On a GPU the times are those between two events, and the number of times that the host
waited is counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import describe, load
from tempbalance.spectra.eigensolver.solver import Form, eigvalsh

RESULTS = Path(__file__).parent / "results"

# (n, matrices): the windows of the published experiments, and a row over sizes.
CASES: dict[str, list[tuple[int, int]]] = {
    **{f"{batch} x {n}": [(n, batch)] for n, batch in (
        (20, 144), (32, 64), (64, 56), (100, 9), (128, 47), (256, 47), (512, 27), (768, 22),
        (1024, 16))},
    "resnet18": [(3, 189), (64, 56), (100, 9), (128, 47), (256, 47), (512, 27)],
    "vgg16": [(3, 189), (64, 27), (100, 9), (128, 27), (256, 36), (512, 45)],
    "gpt2": [(768, 144)],
}  # fmt: skip
FORMS = ("library", "torch", "graph", "triton")
# On a CPU the torch form is there for its results: what takes long is left out.
CPU_CASES = [name for name, batches in CASES.items() if sum(b * n**3 for n, b in batches) < 1e9]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a form disagrees."""
    options = _parse(argv)
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype)
    machine = describe(options.device)
    rows = [
        _case(name, form, dtype, device, options.repeats)
        for name in options.cases or (CASES if device.type == "cuda" else CPU_CASES)
        for form in (FORMS if device.type == "cuda" else FORMS[:2])
    ]
    machine["load_average_after"] = load()
    content = {"machine": machine, "repeats": options.repeats, "dtype": options.dtype,
               "cases": rows}  # fmt: skip
    file = Path(options.json or RESULTS / f"eigensolver_{options.device}.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    _print(machine, rows, options)
    return int(any(row.get("agrees") is False for row in rows))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.eigensolver",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", nargs="+", choices=CASES)
    parser.add_argument("--dtype", choices=("float32", "float64", "complex64", "complex128"),
                        default="float32")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", metavar="FILE", help="default: benchmarks/results/")
    return parser.parse_args(argv)


def _case(
    name: str, form: str, dtype: torch.dtype, device: torch.device, repeats: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"case": name, "form": form, "batches": CASES[name]}
    batches = [_windows(n, count, dtype, device) for n, count in CASES[name]]

    def work() -> list[Tensor]:
        if form == "library":
            return [torch.linalg.eigvalsh(a, UPLO="U") for a in batches]
        wanted: Form = form  # type: ignore[assignment]
        return [eigvalsh(a, form=wanted) for a in batches]

    try:
        start = time.perf_counter()
        found = work()
        row["first_call_s"] = time.perf_counter() - start
        row["error_eps"] = max(map(_error, batches, found))
    except RuntimeError as error:
        return {**row, "note": str(error).splitlines()[0]}
    # Four units of rounding a reflection, added up at random, as in the tests.
    row["agrees"] = row["error_eps"] <= 8 * (1 + max(n for n, _ in CASES[name]) ** 0.5)
    if not row["agrees"]:
        return {**row, "note": f"off by {row['error_eps']:.1f} units: no time is given"}
    # A loop over matrices takes seconds: once is enough of it.
    often = repeats if _milliseconds(work, device) < 1000 else 1
    row["times_ms"] = [_milliseconds(work, device) for _ in range(often)]
    row["ms"] = statistics.median(row["times_ms"])
    if device.type == "cuda":
        row["synchronizations"] = _synchronizations(work)
    return row


def _windows(n: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Gram matrices of random square windows."""
    generator = torch.Generator().manual_seed(n)
    a = torch.randn(count, n, n, dtype=dtype, generator=generator).to(device)
    return a.mH @ a / n


def _error(batch: Tensor, found: Tensor) -> float:
    """Of the first four matrices, in units of rounding of the largest eigenvalue."""
    some = batch[:4].cpu()
    truth = np.linalg.eigvalsh(some.to(torch.complex128 if some.is_complex() else torch.float64),
                               UPLO="U")  # fmt: skip
    error = np.abs(found[:4].double().cpu().numpy() - truth) / np.abs(truth).max(-1, keepdims=True)
    return float(error.max() / torch.finfo(batch.dtype).eps)


def _milliseconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def _synchronizations(work: Callable[[], object]) -> int:
    """How often the host waited for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.set_warn_always(False)
    return sum("synchroniz" in str(w.message) for w in caught)


def _print(
    machine: dict[str, Any], rows: Sequence[dict[str, Any]], options: argparse.Namespace
) -> None:
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    table = Table(
        title=f"{where}, torch {machine['torch']}, {options.dtype}, {options.repeats} repeats",
        title_justify="left",
        box=None,
    )
    for title in ("case", "form"):
        table.add_column(title)
    for title in ("ms (range)", "error, eps", "waits"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        times = row.get("times_ms")
        shown = f"{row['ms']:.2f} ({min(times):.2f} to {max(times):.2f})" if times else row["note"]
        error = f"{row['error_eps']:.1f}" if "error_eps" in row else ""
        table.add_row(row["case"], row["form"], shown, error, str(row.get("synchronizations", "")))
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)


if __name__ == "__main__":
    sys.exit(main())
