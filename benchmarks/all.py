"""All benchmarks, one after another, and the page of tables that they make.

    python -m benchmarks.all                   # minutes; on CUDA where there is a GPU
    python -m benchmarks.all --only measure growth --device cpu
    python -m benchmarks.all --full

Each runs in a process of its own and writes benchmarks/results/<name>_<device>.json; from whatever
files there are, docs/benchmarks.md is made anew. One that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import report
from benchmarks.command import MARK, PROGRESS

NAMES = ("measure", "training", "growth", "memory", "ranks", "optimizer_groups", "eigensolver")
_CPU_ONLY = ("ranks",)


def available(device: str) -> list[str]:
    """Benchmarks that this checkout has for a device."""
    return [
        name
        for name in NAMES
        if importlib.util.find_spec(f"benchmarks.{name}") is not None
        and not (device == "cuda" and name in _CPU_ONLY)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run them; 1 if one failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.all",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=here)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=available("cpu"),
                        help=", ".join(available("cpu")))  # fmt: skip
    parser.add_argument("--full", action="store_true", help="larger sizes and more repeats")
    options = parser.parse_args(argv)
    names = [n for n in available(options.device) if not options.only or n in options.only]
    ends: dict[str, tuple[int, float]] = {}
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<44.44}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
    )
    wide = Console(width=None if Console().is_terminal else 140)
    with Progress(*columns, console=wide) as bar:
        overall = bar.add_task("all benchmarks", total=len(names))
        for name in names:
            ends[name] = _run(name, options, bar)
            bar.advance(overall)
    table = Table("benchmark", "result", "seconds", box=None)
    for name, (code, seconds) in ends.items():
        result = "[green]done[/]" if code == 0 else f"[red]failed ({code})[/]"
        table.add_row(name, result, f"{seconds:.0f}")
    wide.print(table)
    wide.print(f"tables: {report.write()}", highlight=False)
    return int(any(code for code, _ in ends.values()))


def _run(name: str, options: argparse.Namespace, bar: Progress) -> tuple[int, float]:
    """Exit status and seconds of one benchmark; what it prints appears above the display."""
    task = bar.add_task(name, total=1)
    command = [sys.executable, "-m", f"benchmarks.{name}", "--device", options.device]
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(
            command + ["--full"] * options.full,
            cwd=Path(__file__).resolve().parents[1],
            env={**os.environ, PROGRESS: "1"},
            stdout=printed,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        others = []
        for line in process.stderr:
            if not line.startswith(MARK):
                others.append(line)
                continue
            count, _, what = line[1:].strip().partition(" ")
            done, _, total = count.partition("/")
            bar.update(task, completed=int(done), total=int(total), description=f"{name}: {what}")
        code = process.wait()
        printed.seek(0)
        bar.console.rule(name, align="left")
        bar.console.print(escape(printed.read()), highlight=False)
        if others:
            bar.console.print(escape("".join(others)[-4000:]), style="dim", highlight=False)
    bar.remove_task(task)
    return code, time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
