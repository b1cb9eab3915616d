"""Prune a causal language model and score it, or a sweep of such runs.

python -m experiments.prune model.path=SmolLM2.gguf method=wanda allocation=farms total=0.6
python -m experiments.prune -m model.path=MODEL allocation=uniform,farms,depth total=0.5,0.6,0.7
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from experiments import extras  # noqa: F401  (first: says what to install)

# isort: split
import hydra
from omegaconf import DictConfig

from experiments import provenance, sweep
from experiments.prune.run import run

log = logging.getLogger(__name__)


def _stored(cfg: DictConfig) -> dict[str, Any]:
    provenance.store(cfg, Path(cfg.folder))
    return run(cfg)


@hydra.main(version_base="1.3", config_path=str(sweep.CONF), config_name="prune")
def main(cfg: DictConfig) -> float:
    """Entry of the command line: the perplexity, NaN where it failed in a sweep."""
    result = sweep.run(cfg, _stored)
    if result is None:
        return math.nan
    told = result["pruning"]
    log.info(
        "perplexity %.4g on %s (%s tokens), %.4f of the weights are zero (%.4f were before): %s",
        *(result["value"], told["split"], f"{told['tokens']:,}", told["sparsity"]),
        *(told["sparsity_before"], cfg.folder),
    )
    return float(result["value"])


if __name__ == "__main__":
    main()
