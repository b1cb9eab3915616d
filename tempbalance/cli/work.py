"""Work: what several subcommands do: measure a checkpoint, show progress, write what was found."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from tempbalance.analysis.analyze import analyze
from tempbalance.analysis.details import Details
from tempbalance.analysis.files import open_checkpoint
from tempbalance.analysis.guess import Guess, guess_layers
from tempbalance.analysis.report import Report
from tempbalance.cli import options as given
from tempbalance.cli.checkpoints import load_into, read_state
from tempbalance.cli.options import PICTURES, UsageError

OK, FOUND, UNUSABLE = 0, 1, 2


def network(options: argparse.Namespace, path: str) -> nn.Module | Guess:
    """What is to be measured: a model with the weights in it or, without ``--model``, the file."""
    if options.model is None:
        if options.model_arg:
            raise UsageError("--model-arg has no meaning without --model")
        try:
            return guess_layers(
                open_checkpoint(path, options.key), given.fused(options), options.device
            )
        except RuntimeError as error:
            raise UsageError(f"--device {options.device}: {str(error).splitlines()[0]}") from error
    model = given.model(options)
    if getattr(options, "plot_layer", None):
        given.check_layers(options, model)
    loaded = load_into(model, read_state(path, options.key), path)
    if loaded.ignored:
        note(
            f"{path}: measured what is under {loaded.prefix!r}; left out {len(loaded.ignored)} "
            f"other tensors ({', '.join(loaded.ignored[:3])})"
        )
    try:
        return model.to(options.device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {options.device}: {str(error).splitlines()[0]}") from error


def report(options: argparse.Namespace, path: str) -> Report:
    """Measure a checkpoint as the options say."""
    method = measuring(options)
    what = network(options, path)
    if isinstance(what, nn.Module):
        method["fused"] = given.fused(options)
    with progress(f"measuring {Path(path).name}") as bar:
        return analyze(
            what,
            strict=getattr(options, "strict", False),
            traps=getattr(options, "traps", False),
            progress=bar,
            **method,
        )


def details(options: argparse.Namespace, path: str) -> Details:
    """Measure a checkpoint in the columns of WeightWatcher."""
    what = network(options, path)
    fused = given.fused(options) if isinstance(what, nn.Module) else None
    with progress(f"measuring {Path(path).name}") as bar:
        return analyze(what, preset=options.preset, traps=options.traps, fused=fused, progress=bar)


def measuring(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``analyze`` and ``rank`` that say how to measure."""
    memory = {} if options.memory is None else {"budget": options.memory * 2**20}
    return {
        "windows": given.windows(options),
        "fit": given.fit(options),
        "min_eigs": options.min_eigs,
        **memory,
    }


@contextlib.contextmanager
def progress(label: str) -> Iterator[Callable[[float], None] | None]:
    """A bar on stderr while a person watches, and nothing otherwise."""
    if not sys.stderr.isatty():
        yield None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn
    except ImportError:
        yield None
        return
    columns = ("{task.description}", BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=1.0)
        yield lambda share: bar.advance(task, share)


def pictures(target: str, name: str) -> Path:
    """Where a picture goes: the file that ``--plot`` names, or one of this name in its folder."""
    path = Path(target)
    return path if path.suffix.lower() in PICTURES else path / name


def write_json(target: str, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        Path(target).write_text(text, encoding="utf-8")


def note(text: str) -> None:
    sys.stderr.write(f"tempbalance: {text}\n")
