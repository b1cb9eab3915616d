"""Metrics: the columns of WeightWatcher's details and summary, by the same names.

Figures are those of WeightWatcher 0.7.7 on a CPU, with three faults left out: a fit that fails is
no "over-trained" layer, N is the larger side for every kernel size, and an alpha norm neither
over- nor underflows.

Legend: N >= M sides of a slice, rf slices (kernel positions), Q = N / M; eigenvalues of W^T W,
those of a 2-d convolution halved, all slices pooled, ascending in float64.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tempbalance.analysis.lapack import numpy_alone
from tempbalance.analysis.released_bulk import fit_bulk, random_columns
from tempbalance.measure.measurement import DEFAULT_BUDGET
from tempbalance.spectra.powerlaw import KSFit
from tempbalance.spectra.scale import unit_scales
from tempbalance.spectra.spectrum import Task, spectra_float64
from tempbalance.spectra.windows import WholeMatrix

logger = logging.getLogger("tempbalance")

Row = dict[str, str | int | float | bool]
Values = npt.NDArray[np.float64]

# Its limits: eigenvalues of a layer, and the larger side; what counts for the fit and as a rank.
FEWEST, MOST, LONGEST = 8, 15_000, 50_000
_FITTED, _WEAK, _EPSILON = 1e-5, 1e-6, 1e-10
_OVER_TRAINED, _UNDER_TRAINED = 2.0, 6.0
# In spectra of fewer eigenvalues, tails have at least so many, and alpha is corrected for bias.
_SMALL, _SMALL_TAIL = 20, 8
# A slice with an eigenvalue below this share of its largest is decomposed itself: the eigenvalues
# of a Gram matrix are exact to 2e-16 of the largest.
_EXACT = 1e-10
_MEANS = ("log_norm", "alpha", "alpha_weighted", "log_alpha_norm", "log_spectral_norm",
          "stable_rank", "mp_softrank")  # fmt: skip


class Weight(Protocol):
    """What is asked of a layer: ``Layer`` has it, and :func:`model_weights` gives it."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int, int]: ...
    def read(self) -> Tensor:
        """The weight as (slices, rows, cols)."""
        ...


def details(
    layers: Sequence[Weight],
    *,
    ids: Mapping[str, int] | None = None,
    mp_fit: bool = False,
    randomize: bool = False,
    seed: int = 0,
    budget: int = DEFAULT_BUDGET,
    progress: Callable[[float], None] | None = None,
) -> list[Row]:
    """A row a layer, as ``WeightWatcher.analyze()`` has it; none for complex weights.

    As there, layers of fewer than 8 or more than 15,000 eigenvalues, or of a side above 50,000,
    have no row.

    Args:
        layers: those of :func:`model_weights` are the ones that WeightWatcher reads.
        ids: ``layer_id`` by name, as from :func:`module_ids`; default the position.
        mp_fit: also the Marchenko-Pastur fit of the weight (num_spikes, sigma_mp, mp_softrank...).
        randomize: also the shuffled weight (rand_num_spikes, max_rand_eval, rand_distance...): the
            figures that ``np.random.seed(seed)`` gives there. They are for comparison;
            :func:`tempbalance.analysis.traps.find_traps` is the measurement.
        seed: of the shuffles; numpy's own state is left alone.
        budget: extra memory in bytes.
        progress: called with the share of the work (0 to 1) that was just done.
    """
    kept = [(i, layer) for i, layer in enumerate(layers) if _is_read(layer)]
    generator = np.random.RandomState(seed)
    rows = []
    for (i, layer), found in zip(kept, _spectra([x for _, x in kept], budget), strict=True):
        if progress is not None:
            progress(1 / len(kept))
        if found is None:
            logger.warning("layer %r is complex or not finite: it has no row", layer.name)
            continue
        spectrum, law = found
        row = _row(layer, spectrum, law, i if ids is None else ids.get(layer.name, i))
        n, m = max(layer.shape[1:]), min(layer.shape[1:])
        if mp_fit:
            row |= asdict(fit_bulk(spectrum.eigenvalues, n, m))
        if randomize:
            row |= random_columns(_oriented(layer), spectrum.eigenvalues, n, m, generator)
        rows.append(row)
    return rows


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Plain means over layers, as ``WeightWatcher.get_summary()``: failed fits enter as -1."""
    known = [name for name in _MEANS if rows and name in rows[0]]
    return {name: math.fsum(float(row[name]) for row in rows) / len(rows) for name in known}


def module_ids(model: nn.Module) -> dict[str, int]:
    """``layer_id`` of each module by its name: its place among ``model.named_modules()``."""
    return {name: i for i, (name, _) in enumerate(model.named_modules())}


# --- which weights -------------------------------------------------------------------------------

_KINDS = (("dense", "linear"), ("conv1d", "conv1d"), ("conv2d", "conv2d"),
          ("embedding", "embedding"))  # fmt: skip


@dataclass(frozen=True)
class _ModuleWeight:
    name: str
    kind: str
    module: nn.Module

    @property
    def shape(self) -> tuple[int, int, int]:
        slices, rows, cols = self.read().shape
        return slices, rows, cols

    def read(self) -> Tensor:
        weight: Tensor = self.module.weight.detach()  # type: ignore[operator, assignment]
        return weight.flatten(2).permute(2, 0, 1) if weight.ndim == 4 else weight.unsqueeze(0)


def model_weights(model: nn.Module) -> list[Weight]:
    """The weights that WeightWatcher reads: by the name of the module's type.

    Embeddings, depthwise convolutions and tied weights are among them, each time they are used;
    fused attention projections, recurrent layers and 1-d convolutions of three dimensions are not.
    """
    found: list[Weight] = []
    for name, module in model.named_modules():
        kind = _kind_of(module)
        weight = getattr(module, "weight", None)
        dims = (4,) if kind == "conv2d" else (2,)
        if kind and isinstance(weight, Tensor) and weight.ndim in dims and not weight.is_complex():
            found.append(_ModuleWeight(name, kind, module))
    return found


def _kind_of(module: nn.Module) -> str:
    """Of the type's name, the first that is part of it; empty where none is."""
    names = (str(type(module)).lower(), *(base.__name__.lower() for base in type(module).__mro__))
    for kind, part in _KINDS:
        if any(part in name for name in names):
            return kind
    return ""


def _is_read(layer: Weight) -> bool:
    slices, *sides = layer.shape
    return FEWEST <= slices * min(sides) <= MOST and max(sides) <= LONGEST


def _layer_type(layer: Weight) -> str:
    kind = layer.kind.lower()
    named = [name for name, part in _KINDS if part in kind or name == kind]
    return named[0] if named else "conv2d" if layer.shape[0] > 1 else "dense"


# --- eigenvalues ---------------------------------------------------------------------------------


class _Spectrum(NamedTuple):
    eigenvalues: Values  # of all slices
    largest: float  # singular value
    smallest: float  # the largest of the smallest of each slice
    rank_loss: int


def _factor(layer: Weight) -> float:
    """Convolutions are multiplied by sqrt(1/2)."""
    return 0.5 if _layer_type(layer) == "conv2d" else 1.0


@torch.no_grad()
def _spectra(layers: Sequence[Weight], budget: int) -> Iterator[tuple[_Spectrum, Row] | None]:
    """With their fits, in order; as many layers together as hold a quarter of the budget."""
    batch: list[Weight] = []
    entries = 0
    for layer in layers:
        if batch and 8 * (entries + math.prod(layer.shape)) > budget // 4:
            yield from _together(batch, budget)
            batch, entries = [], 0
        batch.append(layer)
        entries += math.prod(layer.shape)
    if batch:
        yield from _together(batch, budget)


def _together(layers: Sequence[Weight], budget: int) -> Iterator[tuple[_Spectrum, Row] | None]:
    weights = [_usual(layer) for layer in layers]
    scales = unit_scales(weights)
    with numpy_alone() as solver:
        tasks = []
        for layer, weight, scale in zip(layers, weights, scales, strict=True):
            grid = WholeMatrix().grid(*weight.shape[1:])
            mask = torch.ones(1, len(weight), dtype=torch.bool)
            none = torch.zeros(1, len(weight), min(weight.shape[1:]), device=weight.device)
            own = None if weight.is_complex() else solver
            tasks.append((Task(weight, grid, scale, layer.name, solver=own), none, mask))
        found = spectra_float64(tasks, budget)
    spectra: list[_Spectrum | None] = []
    for layer, weight, scale, (values,) in zip(layers, weights, scales, found, strict=True):
        known = bool(scale) and not weight.is_complex()
        spectra.append(_spectrum(layer, weight, values / scale / scale) if known else None)
    laws = iter(_fits([x.eigenvalues for x in spectra if x is not None]))
    yield from (None if x is None else (x, next(laws)) for x in spectra)


def _usual(layer: Weight) -> Tensor:
    weight = layer.read()
    if weight.device.type not in ("cpu", "cuda"):
        weight = weight.cpu()
    return weight.float() if weight.element_size() == 1 else weight


def _spectrum(layer: Weight, weight: Tensor, values: Tensor) -> _Spectrum:
    """Of eigenvalues (S, k), those of rank-deficient slices computed once more."""
    low = values[:, 0] < _EXACT * values[:, -1]
    singular = values.clamp_min(0).sqrt()
    for i in low.nonzero().flatten().tolist():
        singular[i] = torch.linalg.svdvals(weight[i].double()).flip(-1)
    sigma = (singular * math.sqrt(_factor(layer))).cpu().numpy()
    return _Spectrum(
        np.sort((sigma**2).ravel()),
        float(sigma[:, -1].max()),
        float(sigma[:, 0].max()),
        sum(len(s) - _rank(s, max(weight.shape[1:])) for s in sigma),
    )


def _rank(singular: Values, n: int) -> int:
    return int((singular > singular.max() * n * np.finfo(np.float64).eps).sum())


def _oriented(layer: Weight) -> Values:
    """The slices as they are shuffled there: those of a convolution turned to N x M."""
    weight = _usual(layer).double() * math.sqrt(_factor(layer))
    if _layer_type(layer) == "conv2d" and weight.shape[1] < weight.shape[2]:
        weight = weight.mT
    return np.ascontiguousarray(weight.cpu().numpy())


# --- a row ---------------------------------------------------------------------------------------


def _row(layer: Weight, spectrum: _Spectrum, law: Row, layer_id: int) -> Row:
    values = spectrum.eigenvalues
    slices, *sides = layer.shape
    n, m = max(sides), min(sides)
    row: Row = {
        "layer_id": layer_id,
        "name": layer.name.rpartition(".")[2],
        "longname": layer.name,
        "layer_type": _layer_type(layer),
        "N": n,
        "M": m,
        "rf": slices,
        "Q": n / m,
        "has_esd": True,
        "num_evals": len(values),
        "sv_max": spectrum.largest,
        "sv_min": spectrum.smallest,
        "rank_loss": spectrum.rank_loss,
        "weak_rank_loss": int((values < _WEAK).sum()),
        "lambda_max": float(values[-1]),
    }
    row |= law
    return row | _norms(values, float(law["alpha"]), n)


# alpha, the index of xmin and D
_Law = tuple[float, int, float]


def _fits(spectra: Sequence[Values]) -> list[Row]:
    """The power laws of the eigenvalues that count; -1 where there is none."""
    some = [values[values > _FITTED] for values in spectra]
    laws = [_small_law(values) if len(values) < _SMALL else None for values in some]
    # Those of one length at a time, up to a factor of two: the shorter are padded.
    by_size: dict[int, list[int]] = {}
    for i, values in enumerate(some):
        if len(values) >= _SMALL:
            by_size.setdefault(len(values).bit_length(), []).append(i)
    for places in by_size.values():
        for i, law in zip(places, _laws([some[i] for i in places]), strict=True):
            laws[i] = law
    return [_fit(*each) for each in zip(spectra, some, laws, strict=True)]


def _fit(values: Values, some: Values, law: _Law | None) -> Row:
    if law is None:
        row: Row = {"num_pl_spikes": -1, "status": "failed", "warning": ""}
        return row | dict.fromkeys(("alpha", "xmin", "xmax", "D", "sigma"), -1.0)
    alpha, start, d = law
    under = "under-trained" if alpha > _UNDER_TRAINED else ""
    return {
        "alpha": alpha,
        "xmin": float(some[start]),
        "xmax": float(some[-1]),
        "D": d,
        "sigma": (alpha - 1) / math.sqrt(len(some) - start),
        "num_pl_spikes": int((values >= some[start]).sum()),
        "status": "success",
        "warning": "over-trained" if alpha < _OVER_TRAINED else under,
    }


def _laws(spectra: Sequence[Values]) -> Iterator[_Law | None]:
    size = max(map(len, spectra))
    first = torch.tensor([size - len(values) for values in spectra])
    batch = torch.zeros(len(spectra), size, dtype=torch.float64)
    for values, padded, start in zip(spectra, batch, first, strict=True):
        padded[start:] = torch.from_numpy(values)
    law = KSFit()(batch, first)
    for values, alpha, tail, d in zip(spectra, law.alpha, law.n_tail, law.d, strict=True):
        found = float(alpha), len(values) - int(tail), float(d)
        yield found if math.isfinite(alpha) else None


def _small_law(values: Values) -> _Law | None:
    """The same of few eigenvalues, alpha = 1 + (k - 1) / sum ln(lambda_j / xmin)."""
    logs, count = np.log(values), len(values)
    starts = list(range(max(0, count - _SMALL_TAIL + 1))) or [0]
    best = None
    for start in starts if count > 1 else []:
        tail = logs[start:] - logs[start]
        k, total = count - start, float(tail.sum())
        if total <= 1e-12:
            continue
        alpha = 1 + (k - 1) / total
        d = float(np.abs(1 - np.exp((1 - alpha) * tail) - np.arange(k) / k).max())
        if best is None or d < best[2]:
            best = (alpha, start, d)
    return best


def _norms(values: Values, alpha: float, n: int) -> Row:
    total, top = float(values.sum()), float(values[-1])
    if not top > 0:
        row: Row = {"matrix_rank": 0}
        row |= dict.fromkeys(("norm", "spectral_norm", "stable_rank", "entropy"), 0.0)
        logs = ("log_norm", "log_spectral_norm", "alpha_weighted", "log_alpha_norm")
        return row | dict.fromkeys(logs, -math.inf)
    rank = _rank(np.sqrt(values), n)
    share = values / total + _EPSILON
    with np.errstate(divide="ignore"):
        relative = (values / top) ** alpha if alpha > 0 else (top / values) ** -alpha
    return {
        "norm": total,
        "log_norm": math.log10(total),
        "spectral_norm": top,
        "log_spectral_norm": math.log10(top),
        "alpha_weighted": alpha * math.log10(top),
        "log_alpha_norm": float(np.log10(relative.sum())) + alpha * math.log10(top),
        "stable_rank": total / top,
        "matrix_rank": rank,
        "entropy": float(-(share * np.log(share)).sum()) / math.log(rank + _EPSILON),
    }
