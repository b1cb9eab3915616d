"""What a param group per layer costs ``optimizer.step()``, against one group.

    python -m benchmarks.optimizer_groups --networks resnet18 --repeats 11

The same weights and gradients are stepped with one group, with the groups that ``TempBalanceLR``
makes, and with one group and ``StepHooks``, in turn; nothing is measured meanwhile. The table
gives medians, the median ratio of pairs, and the extra time as a share of a whole training step
(forward, backward, step with one group) of the same network.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.clocks import compare
from benchmarks.command import Record, console, no_cuda, parser, progress, threads_kept
from tempbalance import Constant, StepHooks, TempBalanceLR

TARGET = 0.01  # of a training step
_NEVER = 10**9
_WAYS = ("one group", "TempBalanceLR", "StepHooks")


@dataclass(frozen=True)
class Case:
    """A network as it is trained, and a batch of inputs."""

    build: Callable[[], nn.Module]
    batch: Callable[[], torch.Tensor]
    note: str


def _torchvision(name: str) -> nn.Module:
    """Raises ImportError without torchvision."""
    import torchvision

    return torchvision.models.get_model(name, num_classes=100)


def _transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(192, 4, 768, 0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 75, enable_nested_tensor=False)


CASES = {
    "resnet18": Case(
        lambda: _torchvision("resnet18"),
        lambda: torch.randn(32, 3, 64, 64),
        "21 weights, 11 M parameters, batch 32 of 64 x 64 (the work of a CIFAR stem, about)",
    ),
    "resnet50": Case(
        lambda: _torchvision("resnet50"),
        lambda: torch.randn(32, 3, 64, 64),
        "54 weights, 24 M parameters, batch 32 of 64 x 64",
    ),
    "transformer300": Case(
        _transformer,
        lambda: torch.randn(8, 128, 192),
        "75 blocks of width 192: 300 weights, 33 M parameters, batch 8 of 128 tokens",
    ),
}

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda p, **how: SGD(p, lr=1e-6, momentum=0.9, weight_decay=5e-4, **how),
    "AdamW": lambda p, **how: AdamW(p, lr=1e-6, **how),
}
IMPLEMENTATIONS: dict[str, dict[str, bool]] = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if ``--check`` and a share is above 1% of a training step."""
    options = _parse(argv)
    if reason := no_cuda(options.device):
        print(reason)
        return 1
    device = torch.device(options.device)
    out, record = console(), Record("optimizer_groups", options.device)
    rows: list[dict[str, Any]] = []
    kinds = len(OPTIMIZERS) * len(IMPLEMENTATIONS)
    with progress(len(options.networks) * kinds) as step, threads_kept():
        for name in options.networks:
            try:
                rows += _network(name, device, options, step)
            except ImportError as error:
                out.print(f"{name}: not run: {error}")
    file = record.save(rows, {"repeats": options.repeats, "target": TARGET}, options.json)
    _print(out, record.machine, rows, options.repeats)
    out.print(f"written to {file}", highlight=False)
    missed = [row for row in rows if row["share"]["TempBalanceLR"] > TARGET]
    return int(bool(options.check and missed))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser("optimizer_groups", __doc__)
    made.add_argument("--networks", nargs="+", choices=CASES, help="default: two; all when full")
    made.add_argument("--repeats", type=int, help="default: 7; 15 when full")
    made.add_argument("--check", action="store_true", help="fail above 1%% of a training step")
    options = made.parse_args(argv)
    quick = ["resnet18", "transformer300"]
    options.networks = options.networks or (list(CASES) if options.full else quick)
    options.repeats = options.repeats or (15 if options.full else 7)
    return options


def _network(
    name: str, device: torch.device, options: argparse.Namespace, step: Callable[[str], None]
) -> list[dict[str, Any]]:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.build().to(device)
    work = _forward_backward(model, case.batch().to(device))
    passes = compare({"passes": work}, 3, device)["passes"]  # leaves gradients behind
    rows = []
    for kind, make in OPTIMIZERS.items():
        for way, how in IMPLEMENTATIONS.items():
            step(f"{name}, {kind} {way}")
            ways, groups = _optimizers(model, functools.partial(make, **how))
            times = compare(ways, options.repeats, device)
            rows.append(_row(name, kind, way, groups, times, passes))
    return rows


def _forward_backward(model: nn.Module, batch: torch.Tensor) -> Callable[[], None]:
    def work() -> None:
        model.zero_grad()
        model(batch).square().mean().backward()

    return work


def _optimizers(
    model: nn.Module, make: Callable[..., Optimizer]
) -> tuple[dict[str, Callable[[], object]], int]:
    """The three ways to step, and the number of groups of the second."""
    one, split, hooked = (make(list(model.parameters())) for _ in _WAYS)
    scheduler = TempBalanceLR(split, model, assign=Constant(0.9), every=_NEVER)
    StepHooks(hooked, model, assign=Constant(0.9), every=_NEVER)

    def step_split(_keep: TempBalanceLR = scheduler) -> None:
        split.step()

    steps: tuple[Callable[[], object], ...] = (one.step, step_split, hooked.step)
    return dict(zip(_WAYS, steps, strict=True)), len(split.param_groups)


def _row(
    network: str,
    optimizer: str,
    implementation: str,
    groups: int,
    times: Mapping[str, list[float]],
    passes: Sequence[float],
) -> dict[str, Any]:
    one = times["one group"]
    whole = statistics.median(passes) + statistics.median(one)
    row: dict[str, Any] = {
        "network": network,
        "note": CASES[network].note,
        "optimizer": optimizer,
        "implementation": implementation,
        "groups": groups,
        "training_step": whole,
        "times": dict(times),
        "ratio": {},
        "share": {},
    }
    for way in _WAYS[1:]:
        pairs = list(zip(times[way], one, strict=True))
        row["ratio"][way] = statistics.median(a / b for a, b in pairs)
        row["share"][way] = statistics.median(a - b for a, b in pairs) / whole
    return row


def _print(
    console: Console, machine: dict[str, Any], rows: Sequence[dict[str, Any]], repeats: int
) -> None:
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    table = Table(
        title=f"{where}, torch {machine['torch']}, {repeats} repeats, load "
        f"{machine['load_average']} to {machine['load_average_after']}",
        title_justify="left",
        box=None,
    )
    table.add_column("network")
    table.add_column("optimizer")
    for title in ("groups", "one group ms", "a group a layer ms (ratio)", "StepHooks ms (ratio)",
                  "training step ms", "share, a group a layer", "StepHooks"):  # fmt: skip
        table.add_column(title, justify="right")
    for row in rows:
        cells = []
        for way in _WAYS[1:]:
            milliseconds = 1000 * statistics.median(row["times"][way])
            cells.append(f"{milliseconds:.2f} ({row['ratio'][way]:.2f})")
        shares = []
        for way in _WAYS[1:]:
            color = "red" if row["share"][way] > TARGET else "green"
            shares.append(f"[{color}]{100 * row['share'][way]:+.2f}%[/]")
        table.add_row(
            row["network"],
            f"{row['optimizer']} {row['implementation']}",
            str(row["groups"]),
            f"{1000 * statistics.median(row['times']['one group']):.2f}",
            *cells,
            f"{1000 * row['training_step']:.0f}",
            *shares,
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
