"""Train one configuration, or a sweep of them.

python -m experiments.train experiment=cifar100_resnet18 balance=farms
python -m experiments.train -m experiment=cifar100_resnet18 seed=43,37,13 balance=none,tb,farms
"""

from __future__ import annotations

import logging
import math
import sys
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments import extras  # noqa: F401  (first: says what to install)

# isort: split
import hydra
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments import provenance, sweep
from experiments.history import History

log = logging.getLogger(__name__)

# Meant: the folder of a run is kept, and resumed.
warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")  # Lightning's own


def train(cfg: DictConfig, more: Sequence[pl.Callback] = ()) -> dict[str, Any]:
    """Build, fit and test what the configuration says; the content of `result.json`.

    `more`: callbacks that only watch (a progress bar), beside those of the configuration.
    """
    folder = Path(cfg.folder)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    pl.seed_everything(cfg.seed, workers=True)
    checkpoint = sweep.find_checkpoint(cfg.trainer.ckpt_path, folder)
    provenance.store(cfg, folder)

    data: pl.LightningDataModule = instantiate(cfg.data)
    if cfg.watch_test:
        data.val_dataloader = partial(_first_test, data)  # type: ignore[method-assign]
    task: pl.LightningModule = instantiate(cfg.task)
    history = History()
    configured = [*(cfg.callbacks or {}).values(), cfg.balance]
    if cfg.balance and "_target_" not in cfg.balance:
        raise ValueError(
            f"balance={cfg.method} has no options, and was given {sorted(cfg.balance)}: choose a "
            "method, such as balance=farms"
        )
    callbacks = [history, *(instantiate(item) for item in configured if item), *more]
    loggers = [instantiate(item) for item in (cfg.logger or {}).values()]
    options: Any = OmegaConf.to_container(cfg.trainer, resolve=True)
    del options["ckpt_path"]  # an argument of fit
    trainer: pl.Trainer = instantiate(options, callbacks=callbacks, logger=loggers)
    began = time.time()
    try:
        for logger in trainer.loggers:
            logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
        sweep.as_single_job(cfg)
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint)
        # The weights of the last epoch: the best epoch is reported beside, never chosen by test.
        trainer.test(task, datamodule=data, verbose=False)
        test = {name: float(value) for name, value in trainer.callback_metrics.items()}
    finally:
        _close(trainer)
    measuring = history.measuring
    return {
        "name": cfg.name,
        "method": cfg.whole_method,
        "seed": cfg.seed,
        "settings": sweep.settings(cfg.overrides),
        "metric": {
            "name": cfg.metric.name,
            "monitor": cfg.metric.monitor,
            "mode": cfg.metric.mode,
        },
        "value": test.get(cfg.metric.name),
        "test": test,
        "rows": history.rows,
        "last": history.rows[-1] if history.rows else {},
        "best_on": "test" if cfg.watch_test else "validation",
        "best": {cfg.metric.monitor: history.best(cfg.metric.monitor, cfg.metric.mode)},
        "epochs": len(history.rows),
        "seconds": history.seconds,
        "measuring_share": None if measuring is None else measuring / history.seconds,
        "resumed_from": checkpoint,
        "started": began,
        "finished": time.time(),
        "fast_dev_run": bool(cfg.trainer.fast_dev_run),
        **provenance.commit(),
        "device": provenance.device_name(),
        "versions": provenance.versions(),
    }


def _first_test(data: pl.LightningDataModule) -> Any:
    """The first test set, where there is no validation data and each epoch is scored on it."""
    loaders = data.test_dataloader()
    return loaders[0] if isinstance(loaders, list | tuple) else loaders


def _close(trainer: pl.Trainer) -> None:
    """End every logger, and the run of Weights & Biases, so that the next job starts its own."""
    for logger in trainer.loggers:
        logger.finalize("finished" if trainer.state.finished else "failed")
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish(exit_code=0 if trainer.state.finished else 1)


@hydra.main(version_base="1.3", config_path=str(sweep.CONF), config_name="train")
def main(cfg: DictConfig) -> float:
    """Entry of the command line: the metric of the run, NaN where it failed in a sweep."""
    result = sweep.run(cfg, train)
    if result is None or result.get("value") is None:
        return math.nan
    log.info("%s = %.6g  (%s)", result["metric"]["name"], result["value"], cfg.folder)
    return float(result["value"])


if __name__ == "__main__":
    main()
