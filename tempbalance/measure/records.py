"""Records: what came of measuring a layer, in numbers or in words."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from tempbalance.layers.find import Layer
from tempbalance.spectra.table import (
    ALPHA,
    COUNT,
    FAILED,
    KS,
    LARGEST_ALPHA,
    SCALE,
    SUM,
    TAIL,
    TOP,
    TOTAL,
    XMIN,
)


class Outcome(enum.Enum):
    """What came of measuring a layer; :meth:`message` says what it means and what to do."""

    OK = "ok"
    RANK_DEFICIENT = "rank-deficient"
    TOO_SMALL = "too small"
    TOO_FEW_EIGENVALUES = "too few eigenvalues"
    ALL_ZERO = "all zero"
    NO_SPREAD = "no spread"
    NON_FINITE = "non-finite"
    NOT_CONVERGED = "not converged"

    @property
    def measured(self) -> bool:
        """Whether the layer has an alpha."""
        return self in (Outcome.OK, Outcome.RANK_DEFICIENT)

    def message(self, layer: Layer | LayerRecord, min_eigs: int) -> str:
        """One sentence for a person: the layer, its shape, the meaning and the cure."""
        slices, rows, cols = layer.shape
        text = _MESSAGES[self].format(eigenvalues=slices * min(rows, cols), min_eigs=min_eigs)
        return f"layer {layer.name!r} ({slices} x {rows} x {cols}): {text}"


_MESSAGES = {
    Outcome.OK: "measured",
    Outcome.RANK_DEFICIENT: (
        "some eigenvalues are zero to rounding (dead channels, pruning or a low-rank factor); "
        "alpha is that of the others"
    ),
    Outcome.TOO_SMALL: (
        "it has {eigenvalues} eigenvalues, under min_eigs={min_eigs}; lower min_eigs to measure it"
    ),
    Outcome.TOO_FEW_EIGENVALUES: (
        "of its {eigenvalues} eigenvalues fewer than min_eigs={min_eigs} are not zero: the weight "
        "is close to low rank; look for dead channels, or lower min_eigs"
    ),
    Outcome.ALL_ZERO: (
        "every weight is zero. Where that is only its start (B of LoRA), it is measured once it is "
        "not; else initialize it, or leave the layer out by exclude"
    ),
    Outcome.NO_SPREAD: (
        "its eigenvalues are all equal (an identity or orthogonal initialization), so there is no "
        "tail to fit; train it first"
    ),
    Outcome.NON_FINITE: (
        "the weight holds NaN or infinity; go back to an earlier checkpoint and lower the "
        "learning rate, or clip gradients"
    ),
    Outcome.NOT_CONVERGED: (
        "the eigensolver did not converge, in float64 either; measure it with windows=Farms(rows="
        "128), and please report the weight"
    ),
}


GUESSED = "guessed: no reader knows its module; taken for a matrix by its name and shape"


class MeasurementError(ValueError):
    """Raised by ``analyze(..., strict=True)`` for a layer that could not be measured in full."""


@dataclass(frozen=True)
class LayerRecord:
    """What was measured of one layer. Eigenvalues are those of W W^H, not its singular values.

    The fit (alpha, D, xmin, n_tail) and the eigenvalues (n_eigs, lambda_max) are of the spectrum
    that was measured: of all windows together, or of the weight with ``WholeMatrix()``. Norms,
    stable rank and alpha_hat are of the weight in a :func:`~tempbalance.analyze` report, of
    the same spectrum elsewhere. Numbers are ``None`` where the layer has none, never NaN or
    infinite.
    """

    name: str
    kind: str
    shape: tuple[int, int, int]  # slices, rows, cols
    numel: int  # real numbers in the weight
    outcome: Outcome
    message: str
    alpha: float | None = None  # power-law exponent
    D: float | None = None  # Kolmogorov-Smirnov distance of the fit
    xmin: float | None = None  # lower end of the tail, an eigenvalue
    n_tail: int | None = None  # eigenvalues in the tail
    n_eigs: int = 0  # eigenvalues that count, over all windows
    lambda_max: float | None = None  # largest eigenvalue
    spectral_norm: float | None = None  # its root, the largest singular value
    frobenius_norm: float | None = None  # root of the sum of the eigenvalues
    stable_rank: float | None = None  # sum of the eigenvalues / the largest
    alpha_hat: float | None = None  # alpha * log10 of the largest eigenvalue
    log_norm: float | None = None  # log10 of the sum of the eigenvalues
    note: str | None = None  # what else there is to know: that the weight's form was guessed
    traps: int | None = None  # shuffled eigenvalues beyond the random edge, if asked for
    trap_units: float | None = None  # the largest of them above it, in Tracy-Widom units
    largest_entry: float | None = None  # |entry - mean| over the standard deviation, the largest
    kurtosis: float | None = None  # of the entries, in excess of a Gaussian's
    eigenvalues: npt.NDArray[np.float64] | None = field(default=None, repr=False, compare=False)

    def with_norms_of(self, weight: LayerRecord | None) -> LayerRecord:
        """This record with the norms of another, that of the whole weight, or with none."""
        norm, hat = None if weight is None else weight.spectral_norm, None
        if self.alpha is not None and norm:  # not of the eigenvalue, which may underflow
            hat = 2 * self.alpha * math.log10(norm)
        return replace(
            self,
            spectral_norm=norm,
            frobenius_norm=None if weight is None else weight.frobenius_norm,
            stable_rank=None if weight is None else weight.stable_rank,
            alpha_hat=hat,
            log_norm=None if weight is None else weight.log_norm,
        )


def record_of(
    layer: Layer,
    row: npt.NDArray[np.float64],
    eigenvalues: npt.NDArray[np.float64] | None,
    min_eigs: int,
) -> LayerRecord:
    outcome = _outcome(layer, row, min_eigs)
    base = LayerRecord(
        layer.name,
        layer.kind,
        layer.shape,
        layer.numel,
        outcome,
        outcome.message(layer, min_eigs),
        note=GUESSED if layer.guessed else None,
    )
    if outcome in (Outcome.NON_FINITE, Outcome.ALL_ZERO, Outcome.NOT_CONVERGED):
        return base
    scale = float(row[SCALE])
    top, total = row[TOP], row[SUM]
    numbers: dict[str, float | int | None] = {
        "n_eigs": int(row[COUNT]),
        "lambda_max": float(unscaled(top, scale)),
        "spectral_norm": math.sqrt(top) / scale,
        "frobenius_norm": math.sqrt(total) / scale,
        "stable_rank": float(total / top),
        "log_norm": math.log10(total) - 2 * math.log10(scale),
    }
    if outcome.measured:
        alpha = float(row[ALPHA])
        numbers |= {
            "alpha": alpha,
            "D": float(row[KS]),
            "xmin": float(unscaled(row[XMIN], scale)),
            "n_tail": int(row[TAIL]),
            "alpha_hat": alpha * (math.log10(top) - 2 * math.log10(scale)),
        }
    return LayerRecord(**{**_fields(base), **numbers, "eigenvalues": eigenvalues})  # type: ignore


def unscaled(eigenvalues: npt.NDArray[np.float64], scale: float) -> npt.NDArray[np.float64]:
    """Eigenvalues of the weight itself, where float64 holds them: never infinite."""
    with np.errstate(over="ignore"):
        return np.minimum(eigenvalues / scale / scale, np.finfo(np.float64).max)


def _fields(record: LayerRecord) -> dict[str, object]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def _outcome(layer: Layer, row: npt.NDArray[np.float64], min_eigs: int) -> Outcome:
    if not row[SCALE]:
        return Outcome.NON_FINITE
    if row[FAILED]:
        return Outcome.NOT_CONVERGED
    if row[TOP] <= 0:
        return Outcome.ALL_ZERO
    if layer.eigenvalues < min_eigs:
        return Outcome.TOO_SMALL
    # Windows repeat parts of a spectrum: what counts is the share that is not zero.
    share = row[COUNT] / row[TOTAL]
    if round(share * layer.eigenvalues) < min_eigs:
        return Outcome.TOO_FEW_EIGENVALUES
    if not (math.isfinite(row[ALPHA]) and row[ALPHA] <= LARGEST_ALPHA):
        return Outcome.NO_SPREAD
    return Outcome.RANK_DEFICIENT if share < 1 else Outcome.OK
