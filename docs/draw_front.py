"""Draw docs/images/front.png, the picture on top of the README.

    python -m experiments.train experiment=quickstart balance=farms trainer.max_epochs=20 \
        hydra.run.dir=outputs/digits
    python docs/draw_front.py outputs/digits

Left, random matrices from docs/results/bias.json (`python -m experiments.bias`); right, alpha of
every layer over that run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments import pictures  # noqa: E402
from tempbalance.plots.style import COLORS  # noqa: E402

PICTURE = ROOT / "docs" / "images" / "front.png"


def shapes(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Alpha of random matrices of as many entries each, from square to narrow."""
    rows = sorted(rows, key=lambda row: -row["ratio"])
    places = range(len(rows))
    for name, label, color in (
        ("plain", "alpha of the whole matrix", COLORS[1]),
        ("farms", "alpha of square windows (FARMS)", COLORS[0]),
    ):
        means, spreads = zip(*(row[name] for row in rows), strict=True)
        axis.errorbar(places, means, spreads, fmt="o-", ms=5, capsize=3, color=color, label=label)
    axis.set_xticks(places, ["{}\nx {}".format(*row["shape"]) for row in rows], fontsize=9)
    axis.set_xlabel("shape of a random matrix: nothing is learned")
    axis.set_ylabel("alpha")
    axis.set_ylim(0, None)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=9, loc="upper left")
    axis.set_title("Plain alpha reads the shape; windows do not", fontsize=11, loc="left")


def training(figure: Any, axis: Any, found: pictures.Alphas) -> None:
    """Alpha of every layer over the epochs."""
    image = axis.imshow(found.values, aspect="auto", interpolation="nearest", cmap="viridis")
    axis.set_yticks(range(len(found.layers)), found.layers, fontsize=7)
    every = max(1, len(found.epochs) // 10)
    axis.set_xticks(range(0, len(found.epochs), every), map(str, found.epochs[::every]))
    axis.set_xlabel("epoch")
    axis.set_title("Every layer of a ResNet while it trains", fontsize=11, loc="left")
    figure.colorbar(image, ax=axis, label="alpha", pad=0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the picture on top of the README.")
    parser.add_argument("run", type=Path, help="folder of a run that wrote tempbalance.csv")
    run = parser.parse_args().run
    found = pictures.alphas(run / "tempbalance.csv")
    if found is None:
        parser.error(f"{run} has no tempbalance.csv; the head of this file says how to make one")
    bias = json.loads((ROOT / "docs" / "results" / "bias.json").read_text())
    figure = pictures.blank(11, 3.9)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    shapes(left, bias["random"])
    training(figure, right, found)
    figure.savefig(PICTURE, dpi=130)


if __name__ == "__main__":
    main()
