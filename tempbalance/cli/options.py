"""Options of the command line: what they add to a parser, and the objects they stand for."""

from __future__ import annotations

import argparse
import ast
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tempbalance.cli.checkpoints import build_model
from tempbalance.layers.find import find_layers
from tempbalance.spectra.by_layer import AnyWindows, ByLayer
from tempbalance.spectra.powerlaw import Fit, Hill, KSFit, PeakFit
from tempbalance.spectra.windows import Farms, WholeMatrix, Windows

CHECKPOINT = (
    "a state dict, a checkpoint that holds one (Lightning's, timm's), a safetensors or GGUF file, "
    "the folder that save_pretrained wrote, or a quoted pattern of the files of one model; no code "
    "in it is run"
)


PICTURES = (".png", ".pdf", ".svg")


class UsageError(ValueError):
    """Options that contradict each other, or a value out of range."""


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model the weights belong to."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", metavar="PACKAGE.MODULE:FACTORY",
        help="what makes the model that the weights belong to: installed, or below this folder "
        "(default: tell the layers from names and shapes)",
    )  # fmt: skip
    group.add_argument(
        "--model-arg", action="append", default=[], metavar="NAME=VALUE",
        help="an argument of the factory, a Python literal or else text (may be repeated)",
    )  # fmt: skip
    group.add_argument("--key", help="where in the file the weights are, if not in a usual place")
    group.add_argument("--device", default="cpu", help="where to measure (default: cpu)")


def add_method(
    parser: argparse.ArgumentParser, windows: str = "farms, covering all", fit: str = "hill"
) -> None:
    """What is measured, and how; the defaults are those of the command."""
    group = parser.add_argument_group("method")
    group.add_argument(
        "--windows", action="append", metavar="[PATTERN=]KIND",
        help=f"which submatrices are measured: {', '.join(_WINDOWS)} (default: {windows}). "
        "By pattern of layers, name or type, if repeated, the first that matches: --windows "
        "Linear=released-linear --windows '*=released-conv'",
    )  # fmt: skip
    group.add_argument(
        "--whole", action="store_true", help="no windows (plain TempBalance): --windows whole"
    )
    group.add_argument("--rows", type=int, metavar="N", help="window rows (default: what fits)")
    group.add_argument(
        "--aspect-ratio", type=float, metavar="Q", help="window columns / rows (default: 1)"
    )
    group.add_argument("--per-dim", type=int, metavar="N", help="window positions along each side")
    group.add_argument("--stride", type=int, metavar="N", help="or the distance between windows")
    group.add_argument(
        "--pool", choices=("spectrum", "alpha"),
        help="one fit of all windows (default), or the mean of a fit for each",
    )  # fmt: skip
    group.add_argument("--fit", choices=tuple(_FITS), default=fit, help=f"default: {fit}")
    group.add_argument("--xmin-pos", type=float, metavar="X", help="of --fit hill (default: 2)")
    group.add_argument(
        "--min-eigs", type=int, default=10, metavar="N",
        help="layers of fewer eigenvalues get no alpha (default: 10)",
    )  # fmt: skip
    group.add_argument(
        "--fused", action="append", default=[], metavar="PATTERN=N",
        help="layers whose weight is N projections in one, such as '*.qkv=3', or sizes "
        "'*.kv=512,64' (may be repeated)",
    )  # fmt: skip
    group.add_argument("--memory", type=int, metavar="MIB", help="extra memory (default: 1024)")


def add_strict(parser: argparse.ArgumentParser) -> None:
    """Whether a layer that is not measured in full is a failure."""
    parser.add_argument(
        "--strict", action="store_true",
        help="fail (exit code 1) if a layer is not measured in full",
    )  # fmt: skip


def add_output(parser: argparse.ArgumentParser, what: str, sorts: Sequence[str]) -> None:
    """Where the result goes."""
    group = parser.add_argument_group("output")
    group.add_argument("--sort", choices=sorts, default="depth", help="default: depth")
    group.add_argument(
        "--json", nargs="?", const="-", metavar="FILE",
        help="write JSON to a file, or instead of the table to stdout; a checkpoint goes before it",
    )  # fmt: skip
    group.add_argument(
        "--plot", metavar="DIR_OR_FILE",
        help=f"draw {what} into this folder, or this .png, .pdf or .svg file",
    )  # fmt: skip


_FITS: dict[str, Callable[[], Fit]] = {"hill": Hill, "ks": KSFit, "peak": PeakFit}


_OPTIONS = ("rows", "aspect_ratio", "per_dim", "stride", "pool")


def windows(options: argparse.Namespace) -> AnyWindows:
    """The windows that the options stand for."""
    asked = options.windows or []
    if options.whole and asked not in ([], ["farms"], ["whole"]):
        raise UsageError(f"--whole and --windows {asked[-1]} contradict each other")
    by_pattern = dict(_split(each) for each in (["whole"] if options.whole else asked or ["farms"]))
    kinds = list(by_pattern.values())
    given = {n: value for n in _OPTIONS if (value := getattr(options, n)) is not None}
    for name in given:
        if not any(name in _WINDOWS[kind] for kind in kinds):
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} has no meaning with {' and '.join(kinds)} windows")
    if list(by_pattern) == [""]:
        return _windows(kinds[0], given)
    if "" in by_pattern:
        raise UsageError(
            f"--windows {by_pattern['']} is for all layers, and cannot stand beside windows by "
            f"pattern: write --windows '*={by_pattern['']}', last"
        )
    return ByLayer({pattern: _windows(kind, given) for pattern, kind in by_pattern.items()})


# Which options each kind of windows takes.
_WINDOWS: dict[str, tuple[str, ...]] = {
    "farms": _OPTIONS,
    "whole": (),
    "released-conv": ("aspect_ratio",),
    "released-linear": ("rows", "aspect_ratio", "per_dim", "stride"),
}


def _split(text: str) -> tuple[str, str]:
    """``PATTERN=KIND``, or ``KIND`` alone, whose pattern is empty."""
    pattern, _, kind = text.rpartition("=")
    if kind not in _WINDOWS:
        raise UsageError(f"--windows {text}: there are {', '.join(_WINDOWS)}")
    return pattern, kind


def _windows(kind: str, options: Mapping[str, Any]) -> Windows:
    given = {name: value for name, value in options.items() if name in _WINDOWS[kind]}
    if kind == "whole":
        return WholeMatrix()
    if kind == "farms":
        return Farms(**given)
    if kind == "released-conv":
        return Farms.released_conv(given.get("aspect_ratio", 1.0))
    if "rows" not in given:
        raise UsageError("released-linear windows need --rows, and --per-dim or --stride")
    return Farms.released_linear(**{"aspect_ratio": 1.0, **given})


def fit(options: argparse.Namespace) -> Fit:
    """The fit that the options stand for."""
    if options.xmin_pos is None:
        return _FITS[options.fit]()
    if options.fit != "hill":
        raise UsageError(f"--xmin-pos has no meaning with --fit {options.fit}")
    return Hill(options.xmin_pos)


def fused(options: argparse.Namespace) -> dict[str, int | tuple[int, ...]]:
    """Fused projections by name pattern."""
    fused: dict[str, int | tuple[int, ...]] = {}
    for text in options.fused:
        pattern, _, parts = text.rpartition("=")
        try:
            sizes = tuple(int(part) for part in parts.split(","))
        except ValueError:
            sizes = ()
        if not pattern or not sizes or min(sizes) < 1:
            raise UsageError(f"--fused {text!r} is not PATTERN=N, such as '*.qkv=3'")
        fused[pattern] = sizes[0] if len(sizes) == 1 else sizes
    return fused


def model(options: argparse.Namespace) -> nn.Module:
    """The model, freshly made."""
    arguments: dict[str, object] = {}
    for text in options.model_arg:
        name, equals, value = text.partition("=")
        if not (equals and name.isidentifier()):
            raise UsageError(f"--model-arg {text!r} is not NAME=VALUE")
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[name] = value
    return build_model(options.model, arguments)


def check_output(options: argparse.Namespace) -> None:
    """What would fail after minutes of measuring is refused before."""
    if options.plot is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise UsageError("--plot needs matplotlib: pip install 'tempbalance[plot]'") from error
        target = Path(options.plot)
        (target.parent if target.suffix else target).mkdir(parents=True, exist_ok=True)
        if target.suffix and not target.is_dir() and target.suffix.lower() not in PICTURES:
            raise UsageError(
                f"--plot {target}: no picture ends in {target.suffix}; name a .png, .pdf or .svg "
                "file, or a folder"
            )
    check_files(options)


def check_files(options: argparse.Namespace) -> None:
    """The same for files alone, and for the memory."""
    for name in ("json", "html"):
        given = getattr(options, name, None)
        if given in (None, "-"):
            continue
        target = Path(given)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir() or not os.access(target if target.exists() else target.parent, os.W_OK):
            raise UsageError(f"--{name} {given}: this cannot be written")
    if options.memory is not None and options.memory < 1:
        raise UsageError(f"--memory must be at least 1 MiB, got {options.memory}")


def check_layers(options: argparse.Namespace, model: nn.Module) -> None:
    """The same for the names of layers to draw. (Lazy ones have no matrix until they are loaded.)

    Raises:
        UsageError: for a name that is no layer of the model.
    """
    found = find_layers(model, fused(options))
    names = [layer.name for layer in found.layers]
    lazy = {skipped.name.rpartition(".")[0] for skipped in found.skipped}
    for name in options.plot_layer:
        if name not in names and name not in lazy:
            raise UsageError(f"--plot-layer: no layer {name!r}; there are {names}")
