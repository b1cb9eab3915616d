"""What the second part of the study runs: cells, their methods and controls, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Nothing is drawn, kept or logged but the result.
COMMON = ("threads=1", "callbacks=none", "logger=none", "trainer.enable_progress_bar=false")
_QUIET = ("+balance.log=none", "+balance.esd=false", "+balance.warn=false")

RATE, DECAY = "optimizer.lr", "optimizer.weight_decay"


@dataclass(frozen=True)
class Variant:
    """One way to train: its overrides, and how it is tuned.

    ``start``: rate and decay that the search starts from, of a uniform rate; ``of``: the variant
    that another one starts from, and is compared with; ``axes``: what is tuned.
    """

    overrides: tuple[str, ...]
    start: tuple[float, float] | None = None
    of: str | None = None
    axes: tuple[str, ...] = (RATE,)


@dataclass(frozen=True)
class Cell:
    """One task, and what is tried on it.

    ``factors``: the step of the search by axis; ``tuning``, ``finals``: seeds, which share none;
    ``mode``: "max" where larger is better.
    """

    name: str
    title: str
    overrides: tuple[str, ...]
    variants: Mapping[str, Variant]
    tuning: tuple[int, ...]
    finals: tuple[int, ...]
    factors: Mapping[str, float]
    mode: str = "min"
    subset_of: int = 0  # so many seeds in a row train on one subset of the data; 0: own splits

    def of_seed(self, seed: int) -> tuple[str, ...]:
        """The overrides of a seed."""
        subset = (f"data.seed={seed // self.subset_of}",) if self.subset_of else ()
        return (f"seed={seed}", *subset)

    def root(self, name: str) -> str:
        """The uniform variant that a variant is compared with: itself, where it is one."""
        return self.variants[name].of or name


def _method(balance: str, *more: str) -> tuple[str, ...]:
    return (f"balance={balance}", *_QUIET, *more)


# --- why the FNO behaves as it does --------------------------------------------------------------


def _types(spectral: float, others: float, *more: str) -> tuple[str, ...]:
    return _method(
        "pertype",
        f"tuned.pertype.multipliers.SpectralConv={spectral}",
        f"tuned.pertype.default={others}",
        "+balance.start=27",  # of 80 epochs
        *more,
    )


def _factorial() -> dict[str, Variant]:
    """{0.57, 1, 1.43} x {spectral, all} x {Adam with L2, AdamW, AdamW with the decay kept}."""
    both = (RATE, DECAY)
    out = {
        "adam": Variant(("balance=none", "optimizer=adam"), start=(1.6e-2, 1e-4), axes=both),
        "adamw": Variant(("balance=none", "optimizer=adamw"), start=(1.6e-2, 1e-2), axes=both),
    }
    for m in (0.57, 1.43):
        for which, others in (("spectral", 1.0), ("all", m)):
            for kind, root, more in (
                ("adam", "adam", ()),
                ("adamw", "adamw", ()),
                ("adamw keep", "adamw", ("+balance.keep_decay=true",)),
            ):
                own = (f"optimizer={root}", *_types(m, others, *more))
                out[f"{kind} {which} {m}"] = Variant(own, of=root)
    return out


_FNO = Cell(
    "fno_factorial",
    "Darcy flow, FNO, 5% of the data: multipliers of 0.57 and 1.43 after a third of the training",
    (
        "experiment=darcy_fno",
        "data.share=0.05",
        "data.batch_size=10",
        "schedule=cosine",
        "trainer.max_epochs=80",
        "trainer.check_val_every_n_epoch=80",
        "tuned.exclude=[]",
    ),
    _factorial(),
    tuning=(1100, 1101, 1102),
    finals=tuple(range(100, 120)),
    factors={RATE: 2**0.5, DECAY: 4.0},
)


# --- a small language model ----------------------------------------------------------------------

_HEADS = "tuned.fixed=${tuned.heads}"  # embedding and output layer


def _language() -> dict[str, Variant]:
    out = {
        "uniform": Variant(("balance=none",), start=(4e-3, 0.1), axes=(RATE, DECAY)),
        "llr": Variant(_method("llr"), of="uniform"),
        "llr, heads at the base": Variant(
            _method("llr", "tuned.llr.head=1.0"), of="uniform"
        ),
        "llr, mean one": Variant(_method("llr", "+balance.normalize=true"), of="uniform"),
        "llr_farms": Variant(_method("llr_farms"), of="uniform"),
        "llr_farms, mean one": Variant(
            _method("llr_farms", "+balance.normalize=true"), of="uniform"
        ),
        "farms": Variant(_method("farms"), of="uniform"),
        "tb_sigmoid": Variant(_method("tb_sigmoid"), of="uniform"),
        "alphadecay": Variant(("balance=none", "decay=alphadecay"), of="uniform", axes=(DECAY,)),
        "alphadecay, mean one": Variant(
            ("balance=none", "decay=alphadecay", "tuned.alphadecay.normalize=true"),
            of="uniform", axes=(DECAY,),
        ),
        "by type": Variant(_method("pertype_measured"), of="uniform"),
        "by depth": Variant(_method("depth"), of="uniform"),
        "shuffled within type": Variant(_method("shuffled_type"), of="uniform"),
        "reversed": Variant(_method("reversed"), of="uniform"),
        "frozen": Variant(_method("frozen"), of="uniform"),
        "level": Variant(_method("level"), of="uniform"),
    }  # fmt: skip
    for times in (2, 5, 10):
        own = _method("heads", _HEADS, f"tuned.head={times}")
        out[f"heads {times}"] = Variant(own, of="uniform")
    for name in ("farms", "reversed", "shuffled_type"):
        out[f"{name}, heads 5"] = Variant(_method(name, _HEADS, "tuned.head=5"), of="uniform")
    return out


_LM = Cell(
    "lm_tiny",
    "A LLaMA of 0.9M parameters on bytes of Python's standard library, 600 steps",
    ("experiment=lm_tiny",),
    _language(),
    tuning=(1100, 1101),
    finals=tuple(range(100, 108)),
    factors={RATE: 2**0.5, DECAY: 2.0},
)


# --- fine-tuning ---------------------------------------------------------------------------------


def _encoder() -> dict[str, Variant]:
    out = {"uniform": Variant(("balance=none",), start=(1e-4, 0.1), axes=(RATE, DECAY))}
    for rate in (0.8, 0.9, 0.95):
        own = _method("llrd", f"balance.assign.rate={rate}")
        out[f"llrd {rate}"] = Variant(own, of="uniform")
    for times in (5, 10, 20):
        out[f"head {times}"] = Variant(_method("heads", f"tuned.head={times}"), of="uniform")
    for name in ("tb_sigmoid_block", "farms", "farms_sigmoid", "level", "depth", "shuffled",
                 "shuffled_type", "reversed", "frozen"):  # fmt: skip
        out[name] = Variant(_method(name), of="uniform")
    return out


def _sst2(labels: int, epochs: int) -> Cell:
    return Cell(
        f"sst2_{labels}",
        f"MiniLM on {labels} labelled sentences of SST-2, {epochs} epochs",
        (
            "experiment=sst2_minilm",
            f"data.share={labels / 6920:.5f}",
            "data.batch_size=16",
            f"trainer.max_epochs={epochs}",
            f"trainer.check_val_every_n_epoch={epochs}",
        ),
        _encoder(),
        tuning=(1100, 1105, 1110),  # three subsets
        finals=tuple(range(100, 130)),  # six subsets of five seeds
        factors={RATE: 2**0.5, DECAY: 4.0},
        mode="max",
        subset_of=5,
    )


# --- vision --------------------------------------------------------------------------------------


def _resnet() -> dict[str, Variant]:
    out = {"uniform": Variant(("balance=none",), start=(0.1, 5e-4), axes=(RATE, DECAY))}
    for name in ("tb", "tb_sigmoid", "farms", "farms_sigmoid", "level", "pertype_measured", "depth",
                 "shuffled", "shuffled_type", "reversed", "frozen"):  # fmt: skip
        out[name] = Variant(_method(name), of="uniform")
    return out


_CIFAR = Cell(
    "cifar20",
    "20 classes of CIFAR-100, 4,500 images, ResNet-18 of width 12 with SGD, 30 epochs",
    (
        "experiment=cifar100_resnet18",
        "data=cifar100_folder",
        "data.classes=20",
        "problem.num_classes=20",
        "model.width=12",
        "data.val_fraction=0.1",
        "data.share=0.5",
        "trainer.max_epochs=30",
        "trainer.check_val_every_n_epoch=30",
        "trainer.precision=32-true",
    ),
    _resnet(),
    tuning=(1100, 1101),
    finals=tuple(range(100, 120)),
    factors={RATE: 2**0.5, DECAY: 2.0},
    mode="max",
)


CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in (
        _FNO,
        _LM,
        *(_sst2(n, 2560 // n if n < 256 else 5) for n in (64, 256, 1024)),
        _CIFAR,
    )
}
