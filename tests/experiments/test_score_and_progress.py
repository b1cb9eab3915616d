"""Alpha on the rate with decay kept, and on decay at a fixed rate, by overrides of every task."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from hydra.utils import instantiate
from standins import composed, substitute

import tempbalance as tb
from experiments.assignments import typed
from experiments.train import train

TASKS = ("darcy_fno", "cifar100_resnet18", "lm_tiny")


class Groups(pl.Callback):
    """What a step of the run has: the parameters, rate and decay of every group."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.rows = [
            (sum(p.numel() * (1 + p.is_complex()) for p in g["params"]), g["lr"], g["weight_decay"])
            for g in trainer.optimizers[0].param_groups
        ]
        self.callback = next(c for c in trainer.callbacks if hasattr(c, "balancers"))


def step(tmp_path: Path, task: str, *overrides: str) -> tuple[dict[str, Any], Groups, Any]:
    # Constant: so that each group's rate is the base rate times its multiplier.
    given = [f"experiment={task}", *overrides, "schedule=constant", "trainer.fast_dev_run=true"]
    cfg = substitute(composed(tmp_path, *given))
    groups = Groups()
    return train(cfg, [groups]), groups, cfg


@pytest.mark.parametrize("task", TASKS)
def test_alpha_on_decay_at_a_fixed_rate(task: str, tmp_path: Path) -> None:
    result, groups, cfg = step(tmp_path, task, "decay=alphadecay_mean")
    assert result["method"] == "none+alphadecay_mean"
    rate, base = cfg.optimizer.lr, cfg.optimizer.weight_decay
    assert {lr for _, lr, _ in groups.rows} == {rate}
    decays = {decay for _, _, decay in groups.rows}
    assert len(decays) > 2
    # The mean over the parameters of the layers is that of the optimizer.
    (decay,) = groups.callback.decays
    sizes = {layer.name: layer.numel for layer in decay.balancer.layers}
    factors = decay.multipliers
    mean = math.fsum(sizes[n] * factors[n] for n in sizes) / sum(sizes.values())
    assert mean == pytest.approx(1.0)
    assert {round(base * m, 12) for m in factors.values()} <= {round(d, 12) for d in decays}


@pytest.mark.parametrize(("task", "mean"), [*((t, False) for t in TASKS), ("lm_tiny", True)])
def test_alpha_on_the_rate_with_decay_kept(task: str, mean: bool, tmp_path: Path) -> None:
    more = ["+balance.normalize=true"] if mean else []
    result, groups, cfg = step(tmp_path, task, "balance=farms", "decay=kept", *more)
    assert result["method"] == "farms+kept"
    rate, base = cfg.optimizer.lr, cfg.optimizer.weight_decay
    assert len({lr for _, lr, _ in groups.rows}) > 2
    for _, lr, decay in groups.rows:
        assert lr * decay == pytest.approx(rate * base, rel=1e-9)
    (balancer,) = groups.callback.balancers
    sizes = {layer.name: layer.numel for layer in balancer.layers}
    total = math.fsum(sizes[n] * balancer.multipliers[n] for n in sizes) / sum(sizes.values())
    assert (total == pytest.approx(1.0)) == mean


def test_decay_kept_needs_a_method_of_rates(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"balance=none has no options.*keep_decay"):
        step(tmp_path, "lm_tiny", "decay=kept")


def test_nullscore_and_its_controls_are_built_as_said(tmp_path: Path) -> None:
    def built(experiment: str, balance: str, *more: str) -> Any:
        cfg = composed(tmp_path, f"experiment={experiment}", f"balance={balance}", *more)
        return instantiate(cfg.balance)

    assert built("darcy_fno", "nullscore").options["assign"] == tb.NullScore()
    language = built("lm_tiny", "nullscore", "tuned.nullscore.c=0.3")
    assert language.options["assign"] == tb.ByRole(tb.NullScore(0.3)) and language.every == 20
    turned = built("lm_tiny", "nullscore_reversed", "tuned.nullscore.by_role=false")
    assert turned.options["assign"] == tb.NullScore(-0.1)
    shuffled = tb.Shuffled(tb.NullScore(), seed=43, within_type=True)
    assert built("lm_tiny", "nullscore_shuffled").options["assign"] == tb.ByRole(shuffled)
    frozen = built("lm_tiny", "nullscore_frozen").options
    assert frozen["assign"] == tb.ByRole(tb.Frozen(tb.NullScore())) and frozen["start"] == 200
    assert built("darcy_fno", "nullscore_frozen").options["start"] == 233
    assert typed(tb.LinearMap(), False) == tb.LinearMap()
    assert built("lm_tiny", "progress_reversed").progress.equalizer.gamma == -1.0
    assert built("lm_tiny", "equal_updates").progress.equalizer.gamma == 0.0
