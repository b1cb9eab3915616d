"""Time of the eigenvalues of a batch: the library, and our own kernels on request.

    python -m benchmarks.eigensolver --device cuda --full

Agreement comes first: every form against LAPACK in float64, in units of rounding of the largest
eigenvalue; one that disagrees gets no time. A case is one batch, or all batches of a network after
one another. On a GPU the times are those between two events, and the number of times that the host
waited is counted. Without ``--full`` the networks and a few sizes; on a CPU what takes seconds is
left out.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from benchmarks.command import Record, console, no_cuda, parser, progress, threads_kept
from tempbalance.spectra import gram
from tempbalance.spectra.eigensolver.solver import LARGEST, SMALLEST, VARIABLE, eigvalsh

# (n, matrices): the windows of the published experiments, and a row over sizes.
SIZES = ((20, 144), (32, 64), (64, 56), (100, 9), (128, 47), (256, 47), (512, 27), (768, 22),
         (1024, 16))  # fmt: skip
CASES: dict[str, list[tuple[int, int]]] = {
    **{f"{batch} x {n}": [(n, batch)] for n, batch in SIZES},
    "resnet18": [(3, 189), (64, 56), (100, 9), (128, 47), (256, 47), (512, 27)],
    "vgg16": [(3, 189), (64, 27), (100, 9), (128, 27), (256, 36), (512, 45)],
    "gpt2": [(768, 144)],
}
QUICK = ("56 x 64", "47 x 256", "resnet18", "vgg16")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a form disagrees."""
    made = parser("eigensolver", __doc__)
    made.add_argument("--cases", nargs="+", choices=CASES)
    made.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    made.add_argument("--repeats", type=int)
    options = made.parse_args(argv)
    if reason := no_cuda(options.device):
        print(reason)
        return 1
    device = torch.device(options.device)
    repeats = options.repeats or (15 if options.full else 5)
    forms = ("library", "triton") if device.type == "cuda" else ("library",)
    names = options.cases or [n for n in CASES if options.full or n in QUICK]
    if device.type == "cpu" and not options.cases and not options.full:
        names = [n for n in names if sum(count * k**3 for k, count in CASES[n]) < 1e9]
    record, rows = Record("eigensolver", options.device), []
    with progress(len(names) * len(forms)) as step, threads_kept():
        for name in names:
            for form in forms:
                step(f"{name}, {form}")
                rows.append(_case(name, form, getattr(torch, options.dtype), device, repeats))
    settings = {"repeats": repeats, "dtype": options.dtype}
    file = record.save(rows, settings, options.json)
    _print(record.machine, rows, settings)
    console().print(f"written to {file}", highlight=False)
    return int(any(row.get("agrees") is False for row in rows))


@contextlib.contextmanager
def _wish(form: str) -> Iterator[None]:
    """The environment that asks for a form."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = form
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before


def _case(
    name: str, form: str, dtype: torch.dtype, device: torch.device, repeats: int
) -> dict[str, Any]:
    with _wish(form):
        return _timed(name, form, dtype, device, repeats)


def _timed(
    name: str, form: str, dtype: torch.dtype, device: torch.device, repeats: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"case": name, "form": form, "batches": CASES[name]}
    batches = [_windows(n, count, dtype, device) for n, count in CASES[name]]

    def work() -> list[Tensor]:
        return [gram.solve(a) for a in batches]

    try:
        start = time.perf_counter()
        found = work()
        row["first_call_s"] = time.perf_counter() - start
        row["error_eps"] = max(map(_error, batches, found))
    except RuntimeError as error:
        return {**row, "note": str(error).splitlines()[0]}
    ours = [a for a in batches if SMALLEST <= a.shape[-1] <= LARGEST]
    if form == "triton" and not (ours and all(eigvalsh(a) is not None for a in ours)):
        return {**row, "note": "the library did it (see the log)"}
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
    machine: dict[str, Any], rows: Sequence[dict[str, Any]], settings: dict[str, Any]
) -> None:
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    table = Table(
        title=f"{where}, torch {machine['torch']}, {settings['dtype']}, "
        f"{settings['repeats']} repeats",
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
    console().print(table)


if __name__ == "__main__":
    sys.exit(main())
