"""What the study of docs/study.md runs: methods, controls and cells, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

# Nothing is drawn, kept or logged by a run of the study but its result.
COMMON = ("threads=1", "callbacks=none", "logger=none", "trainer.enable_progress_bar=false")
_QUIET = ("+balance.log=none", "+balance.esd=false", "+balance.warn=false")
_REST = "tuned.exclude=[SpectralConv]"
# Unlike the published FNO: torch's Adam, and spectral weights that vote.
_AS_STUDIED = ("optimizer=adam", "tuned.exclude=[]")
_GENTLE = ("tuned.farms.s1=0.9", "tuned.farms.s2=1.1")

# Tuning and final seeds are different ones: those from here on tune.
TUNING_SEED = 1000


def _method(balance: str, *more: str) -> tuple[str, ...]:
    return (f"balance={balance}", *_QUIET, *more)


# Name -> overrides. "rest": without the spectral weights, as the released code has it.
VARIANTS: dict[str, tuple[str, ...]] = {
    "uniform": ("balance=none",),
    "tb": _method("tb"),
    "tb_sigmoid": _method("tb_sigmoid"),
    "farms": _method("farms"),
    "farms_sigmoid": _method("farms_sigmoid"),
    "tb_rest": _method("tb", _REST),
    "tb_sigmoid_rest": _method("tb_sigmoid", _REST),
    "farms_rest": _method("farms", _REST),
    "farms_sigmoid_rest": _method("farms_sigmoid", _REST),
    "shuffled": _method("shuffled"),
    "reversed": _method("reversed"),
    "constant": _method("constant"),
    "frozen": _method("frozen"),
    "type_unit": _method("type_unit"),
    "pertype": _method("pertype"),
    "farms_gentle": _method("farms", *_GENTLE),
    "shuffled_gentle": _method("shuffled", *_GENTLE),
    "level": _method("level"),
}

METHODS = ("tb", "tb_sigmoid", "farms", "farms_sigmoid")
WITHOUT_SPECTRAL = tuple(f"{name}_rest" for name in METHODS)
# What the first cells proposed, with its own control; for cells that were not run by then.
GENTLE = ("farms_gentle", "shuffled_gentle")
# Run at a rate far below the best too, where a cell names one, on so many seeds.
UNTUNED = ("uniform", "tb", "tb_sigmoid", "farms", "farms_sigmoid", "shuffled", "pertype",
           "constant")  # fmt: skip
UNTUNED_SEEDS = 10
LATE_SEEDS = 15
CONTROLS = ("shuffled", "type_unit", "pertype", "constant", "reversed", "frozen")
_FIRST = 4  # of these, which a method must beat
# Added after the cells were run, and run at their common rates alone (`--at`).
LATER = ("level",)


@dataclass(frozen=True)
class Cell:
    """One task at one share of its data.

    ``rates``: the grid for uniform; ``seeds``: final seeds of each variant that is run;
    ``mode``: "max" where larger is better; ``gpu``: not to be run without one;
    ``untuned``: a rate far below the best, to see what a method does for a training that was
    not tuned; ``extra``: variants of this cell alone, at uniform's rate, without tuning;
    ``late``: variants that start after the first part of a training which they share with
    uniform, at ``late_rate``.
    """

    name: str
    title: str
    overrides: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: Mapping[str, int]
    tuning_seeds: int = 4
    mode: str = "min"
    gpu: bool = False
    untuned: float | None = None
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    late: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    late_rate: float = math.nan

    def own(self, variant: str) -> tuple[str, ...]:
        """The overrides of a variant, of this cell or of all."""
        return {**VARIANTS, **self.extra, **self.late}[variant]


def _seeds(**groups: int) -> dict[str, int]:
    """Final seeds by variant from those of uniform, methods, rest, and controls."""
    out = {"uniform": groups["methods"]}
    out |= dict.fromkeys(METHODS, groups["methods"])
    out |= dict.fromkeys(WITHOUT_SPECTRAL, groups.get("rest", 0))
    out |= dict.fromkeys(CONTROLS[:_FIRST], groups.get("first_controls", 0))
    out |= dict.fromkeys(CONTROLS[_FIRST:], groups.get("controls", 0))
    out["pertype"] = groups.get("pertype", out["pertype"])
    out |= dict.fromkeys(GENTLE, groups.get("gentle", 0))
    return {name: count for name, count in out.items() if count}


def _darcy(model: str, share: float, epochs: int, sigmoid: float, *more: str) -> tuple[str, ...]:
    return (
        f"experiment=darcy_{model}",
        f"data.share={share}",
        "data.batch_size=10",
        "schedule=cosine",
        f"trainer.max_epochs={epochs}",
        f"trainer.check_val_every_n_epoch={epochs // 10}",
        f"tuned.sigmoid.s={sigmoid}",
        *(_AS_STUDIED if model == "fno" else ()),
        *more,
    )


def _cifar(name: str, rates: tuple[float, ...]) -> Cell:
    return Cell(
        f"cifar100_{name}",
        f"CIFAR-100, {name.replace('resnet', 'ResNet-').replace('vgg', 'VGG-')}, 30 epochs",
        (
            f"experiment=cifar100_{name}",
            "data=cifar100_folder",
            "trainer=gpu",
            "trainer.max_epochs=30",
            "trainer.check_val_every_n_epoch=3",
            "data.val_fraction=0.1",
        ),
        rates,
        _seeds(methods=5, first_controls=5),
        tuning_seeds=1,
        mode="max",
        gpu=True,
    )


def _sensitivity() -> dict[str, tuple[str, ...]]:
    """One change at a time from `farms`."""
    farms = VARIANTS["farms"]
    out = {
        f"farms s {s1}-{s2}": (*farms, f"tuned.farms.s1={s1}", f"tuned.farms.s2={s2}")
        for s1, s2 in ((0.1, 1.9), (0.3, 1.7), (0.7, 1.3), (0.9, 1.1))
    }
    for rows in (4, 8, 12, 16):
        out[f"farms rows {rows}"] = (*farms, f"+tuned.windows.rows={rows}")
    for every in (5, 20):
        out[f"farms every {every}"] = (*farms, f"+balance.every_n_epochs={every}")
    for start in (4, 8, 24):
        out[f"farms start {start}"] = (*farms, f"+balance.start={start}")
    for least in (2, 10):
        out[f"farms min_eigs {least}"] = (*farms, f"tuned.min_eigs={least}")
    out["farms skip_first, skip_last"] = (
        *farms, "tuned.farms.skip_first=true", "tuned.farms.skip_last=true",
    )  # fmt: skip
    out["farms spectral only"] = (*farms, "tuned.exclude=[Conv1d]")
    out["farms normalized"] = (*farms, "+balance.normalize=true")
    for s in (0.25, 1.0):
        out[f"farms_sigmoid s {s}"] = (*VARIANTS["farms_sigmoid"], f"tuned.sigmoid.s={s}")
    for low, high in ((0.3, 1.3), (0.8, 1.05)):
        out[f"pertype {low}-{high}"] = (
            *VARIANTS["pertype"],
            f"tuned.pertype.multipliers.SpectralConv={low}",
            f"tuned.pertype.default={high}",
        )
    return out


def _late(start: int) -> dict[str, tuple[str, ...]]:
    """Methods and controls that start at an epoch, and the two halves of what `frozen` does."""
    at = f"+balance.start={start}"
    pertype = "tuned.pertype.multipliers.SpectralConv"
    out = {
        f"late {name}": (*VARIANTS[name], at)
        for name in ("farms", "farms_gentle", "shuffled", "reversed", "pertype")
    }
    for text, spectral, others in (("spectral 0.57", 0.57, 1.0), ("others 1.3", 1.0, 1.3)):
        own = (f"{pertype}={spectral}", f"tuned.pertype.default={others}")
        out[f"late {text}"] = (*VARIANTS["pertype"], at, *own)
    return out


_GRID = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)

_CELLS = (
    Cell(
        "darcy_fno_5",
        "Darcy flow, FNO, 5% of the data (45 samples)",
        _darcy("fno", 0.05, 80, 0.5),
        _GRID,
        _seeds(methods=30, rest=15, first_controls=30, controls=15),
        untuned=4e-3,
        extra=_sensitivity(),
        late=_late(27),
        late_rate=1.6e-2,
    ),
    Cell(
        "digits",
        "Digits, small ResNet-18",
        ("experiment=quickstart", "trainer.check_val_every_n_epoch=3"),
        (1.25e-2, 2.5e-2, 5e-2, 0.1, 0.2, 0.4),
        _seeds(methods=20, first_controls=20, controls=20),
        mode="max",
    ),
    Cell(
        "darcy_fno_2.5",
        "Darcy flow, FNO, 2.5% of the data (22 samples)",
        _darcy("fno", 0.025, 100, 0.5),
        _GRID,
        _seeds(methods=30, rest=15, first_controls=30, controls=15, gentle=30),
    ),
    Cell(
        "darcy_unet_5",
        "Darcy flow, UNet, 5% of the data (45 samples)",
        _darcy("unet", 0.05, 40, 0.5, "model.width=16"),
        (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
        _seeds(methods=12, first_controls=12, pertype=0),
        tuning_seeds=3,
    ),
    Cell(
        "darcy_fno_25",
        "Darcy flow, FNO, 25% of the data (225 samples)",
        _darcy("fno", 0.25, 30, 0.25),
        _GRID,
        _seeds(methods=8, first_controls=8),
        tuning_seeds=2,
    ),
    Cell(
        "darcy_fno_100",
        "Darcy flow, FNO, all data (900 samples)",
        _darcy("fno", 1.0, 10, 0.125),
        _GRID[:6],
        _seeds(methods=6, first_controls=6, gentle=6),
        tuning_seeds=2,
    ),
    Cell(
        "darcy_unet_2.5",
        "Darcy flow, UNet, 2.5% of the data (22 samples)",
        _darcy("unet", 0.025, 50, 0.5, "model.width=16"),
        (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
        _seeds(methods=12, first_controls=12, pertype=0, gentle=12),
        tuning_seeds=3,
    ),
    Cell(
        "navier_stokes_fno",
        "Generated Navier-Stokes flow (32x32, 10 frames in, 5 out), FNO, 20 flows",
        (
            "experiment=cfd2d_fno",
            "data=navier_stokes",
            *_AS_STUDIED,
            "+data.n_train=40",
            "+data.n_test=40",
            "+data.resolution=32",
            "+data.solver_resolution=64",
            "+data.t_train=15",
            "+data.interval=2.0",
            "data.val_fraction=0.5",
            "data.batch_size=5",
            "schedule=cosine",
            "trainer.max_epochs=20",
            "trainer.check_val_every_n_epoch=2",
            "tuned.sigmoid.s=0.5",
        ),
        (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
        _seeds(methods=6, first_controls=6, gentle=6),
        tuning_seeds=2,
    ),
    Cell(
        "darcy_unet_25",
        "Darcy flow, UNet, 25% of the data (225 samples)",
        _darcy("unet", 0.25, 20, 0.25, "model.width=16"),
        (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
        _seeds(methods=5, first_controls=5, pertype=0, gentle=5),
        tuning_seeds=2,
    ),
    Cell(
        "darcy_unet_100",
        "Darcy flow, UNet, all data (900 samples)",
        _darcy("unet", 1.0, 10, 0.125, "model.width=16"),
        (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
        _seeds(methods=4, first_controls=4, pertype=0, gentle=4),
        tuning_seeds=2,
    ),
    _cifar("resnet18", (0.025, 0.05, 0.1, 0.2, 0.4)),
    _cifar("vgg16", (0.0125, 0.025, 0.05, 0.1, 0.2)),
)

CELLS: dict[str, Cell] = {cell.name: cell for cell in _CELLS}
