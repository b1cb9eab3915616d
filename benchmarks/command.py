"""What all benchmarks share: options, a progress display, threads left alone, a file of figures."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.machine import describe, load

RESULTS = Path(__file__).parent / "results"
# Set by benchmarks.all, which draws the progress of the processes that it starts.
PROGRESS = "TEMPBALANCE_BENCH_PROGRESS"
MARK = "\x1e"


def parser(name: str, doc: str | None, cuda: bool = True) -> argparse.ArgumentParser:
    """Options of every benchmark: ``--device``, ``--full``, ``--json``."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    devices = ("cpu", "cuda") if cuda else ("cpu",)
    made.add_argument("--device", choices=devices, default="cpu")
    made.add_argument("--full", action="store_true", help="larger sizes and more repeats")
    made.add_argument("--json", metavar="FILE", help="default: benchmarks/results/")
    return made


def console() -> Console:
    """For tables: as wide as the terminal, or 140 columns where there is none."""
    made = Console()
    return made if made.is_terminal else Console(width=140)


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Yield a function to call before each of ``total`` steps, with what the step is."""
    if os.environ.get(PROGRESS):
        done = iter(range(total + 1))

        def say(what: str) -> None:
            print(f"{MARK}{next(done, total)}/{total} {what}", file=sys.stderr, flush=True)

        yield say
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        started = False

        def step(what: str) -> None:
            nonlocal started
            bar.update(task, description=what, advance=int(started))
            started = True

        yield step


@contextlib.contextmanager
def threads_kept() -> Iterator[int]:
    """Yield the number of threads, and see that it is the same afterwards.

    Raises:
        AssertionError: if the work changed it.
    """
    before = torch.get_num_threads()
    yield before
    after = torch.get_num_threads()
    if after != before:
        raise AssertionError(f"torch.get_num_threads() was {before} and is {after} afterwards")


class Record:
    """One file of figures: where and how they were measured, and a row a case."""

    def __init__(self, name: str, device: str) -> None:
        self.name, self.device = name, device
        self.machine = describe(device)

    def save(
        self, rows: Sequence[dict[str, Any]], settings: dict[str, Any], file: str | None = None
    ) -> Path:
        """Write ``results/<name>_<device>.json`` (or ``file``), and return its path."""
        self.machine["load_average_after"] = load()
        self.machine["threads_after"] = torch.get_num_threads()
        path = Path(file or RESULTS / f"{self.name}_{self.device}.json")
        content = {"machine": self.machine, "settings": settings, "rows": list(rows)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return path


def read(name: str, device: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """A file of figures, or None where it was not measured."""
    path = folder / f"{name}_{device}.json"
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def no_cuda(device: str) -> str:
    """Why nothing can run on this device, or an empty string."""
    return "no GPU at hand" if device == "cuda" and not torch.cuda.is_available() else ""
