"""Ranking tried on families that are trained here: does a spectrum order models as accuracy does?

Small networks on scikit-learn's digits, in two series of one architecture each: label noise (more
and more training labels drawn at random) and width. Accuracy is that on held-out digits. A minute
on one core:

    python -m experiments.ranking --out outputs/ranking
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import tempbalance as tb

NOISE = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
WIDTHS = (12, 16, 24, 32, 48, 64, 96, 128)
EPOCHS, BATCH, HELD_OUT = 60, 64, 600


def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 64) in 0 to 1 and labels, shuffled once."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x = torch.tensor(data.data[order] / 16, dtype=torch.float32)
    return x, torch.tensor(data.target[order])


def trained(width: int, noise: float, seed: int) -> tuple[nn.Module, float]:
    """A network of three hidden layers, and its accuracy on the digits held out."""
    x, y = digits()
    torch.manual_seed(seed)
    images, labels = x[HELD_OUT:], y[HELD_OUT:].clone()
    flipped = torch.rand(len(labels)) < noise
    labels[flipped] = torch.randint(10, (int(flipped.sum()),))
    sizes = (64, width, width, width, 10)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        right = (model(x[:HELD_OUT]).argmax(1) == y[:HELD_OUT]).float().mean()
    return model, float(right)


def series(name: str, seed: int) -> tb.Ranking:
    """The models of one series, ranked; the last layer has too few eigenvalues to take part."""
    grid: Sequence[tuple[str, int, float]] = {
        "noise": [(f"noise {noise:g}", 96, noise) for noise in NOISE],
        "width": [(f"width {width}", width, 0.2) for width in WIDTHS],
    }[name]
    models, scores = {}, {}
    for label, width, noise in grid:
        models[label], scores[label] = trained(width, noise, seed)
    return tb.rank(models, scores, min_eigs=11)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, rank and write both series."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", default="outputs/ranking", help="folder for text and JSON")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("noise", "width"):
        ranking = series(name, options.seed)
        (folder / f"{name}.txt").write_text(f"{ranking}\n")
        (folder / f"{name}.json").write_text(json.dumps(ranking.to_dict(), indent=2) + "\n")


if __name__ == "__main__":
    main()
