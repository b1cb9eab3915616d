"""One run of the second part of the study."""

from __future__ import annotations

import logging
import math
import tempfile
import warnings

from experiments import provenance, sweep
from experiments.evidence.cells import CELLS, COMMON, DECAY, RATE, Cell
from experiments.evidence.search import Key, Row


def overrides(cell: Cell, key: Key) -> list[str]:
    """The overrides of ``python -m experiments.train`` that make a run."""
    own = cell.variants[key.variant].overrides
    point = (f"{RATE}={key.rate:g}", f"{DECAY}={key.decay:g}")
    return [*cell.overrides, *COMMON, *own, *point, *cell.of_seed(key.seed)]


def run(key: Key, cell: str) -> Row:
    """Train once, in this process."""
    from experiments.train import train

    for name in ("pytorch_lightning", "lightning_fabric", "tempbalance"):
        logging.getLogger(name).setLevel(logging.ERROR)  # hundreds of runs say the same
    warnings.filterwarnings("ignore")
    chosen = overrides(CELLS[cell], key)
    code, device = provenance.commit(), provenance.device_name()
    value = held_out = seconds = measuring = math.nan
    with tempfile.TemporaryDirectory() as outputs:
        cfg = sweep.compose([*chosen, f"outputs={outputs}"])
        try:
            result = sweep.run(cfg, train)
        except FloatingPointError:  # it diverged; all other errors are the machine's
            result = None
    if result is not None:
        value = float(result["value"])
        held_out = float(result["last"].get(result["metric"]["monitor"], math.nan))
        seconds, measuring = result["seconds"], result["measuring_share"] or 0.0
        device = f"{result['device']}, torch {result['versions']['torch']}"
    return Row(
        **vars(key),
        value=float(f"{value:.6g}"),
        held_out=float(f"{held_out:.6g}"),
        seconds=round(seconds, 1),
        measuring=round(measuring, 4),
        commit=f"{(code['commit'] or '')[:8]}{'+' if code['changed'] else ''}",
        device=device,
        overrides=" ".join(chosen),
    )
