"""Command line: ``tempbalance analyze CHECKPOINT``, ``compare A B`` and ``plot RUN_DIR``.

A subcommand is a function that adds its parser and names, as ``run``, the function that does the
work and returns the exit code; it is listed in ``_COMMANDS``.

Tables go to stdout, all else to stderr. Exit codes: 0 done; 1 the measurement found what was asked
to be an error (``--strict``, or no layer with an alpha); 2 it could not be made (usage, a file, the
model).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tempbalance.analysis.report import Report, analyze
from tempbalance.cli import options as given
from tempbalance.cli.checkpoints import CheckpointError, load_into, read_state
from tempbalance.cli.options import UsageError
from tempbalance.cli.tables import compare_rows, print_comparison, print_report
from tempbalance.measure.measurement import MeasurementError

OK, FOUND, UNUSABLE = 0, 1, 2
_SORTS = ("depth", "name", "alpha", "change")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code (argparse itself exits with 2)."""
    parser = argparse.ArgumentParser(
        prog="tempbalance",
        description="How heavy-tailed the weight spectra of a network are, layer by layer.",
        epilog="exit code: 0 done, 1 a layer could not be measured (with --strict, or none could), "
        "2 wrong usage, file or model",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in _COMMANDS:
        add(commands)
    options = parser.parse_args(argv)
    try:
        return options.run(options)
    except MeasurementError as error:
        return _fail(error, FOUND)
    except (CheckpointError, UsageError, ImportError, OSError, ValueError) as error:
        if isinstance(error, BrokenPipeError):  # the reader (head, less) has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return OK
        return _fail(error, UNUSABLE)
    except KeyboardInterrupt:
        return 130


def _fail(error: Exception, code: int) -> int:
    sys.stderr.write(f"tempbalance: error: {' '.join(str(error).split())}\n")
    return code


# --- analyze -------------------------------------------------------------------------------------


def _add_analyze(commands: Any) -> None:
    parser = commands.add_parser(
        "analyze",
        help="alpha of every layer of a checkpoint",
        description="Measure every layer of a checkpoint: the exponent alpha of its spectrum's "
        "power-law tail, its norms and its stable rank.",
        epilog="example: tempbalance analyze resnet.pt --model torchvision.models:resnet18 "
        "--model-arg num_classes=100 --plot pictures",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=given.CHECKPOINT)
    given.add_model(parser)
    given.add_method(parser)
    given.add_output(parser, "the overview", ("depth", "name", "alpha"))
    parser.add_argument(
        "--plot-layer", action="append", default=[], metavar="NAME",
        help="with --plot, draw this layer's spectrum too (may be repeated)",
    )  # fmt: skip
    parser.add_argument(
        "--strict",
        action="store_true",
        help="fail (exit code 1) if a layer is not measured in full",
    )
    parser.set_defaults(run=_analyze)


def _analyze(options: argparse.Namespace) -> int:
    given.check_output(options)
    model = given.model(options)
    given.check_layers(options, model)
    report = _measure(options, options.checkpoint, model)
    if options.json:
        _write_json(options.json, {"checkpoint": options.checkpoint, **report.to_dict()})
    if options.json != "-":
        print_report(report, options.sort)
    if options.plot is not None and report.measured:
        folder = Path(options.plot)
        report.plot(folder / "alphas.png")
        for name in options.plot_layer:
            try:
                report.plot(folder / f"esd_{_file_name(name)}.png", layer=name)
            except KeyError as error:
                raise UsageError(f"--plot-layer: {error.args[0]}") from error
        _note(f"pictures in {folder}")
    if not report.measured:
        first = report.layers[0].message if report.layers else "the model has no weight matrix"
        raise MeasurementError(f"no layer has an alpha: {first}")
    return OK


# --- compare -------------------------------------------------------------------------------------


def _add_compare(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="alpha of every layer in two checkpoints of one model",
        description="Measure two checkpoints of one model and show what changed.",
        epilog="example: tempbalance compare epoch1.pt epoch200.pt --model my_models:net "
        "--sort change",
    )
    parser.add_argument("a", metavar="A", help=given.CHECKPOINT)
    parser.add_argument("b", metavar="B", help="a later one, say")
    given.add_model(parser)
    given.add_method(parser)
    given.add_output(parser, "both", _SORTS)
    parser.add_argument(
        "--strict",
        action="store_true",
        help="fail (exit code 1) if a layer is not measured in full",
    )
    parser.set_defaults(run=_compare)


def _compare(options: argparse.Namespace) -> int:
    given.check_output(options)
    a = _measure(options, options.a, given.model(options))
    b = _measure(options, options.b, given.model(options))
    rows = compare_rows(a, b)
    if options.json:
        both = {
            "a": {"checkpoint": options.a, **a.to_dict()},
            "b": {"checkpoint": options.b, **b.to_dict()},
        }
        _write_json(options.json, {"layers": rows, **both})
    if options.json != "-":
        print_comparison(a, b, rows, options.sort)
    common = any(row["difference"] is not None for row in rows)
    if options.plot is not None and common:
        from tempbalance.plots.report import plot_compare

        names = (Path(options.a).name, Path(options.b).name)
        path = Path(options.plot) / "compare.png"
        plot_compare(a.layers, b.layers, path, names if names[0] != names[1] else ("A", "B"))
        _note(f"picture in {path}")
    if not common:
        raise MeasurementError("nothing to compare: no layer has an alpha in both")
    return OK


# --- plot ----------------------------------------------------------------------------------------


def _add_plot(commands: Any) -> None:
    parser = commands.add_parser(
        "plot",
        help="pictures of a training run",
        description="Draw what TempBalanceCallback wrote in a run: alpha by layer over the epochs, "
        "the learning-rate multipliers over time, and the spectra of some layers at the first and "
        "the last measurement. PNG files.",
        epilog="example: tempbalance plot lightning_logs/version_3 --layers 'layer1.*' fc",
    )
    parser.add_argument(
        "run_dir", metavar="RUN_DIR",
        help="the folder that holds tempbalance.csv, or one with exactly one such run below it",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="DIR", help="where to write (default: the folder plots in the run's)"
    )
    parser.add_argument(
        "--layers", nargs="+", default=[], metavar="PATTERN",
        help="layers whose spectra are drawn, * for any letters (default: those of smallest, "
        "median and largest alpha, and the one that changed most)",
    )  # fmt: skip
    parser.set_defaults(run=_plot)


def _plot(options: argparse.Namespace) -> int:
    from tempbalance.runs.plot import plot_run

    for path in plot_run(options.run_dir, options.out, options.layers):
        _note(f"drew {path}")
    return OK


# --- work ----------------------------------------------------------------------------------------


def _measure(options: argparse.Namespace, path: str, model: nn.Module) -> Report:
    windows, fit, fused = given.windows(options), given.fit(options), given.fused(options)
    loaded = load_into(model, read_state(path, options.key), path)
    if loaded.ignored:
        _note(
            f"{path}: measured what is under {loaded.prefix!r}; left out {len(loaded.ignored)} "
            f"other tensors ({', '.join(loaded.ignored[:3])})"
        )
    try:
        model = model.to(options.device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {options.device}: {str(error).splitlines()[0]}") from error
    memory = {} if options.memory is None else {"budget": options.memory * 2**20}
    with _progress(Path(path).name) as progress:
        return analyze(
            model,
            windows=windows,
            fit=fit,
            min_eigs=options.min_eigs,
            fused=fused,
            strict=options.strict,
            progress=progress,
            **memory,
        )


@contextlib.contextmanager
def _progress(label: str) -> Iterator[Callable[[float], None] | None]:
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
        task = bar.add_task(f"measuring {label}", total=1.0)
        yield lambda share: bar.advance(task, share)


def _write_json(target: str, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        Path(target).write_text(text, encoding="utf-8")


def _file_name(layer: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in layer) or "layer"


def _note(text: str) -> None:
    sys.stderr.write(f"tempbalance: {text}\n")


_COMMANDS: tuple[Callable[[Any], None], ...] = (_add_analyze, _add_compare, _add_plot)


if __name__ == "__main__":
    sys.exit(main())
