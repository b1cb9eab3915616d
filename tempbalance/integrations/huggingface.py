"""Hugging Face: ``Trainer(callbacks=[TempBalanceTrainerCallback()])``.

The Trainer restores optimizer and schedule before any callback can change them, so nothing of
them is changed: multipliers are put on only while the optimizer steps
(:mod:`tempbalance.optim.hooks`).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any, Unpack

import torch.distributed as dist
from torch import nn

from tempbalance.balance.options import Given, GivenAssign, check_names, with_options
from tempbalance.integrations.traps import TrapLog
from tempbalance.optim.decay import AlphaDecay
from tempbalance.optim.hooks import StepHooks
from tempbalance.runs import write as history

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "tempbalance.integrations.huggingface needs transformers: pip install 'tempbalance[hf]'"
    ) from error

logger = logging.getLogger("tempbalance")

# Where the balancer's state is kept in the Trainer's own. (An ``ExportableState`` would fail when
# a checkpoint without it is continued.)
_KEY = "tempbalance"


@with_options()
class TempBalanceTrainerCallback(TrainerCallback):
    """Layer-wise learning rates from the spectra, for a Hugging Face Trainer as it is.

    Args:
        every: optimizer steps between measurements.
        log: at each measurement, ``"summary"`` adds least, median and largest alpha and
            multiplier to the Trainer's ``log_history`` and to a W&B run where there is one,
            ``"layers"`` also those of every layer, ``"none"`` nothing.
        traps: look for correlation traps (atypical entries) at each measurement too, which costs
            several measurements; logged as ``traps`` and ``trap_units``. A warning names each
            layer, once, whose traps persist and grow over three looks.
        keep_decay, decay: see :class:`~tempbalance.StepHooks`.
        options: see :class:`~tempbalance.balance.options.Options`, in optimizer steps.

    The balancer's state is in the checkpoint's ``trainer_state.json``; a run resumes from it with
    the same multipliers. The learning rate in the Trainer's logs is the schedule's own.

    Raises:
        ValueError: when training begins, if the model has no layer to balance.
    """

    def __init__(
        self,
        *,
        every: int = 100,
        log: str = "summary",
        traps: bool = False,
        keep_decay: bool = False,
        decay: Given | None = None,
        **options: Unpack[GivenAssign],
    ) -> None:
        check_names(type(self), options)
        check_names(AlphaDecay, decay or {})
        if log not in ("layers", "summary", "none"):
            raise ValueError(f"log must be 'layers', 'summary' or 'none', got {log!r}")
        self.every, self.log, self.options = every, log, options
        self.keep_decay, self.decay = keep_decay, decay
        self.traps = TrapLog(traps)
        self.hooks: StepHooks | None = None
        self._logged = 0

    @property
    def alphas(self) -> dict[str, float | None]:
        """The last alpha of every balanced layer, of a training that is over too."""
        return {} if self.hooks is None else self.hooks.balancer.alphas

    @property
    def multipliers(self) -> dict[str, float]:
        """The last multiplier of every balanced layer, of a training that is over too."""
        return {} if self.hooks is None else self.hooks.balancer.multipliers

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        saved = _saved_state(state)
        group = _ranks(args)
        options: Any = {"process_group": group, **self.options}
        decay: Any = None if self.decay is None else {"process_group": group, **self.decay}
        self.hooks = StepHooks(
            optimizer,
            model,
            every=self.every,
            begin=saved is None,
            keep_decay=self.keep_decay,
            decay=decay,
            **options,
        )
        self.traps.start()
        if saved is not None:
            self.hooks.load_state_dict(saved)
            self.traps.load_state_dict(saved.get("traps", {}))
        elif state.global_step:
            logger.info("the checkpoint holds no balancing state: measuring the model as it is now")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.hooks is None:
            return
        if self.hooks.balancer.measurements != self._logged:
            self._logged = self.hooks.balancer.measurements
            self.traps.look([self.hooks.balancer], quiet=not state.is_world_process_zero)
            self._log(state)
        self._keep(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._keep(state, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # With save_strategy="best" the Trainer decides to save only after this.
        self._keep(state, control, whatever=args.save_strategy == "best")

    def _keep(self, state: TrainerState, control: TrainerControl, whatever: bool = False) -> None:
        """The state as it is now goes into the checkpoint that may follow."""
        if self.hooks is not None and (control.should_save or whatever):
            kept: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]
            kept[_KEY] = {**self.hooks.state_dict(), "traps": self.traps.state_dict()}

    def _log(self, state: TrainerState) -> None:
        """Into the Trainer's history and a W&B run: its other loggers hear of nothing from here."""
        assert self.hooks is not None
        if self.log == "none":
            return
        alphas, multipliers = self.hooks.alphas, self.hooks.multipliers
        figures = history.summary(alphas, multipliers)
        figures |= self.traps.figures(by_layer=self.log == "layers")
        if self.log == "layers":
            figures |= history.by_layer(alphas, multipliers, {})
        for name, value in self.hooks.decay_multipliers.items() if self.log == "layers" else ():
            figures[f"decay_multiplier/{name}"] = value
        named = {f"tempbalance/{name}": value for name, value in figures.items()}
        state.log_history.append({**named, "step": state.global_step})
        wandb = sys.modules.get("wandb")
        if state.is_world_process_zero and getattr(wandb, "run", None) is not None:
            wandb.run.log({**named, "train/global_step": state.global_step})  # type: ignore

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.hooks is not None:
            self.hooks.detach()


def _ranks(args: TrainingArguments) -> dist.ProcessGroup | None:
    """All ranks: callbacks are given the model without the wrapper that would tell."""
    if args.world_size > 1 and dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    return None


def _saved_state(state: TrainerState) -> Mapping[str, Any] | None:
    """The balancer's state as it was read from a checkpoint, if this run resumes one."""
    if not state.global_step:
        return None
    saved: Any = state.stateful_callbacks or {}
    return saved.get(_KEY)
