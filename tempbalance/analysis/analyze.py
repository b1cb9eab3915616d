"""Analyze: measure a network at rest, from a model, a state dict or a file."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal, overload

from torch import Tensor, nn

from tempbalance.analysis.details import Details
from tempbalance.analysis.files import open_checkpoint
from tempbalance.analysis.formats import in_memory
from tempbalance.analysis.guess import Guess, guess_layers
from tempbalance.analysis.metrics import Weight, details, model_weights, module_ids
from tempbalance.analysis.report import Report
from tempbalance.analysis.traps import find_traps
from tempbalance.layers import Fused, Layer, find_layers
from tempbalance.measure.measurement import (
    DEFAULT_BUDGET,
    LayerRecord,
    MeasurementError,
    Outcome,
    measure,
)
from tempbalance.measure.method import Method, check_engine
from tempbalance.spectra.by_layer import AnyWindows, WindowsLike, checked_windows, windows_of
from tempbalance.spectra.powerlaw import Fit, Hill
from tempbalance.spectra.windows import Farms, WholeMatrix

logger = logging.getLogger("tempbalance")

Network = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str] | Guess


@overload
def analyze(
    model: Network,
    *,
    windows: WindowsLike = ...,
    fit: Fit = ...,
    min_eigs: int = ...,
    fused: Fused | Literal[False] | None = ...,
    traps: bool = ...,
    preset: None = ...,
    strict: bool = ...,
    budget: int = ...,
    progress: Callable[[float], None] | None = ...,
) -> Report: ...


@overload
def analyze(
    model: Network,
    *,
    fused: Fused | Literal[False] | None = ...,
    traps: bool = ...,
    preset: Literal["weightwatcher"],
    progress: Callable[[float], None] | None = ...,
) -> Details: ...


def analyze(
    model: Network,
    *,
    windows: WindowsLike = Farms(),
    fit: Fit = Hill(),
    min_eigs: int = 10,
    fused: Fused | Literal[False] | None = None,
    traps: bool = False,
    preset: Literal["weightwatcher"] | None = None,
    strict: bool = False,
    budget: int = DEFAULT_BUDGET,
    progress: Callable[[float], None] | None = None,
) -> Report | Details:
    """Measure how heavy-tailed the spectrum of every layer of a network is.

    Works on the device where the weights are, changes nothing, needs no data. Alpha and its fit are
    those of the windows; norms, stable rank and alpha_hat are those of the weight itself, which is
    measured a second time for them, unless it is its own only window. Where its Gram matrix then
    needs more than the budget (above 8192 rows and columns at the default) they are ``None``.

    Args:
        model: any ``nn.Module``; compiled, DDP- and FSDP2-wrapped ones too (under FSDP2 every
            rank must call). Frozen layers are measured as well. Without the code of the model: a
            state dict, or the path of a file or folder (see
            :func:`~tempbalance.analysis.files.open_checkpoint`), whose layers are told from
            names and shapes; ``Report.notes`` says what was guessed. No code in a file is run,
            and tensors are read one at a time.
        windows: which submatrices are measured, ``Farms()``, or ``WholeMatrix()`` for
            the plain method; or by the first pattern that a layer's name or type matches:
            ``{"Linear": WholeMatrix(), "*": Farms()}``.
        fit: the power-law fit, ``Hill()``, ``KSFit()`` or ``PeakFit()``.
        min_eigs: layers with fewer eigenvalues get no alpha.
        fused: projections that share one weight, by name pattern: ``{"*.kv": 2}``; a ``qkv`` is
            found by itself, and ``False`` leaves all whole.
        traps: look for correlation traps too: atypical entries of a weight, told by the edge of
            the spectrum of the shuffled weight (fields ``traps``, ``trap_units``,
            ``largest_entry`` and ``kurtosis`` of a record). Costs several measurements more.
        preset: ``"weightwatcher"`` for the columns and names of WeightWatcher, computed its way
            (whole matrices, its fit): the other choices then have no say. The result is a
            :class:`~tempbalance.analysis.details.Details`, with ``traps`` also of the randomized
            weights.
        strict: raise for the first layer that is not measured in full, instead of recording it.
        budget: extra memory in bytes (default 1 GiB); what a single window needs beyond it is
            taken all the same, with a message in the log.
        progress: called with the share of the work (0 to 1) that was just done.

    Raises:
        CheckpointError: for a file that cannot be read safely, or holds no weights.
        MeasurementError: with ``strict``, naming the layer, its shape and the cure.
        TypeError: if ``model`` is none of these, or windows or fit are not objects of their kind.
        ValueError: for ``min_eigs`` below 2, a ``fused`` pattern that matches nothing, or a
            layer that no pattern of ``windows`` matches.

    >>> report = analyze(nn.Linear(256, 64))
    >>> 1.5 < report.layers[0].alpha < 3
    True
    """
    check_engine(windows, fit, budget)
    if min_eigs < 2:
        raise ValueError(f"min_eigs must be at least 2, got {min_eigs!r}")
    if preset not in (None, "weightwatcher"):
        raise ValueError(f"preset must be 'weightwatcher' or None, got {preset!r}")
    found = _network(model, fused)
    layers = found.layers
    if preset is not None:
        return _details(model, found, traps, budget, progress)
    method = Method(checked_windows(windows, layers.layers), fit, min_eigs, budget)
    ticks = _half(progress) if traps and progress is not None else progress
    records = _measured(layers.layers, method, ticks)
    if traps:
        found_traps = find_traps(layers.layers, budget=budget, progress=ticks)
        records = tuple(
            replace(r, **asdict(found_traps[r.name])) if r.name in found_traps else r
            for r in records
        )
    of_complex = frozenset(
        x.name for x in layers.layers if any(p.is_complex() for p in x.tensors())
    )
    report = Report(records, layers.skipped, layers.numel, found.notes, method, of_complex)
    if strict:
        _raise_first(report)
    return report


def _details(
    model: Network,
    found: Guess,
    randomize: bool,
    budget: int,
    progress: Callable[[float], None] | None,
) -> Details:
    """The weights that WeightWatcher reads of a model, or all those found in a file."""
    weights: Sequence[Weight] = found.layers.layers
    ids = None
    if isinstance(model, nn.Module):
        weights, ids = model_weights(model), module_ids(model)
    rows = details(
        weights, ids=ids, mp_fit=True, randomize=randomize, budget=budget, progress=progress
    )
    has_row = {f"{weight.name}.weight" for weight in weights}
    left = tuple(each for each in found.layers.skipped if each.name not in has_row)
    return Details(tuple(rows), left, found.notes)


def _network(model: Network, fused: Fused | Literal[False] | None) -> Guess:
    """The layers of a network, whatever it is given as."""
    if isinstance(model, Guess):
        return model
    if isinstance(model, nn.Module):
        return Guess(find_layers(model, fused))
    if isinstance(model, Mapping):
        return guess_layers(in_memory(model), fused)
    if isinstance(model, str | os.PathLike):
        return guess_layers(open_checkpoint(model), fused)
    raise TypeError(
        "analyze needs a torch.nn.Module, a state dict or the path of a file, got "
        f"{type(model).__name__}"
    )


def _measured(
    layers: tuple[Layer, ...], method: Method, progress: Callable[[float], None] | None
) -> tuple[LayerRecord, ...]:
    windows, budget = method.windows, method.budget
    # Where the only window is the slice itself, its norms come with the first measurement.
    others = [x for x in layers if not _is_whole(windows, x)]
    # A Gram matrix of the whole slice and the solver's copy of it, complex as they may be.
    again = [x for x in others if 16 * min(x.shape[1:]) ** 2 <= budget]
    ticks = _half(progress) if again and progress is not None else progress
    common: dict[str, Any] = {"min_eigs": method.min_eigs, "budget": budget, "progress": ticks}
    records = measure(layers, windows=windows, fit=method.fit, keep_spectra=True, **common)
    of_weight = {r.name: r for r in measure(again, windows=WholeMatrix(), **common)}
    windowed = {x.name for x in others}
    if len(again) < len(others):
        logger.info(
            "norms of %d of %d layers are left out: their whole weights need more than the budget "
            "of %d MiB",
            *(len(others) - len(again), len(records), budget >> 20),
        )
    return tuple(
        r.with_norms_of(of_weight.get(r.name)) if r.name in windowed else r for r in records
    )


def _is_whole(windows: AnyWindows, layer: Layer) -> bool:
    """Whether the windows of a layer are its slices, each once."""
    _, rows, cols = layer.shape
    grid = windows_of(windows, layer).grid(rows, cols)
    return grid.positions == 1 and grid.height * grid.width == rows * cols


def _half(progress: Callable[[float], None]) -> Callable[[float], None]:
    return lambda share: progress(share / 2)


def _raise_first(report: Report) -> None:
    bad = [layer for layer in report.layers if layer.outcome is not Outcome.OK]
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise MeasurementError(bad[0].message + more)
    if not report.layers:
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in report.skipped[:3])
        raise MeasurementError(
            "the model has no weight matrix to measure" + (f" ({reasons})" if reasons else "")
        )
