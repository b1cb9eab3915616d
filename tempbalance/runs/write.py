"""History: what balancing did in a run, as files that a person or a plot can read.

``tempbalance.csv`` has a row a layer and measurement; ``esd_first.npz`` and ``esd_last.npz`` hold
the eigenvalues of every layer at the first and at the last one.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tempbalance.measure.measurement import LayerRecord

FILE = "tempbalance.csv"
COLUMNS = ("epoch", "step", "layer", "alpha", "multiplier", "lr")
ESD_FILES = ("esd_first.npz", "esd_last.npz")


def append(
    folder: Path,
    epoch: int,
    step: int,
    alphas: Mapping[str, float | None],
    multipliers: Mapping[str, float],
    rates: Mapping[str, float],
) -> None:
    """Add one measurement; an alpha or rate that there is not is left empty."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        for layer, alpha in alphas.items():
            row = (alpha, multipliers.get(layer, 1.0), rates.get(layer))
            writer.writerow([epoch, step, layer, *("" if v is None else repr(v) for v in row)])


def save_esd(folder: Path, records: Sequence[LayerRecord], last: bool) -> None:
    """Save the eigenvalues of measured layers, with their fits."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    for r in records:
        if r.eigenvalues is not None and r.outcome.measured:
            arrays[f"eigenvalues/{r.name}"] = r.eigenvalues.astype(np.float32)
            arrays[f"fit/{r.name}"] = np.array([r.alpha, r.xmin, r.D, r.n_tail], dtype=np.float64)
    np.savez_compressed(folder / ESD_FILES[last], allow_pickle=False, **arrays)


def summary(
    alphas: Mapping[str, float | None], multipliers: Mapping[str, float]
) -> dict[str, float]:
    """Least, median and largest alpha and multiplier, and the share of layers with an alpha."""
    known = [a for a in alphas.values() if a is not None]
    out = {"alpha/measured_share": len(known) / max(1, len(alphas))}
    for name, values in (("alpha", known), ("multiplier", list(multipliers.values()))):
        if values:
            out[f"{name}/min"] = min(values)
            out[f"{name}/median"] = statistics.median(values)
            out[f"{name}/max"] = max(values)
    return out


def by_layer(
    alphas: Mapping[str, float | None],
    multipliers: Mapping[str, float],
    rates: Mapping[str, float],
) -> dict[str, float]:
    """Alpha, multiplier and rate of every layer under stable names."""
    out = {f"alpha/{name}": a for name, a in alphas.items() if a is not None}
    out |= {f"multiplier/{name}": m for name, m in multipliers.items()}
    return out | {f"lr/{name}": rate for name, rate in rates.items()}
