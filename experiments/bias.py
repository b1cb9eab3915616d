"""The bias of alpha by the shape of a matrix, and what windows of one aspect ratio change.

    python -m experiments.bias --train   # train two networks and measure: docs/results/bias.json
    python -m experiments.bias           # figure and paragraph from that file

Random matrices: plain and FARMS alphas by aspect ratio, beside the Marchenko-Pastur value. Trained
networks: a ResNet-18 on digits and an FNO on Darcy flow, layer by layer.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import extras  # noqa: F401  (first: says what to install)

# isort: split
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from scipy.stats import spearmanr
from torch import nn

import tempbalance as tb
from experiments import pictures, provenance, sweep
from experiments.study.files import RESULTS

# Aspect ratios cols / rows at a fixed number of entries, so that only the shape differs.
_RATIOS = (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125)
_ENTRIES, _DRAWS = 2**16, 16
_WINDOWS = tb.Farms(rows=16)
NETWORKS = {
    "ResNet-18 on digits": (
        "experiment=quickstart", "model.width=32", "trainer.max_epochs=15", "data.val_fraction=0",
    ),
    "FNO on Darcy flow": (
        "experiment=darcy_fno", "schedule=cosine", "trainer.max_epochs=40", "data.batch_size=20",
    ),
}  # fmt: skip


def marchenko_pastur_alpha(ratio: float) -> float:
    """Hill's alpha (upper half) of an infinite i.i.d. matrix with cols / rows = ratio <= 1.

    The median and the mean log above it by integrating the law's density (Marchenko and Pastur
    1967), with lambda = 1 + ratio - 2 sqrt(ratio) cos(t), which has no singular ends.
    """
    from scipy.integrate import quad
    from scipy.optimize import brentq

    def value(t: float) -> float:
        return 1 + ratio - 2 * math.sqrt(ratio) * math.cos(t)

    def density(t: float) -> float:
        return 2 * math.sin(t) ** 2 / (math.pi * value(t))

    median = brentq(lambda t: quad(density, t, math.pi)[0] - 0.5, 1e-9, math.pi - 1e-9)
    mean, _ = quad(lambda t: density(t) * math.log(value(t) / value(median)), median, math.pi)
    return 1 + 0.5 / mean


def random_alphas(draws: int = _DRAWS) -> list[dict[str, Any]]:
    """Mean and standard deviation of alpha over draws, plain and FARMS, by aspect ratio."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for ratio in track(_RATIOS, "random matrices", transient=True):
        cols = round(math.sqrt(_ENTRIES * ratio))
        shape = (round(_ENTRIES / cols), cols)
        found: dict[str, list[float]] = {"plain": [], "farms": []}
        for _ in range(draws):
            layer = nn.Linear(shape[1], shape[0], bias=False)
            layer.weight.data = torch.randn(shape, generator=generator)
            found["plain"].append(_alphas(layer, tb.WholeMatrix())[0])
            found["farms"].append(_alphas(layer, _WINDOWS)[0])
        rows.append(
            {
                "ratio": shape[1] / shape[0],
                "shape": shape,
                "marchenko_pastur": marchenko_pastur_alpha(shape[1] / shape[0]),
                **{
                    name: [float(np.mean(v)), float(np.std(v, ddof=1))] for name, v in found.items()
                },
            }
        )
    return rows


def _alphas(model: nn.Module, windows: tb.Farms | tb.WholeMatrix) -> list[float]:
    return [float(x.alpha) for x in tb.analyze(model, windows=windows).layers if x.alpha]


def trained_alphas(overrides: Sequence[str], outputs: str) -> dict[str, Any]:
    """Train with one rate for all layers; both alphas of every layer, before and after."""
    import pytorch_lightning as pl
    from hydra.utils import instantiate

    chosen = [*overrides, "callbacks=none", "logger=none", "threads=1", f"outputs={outputs}"]
    cfg = sweep.compose(chosen)
    torch.set_num_threads(1)
    pl.seed_everything(cfg.seed, verbose=False)
    task, data = instantiate(cfg.task), instantiate(cfg.data)
    options = {k: v for k, v in cfg.trainer.items() if k != "ckpt_path"}
    trainer = pl.Trainer(
        **{k: v for k, v in options.items() if k != "_target_"},
        logger=False, enable_checkpointing=False,
    )  # fmt: skip
    before = both_alphas(task.model)
    trainer.fit(task, datamodule=data)
    after = both_alphas(task.model)
    return {"overrides": list(overrides), "before": before, "after": after}


def both_alphas(network: nn.Module | Path) -> list[dict[str, Any]]:
    """Name, kind, shape, plain and FARMS alpha of each layer of a model, or of a checkpoint."""
    plain = tb.analyze(network, windows=tb.WholeMatrix(), min_eigs=10)
    farms = {x.name: x for x in tb.analyze(network, min_eigs=10).layers}
    return [
        {"name": x.name, "kind": x.kind, "shape": x.shape, "plain": x.alpha, "farms": y.alpha}
        for x in plain.layers
        if (y := farms[x.name]).alpha is not None and x.alpha is not None
    ]


# --- figure and paragraph ------------------------------------------------------------------------


def rankings(layers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How far the two rankings of the layers, and the multipliers made of them, lie apart.

    ``rank``: Spearman's correlation; ``shape``: that of the plain alpha with rows / cols;
    ``shape_farms``: the same of the FARMS alpha; ``moved``: layers whose multiplier (linear map
    0.5 to 1.5) differs by more than 0.25; ``most``: the largest difference.
    """
    plain, farms = ([x[name] for x in layers] for name in ("plain", "farms"))
    tall = [max(x["shape"][1:]) / min(x["shape"][1:]) for x in layers]
    rates = [tb.LinearMap()(alphas) for alphas in (plain, farms)]
    apart = (rates[0] - rates[1]).abs()
    return {
        "layers": len(layers),
        "rank": float(spearmanr(plain, farms)[0]),
        "shape": float(spearmanr(plain, tall)[0]),
        "shape_farms": float(spearmanr(farms, tall)[0]),
        "moved": int((apart > 0.25).sum()),
        "most": float(apart.max()),
    }


def figure(content: Mapping[str, Any], path: Path) -> None:
    """Alpha against aspect ratio on random matrices; plain against FARMS in trained networks."""
    networks = content["networks"]
    fig = pictures.blank(4.2 * (1 + len(networks)), 3.8)
    axes = fig.subplots(1, 1 + len(networks), squeeze=False)[0]
    rows = content["random"]
    ratios = [row["ratio"] for row in rows]
    axes[0].plot(
        ratios, [r["marchenko_pastur"] for r in rows], "k--", lw=1, label="Marchenko-Pastur"
    )
    for name, label in (("plain", "plain"), ("farms", "FARMS, 16x16 windows")):
        means, spreads = zip(*(row[name] for row in rows), strict=True)
        axes[0].errorbar(ratios, means, spreads, fmt="o-", ms=4, capsize=2, label=label)
    axes[0].set_xscale("log", base=2)
    axes[0].set_xlabel("aspect ratio, columns / rows")
    axes[0].set_ylabel("alpha")
    axes[0].set_title("random matrices (no structure)", fontsize=10)
    axes[0].legend(fontsize=8)
    for axis, (name, found) in zip(axes[1:], networks.items(), strict=True):
        kinds = list(dict.fromkeys(x["kind"] for x in found["after"]))
        for kind in kinds:
            some = [x for x in found["after"] if x["kind"] == kind]
            axis.plot([x["plain"] for x in some], [x["farms"] for x in some], "o", ms=5, label=kind)
        rho = rankings(found["after"])["rank"]
        axis.set_xlabel("plain alpha")
        axis.set_ylabel("FARMS alpha")
        axis.set_title(f"{name}: rank correlation {rho:.2f}", fontsize=10)
        axis.legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    fig.savefig(path, dpi=130)


def paragraph(content: dict[str, Any]) -> str:
    """What the figure shows, in numbers."""
    first, last = content["random"][0], content["random"][-1]
    lines = [
        "## The bias of the shape",
        "",
        "![alpha by aspect ratio, and plain against FARMS in trained networks](images/bias.png)",
        "",
        f"Random matrices of {_ENTRIES} entries, {_DRAWS} draws: from {first['shape'][0]}x"
        f"{first['shape'][1]} to {last['shape'][0]}x{last['shape'][1]} the plain alpha goes from "
        f"{first['plain'][0]:.2f} to {last['plain'][0]:.2f} (Marchenko-Pastur: "
        f"{first['marchenko_pastur']:.2f} to {last['marchenko_pastur']:.2f}), that of 16x16 "
        f"windows from {first['farms'][0]:.2f} to {last['farms'][0]:.2f}. No weight has learned "
        "anything here, yet a plain ranking would give the tall ones three times the rate.",
    ]
    for name, found in content["networks"].items():
        r = rankings(found["after"])
        lines += [
            "",
            f"{name}, trained with one rate, {r['layers']} layers: the two rankings correlate by "
            f"{r['rank']:.2f} (Spearman). The plain alpha correlates with rows / columns by "
            f"{r['shape']:.2f}, the FARMS alpha by {r['shape_farms']:.2f}. {r['moved']} layers "
            f"have multipliers (linear map, 0.5 to 1.5) more than 0.25 apart, the most "
            f"{r['most']:.2f}.",
        ]
    lines += [
        "",
        f"`python -m experiments.bias --train`; commit {content['commit'][:12]}, "
        f"{content['device']}.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bias", description=__doc__)
    parser.add_argument("--train", action="store_true", help="measure anew, which trains")
    parser.add_argument("--results", type=Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    path = chosen.results / "bias.json"
    if chosen.train:
        networks = {name: trained_alphas(o, "outputs/bias") for name, o in NETWORKS.items()}
        content = {
            "random": random_alphas(),
            "networks": networks,
            **provenance.commit(),
            "device": provenance.device_name(),
        }
        chosen.results.mkdir(parents=True, exist_ok=True)
        provenance.write_json(path, content)
    content = json.loads(path.read_text())
    images = chosen.results.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    figure(content, images / "bias.png")
    (chosen.results / "bias.md").write_text(paragraph(content))
    Console().print(f"written: {images / 'bias.png'}, {chosen.results / 'bias.md'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
