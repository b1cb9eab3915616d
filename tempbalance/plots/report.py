"""Pictures of a report: the spectrum of a layer, alpha by depth, and two reports side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tempbalance.plots.labels import labels as labels_of
from tempbalance.plots.style import (
    AFTER,
    BEFORE,
    COLORS,
    DATA,
    DECADES_BELOW,
    FIT,
    GREY,
    LEFT_OUT,
    NAMED,
    cycle,
    histogram,
    legend_outside,
    log_log,
    marker_size,
    new_figure,
    save,
    shorten,
    tag,
    width_for,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tempbalance.measure.measurement import LayerRecord


def plot_report(
    layers: Sequence[LayerRecord],
    numel: int,
    path: str | PathLike[str] | None = None,
    *,
    layer: LayerRecord | None = None,
    level: Mapping[str, float] | None = None,
) -> Figure:
    """Draw one layer's ESD, or alpha by depth above the ESDs of the chief layers.

    The chief layers are those of the smallest, the median and the largest alpha.

    Args:
        layers: the records of a report.
        numel: parameters of the model.
        path: where to write the figure: PNG, PDF or SVG by its suffix. Default: nowhere.
        layer: draw the ESD of this one alone.
        level: by layer, alpha of a random matrix of its shape, drawn beside its own.

    Raises:
        ImportError: without matplotlib.
        ValueError: if there is nothing to draw, or for an unknown file format.
    """
    if layer is not None:
        if layer.eigenvalues is None or not len(layer.eigenvalues):
            raise ValueError(f"no spectrum to draw: {layer.message}")
        figure = new_figure(7.0, 5.0)
        _esd(figure.add_subplot(), layer)
        return save(figure, path)
    measured = _measured(layers)
    if not measured:
        why = layers[0].message if layers else "the model has no weight matrix"
        raise ValueError(f"no layer has an alpha to draw: {why}")
    chief = _chief(measured)
    figure = new_figure(width_for(len(layers)), 9.0)
    grid = figure.add_gridspec(2, max(len(chief), 1), height_ratios=(1.15, 1.0))
    _depth(figure.add_subplot(grid[0, :]), layers, numel, chief, level or {})
    drawable = [r for r in chief if r.eigenvalues is not None and len(r.eigenvalues)]
    for i, record in enumerate(drawable):
        _esd(figure.add_subplot(grid[1, i]), record, chr(ord("A") + chief.index(record)))
    return save(figure, path)


def plot_compare(
    a: Sequence[LayerRecord],
    b: Sequence[LayerRecord],
    path: str | PathLike[str] | None = None,
    labels: tuple[str, str] = ("before", "after"),
    level: Mapping[str, float] | None = None,
) -> Figure:
    """Draw two reports of one model: alpha by depth in both, and the spectra that changed most.

    Raises:
        ImportError: without matplotlib.
        ValueError: if no layer has an alpha in both, or for an unknown file format.
    """
    first = {record.name: record for record in _measured(a)}
    pairs = [(first[record.name], record) for record in _measured(b) if record.name in first]
    if not pairs:
        raise ValueError("nothing to compare: no layer has an alpha in both reports")
    change = [abs(_alpha(after) - _alpha(before)) for before, after in pairs]
    most = sorted(sorted(range(len(pairs)), key=lambda i: -change[i])[:3])
    figure = new_figure(width_for(len(pairs)), 9.0)
    grid = figure.add_gridspec(2, len(most), height_ratios=(1.15, 1.0))
    _dumbbells(figure.add_subplot(grid[0, :]), pairs, labels, most, level or {})
    for i, index in enumerate(most):
        before, after = pairs[index]
        _both_esds(figure.add_subplot(grid[1, i]), before, after, labels, chr(ord("A") + i))
    return save(figure, path)


# --- one axes each -------------------------------------------------------------------------------


def _esd(axes: Axes, record: LayerRecord, letter: str = "") -> None:
    """The empirical spectral density on log-log axes, with the fitted tail."""
    values = _eigenvalues(record)
    low = _drawn_from(record, values)
    edges, density = histogram(values, low)
    axes.stairs(density, edges, fill=True, color=COLORS[0], alpha=0.45, label=_count(values, low))
    if record.alpha is not None and record.xmin is not None and record.n_tail is not None:
        tail = np.geomspace(record.xmin, max(values[-1], record.xmin * (1 + 1e-9)), 64)
        height = record.n_tail / len(values) * (record.alpha - 1) / record.xmin
        label = rf"$\alpha$ = {record.alpha:.3f}, D = {record.D:.3f}"
        axes.plot(tail, height * (tail / record.xmin) ** -record.alpha, color=FIT, lw=2.2,
                  label=label)  # fmt: skip
        axes.axvline(record.xmin, ymax=DATA, color=GREY, ls="--", lw=1.2,
                     label=f"xmin = {record.xmin:.3g}")  # fmt: skip
        ends = height * np.array([1.0, (tail[-1] / record.xmin) ** -record.alpha])
    else:
        axes.plot([], [], " ", label=record.outcome.value)
        ends = np.empty(0)
    log_log(axes, edges, np.concatenate([density, ends]))
    slices, rows, cols = record.shape
    shape = f"{slices} x {rows} x {cols}" if slices > 1 else f"{rows} x {cols}"
    axes.set_title(f"{_lettered(letter, record.name)}  ({shape})", fontsize=10)


def _both_esds(
    axes: Axes, before: LayerRecord, after: LayerRecord, labels: tuple[str, str], letter: str
) -> None:
    spectra = [_eigenvalues(before), _eigenvalues(after)]
    low = min(_drawn_from(r, v) for r, v in zip((before, after), spectra, strict=True))
    high = max(values[-1] for values in spectra)
    drawn = []
    for values, record, label, color in zip(
        spectra, (before, after), labels, (BEFORE, AFTER), strict=True
    ):
        edges, density = histogram(values, low, high)
        drawn.append(density)
        text = rf"{label}: $\alpha$ = {_alpha(record):.3f}"
        axes.stairs(density, edges, fill=True, color=color, alpha=0.25)
        axes.stairs(density, edges, color=color, lw=1.6, label=text)
    log_log(axes, edges, np.concatenate(drawn))
    axes.set_title(_lettered(letter, before.name), fontsize=10)


def _depth(
    axes: Axes,
    layers: Sequence[LayerRecord],
    numel: int,
    chief: Sequence[LayerRecord],
    level: Mapping[str, float],
) -> None:
    """Alpha by depth, a colour a kind of layer; layers without one as crosses on the axis."""
    measured = _measured(layers)
    kinds = sorted({r.kind for r in measured})
    size = marker_size(len(layers))
    axes.plot(
        [i for i, r in enumerate(layers) if r.alpha is not None],
        [_alpha(r) for r in layers if r.alpha is not None],
        color="#C8C8C8", lw=0.8, zorder=1,
    )  # fmt: skip
    for kind, color in zip(kinds, cycle(len(kinds)), strict=True):
        x = [i for i, r in enumerate(layers) if r.alpha is not None and r.kind == kind]
        y = [_alpha(layers[i]) for i in x]
        axes.scatter(x, y, s=size, color=color, zorder=3, label=f"{kind} ({len(x)})")
    _level(axes, [r.name for r in layers], level)
    _alpha_axis(axes, [_alpha(r) for r in measured])
    failed = [i for i, r in enumerate(layers) if r.alpha is None]
    if failed:
        axes.scatter(failed, [0.015] * len(failed), marker="x", s=size, color="black", lw=1,
                     transform=axes.get_xaxis_transform(), clip_on=False, zorder=4,
                     label=f"no alpha ({len(failed)})")  # fmt: skip
    for i, record in enumerate(chief):
        tag(axes, layers.index(record), _alpha(record), chr(ord("A") + i))
    _layer_axis(axes, [r.name for r in layers])
    axes.set_title(
        f"{len(measured)} of {len(layers)} layers, "
        f"{sum(r.numel for r in measured) / numel:.1%} of {numel:,} parameters, "
        f"mean alpha {np.mean([_alpha(r) for r in measured]):.3f}",
        fontsize=10,
        loc="left",
    )
    legend_outside(axes, len(kinds) + 2)


def _level(axes: Axes, names: Sequence[str], level: Mapping[str, float]) -> None:
    """A dash a layer: alpha of a random matrix of its shape, which training moves away from."""
    known = [(i, level[name]) for i, name in enumerate(names) if name in level]
    if known:
        x, y = zip(*known, strict=True)
        size = max(2.0, min(14.0, 500 / len(names)))
        axes.plot(x, y, "_", color=GREY, ms=size, mew=1.4, zorder=2,
                  label="random matrix of the shape")  # fmt: skip


def _dumbbells(
    axes: Axes,
    pairs: Sequence[tuple[LayerRecord, LayerRecord]],
    labels: tuple[str, str],
    most: Sequence[int],
    level: Mapping[str, float],
) -> None:
    """Both alphas of every layer, joined by a line."""
    x = np.arange(len(pairs))
    old = np.array([_alpha(before) for before, _ in pairs])
    new = np.array([_alpha(after) for _, after in pairs])
    size = marker_size(len(pairs))
    axes.vlines(x, old, new, color="#A8A8A8", lw=max(0.8, min(2.5, 90 / len(pairs))), zorder=1)
    for values, label, color, marker in (
        (old, labels[0], BEFORE, "o"), (new, labels[1], AFTER, "D")
    ):  # fmt: skip
        axes.scatter(x, values, s=size, color=color, marker=marker, zorder=3,
                     label=f"{label} (mean {values.mean():.3f})")  # fmt: skip
    _level(axes, [before.name for before, _ in pairs], level)
    _alpha_axis(axes, [*old, *new])
    for i, index in enumerate(most):
        tag(axes, index, max(old[index], new[index]), chr(ord("A") + i))
    _layer_axis(axes, [before.name for before, _ in pairs])
    axes.set_title(f"{len(pairs)} layers measured in both", fontsize=10, loc="left")
    legend_outside(axes, 3)


# --- parts ---------------------------------------------------------------------------------------


def _measured(layers: Sequence[LayerRecord]) -> list[LayerRecord]:
    return [layer for layer in layers if layer.outcome.measured]


def _chief(measured: Sequence[LayerRecord]) -> list[LayerRecord]:
    """The measured layers of smallest, median and largest alpha, each once."""
    ranked = sorted(measured, key=_alpha)
    picked = (ranked[0], ranked[len(ranked) // 2], ranked[-1])
    return [r for i, r in enumerate(picked) if r.name not in {p.name for p in picked[:i]}]


def _alpha(record: LayerRecord) -> float:
    assert record.alpha is not None
    return record.alpha


def _eigenvalues(record: LayerRecord) -> npt.NDArray[np.float64]:
    assert record.eigenvalues is not None
    return record.eigenvalues


def _drawn_from(record: LayerRecord, values: npt.NDArray[np.float64]) -> float:
    end = record.xmin if record.xmin is not None else float(values[-1])
    return max(float(values[int(LEFT_OUT * len(values))]), end * DECADES_BELOW)


def _count(values: npt.NDArray[np.float64], low: float) -> str:
    left = int((values < low).sum())
    return f"{len(values):,} eigenvalues" + (f" ({left:,} further left)" if left else "")


def _alpha_axis(axes: Axes, alphas: Sequence[float]) -> None:
    """A logarithmic axis where one wild alpha would press all others flat."""
    if max(alphas) > 3 * float(np.median(alphas)):
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.01, y=0.12)
    axes.autoscale_view()
    axes.set_ylabel(r"$\alpha$")
    axes.grid(axis="y", color="#E6E6E6", lw=0.7, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _layer_axis(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xlim(-0.8, len(names) - 0.2)
    if len(names) <= NAMED:
        axes.set_xticks(range(len(names)), labels_of(names, 34), fontsize=8)
        if len(names) * max(map(len, names)) > 100:  # side by side they would not fit
            axes.tick_params("x", rotation=60)
            for text in axes.get_xticklabels():
                text.set(ha="right", rotation_mode="anchor")
        axes.set_xlabel("layer, in definition order")
        return
    # A tick a top-level block would name hundreds too: name evenly spread layers.
    ticks = np.unique(np.linspace(0, len(names) - 1, 16).round().astype(int))
    short = labels_of(names, 26)
    axes.set_xticks(ticks, [f"{i}: {short[i]}" for i in ticks], rotation=40,
                    ha="right", rotation_mode="anchor", fontsize=8)  # fmt: skip
    axes.set_xlabel("layer, by its number in definition order")


def _lettered(letter: str, name: str) -> str:
    return f"{letter}: {shorten(name, 40)}" if letter else shorten(name, 60)
