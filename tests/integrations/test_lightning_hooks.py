"""The Lightning callback on step hooks, and with decay: exact, resumable, from a command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_modules import Plain, loader, pl
from releases import needs_step_checkpoints
from schedules import Foreign, rates, weights

import tempbalance as tb
from tempbalance.integrations.lightning import TempBalanceCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*lr_scheduler.step.*before"
)


class Decaying(Foreign):
    """A schedule that is not torch's: an object that writes the groups, one entry each."""

    def write(self, group: dict[str, Any], value: float) -> None:
        group["lr"] = value * 0.8**self.count


class Other(Plain):
    """With a schedule that Lightning steps through a hook of the module."""

    def __init__(self) -> None:
        super().__init__(Decaying, adam=True)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()


class Places:
    """A loader that keeps its place in a checkpoint, as torchdata's StatefulDataLoader does."""

    def __init__(self) -> None:
        self.batches, self.place = list(loader()), 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        self.place %= len(self)
        while self.place < len(self):
            self.place += 1
            yield self.batches[self.place - 1]

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def fit(
    folder: Path, model: Any, callback: Any, ckpt: Path | None = None, data: Any = None, **when: int
) -> Any:
    keep = pl.callbacks.ModelCheckpoint(folder, save_top_k=-1, filename="{step}", **when)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        callbacks=[callback, keep] if callback else [keep],
    )
    trainer.fit(model, data or loader(), ckpt_path=ckpt and str(ckpt))
    return trainer


MODES: dict[str, dict[str, Any]] = {
    "hooks": {"hooks": True},
    "hooks and decay": {"hooks": True, "decay": {"every": 2}},
    "decay": {"decay": {"every": 2}},
    "keep_decay": {"keep_decay": True},
}


def resumed(tmp_path: Path, mode: str | None, step: int, data: Any, **when: int) -> bool:
    """Whether a run that goes on from a step's checkpoint ends as the whole one, bit for bit."""

    def build() -> Any:
        callback = None if mode is None else TempBalanceCallback(every_n_steps=3, **MODES[mode])
        return (Plain(adam=True) if mode in ("decay", "keep_decay") else Other()), callback

    model, callback = build()
    whole = fit(tmp_path / "a", model, callback, data=data(), **when)
    again, callback2 = build()
    with torch.no_grad():
        for p in again.parameters():
            p.add_(1.0)
    ckpt = tmp_path / "a" / f"step={step}.ckpt"
    second = fit(tmp_path / "b", again, callback2, ckpt, data(), **when)
    same = rates(second.optimizers[0]) == rates(whole.optimizers[0])
    return same and torch.equal(weights(again), weights(model))


@pytest.mark.parametrize("mode", MODES)
def test_resumed_from_an_epochs_end(tmp_path: Path, mode: str) -> None:
    assert resumed(tmp_path, mode, 8, loader, every_n_epochs=1)
    plain, balanced = Other(), Other()
    if "hooks" in mode:
        fit(tmp_path / "c", plain, None)
        fit(tmp_path / "d", balanced, TempBalanceCallback(every_n_steps=3, **MODES[mode]))
        assert not torch.equal(weights(plain), weights(balanced))


@needs_step_checkpoints
@pytest.mark.parametrize("step", [4, 5, 7])
@pytest.mark.parametrize("mode", MODES)
def test_resumed_from_a_step(tmp_path: Path, mode: str, step: int) -> None:
    """In the middle of an epoch where the loader keeps its place."""
    assert resumed(tmp_path, mode, step, Places, every_n_train_steps=1)


@needs_step_checkpoints
@pytest.mark.parametrize("mode", [None, "hooks", "keep_decay"])
def test_a_loader_without_a_place_begins_its_epoch_anew(tmp_path: Path, mode: str | None) -> None:
    """torch's DataLoader: Lightning gives a plain run too other batches after the resume."""
    assert not resumed(tmp_path, mode, 5, loader, every_n_train_steps=1)


def test_hooks_change_nothing_but_the_steps(tmp_path: Path) -> None:
    """With a multiplier of 1 the run is the plain one; the groups stay whole."""
    plain, same = Other(), Other()
    before = fit(tmp_path / "a", plain, None)
    callback = TempBalanceCallback(every_n_steps=2, hooks=True, assign=tb.Constant(1.0))
    after = fit(tmp_path / "b", same, callback)
    assert torch.equal(weights(plain), weights(same))
    assert len(after.optimizers[0].param_groups) == 1
    assert rates(after.optimizers[0]) == rates(before.optimizers[0])


def test_hooks_want_steps() -> None:
    with pytest.raises(ValueError, match="give every_n_steps"):
        TempBalanceCallback(hooks=True)


YAML = """
model: {adam: true}
trainer:
  max_steps: 2
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  callbacks:
    - class_path: tempbalance.integrations.lightning.TempBalanceCallback
      init_args:
        every_n_steps: 2
        start: 1
        min_eigs: 8
        exclude: [nothing]
        fixed: {net.0: 2.0}
        unit: layer
        decay: {every: 4, normalize: true}
        windows: {class_path: tempbalance.WholeMatrix}
        fit: {class_path: tempbalance.Hill}
        assign:
          class_path: tempbalance.LinearMap
          init_args: {s1: 0.6, s2: 1.4}
"""


def test_every_option_from_yaml(tmp_path: Path) -> None:
    """In a process of its own: which of the two packages is loaded decides what a callback is."""
    pytest.importorskip("jsonargparse")
    (tmp_path / "config.yaml").write_text(YAML)
    code = """
import importlib, sys
from lightning_modules import Plain, loader, pl
import tempbalance as tb
from tempbalance.integrations.lightning import TempBalanceCallback

arguments = ["--config", sys.argv[1]]
cli = importlib.import_module(f"{pl.__name__}.cli").LightningCLI(
    Plain, run=False, save_config_callback=None, args=arguments
)
(callback,) = (c for c in cli.trainer.callbacks if isinstance(c, TempBalanceCallback))
cli.trainer.fit(cli.model, loader())
options = callback.balancers[0].options
assert options.assign == tb.LinearMap(0.6, 1.4) and options.windows == tb.WholeMatrix()
assert (options.start, options.min_eigs, options.every) == (1, 8, 2)
assert options.fixed == {"net.0": 2.0}
assert callback.decays[0].balancer.options.normalize
"""
    here = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, str(tmp_path / "config.yaml")]
    environment = {**os.environ, "PYTHONPATH": path}
    subprocess.run(command, check=True, timeout=120, cwd=tmp_path, env=environment)
