"""Report: what :func:`analyze` found in a model, to print, to look up, to export and to draw."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import nn

from tempbalance.layers.find import Layer, Skipped, find_layers
from tempbalance.measure.measurement import (
    DEFAULT_BUDGET,
    LayerRecord,
    MeasurementError,
    Outcome,
    measure,
)
from tempbalance.measure.method import check_engine
from tempbalance.spectra.by_layer import AnyWindows, WindowsLike, checked_windows, windows_of
from tempbalance.spectra.powerlaw import Fit, Hill
from tempbalance.spectra.windows import Farms, WholeMatrix

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger("tempbalance")


@dataclass(frozen=True)
class Report:
    """The layers of a model, measured; ``print(report)`` shows them as a table.

    ``layers`` are in definition order, unmeasurable ones included, with their outcome;
    ``skipped`` are the parameters that hold no matrix, with the reason.
    """

    layers: tuple[LayerRecord, ...]
    skipped: tuple[Skipped, ...]
    numel: int  # real numbers in the model, shared ones once

    def __getitem__(self, name: str) -> LayerRecord:
        """The record of a layer by name.

        Raises:
            KeyError: naming the layers there are, or why the parameter is not among them.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        for skipped in self.skipped:
            if skipped.name in (name, f"{name}.weight"):
                raise KeyError(f"{skipped.name!r} is not measured: {skipped.reason}")
        raise KeyError(f"no layer {name!r}; there are {[layer.name for layer in self.layers]}")

    def __iter__(self) -> Iterator[LayerRecord]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def measured(self) -> tuple[LayerRecord, ...]:
        """The layers that have an alpha."""
        return tuple(layer for layer in self.layers if layer.outcome.measured)

    @property
    def failed(self) -> tuple[LayerRecord, ...]:
        """The layers that hold a matrix but have no alpha."""
        return tuple(layer for layer in self.layers if not layer.outcome.measured)

    @property
    def coverage(self) -> float:
        """Share (0 to 1) of the model's parameters whose layer has an alpha."""
        return sum(layer.numel for layer in self.measured) / self.numel if self.numel else 0.0

    @property
    def weighted_alpha(self) -> float | None:
        """Mean of alpha * log10(lambda_max) over layers: the universal capacity metric.

        Source: Martin, Peng and Mahoney (2021), Nature Communications 12, 4122.
        """
        return _mean([layer.alpha_hat for layer in self.measured])

    @property
    def mean_alpha(self) -> float | None:
        """Mean alpha over layers."""
        return _mean([layer.alpha for layer in self.measured])

    @property
    def mean_log_norm(self) -> float | None:
        """Mean over layers of log10 of the squared Frobenius norm."""
        return _mean([layer.log_norm for layer in self.layers])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: no NaN, ``None`` where there is no number."""
        layers = []
        for layer in self.layers:
            row = asdict(layer)
            row.pop("eigenvalues")
            layers.append({**row, "outcome": layer.outcome.value, "shape": list(layer.shape)})
        return {
            "layers": layers,
            "skipped": [{**asdict(s), "shape": list(s.shape)} for s in self.skipped],
            "coverage": self.coverage,
            "numel": self.numel,
            "weighted_alpha": self.weighted_alpha,
            "mean_alpha": self.mean_alpha,
            "mean_log_norm": self.mean_log_norm,
        }

    def to_pandas(self) -> pd.DataFrame:
        """A row a layer, indexed by name; missing numbers are ``<NA>``.

        Raises:
            ImportError: without pandas.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "Report.to_pandas needs pandas: pip install 'tempbalance[pandas]'"
            ) from error
        rows = self.to_dict()["layers"]
        columns = list(LayerRecord.__dataclass_fields__)
        columns.remove("eigenvalues")
        frame = pd.DataFrame(rows, columns=columns).set_index("name")
        return frame.convert_dtypes()

    def plot(self, path: str | PathLike[str], *, layer: str | None = None) -> None:
        """Draw to a file: the ESD of one layer, or of the chief ones, and alpha by depth.

        Raises:
            ImportError: without matplotlib.
            KeyError: for a layer that is not in the report.
            ValueError: if there is nothing to draw.
        """
        from tempbalance.plots.report import plot_report

        record = None if layer is None else self[layer]
        plot_report(self.layers, self.numel, path, layer=record)

    def __str__(self) -> str:
        return "\n".join(_table(self))


def analyze(
    model: nn.Module,
    *,
    windows: WindowsLike = Farms(),
    fit: Fit = Hill(),
    min_eigs: int = 10,
    fused: Mapping[str, int | tuple[int, ...]] | None = None,
    strict: bool = False,
    budget: int = DEFAULT_BUDGET,
    progress: Callable[[float], None] | None = None,
) -> Report:
    """Measure how heavy-tailed the spectrum of every layer of a model is.

    Works on the device where the weights are, changes nothing, needs no data. Alpha and its fit are
    those of the windows; norms, stable rank and alpha_hat are those of the weight itself, which is
    measured a second time for them, unless it is its own only window. Where its Gram matrix then
    needs more than the budget (above 8192 rows and columns at the default) they are ``None``.

    Args:
        model: any ``nn.Module``; compiled, DDP- and FSDP2-wrapped ones too (under FSDP2 every
            rank must call). Frozen layers are measured as well.
        windows: which submatrices are measured, ``Farms()``, or ``WholeMatrix()`` for
            the plain method; or by the first pattern that a layer's name or type matches:
            ``{"Linear": WholeMatrix(), "*": Farms()}``.
        fit: the power-law fit, ``Hill()``, ``KSFit()`` or ``PeakFit()``.
        min_eigs: layers with fewer eigenvalues get no alpha.
        fused: projections that share one weight, by name pattern: ``{"*.qkv": 3}``.
        strict: raise for the first layer that is not measured in full, instead of recording it.
        budget: extra memory in bytes (default 1 GiB); what a single window needs beyond it is
            taken all the same, with a message in the log.
        progress: called with the share of the work (0 to 1) that was just done.

    Raises:
        MeasurementError: with ``strict``, naming the layer, its shape and the cure.
        TypeError: if ``model`` is not a module, or windows or fit are not objects of their kind.
        ValueError: for ``min_eigs`` below 2, a ``fused`` pattern that matches nothing, or a
            layer that no pattern of ``windows`` matches.

    >>> report = analyze(nn.Linear(256, 64))
    >>> 1.5 < report.layers[0].alpha < 3
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"analyze needs a torch.nn.Module, got {type(model).__name__}; to measure a state "
            "dict, load it into a model first (or use the command line: tempbalance analyze)"
        )
    check_engine(windows, fit, budget)
    if min_eigs < 2:
        raise ValueError(f"min_eigs must be at least 2, got {min_eigs!r}")
    found = find_layers(model, fused)
    # Where the only window is the slice itself, its norms come with the first measurement.
    chosen = checked_windows(windows, found.layers)
    others = [x for x in found.layers if not _is_whole(chosen, x)]
    # A Gram matrix of the whole slice and the solver's copy of it, complex as they may be.
    again = [x for x in others if 16 * min(x.shape[1:]) ** 2 <= budget]
    ticks = _half(progress) if again and progress is not None else progress
    common: dict[str, Any] = {"min_eigs": min_eigs, "budget": budget, "progress": ticks}
    records = measure(found.layers, windows=chosen, fit=fit, keep_spectra=True, **common)
    of_weight = {r.name: r for r in measure(again, windows=WholeMatrix(), **common)}
    windowed = {x.name for x in others}
    records = [r.with_norms_of(of_weight.get(r.name)) if r.name in windowed else r for r in records]
    if len(again) < len(others):
        logger.info(
            "norms of %d of %d layers are left out: their whole weights need more than the budget "
            "of %d MiB",
            *(len(others) - len(again), len(records), budget >> 20),
        )
    report = Report(tuple(records), found.skipped, found.numel)
    if strict:
        _raise_first(report)
    return report


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


def _mean(values: list[float | None]) -> float | None:
    numbers = [v for v in values if v is not None]
    return math.fsum(numbers) / len(numbers) if numbers else None


def _table(report: Report) -> Iterator[str]:
    if not report.layers:
        yield "No layers: the model has no weight matrix to measure."
    else:
        width = max(5, *(len(layer.name) for layer in report.layers))
        yield (
            f"{'layer':<{width}}  {'slices x rows x cols':>20}  {'alpha':>7}  {'D':>6}  "
            f"{'eigs':>7}  {'spectral norm':>13}  {'stable rank':>11}  outcome"
        )
        for layer in report.layers:
            shape = " x ".join(map(str, layer.shape))
            yield (
                f"{layer.name:<{width}}  {shape:>20}  {_number(layer.alpha, 7, 3)}  "
                f"{_number(layer.D, 6, 3)}  {layer.n_eigs:>7}  "
                f"{_number(layer.spectral_norm, 13, 4)}  {_number(layer.stable_rank, 11, 2)}  "
                f"{layer.outcome.value}"
            )
    yield ""
    yield (
        f"{len(report.measured)} of {len(report.layers)} layers measured, "
        f"{report.coverage:.1%} of {report.numel:,} parameters"
    )
    if report.mean_alpha is not None:
        yield (
            f"mean alpha {report.mean_alpha:.3f}, weighted alpha {report.weighted_alpha:.3f}, "
            f"mean log norm {report.mean_log_norm:.3f}"
        )
    for layer in report.layers:
        if layer.outcome is not Outcome.OK:
            yield f"  {layer.message}"
    reasons: dict[str, list[Skipped]] = {}
    for skipped in report.skipped:
        reasons.setdefault(skipped.reason, []).append(skipped)
    for reason, some in reasons.items():
        names = ", ".join(s.name for s in some[:3]) + (", ..." if len(some) > 3 else "")
        yield f"  not measured, {sum(s.numel for s in some):,} parameters: {reason} ({names})"


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"
