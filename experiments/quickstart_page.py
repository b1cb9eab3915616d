"""The page of the demonstration: what its runs measured, in pictures and tables."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import tempbalance as tb
from experiments import bias, pictures
from experiments.page import Code, Picture, Section, Table, page
from tempbalance.runs.plot import plot_run

_CODE = """from tempbalance.integrations.lightning import TempBalanceCallback

trainer = pl.Trainer(callbacks=[TempBalanceCallback()])  # the one line

# or in a loop of your own
scheduler = tb.TempBalanceLR(optimizer, model, cosine)   # step it in the cosine's place
"""


def write(
    outputs: Path,
    folders: Sequence[Path],
    shape: Mapping[str, Any],
    compared: Sequence[Sequence[str]],
    methods: Mapping[str, str],
) -> Path:
    """Draw the pictures into `outputs` and write index.html beside them; its path.

    Args:
        folders: of the runs, named method-seed.
        shape: what `bias.figure` draws: random matrices, and the network of the first run.
        compared: the table of methods, its header first.
        methods: what to call them.
    """
    sections = [_shape(outputs, shape)]
    balanced = next((f for f in folders if f.name.startswith("farms-")), None)
    if balanced is not None:
        sections.append(_training(outputs, balanced))
    sections.append(_comparison(outputs, folders, compared, methods))
    lead = [
        f"{len(folders)} trainings of a small ResNet on the 1,797 handwritten digits that "
        "scikit-learn brings, made on this machine by python -m experiments.quickstart.",
        f"tempbalance {tb.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {platform.machine()}.",
    ]
    path = outputs / "index.html"
    path.write_text(page("tempbalance on handwritten digits", lead, sections), encoding="utf-8")
    return path


def _shape(outputs: Path, shape: Mapping[str, Any]) -> Section:
    """Random matrices, and the network that the first run has trained."""
    (network,) = shape["networks"].values()
    random, layers = shape["random"], network["after"]
    picture = outputs / "bias.png"
    bias.figure(shape, picture)
    r = bias.rankings(layers)
    text = [
        "Alpha is the exponent of the power law in the tail of a layer's spectrum. Theory reads a "
        "small one as well trained. But alpha of a whole matrix grows as the matrix gets narrow: "
        "the random matrices on the left have learned nothing, and a ranking by it would give the "
        "narrow ones the largest rates. FARMS measures windows of one aspect ratio.",
        f"On the right the ResNet that was trained first, {r['layers']} layers. The rank "
        f"correlation of the plain alpha with rows / columns is {r['shape']:.2f}, that of the "
        f"FARMS alpha {r['shape_farms']:.2f}. {r['moved']} layers would get a multiplier that is "
        f"more than 0.25 apart (of 0.5 to 1.5), the most {r['most']:.2f}.",
    ]
    matrices = Table(
        ("random matrix", "columns / rows", "Marchenko-Pastur law", "whole matrix", "FARMS"),
        [
            ["x".join(map(str, row["shape"])), f"{row['ratio']:.3f}",
             *(f"{x:.2f}" for x in (row["marchenko_pastur"], row["plain"][0], row["farms"][0]))]
            for row in random
        ],
    )  # fmt: skip
    both = Table(
        ("layer", "slices x rows x columns", "whole matrix", "FARMS"),
        [
            [x["name"], " x ".join(map(str, x["shape"])), f"{x['plain']:.2f}", f"{x['farms']:.2f}"]
            for x in layers
        ],
        folded="Alpha of every layer of this ResNet",
    )
    shown = "Left: alpha of random matrices by shape. Right: both alphas of each layer."
    title = "1. Alpha of a whole matrix follows its shape; windows of one shape take that out"
    return Section(title, [*text, Picture(picture, shown), matrices, both])


def _training(outputs: Path, run: Path) -> Section:
    """One balanced run: alphas, rates and spectra over its epochs."""
    captions = {
        "alpha.png": "Alpha of every layer, the first on top, over the epochs.",
        "multipliers.png": "What each layer's learning rate is multiplied by.",
        "esd.png": "Spectra of some layers at the first and at the last measurement.",
    }
    drawn = [Picture(path, captions.get(path.name, "")) for path in plot_run(run, outputs)]
    text = (
        "Module, optimizer and schedule stay as they are. Before the first batch and once an epoch "
        "every layer is measured. The layer with the largest alpha learns at 1.5 times the "
        "schedule's rate, the one with the smallest at half of it."
    )
    return Section("2. A training with the one line", [text, Code(_CODE), *drawn])


def _comparison(
    outputs: Path,
    folders: Sequence[Path],
    compared: Sequence[Sequence[str]],
    methods: Mapping[str, str],
) -> Section:
    """All methods over all seeds."""
    series: dict[str, list[list[float]]] = {}
    for folder in folders:
        method = folder.name.split("-")[0]
        rows = pictures.read_metrics(folder / "metrics.csv")
        values = [row["val/accuracy"] for row in rows if "val/accuracy" in row]
        series.setdefault(methods.get(method, method), []).append(values)
    pictures.curves(series, outputs / "curves.png", "accuracy on validation data")
    text = [
        "Accuracy on test digits after the last epoch. Difference: from the uniform rate, paired "
        "by seed, in points, with the 95% interval of Student's t. Measuring: its share of the "
        "training time, which is large where a step takes milliseconds as here.",
        "These are few seeds of a small task: they show that it runs, not which method is better. "
        "Over 20 seeds of digits, and on flows over 4 to 30, no method beat a uniform rate that "
        "was tuned as carefully; large models, where gains are published, were not run "
        "(docs/results.md). Measure it on your task before you rely on it.",
    ]
    differences = "Paired differences: a point a seed, their mean and its interval."
    by_epoch = "By epoch: mean of the seeds, and their range shaded."
    drawn = [
        Picture(outputs / "report.png", differences),
        Picture(outputs / "curves.png", by_epoch),
    ]
    return Section("3. Does it help?", [text[0], Table(compared[0], compared[1:]), text[1], *drawn])
