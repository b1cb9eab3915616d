"""Style: what all pictures share: colours, sizes, axes, and the figure that is drawn on.

matplotlib is imported only when something is drawn, and its global state is never touched: every
figure is an object with a canvas of its own.
"""

from __future__ import annotations

import io
import os
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tempbalance.plots.labels import labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colour-blind safe (Okabe and Ito 2008); black and grey are left for what is not data.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F6000")
FIT, GREY = "#D55E00", "#6E6E6E"
BEFORE, AFTER = "#56B4E9", "#D55E00"
DPI = 150
# Share of an axes' height for the data; above is the legend, which then hides nothing.
DATA = 0.76
# Up to so many layers are named below the axis; beyond, only their number in the depth fits.
NAMED = 48
# A spectrum is drawn down to this share of its tail's lower end, and without this share of its
# smallest eigenvalues: a few lone bars far to the left would press the rest together.
DECADES_BELOW = 1e-4
LEFT_OUT = 0.01


def histogram(
    values: npt.NDArray[np.float64], low: float, high: float | None = None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Edges, even in the logarithm, and the density of all eigenvalues in them."""
    high = float(values[-1]) if high is None else high
    if not high > low * (1 + 1e-6):  # all equal: a bin of some width
        low, high = low / 1.1, high * 1.1
    bins = int(np.clip(1.6 * len(values) ** (1 / 3) * np.log10(high / low), 12, 72))
    edges = np.geomspace(low * (1 - 1e-12), high * (1 + 1e-12), bins + 1)
    counts, _ = np.histogram(values, edges)
    return edges, counts / np.diff(edges) / len(values)


def log_log(axes: Axes, edges: npt.NDArray[np.float64], density: npt.NDArray[np.float64]) -> None:
    positive = density[density > 0]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(edges[0], edges[-1] * (edges[-1] / edges[0]) ** 0.03)
    few_ticks(axes)
    span = max(positive.max() / positive.min(), 10.0)
    bottom, top = positive.min() / span**0.06, positive.max() * span**0.06
    axes.set_ylim(bottom, bottom * (top / bottom) ** (1 / DATA))
    axes.set_xlabel(r"eigenvalue $\lambda$ of $W W^H$")
    axes.set_ylabel("density")
    axes.legend(fontsize=8.5, loc="upper right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def few_ticks(axes: Axes) -> None:
    """Within two decades matplotlib labels minor ticks too, one over the other."""
    from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

    axes.xaxis.set_minor_formatter(NullFormatter())
    left, right = axes.get_xlim()
    if right < 20 * left:
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def tag(axes: Axes, x: float, y: float, letter: str) -> None:
    axes.annotate(letter, (x, y), xytext=(0, 7), textcoords="offset points", ha="center",
                  fontsize=11, fontweight="bold")  # fmt: skip


def legend_outside(axes: Axes, entries: int) -> None:
    axes.legend(fontsize=8.5, loc="lower right", bbox_to_anchor=(1.0, 1.01), frameon=False,
                ncols=max(1, min(entries, 6)), borderaxespad=0.0)  # fmt: skip


def shorten(name: str, most: int) -> str:
    """One name, cut to fit; see :func:`tempbalance.plots.labels.labels`."""
    return labels([name], most)[0]


def marker_size(count: int) -> float:
    return float(np.clip(1600 / count, 14, 46))


def cycle(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


def width_for(count: int) -> float:
    return float(np.clip(0.26 * min(count, NAMED) + 4, 12.0, 16.0))


def new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'tempbalance[plot]'") from error
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: str | PathLike[str] | None) -> Figure:
    """Write the figure, its folder made where there is none; the suffix says the format."""
    if path is not None:
        folder = os.path.dirname(os.fspath(path))
        if folder:
            os.makedirs(folder, exist_ok=True)
        figure.savefig(path)
    return figure


def svg(figure: Figure) -> str:
    """The figure as an SVG element to put into a page, its text kept as text."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]
