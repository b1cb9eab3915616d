"""WeightWatcher side by side: the same weights, one process, in turn, each fit included.

    pip install weightwatcher
    python -m benchmarks.weightwatcher
    OMP_NUM_THREADS=1 python -m benchmarks.weightwatcher --clock cpu \\
        --networks --files model.safetensors weights.pth model.gguf

Every column is compared before any time is given. ``preset`` is
``tempbalance.analyze(preset="weightwatcher")``, every column of its ``analyze(mp_fit=True)``;
``details`` the same without the Marchenko-Pastur fit, as its plain ``analyze()``; ``analyze`` is
``tempbalance.analyze`` of whole matrices by the same power-law fit. Its ``mp_fit=True`` takes
minutes and is run once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.table import Table
from torch import Tensor, nn

from benchmarks.clocks import Clock, Work, compare, cpu_seconds, seconds
from benchmarks.command import Record, console, parser, progress, threads_kept
from tempbalance import KSFit, WholeMatrix, analyze
from tempbalance.analysis.files import open_checkpoint
from tempbalance.analysis.metrics import Row, details, model_weights, module_ids

TOLERANCE = 1e-6  # relative, of every number of the table
ALPHA = 1e-3  # of alpha by analyze(), in float32: another of two tails that are nearly as near
TARGET = 5.0
CPU = torch.device("cpu")
# Ours, and what of theirs is the same work.
WORKS = {
    "preset": "weightwatcher_mp_fit",
    "details": "weightwatcher",
    "analyze": "weightwatcher",
}
CLOCKS: dict[str, Clock] = {"wall": seconds, "cpu": cpu_seconds}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table and write the file; 1 where figures disagree or a target is missed."""
    options = _parse(argv)
    try:
        watch = _weightwatcher()
    except ImportError as error:
        print(f"not run: {error}; pip install weightwatcher", file=sys.stderr)
        return 1
    record, rows = Record("weightwatcher", "cpu"), []
    with progress(len(options.networks)) as step:
        for name, build in options.networks.items():
            step(name)
            clock = CLOCKS[options.clock]
            rows.append(bench(name, build(), watch, options.repeats, clock, options.once))
    _print(rows)
    settings = {name: getattr(options, name) for name in ("repeats", "clock", "once")}
    print(record.save(rows, settings, options.json))
    failed = any(row["disagrees"] for row in rows)
    missed = any(row.get("ratio_preset", TARGET) < TARGET for row in rows)
    return int(failed or (options.check and missed))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser("weightwatcher", __doc__, cuda=False)
    made.add_argument("--networks", nargs="*", choices=NETWORKS, help="default: all")
    made.add_argument(
        "--files", nargs="*", default=[], help="checkpoints (.safetensors, .pt, .gguf)"
    )
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: for one thread, on a busy machine"
    )
    made.add_argument("--once", action="store_true", help="run its plain analyze() alone, once")
    made.add_argument("--check", action="store_true", help="fail where a target is missed")
    options = made.parse_args(argv)
    names = NETWORKS if options.networks is None else options.networks
    options.networks = {name: NETWORKS[name] for name in names}
    options.networks |= {Path(f).name: lambda f=f: from_file(f) for f in options.files}
    return options


# --- networks ------------------------------------------------------------------------------------


def _resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18()


def _transformer() -> nn.Module:
    """The matrices of six blocks of width 384, each a layer of its own as in MiniLM."""
    shapes = {"q": (384, 384), "k": (384, 384), "v": (384, 384), "o": (384, 384)}
    shapes |= {"up": (1536, 384), "down": (384, 1536)}
    made = {f"{i}_{name}": nn.Linear(*shape[::-1]) for i in range(6) for name, shape in
            shapes.items()}  # fmt: skip
    return nn.ModuleDict(made)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": _resnet18,
    "transformer": _transformer,
}


def from_file(path: str) -> nn.Module:
    """The matrices and 2-d convolutions of a checkpoint, each as a layer."""
    model = nn.ModuleDict()
    seen = set()
    for name, stored in open_checkpoint(path).tensors.items():
        known = stored.same is not None and stored.same in seen
        if stored.dtype.is_floating_point and len(stored.shape) in (2, 4) and not known:
            key = name.removesuffix(".weight").replace(".", "/")
            model[key] = _layer(stored.read().float().clone())
        seen.add(stored.same)
    return model


def _layer(weight: Tensor) -> nn.Module:
    layer = nn.Linear(1, 1, bias=False) if weight.ndim == 2 else nn.Conv2d(1, 1, 1, bias=False)
    layer.weight = nn.Parameter(weight)
    return layer


# --- one network ---------------------------------------------------------------------------------


class Watch(Protocol):
    """WeightWatcher's ``analyze``, as rows."""

    def __call__(self, model: nn.Module, mp_fit: bool = False) -> list[Row]: ...


def _weightwatcher() -> Watch:
    """Its analyze(), as rows; what it prints and warns about is left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import weightwatcher
    logging.getLogger("weightwatcher").setLevel(logging.CRITICAL)

    def watch(model: nn.Module, mp_fit: bool = False) -> list[Row]:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            frame = weightwatcher.WeightWatcher(model=model).analyze(mp_fit=mp_fit)
        rows: list[Row] = frame.to_dict("records")
        return rows

    return watch


def bench(
    name: str,
    model: nn.Module,
    watch: Watch,
    repeats: int,
    clock: Clock = seconds,
    once: bool = False,
) -> dict[str, Any]:
    """A row: agreement, then seconds in turn and their ratios."""

    def table(mp_fit: bool = False) -> list[Row]:
        return details(model_weights(model), ids=module_ids(model), mp_fit=mp_fit)

    def preset() -> list[Row]:
        return table(mp_fit=True)

    def plain() -> Any:
        return analyze(model, windows=WholeMatrix(), fit=KSFit())

    theirs: list[Row] = []
    first = clock(lambda: theirs.extend(watch(model, mp_fit=not once)), CPU)
    row: dict[str, Any] = {"network": name, "layers": len(theirs)}
    row["eigenvalues"] = sum(int(each["num_evals"]) for each in theirs)
    said = [*disagreements(theirs, preset()), *_alphas_off(theirs, plain())]
    if said:
        return {**row, "disagrees": said[:20]}
    works: dict[str, Work] = {"preset": preset, "details": table, "analyze": plain}
    if not once:
        works = {"weightwatcher": lambda: watch(model), **works}
    with threads_kept():
        times = compare(works, repeats, CPU, clock, warm_up=repeats > 1)
    times = {"weightwatcher" if once else "weightwatcher_mp_fit": [first], **times}
    row |= {"disagrees": [], "times": times}
    for work, theirs_of in WORKS.items():
        if theirs_of in times:
            row[f"ratio_{work}"] = _ratio(times[theirs_of], times[work])
    return row


def _ratio(old: Sequence[float], new: Sequence[float]) -> float:
    """The median of runs beside each other; where theirs was run once, of medians."""
    if len(old) != len(new):
        return statistics.median(old) / statistics.median(new)
    return statistics.median(a / b for a, b in zip(old, new, strict=True))


def disagreements(theirs: Sequence[Row], ours: Sequence[Row]) -> list[str]:
    """Every number or word that differs, layer by layer."""
    found = []
    by_name = {row["longname"]: row for row in ours}
    if by_name.keys() != {row["longname"] for row in theirs}:
        found.append("the layers differ")
    for row in theirs:
        mine = by_name.get(row["longname"], {})
        for column, value in row.items():
            if not _same(value, mine.get(column)):
                found.append(f"{row['longname']}: {column} {value!r}, ours {mine.get(column)!r}")
    return found


def _same(value: Any, mine: Any) -> bool:
    if isinstance(value, str) or isinstance(mine, str) or mine is None:
        return bool(value == mine)
    return math.isclose(value, mine, rel_tol=TOLERANCE, abs_tol=1e-12)


def _alphas_off(theirs: Sequence[Row], report: Any) -> list[str]:
    alphas = {layer.name: layer.alpha for layer in report if layer.alpha is not None}
    return [
        f"{row['longname']}: alpha {row['alpha']}, analyze has {alphas[row['longname']]}"
        for row in theirs
        if row["longname"] in alphas
        and int(row["num_evals"]) >= 20  # below, it corrects alpha for bias
        and not row["weak_rank_loss"]  # it fits what is above 1e-5, analyze all that is not zero
        and not math.isclose(float(row["alpha"]), alphas[row["longname"]], rel_tol=ALPHA)
    ]


def _print(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(box=None)
    table.add_column("network")
    for title in ("layers", "its mp_fit s", "its analyze s", "preset s", "ratio", "details s",
                  "ratio", "analyze s", "ratio"):  # fmt: skip
        table.add_column(title, justify="right")
    for row in rows:
        if row["disagrees"]:
            table.add_row(row["network"], *row["disagrees"][:1])
            continue
        theirs = [_median(row, work) for work in ("weightwatcher_mp_fit", "weightwatcher")]
        ours = [x for work in WORKS for x in (_median(row, work), _one_digit(row, work))]
        table.add_row(row["network"], str(row["layers"]), *theirs, *ours)
    console().print(table)


def _median(row: dict[str, Any], work: str) -> str:
    times = row["times"].get(work)
    return f"{statistics.median(times):.3f}" if times else "-"


def _one_digit(row: dict[str, Any], work: str) -> str:
    ratio = row.get(f"ratio_{work}")
    return "-" if ratio is None else f"{ratio:.1f}"


if __name__ == "__main__":
    sys.exit(main())
