"""docs/benchmarks.md, made from whatever figures benchmarks/results holds.

python -m benchmarks.report
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import model, training
from benchmarks.command import RESULTS, read
from benchmarks.llm import Weight, together, work
from benchmarks.rates import Rates, Roofline, measured
from tempbalance import Farms

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
DEVICES = ("cpu", "cuda")
_FORMS = ("library", "triton")
Files = dict[str, dict[str, Any] | None]


def write(folder: Path = RESULTS, page: Path = PAGE) -> Path:
    """Make the page anew, and return its path."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text(folder), encoding="utf-8")
    return page


def text(folder: Path = RESULTS) -> str:
    """The page: a section a benchmark, a missing device with the command that measures it."""
    parts = [
        "# Benchmarks\n\nMade by `python -m benchmarks.report` from `benchmarks/results/`; not "
        "edited by hand. `make bench` measures all of it again (`benchmarks/README.md` says how). "
        "Before any time is reported, alpha of every layer is compared with float64."
    ]
    for name, title, section in SECTIONS:
        files = {device: read(name, device, folder) for device in DEVICES}
        lines = [f"## {title}", *_machines(name, files)]
        if any(files.values()):
            lines += section(files)
        parts.append("\n\n".join(lines))
    parts.append("\n\n".join(["## Large language models: a model of the cost", *_model(folder)]))
    return "\n\n".join(parts) + "\n"


# --- pieces --------------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def _machines(name: str, files: Files) -> list[str]:
    rows = []
    for device, content in files.items():
        if content is None:
            if device == "cuda" and name == "ranks":
                continue
            why = "no GPU at hand" if device == "cuda" else "not yet"
            command = f"python -m benchmarks.{name} --device {device}"
            rows.append((device.upper(), f"not run ({why}): `{command}`", "", "", "", ""))
            continue
        m = content["machine"]
        where = m.get("gpu") or m["cpu"]
        threads = str(m["threads"])
        if "threads_after" in m:
            threads += f" before, {m['threads_after']} after"
        busy = f"{m['load_average']} to {m['load_average_after']}"
        commit = str(m["commit"] or "unknown")
        commit = commit[:10] + ("+" if commit.endswith("+") else "")
        rows.append((device.upper(), where, m["torch"], threads, busy, commit))
    return [_table(("", "device", "torch", "torch threads", "load", "commit"), rows)]


def _ms(values: Sequence[float]) -> str:
    value = 1000 * statistics.median(values)
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _mib(count: float | None) -> str:
    return "" if count is None else f"{count / 2**20:,.0f}"


# --- sections ------------------------------------------------------------------------------------


def _measure(files: Files) -> list[str]:
    by_case: dict[tuple[str, str], dict[str, Any]] = {}
    for device, content in files.items():
        for row in content["rows"] if content else ():
            by_case.setdefault((row["network"], row["weights"]), {})[device] = row
    rows = []
    for (network, weights), found in by_case.items():
        first = next(iter(found.values()))
        label = f"{network}, {weights}" + (f" ({first['note']})" if first["note"] else "")
        errors = [row["alpha_error"] for row in found.values() if "alpha_error" in row]
        cpu, cuda = found.get("cpu", {}), found.get("cuda", {})
        rows.append((
            label if any("times" in row for row in found.values()) else f"{network}, {weights}",
            f"{max(errors):.0e}" if errors else "",
            *_ratio(cpu), "" if not cpu.get("target") else f"{cpu['target']:.1f}",
            *_ratio(cuda), str(cuda.get("synchronizations", "")),
            _mib(cuda.get("peak_extra_bytes")),
        ))  # fmt: skip
    ratio = ("ours ms", "ratio (range)")
    header = ("network, weights", "alpha error", "CPU: loop ms", *ratio, "target",
              "CUDA: loop ms", *ratio, "host waits", "peak MiB")  # fmt: skip
    return [
        "Loop: one `svdvals` a window, the published way, on the same weights in the same process, "
        "in turn. Medians; the ratio is the median of pairs.",
        _table(header, rows),
    ]


def _ratio(row: dict[str, Any]) -> tuple[str, str, str]:
    if "times" not in row:
        return "", "", str(row.get("note", "not run")).partition("(")[0]
    times = row["times"]
    if "loop" not in times:
        return "", _ms(times["measure"]), ""
    low, high = row["ratio_range"]
    several = f" ({low:.1f} to {high:.1f})" if low != high else ""
    return _ms(times["loop"]), _ms(times["measure"]), f"{row['ratio']:.2f}{several}"


def _training(files: Files) -> list[str]:
    parts = []
    header = (
        "measured each",
        "options",
        "by division",
        "really (range)",
        "samples/s without, with",
    )
    for device, content in files.items():
        for row in content["rows"] if content else ():
            if "trained" not in row:
                parts.append(f"{device.upper()}, {row['case']}: {row['note']}")
                continue
            one, update = (f"{1000 * row[k][1]:,.1f}" for k in ("step_quartiles",
                                                                 "update_quartiles"))  # fmt: skip
            parts.append(
                f"**{device.upper()}, {row['case']}**: {row['note']}. A step takes {one} ms, an "
                f"update {update} ms."
            )
            parts.append(_table(header, (training.cells(row, r) for r in row["trained"])))
    about = (
        "Share of the training time that measuring takes: by division, the seconds of an update "
        "over those of the steps between; really, two replicas that train in turn, with "
        "`TempBalanceLR` and without."
    )
    return [about, *parts]


def _memory(files: Files) -> list[str]:
    rows = []
    for device, content in files.items():
        for row in content["rows"] if content else ():
            rows.append((device.upper(), row["case"], f"`{row['windows']}`",
                         _mib(row["model_bytes"]), _mib(row["peak_extra_bytes"]),
                         _mib(row["budget_bytes"]), f"{row['seconds']:.2f}"))  # fmt: skip
    header = ("", "case", "windows", "model MiB", "extra MiB", "budget MiB", "s")
    return ["Above the model, at most, during one measurement (CPU: resident memory of a fresh "
            "process; CUDA: the allocator). `llm_layer` is one bf16 layer of 28672 x 8192.",
            _table(header, rows)]  # fmt: skip


def _ranks(files: Files) -> list[str]:
    content = files["cpu"]
    rows = [
        (row["network"], str(row["ranks"]), _ms(row["times"]), f"{row['speedup']:.2f}",
         f"{1000 * row['wait']:.1f}", f"{1000 * row['exchange']:.2f}",
         f"{100 * row['exchange'] / row['seconds']:.1f}%",
         " + ".join(map(str, row["layers"])))
        for row in (content["rows"] if content else ())
    ]  # fmt: skip
    header = ("network", "ranks", "ms", "speed-up", "waited ms", "exchange ms",
              "share of the exchange", "layers")  # fmt: skip
    return ["Processes of one thread each, joined by gloo.", _table(header, rows)]


def _growth(files: Files) -> list[str]:
    rows = []
    for device, content in files.items():
        for row in content["rows"] if content else ():
            points = ", ".join(f"{p['size']}: {_ms(p['times'])}" for p in row["points"])
            rows.append((device.upper(), row["series"], row["what"], points,
                         f"{row['exponent']:.2f}", f"{row['exponent_of_last_two']:.2f}",
                         f"{row['exponent_of_operations']:g}"))  # fmt: skip
    header = ("", "series", "what", "ms by size", "exponent", "of the last two", "of operations")
    return ["Time ~ size^exponent (`windows`: number of windows; `rates`: seconds a window).",
            _table(header, rows), "![growth](images/benchmark_growth.png)"]  # fmt: skip


def _groups(files: Files) -> list[str]:
    rows = []
    for device, content in files.items():
        for row in content["rows"] if content else ():
            shares = [f"{100 * row['share'][way]:+.2f}%" for way in ("TempBalanceLR", "StepHooks")]
            rows.append((device.upper(), row["network"],
                         f"{row['optimizer']} {row['implementation']}", str(row["groups"]),
                         _ms(row["times"]["one group"]), _ms(row["times"]["TempBalanceLR"]),
                         f"{1000 * row['training_step']:,.1f}", *shares))  # fmt: skip
    header = ("", "network", "optimizer", "groups", "one group ms", "a group a layer ms",
              "training step ms", "share of it", "StepHooks")  # fmt: skip
    return ["What a param group a layer costs `optimizer.step()`; nothing is measured meanwhile.",
            _table(header, rows)]  # fmt: skip


def _eigensolver(files: Files) -> list[str]:
    rows = []
    for device, content in files.items():
        by_case: dict[str, dict[str, Any]] = {}
        for row in content["rows"] if content else ():
            by_case.setdefault(row["case"], {})[row["form"]] = row
        for case, forms in by_case.items():
            cells = [f"{forms[f]['ms']:.2f}" if "ms" in forms.get(f, {}) else "" for f in _FORMS]
            rows.append((device.upper(), case, *cells))
    return ["Milliseconds for the eigenvalues of `batch x n` matrices, or of all windows of a "
            "network: the library's `eigvalsh`, and our own kernels.",
            _table(("", "case", *_FORMS), rows)]  # fmt: skip


def _model(folder: Path) -> list[str]:
    rates: Rates = measured("cuda", folder) or Roofline()
    a = model.Assumptions()
    updates = model.sweep(rates, a)
    sources = "; ".join(f"{m.name}: {m.source}" for m in model.MODELS)
    return [
        "What one update needs (`python -m benchmarks.model`). Counted: windows, operations and "
        "bytes, from the library's own windows; the load of every rank, from its own sharing. "
        f"**Seconds a window on a GPU: {rates.source}.** Shapes: {sources}. Nothing is overlapped "
        "with training. Numbers of GPUs that cannot hold the training are left out.",
        "Assumptions: " + ", ".join(f"`{each}`" for each in model.assumptions(a, rates)) + ".",
        "The work grows with the side of the windows: halving it halves the seconds on the "
        "devices. Under FSDP2 gathering the weights does not shrink with more ranks.",
        _table(model.COLUMNS, (model.cells(u) for u in updates)),
        "The largest windows that stay under 1% when measuring each 100 steps, or else the "
        "cheapest:\n\n" + "\n".join(f"- {line}" for line in model.advice(updates)),
        "Windows of another size measure something else: choose once, and keep to it. Seconds of "
        "one device for one layer of 28672 x 8192, by window:",
        _one_layer(rates, folder),
    ]


def _one_layer(rates: Rates, folder: Path) -> str:
    cpu = measured("cpu", folder)
    rows = []
    for side in (512, 1024, 2048, 4096, None):
        some = together([work(Weight("up", (1, 28672, 8192)), Farms(rows=side))])
        rows.append((
            "`Farms()`" if side is None else f"`Farms(rows={side})`",
            f"{some.windows:,}",
            f"{rates.seconds(some):.2g}",
            "not run" if cpu is None else f"{cpu.seconds(some):.3g}",
        ))  # fmt: skip
    about = "not run" if cpu is None else cpu.source
    header = ("windows", "count", f"GPU s ({rates.source})", f"CPU s ({about})")
    return _table(header, rows)


SECTIONS: tuple[tuple[str, str, Callable[[Files], list[str]]], ...] = (
    ("measure", "One measurement", _measure),
    ("training", "Share of a training", _training),
    ("optimizer_groups", "Many param groups", _groups),
    ("memory", "Memory", _memory),
    ("ranks", "One and two ranks", _ranks),
    ("growth", "Growth", _growth),
    ("eigensolver", "Eigenvalues of a batch", _eigensolver),
)


if __name__ == "__main__":
    print(write())
    sys.exit()
