"""Sparsities: the share of each linear layer's weights to remove, from alpha or from a control.

All take a report or a model and a total, and give a ratio for every linear layer inside the
numbered blocks of the network, whose parameter-weighted mean is the total. Embeddings, stems,
heads, norms and biases are left alone. Where a network has no numbered blocks (a plain
``nn.Sequential``), all its linear layers take part, each a block of its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from tempbalance.analysis.report import Report
from tempbalance.layers.find import find_layers
from tempbalance.measure.measurement import measure
from tempbalance.measure.method import check_engine
from tempbalance.pruning.allocate import LIMIT, allocate
from tempbalance.pruning.blocks import group_of, in_block, list_and_numbers
from tempbalance.spectra.by_layer import WindowsLike
from tempbalance.spectra.powerlaw import Fit, Hill
from tempbalance.spectra.windows import Farms

Center = Literal["mean", "median"]
Unit = str | Callable[[str], str]
Progress = Callable[[float], None]

_NOT_CALLED = "NonDynamicallyQuantizableLinear"  # in nn.MultiheadAttention: used, never called
_BUDGET = 2**30


class Matrix(Protocol):
    """What is asked of a layer, measured or not."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def numel(self) -> int: ...


def sparsities(
    report_or_model: Report | nn.Module,
    total: float,
    *,
    spread: float = 0.3,
    unit: Unit = "block",
    center: Center = "mean",
    fit: Fit | None = None,
    windows: WindowsLike | None = None,
    limit: float = LIMIT,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Ratio by layer name: the heavier its tail (the smaller alpha), the less is removed.

    Args:
        report_or_model: what :func:`tempbalance.analyze` gave, or a model, of which only the
            layers that take part are measured.
        total: share (0 to 1) removed of all these layers together.
        spread: see :func:`tempbalance.pruning.allocate`.
        unit: what shares a ratio: ``"block"``, ``"layer"``, ``"type"``, or a function from a
            layer's name to that of its unit.
        center: of the alphas in a unit. The mean is what was published; single fits may be far
            off (18 and more by the peak fit), which the median withstands.
        fit: of a model; ``None`` is ``Hill()``.
        windows: of a model; ``None`` is ``Farms()``. For language models FARMS was published with
            ``Farms.released_linear(2000, 1.0, 15)`` and ``PeakFit(released=True)``.
        limit: no ratio is above it.
        progress: called with the share of the measuring (0 to 1) that was just done.

    A layer that has no alpha gets the ratio of its unit, a unit without any the middle of the map.

    Raises:
        TypeError: for anything but a report or a model.
        ValueError: if there is no linear layer, a total that cannot be met, an unknown unit or
            center, or fit and windows for a report, which is measured already.

    Source: AlphaPruning (arXiv 2410.10912); FARMS (arXiv 2506.06280), section 4.2.
    """
    members, scores = _scored(report_or_model, unit, center, fit, windows, progress)
    return _ratios(members, scores, total, spread, limit)


def uniform(report_or_model: Report | nn.Module, total: float) -> dict[str, float]:
    """The same ratio for every layer: the control that any allocation must beat."""
    return {layer.name: float(total) for layer in linear_layers(report_or_model)}


def by_depth(
    report_or_model: Report | nn.Module,
    total: float,
    *,
    spread: float = 0.3,
    unit: Unit = "block",
    limit: float = LIMIT,
) -> dict[str, float]:
    """Ratios that rise in a line with the unit's place in the network; no weight is read.

    Alpha itself falls in line with depth in language models (rank correlation 0.8 in LLaMA-7B), so
    this is the control that tells whether the spectra say more than the place.
    """
    members = _units(linear_layers(report_or_model), unit)
    return _ratios(members, _places(len(members)), total, spread, limit)


def by_depth_and_alpha(
    report_or_model: Report | nn.Module,
    total: float,
    *,
    share: float = 0.5,
    spread: float = 0.3,
    unit: Unit = "block",
    center: Center = "mean",
    fit: Fit | None = None,
    windows: WindowsLike | None = None,
    limit: float = LIMIT,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Depth, with what alpha says beyond it: the residual of its regression on the place.

    Args:
        share: standard deviation of the residual in the score, over that of depth.
    """
    if not 0 <= share < float("inf"):
        raise ValueError(f"share must be a number of at least 0, got {share!r}")
    members, alphas = _scored(report_or_model, unit, center, fit, windows, progress)
    place = _places(len(members))
    known = torch.isfinite(alphas)
    score = _standard(place)
    residual = torch.zeros_like(score)
    if known.sum() > 2:
        x, y = _standard(place[known]), alphas[known] - alphas[known].mean()
        residual[known] = _standard(y - (x @ y) / (x @ x) * x)
    return _ratios(members, score + share * residual, total, spread, limit)


def shuffled(
    report_or_model: Report | nn.Module,
    total: float,
    *,
    seed: int = 0,
    spread: float = 0.3,
    unit: Unit = "block",
    center: Center = "mean",
    fit: Fit | None = None,
    windows: WindowsLike | None = None,
    limit: float = LIMIT,
    progress: Progress | None = None,
) -> dict[str, float]:
    """As :func:`sparsities`, the alphas dealt out to the units at random."""
    members, scores = _scored(report_or_model, unit, center, fit, windows, progress)
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed), device="cpu")
    return _ratios(members, scores[order], total, spread, limit)


def reversed(
    report_or_model: Report | nn.Module,
    total: float,
    *,
    spread: float = 0.3,
    unit: Unit = "block",
    center: Center = "mean",
    fit: Fit | None = None,
    windows: WindowsLike | None = None,
    limit: float = LIMIT,
    progress: Progress | None = None,
) -> dict[str, float]:
    """As :func:`sparsities`, mirrored: the larger alpha, the less is removed."""
    members, scores = _scored(report_or_model, unit, center, fit, windows, progress)
    return _ratios(members, -scores, total, spread, limit)


def linear_layers(report_or_model: Report | nn.Module) -> list[Matrix]:
    """The layers that take part, in definition order.

    Raises:
        TypeError: for anything but a report or a model.
        ValueError: if there is none, or some wear masks of ``torch.nn.utils.prune``.
    """
    if isinstance(report_or_model, nn.Module):
        layers = find_layers(report_or_model)
        for skipped in layers.skipped:
            if "torch.nn.utils.prune" in skipped.reason:
                raise ValueError(f"{skipped.name!r} is {skipped.reason}")
        found: Iterable[Matrix] = layers.layers
    elif isinstance(report_or_model, Report):
        found = report_or_model.layers
    else:
        raise TypeError(
            "needs a Report of tempbalance.analyze or a torch.nn.Module, got "
            f"{type(report_or_model).__name__}"
        )
    linear = [layer for layer in found if _is_linear(layer.kind)]
    if not linear:
        raise ValueError("there is no linear layer to prune")
    return [layer for layer in linear if in_block(layer.name)] or linear


def _is_linear(kind: str) -> bool:
    """nn.Linear and what is derived from it, and GPT-2's Conv1D, which is one by another name."""
    return (kind.endswith("Linear") or kind == "Conv1D") and kind != _NOT_CALLED


def _scored(
    source: Report | nn.Module,
    unit: Unit,
    center: Center,
    fit: Fit | None,
    windows: WindowsLike | None,
    progress: Progress | None,
) -> tuple[list[list[Matrix]], Tensor]:
    """The units and the alpha of each (U,), NaN where none of its layers has one."""
    if center not in _CENTERS:
        raise ValueError(f"center must be one of {sorted(_CENTERS)}, got {center!r}")
    layers = linear_layers(source)
    members = _units(layers, unit)
    alphas = _alphas(source, layers, fit, windows, progress)
    values = []
    for some in members:
        known = [a for layer in some if (a := alphas[layer.name]) is not None]
        values.append(_CENTERS[center](known) if known else float("nan"))
    return members, torch.tensor(values, dtype=torch.float64, device="cpu")


_CENTERS: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": statistics.fmean,
    "median": statistics.median,
}


def _alphas(
    source: Report | nn.Module,
    layers: Sequence[Matrix],
    fit: Fit | None,
    windows: WindowsLike | None,
    progress: Progress | None,
) -> dict[str, float | None]:
    if isinstance(source, Report):
        if fit is not None or windows is not None:
            raise ValueError("a report is measured already: give fit and windows to analyze")
        return {record.name: record.alpha for record in source.layers}
    windows, fit = windows or Farms(), fit or Hill()
    check_engine(windows, fit, _BUDGET)
    names = {layer.name for layer in layers}
    found = [layer for layer in find_layers(source).layers if layer.name in names]
    records = measure(found, windows=windows, fit=fit, budget=_BUDGET, progress=progress)
    return {record.name: record.alpha for record in records}


def _units(layers: Sequence[Matrix], unit: Unit) -> list[list[Matrix]]:
    """Layers by unit, in definition order; the blocks of one list by their numbers.

    Files name their tensors in the order of the alphabet, where block 10 comes before block 2.
    """
    known: dict[str, Callable[[Matrix], str]] = {
        "block": lambda layer: group_of(layer.name),
        "layer": lambda layer: layer.name,
        "type": lambda layer: layer.kind,
    }
    if isinstance(unit, str) and unit not in known:
        raise ValueError(f"unit must be one of {sorted(known)} or a function, got {unit!r}")
    units: dict[str, list[Matrix]] = {}
    for layer in layers:
        key = known[unit](layer) if isinstance(unit, str) else unit(layer.name)
        units.setdefault(key, []).append(layer)
    lists: dict[str, int] = {}
    for key in units:
        lists.setdefault(list_and_numbers(key)[0], len(lists))

    def place(key: str) -> tuple[int, list[int]]:
        inside, numbers = list_and_numbers(key)
        return lists[inside], numbers

    return [units[key] for key in sorted(units, key=place)]


def _places(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float64, device="cpu")


def _standard(values: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1; zeros where all are equal."""
    centered = values - values.mean()
    deviation = centered.square().mean().sqrt()
    return centered / deviation if deviation > 0 else torch.zeros_like(values)


def _ratios(
    members: Sequence[Sequence[Matrix]], scores: Tensor, total: float, spread: float, limit: float
) -> dict[str, float]:
    sizes = [float(sum(layer.numel for layer in some)) for some in members]
    each = allocate(scores, sizes, total, spread=spread, limit=limit).tolist()
    return {layer.name: ratio for some, ratio in zip(members, each, strict=True) for layer in some}
