"""Pictures of a run: alpha by layer over time, multipliers over time, spectra at start and end.

They are drawn from the files that the Lightning callback writes; see ``tempbalance plot``.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tempbalance.plots.labels import labels
from tempbalance.plots.style import (
    AFTER,
    COLORS,
    DECADES_BELOW,
    GREY,
    LEFT_OUT,
    histogram,
    log_log,
    new_figure,
    save,
    shorten,
)
from tempbalance.runs.read import Run, Spectrum, find_run, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Up to so many layers are named each on an axis, and up to so many are drawn as lines.
_NAMED, _LINES = 48, 24
# More columns than pixels show nothing more.
_COLUMNS = 1200
_PANELS = 12
_EARLIER = "#0072B2"
_TEXT = 26


def plot_run(
    path: str | PathLike[str],
    out: str | PathLike[str] | None = None,
    layers: Sequence[str] = (),
) -> list[Path]:
    """Draw a run's pictures as PNG files and return their paths.

    ``alpha.png``: alpha by layer over the epochs. ``multipliers.png``: the multipliers over time
    (not for a run that only observed). ``esd.png``: the spectra of some layers at the first and at
    the last measurement, where they were kept; more than 12 go to ``esd_2.png`` and so on.

    Args:
        path: the folder that holds ``tempbalance.csv``, or one with exactly one such run below.
        out: where to write. Default: ``plots`` in the run's folder.
        layers: patterns (``layer1.*``) of the layers whose spectra are drawn. Default: those of
            smallest, median and largest alpha at the end, and the one that changed most.

    Raises:
        ImportError: without matplotlib.
        FileNotFoundError: if there is no run.
        ValueError: for several runs, a damaged file, or a pattern that matches no layer.
    """
    run = read_run(find_run(path))
    chosen = run.matching(layers) if layers else _chief(run)
    known = [name for name in chosen if any(name in spectra for spectra in run.spectra)]
    if layers and not known:
        raise ValueError(
            f"no spectrum of {', '.join(chosen[:5])} was kept in {run.folder}: it was not measured,"
            " or the callback had esd=False"
        )
    folder = run.folder / "plots" if out is None else Path(out)
    pictures = {"alpha.png": alpha_heatmap(run)}
    if not run.observed_only:
        pictures["multipliers.png"] = multipliers(run)
    for page, start in enumerate(range(0, len(known), _PANELS), 1):
        name = "esd.png" if page == 1 else f"esd_{page}.png"
        pictures[name] = spectra(run, known[start : start + _PANELS])
    for name, figure in pictures.items():
        save(figure, folder / name)
    return [folder / name for name in pictures]


def alpha_heatmap(run: Run) -> Figure:
    """Alpha of every layer (rows, the first on top) at every measurement; hatched where none is."""
    figure = _tall(run)
    axes = figure.add_subplot()
    known = run.alphas[np.isfinite(run.alphas)]
    low, high, extend = _range(known)
    mesh = _mesh(axes, run, run.alphas, cmap="viridis", vmin=low, vmax=high)
    figure.colorbar(mesh, ax=axes, label=r"$\alpha$", extend=extend, pad=0.02, aspect=30)
    count, at_end = len(run.layers), int(np.isfinite(run.alphas[:, -1]).sum())
    missing = f", {at_end} measured at the end" if at_end < count else ""
    axes.set_title(f"alpha of {count} layers{missing}", loc="left", fontsize=10)
    if len(known) < run.alphas.size:
        _missing_legend(axes)
    return figure


def multipliers(run: Run) -> Figure:
    """The multipliers over time: a named line a layer, or a heatmap where there are many."""
    if len(run.layers) <= _LINES:
        return _lines(run)
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = _tall(run)
    axes = figure.add_subplot()
    finite = run.multipliers[np.isfinite(run.multipliers)]
    reach = max(finite.max(), 1 / finite.min(), 1.1)  # white is 1, and twice as far as half
    mesh = _mesh(axes, run, run.multipliers, cmap="RdBu_r", norm=LogNorm(1 / reach, reach))
    bar = figure.colorbar(mesh, ax=axes, label="multiplier", pad=0.02, aspect=30)
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 6.7, 8.0)))
    bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(f"learning-rate multipliers of {len(run.layers)} layers", loc="left",
                   fontsize=10)  # fmt: skip
    return figure


def spectra(run: Run, layers: Sequence[str]) -> Figure:
    """The spectra of some layers at the first and at the last measurement, a panel each."""
    columns = min(len(layers), 3 if len(layers) != 4 else 2)
    rows = -(-len(layers) // columns)
    figure = new_figure(max(5.2 * columns, 6.4), 3.9 * rows)
    for i, name in enumerate(layers):
        axes = figure.add_subplot(rows, columns, i + 1)
        _both(axes, run.spectra[0].get(name), run.spectra[1].get(name))
        axes.set_title(shorten(name.removeprefix(run.prefix), 48), fontsize=10)
    return figure


# --- one axes each -------------------------------------------------------------------------------


def _mesh(axes: Axes, run: Run, values: npt.NDArray[np.float64], **how: Any) -> Any:
    """A cell a layer and measurement, over a hatched ground that shows where there is no value."""
    when, label = _time(run)
    if len(when) > _COLUMNS:
        kept = np.unique(np.linspace(0, len(when) - 1, _COLUMNS).round().astype(int))
        when, values = when[kept], values[:, kept]
    middle = (when[1:] + when[:-1]) / 2
    first = when[0] - (middle[0] - when[0] if len(middle) else 0.5)
    last = when[-1] + (when[-1] - middle[-1] if len(middle) else 0.5)
    x = np.concatenate([[first], middle, [last]])
    y = np.arange(len(values) + 1) - 0.5
    axes.patch.set(facecolor="#D0D0D0", hatch="////", edgecolor="#8A8A8A", linewidth=0)
    mesh = axes.pcolormesh(x, y, np.ma.masked_invalid(values), rasterized=True, **how)
    axes.set_xlim(first, last)
    axes.set_ylim(len(values) - 0.5, -0.5)
    _time_axis(axes, label)
    _names(axes, run)
    return mesh


def _lines(run: Run) -> Figure:
    """A line a layer, named where it ends; names that would meet are moved apart."""
    count = len(run.layers)
    height = max(4.2, 0.26 * count + 1.2)
    figure = new_figure(9.0, height)
    axes = figure.add_subplot()
    when, label = _time(run)
    values = run.multipliers
    low, high = min(1.0, np.nanmin(values)), max(1.0, np.nanmax(values))
    if high > 8 * low:
        from matplotlib.ticker import StrMethodFormatter

        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.set_ylim(low / (high / low) ** 0.05, high * (high / low) ** 0.05)
    else:
        pad = 0.06 * ((high - low) or 0.5)
        axes.set_ylim(low - pad, high + pad)
    axes.axhline(1, color=GREY, ls=":", lw=1.2, zorder=1)
    colors = _by_depth(count)
    marker = "o" if len(when) <= 40 else None
    for line, color in zip(values, colors, strict=True):
        axes.plot(when, line, color=color, lw=1.6, marker=marker, ms=3, zorder=2)
    axes.margins(x=0.01)
    ends = axes.transAxes.inverted().transform(
        axes.transData.transform([(when[-1], _last(line)) for line in values])
    )[:, 1]
    # 9 points of text and a little room, as a share of the axes' height.
    places = _spread(ends, min(0.165 / (height - 0.9), 1 / count))
    for end, place, name, color in zip(ends, places, run.short, colors, strict=True):
        axes.annotate(
            shorten(name, _TEXT + 8), xy=(1.005, end), xytext=(1.05, place), color=color,
            xycoords="axes fraction", textcoords="axes fraction", va="center", fontsize=9,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.7, "shrinkA": 1, "shrinkB": 0,
                        "relpos": (0.0, 0.5)},
        )  # fmt: skip
    _time_axis(axes, label)
    axes.set_ylabel("learning-rate multiplier")
    axes.set_title(f"learning-rate multipliers of {count} layers", loc="left", fontsize=10)
    axes.grid(axis="y", color="#E6E6E6", lw=0.7, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _both(axes: Axes, first: Spectrum | None, last: Spectrum | None) -> None:
    """Two histograms on one set of bins' width, with the tails that were fitted to them."""
    drawn = [
        (spectrum, label, color, style)
        for spectrum, label, color, style in (
            (first, "first", _EARLIER, "--"), (last, "last", AFTER, "-"),
        )
        if spectrum is not None
    ]  # fmt: skip
    low = min(_drawn_from(spectrum) for spectrum, *_ in drawn)
    high = max(float(spectrum.eigenvalues[-1]) for spectrum, *_ in drawn)
    heights = []
    for spectrum, label, color, style in drawn:
        values = spectrum.eigenvalues
        edges, density = histogram(values, low, high)
        heights.append(density)
        axes.stairs(density, edges, fill=True, color=color, alpha=0.18)
        axes.stairs(density, edges, color=color, lw=0.9, alpha=0.8)
        if not np.isfinite([spectrum.alpha, spectrum.xmin, spectrum.n_tail]).all():
            axes.plot([], [], color=color, label=f"{label}: no fit")
            continue
        tail = np.geomspace(spectrum.xmin, max(values[-1], spectrum.xmin * (1 + 1e-9)), 64)
        top = spectrum.n_tail / len(values) * (spectrum.alpha - 1) / spectrum.xmin
        line = top * (tail / spectrum.xmin) ** -spectrum.alpha
        heights.append(line[[0, -1]])
        text = rf"{label}: $\alpha$ = {spectrum.alpha:.2f}, D = {spectrum.D:.2f}"
        axes.plot(tail, line, color=color, ls=style, lw=2.4, label=text)
    log_log(axes, edges, np.concatenate(heights))


# --- parts ---------------------------------------------------------------------------------------


def _chief(run: Run) -> list[str]:
    """Smallest, median and largest alpha at the end, and the largest change; in depth order."""
    known = [i for i, row in enumerate(run.alphas) if np.isfinite(row).any()]
    ranked = sorted(known, key=lambda i: _last(run.alphas[i]))
    if not ranked:
        return []
    change = {i: abs(_last(run.alphas[i]) - _last(run.alphas[i][::-1])) for i in known}
    picked = {ranked[0], ranked[len(ranked) // 2], ranked[-1], max(known, key=lambda i: change[i])}
    return [run.layers[i] for i in sorted(picked)]


def _last(values: npt.NDArray[np.float64]) -> float:
    return float(values[np.isfinite(values)][-1])


def _time(run: Run) -> tuple[npt.NDArray[np.float64], str]:
    """Epochs, or steps where an epoch has several measurements."""
    by_epoch = len(np.unique(run.epochs)) == len(run.epochs)
    when = run.epochs if by_epoch else run.steps
    if len(np.unique(when)) < len(when):  # no step was taken in between
        return np.arange(len(when), dtype=float), "measurement"
    return when.astype(float), "epoch" if by_epoch else "optimizer step"


def _time_axis(axes: Axes, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.set_xlabel(label)


def _names(axes: Axes, run: Run) -> None:
    names = run.short
    if len(names) <= _NAMED:
        axes.set_yticks(range(len(names)), labels(names, _TEXT + 8), fontsize=8)
    else:  # evenly spread layers, with their numbers
        ticks = np.unique(np.linspace(0, len(names) - 1, 31).round().astype(int))
        short = labels(names, _TEXT)
        text = [f"{short[i]}  {i}" for i in ticks]
        axes.set_yticks(ticks, text, fontsize=8)
    inside = f" (in {run.prefix.removesuffix('.')})" if run.prefix else ""
    order = ", in definition order" if len(names) > 12 else ""
    axes.set_ylabel(f"layer{order}{inside}")


def _range(known: npt.NDArray[np.float64]) -> tuple[float, float, str]:
    """Ends of the colours; a few wild values do not press all others into one colour."""
    if not len(known):
        return 0.0, 1.0, "neither"
    low, high = (float(x) for x in np.percentile(known, [2, 98]))
    room = 0.25 * (high - low)
    under, over = known.min() < low - room, known.max() > high + room
    low = low if under else float(known.min())
    high = high if over else float(known.max())
    if high <= low:
        low, high = low - 0.05, high + 0.05
    return low, high, {(0, 0): "neither", (1, 0): "min", (0, 1): "max"}.get((under, over), "both")


def _missing_legend(axes: Axes) -> None:
    from matplotlib.patches import Patch

    patch = Patch(facecolor="#D0D0D0", hatch="////", edgecolor="#8A8A8A", label="not measured")
    axes.legend(handles=[patch], loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False,
                fontsize=8.5, borderaxespad=0.1)  # fmt: skip


def _by_depth(count: int) -> list[Any]:
    """Colours that tell few lines apart, or dark to light by depth for more."""
    if count <= len(COLORS):
        return list(COLORS[:count])
    from matplotlib import colormaps

    # A little darker than the map is: yellow names on white cannot be read.
    return [
        tuple(0.82 * c for c in colormaps["turbo"](x)[:3]) for x in np.linspace(0.05, 0.95, count)
    ]


def _spread(ends: npt.NDArray[np.float64], gap: float) -> npt.NDArray[np.float64]:
    """Places at least a gap apart, in the order of the ends and close to them."""
    order = np.argsort(ends, kind="stable")
    blocks: list[list[float]] = []  # centre of mass and size of each run of touching names
    for end in ends[order]:
        blocks.append([float(end), 1])
        while len(blocks) > 1 and (
            blocks[-1][0] - blocks[-2][0] < gap * (blocks[-1][1] + blocks[-2][1]) / 2
        ):
            centre, size = blocks.pop()
            before, n = blocks[-1]
            blocks[-1] = [(before * n + centre * size) / (n + size), n + size]
    places = np.concatenate([c + gap * (np.arange(n) - (n - 1) / 2) for c, n in blocks])
    out = np.empty_like(ends)
    out[order] = places
    return out


def _drawn_from(spectrum: Spectrum) -> float:
    values = spectrum.eigenvalues
    end = spectrum.xmin if np.isfinite(spectrum.xmin) else float(values[-1])
    return max(float(values[int(LEFT_OUT * len(values))]), end * DECADES_BELOW)


def _tall(run: Run) -> Figure:
    count = len(run.layers)
    return new_figure(9.0, 1.4 + 0.21 * min(max(count, 8), 36))
