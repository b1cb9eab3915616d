"""What a Lightning run can be balanced with: refused strategies and callbacks, and its schedules.

Lightning is not imported: its objects are told apart by the names of their classes, since
``lightning.pytorch`` and ``pytorch_lightning`` hold the same classes twice.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch.optim import Optimizer

from tempbalance.optim.scheduler import TempBalanceLR

_REFUSED = {
    "FSDPStrategy": "it flattens the weights, so that no layer has a matrix of its own",
    "DeepSpeedStrategy": "it builds its own optimizer from flattened weights",
}
_AVERAGING = "StochasticWeightAveraging"


def is_a(thing: object, *names: str) -> bool:
    """Whether a class of one of these names is among the object's, whichever package it is of."""
    return any(cls.__name__ in names for cls in type(thing).__mro__)


def refuse(trainer: Any, callback: Any, observe: bool) -> None:
    """Stop where balancing, or with ``observe`` measuring, cannot work, and say what can.

    Raises:
        ValueError: for a strategy, a callback or an order of callbacks that it cannot work with.
    """
    reason = next((why for name, why in _REFUSED.items() if is_a(trainer.strategy, name)), None)
    if reason is not None:
        raise ValueError(
            f"TempBalanceCallback does not work with {type(trainer.strategy).__name__}: "
            f"{reason}. Use DDP, or ModelParallelStrategy with fully_shard (FSDP2)"
        )
    callbacks = list(trainer.callbacks)
    if any(is_a(c, "ModelPruning") for c in callbacks):
        raise ValueError(
            "ModelPruning replaces every weight by a masked one during training, which cannot "
            "be measured: prune in a run of its own"
        )
    if observe:
        return
    if not any(optimizer.param_groups for optimizer in trainer.optimizers):
        raise ValueError(
            "configure_optimizers returns no optimizer, so there is no rate to balance; "
            "TempBalanceCallback(observe=True) measures alone"
        )
    if any(is_a(c, "BackboneFinetuning") for c in callbacks):
        raise ValueError(
            "BackboneFinetuning writes the rate of the last param group itself, which would "
            "then be one layer of the backbone; unfreeze with a BaseFinetuning of your own "
            "(unfreeze_and_add_param_group), or use TempBalanceCallback(observe=True)"
        )
    early = [c for c in callbacks[: callbacks.index(callback)] if is_a(c, _AVERAGING)]
    if early:
        raise ValueError(
            f"put TempBalanceCallback before {_AVERAGING} in the list of callbacks: on a "
            "resume that one takes the schedules away first"
        )
    late = [c for c in callbacks[callbacks.index(callback) :] if is_a(c, "BaseFinetuning")]
    if late:
        raise ValueError(
            f"put {type(late[0]).__name__} before TempBalanceCallback in the list of "
            "callbacks: it rebuilds the param groups when a run is resumed"
        )


def check_configs(trainer: Any, index: int, optimizer: Optimizer) -> None:
    """Stop where an optimizer has several schedules, or one of ours already.

    Raises:
        ValueError: naming the cure.
    """
    configs = configs_of(trainer, optimizer)
    if len(configs) > 1:
        raise ValueError(
            f"optimizer {index} has {len(configs)} schedules; combine them into one with "
            "torch.optim.lr_scheduler.ChainedScheduler or SequentialLR"
        )
    if configs and isinstance(configs[0].scheduler, TempBalanceLR):
        raise ValueError(
            "configure_optimizers returns a TempBalanceLR already: use that, or the callback, "
            "not both"
        )


def config_class(trainer: Any) -> Any:
    """``LRSchedulerConfig`` of the package that the trainer is of."""
    own = next(cls for cls in type(trainer).__mro__ if cls.__name__ == "Trainer")
    package = own.__module__.removesuffix(".trainer.trainer")
    return importlib.import_module(f"{package}.utilities.types").LRSchedulerConfig


def configs_of(trainer: Any, optimizer: Optimizer) -> list[Any]:
    """What the trainer keeps of the schedules of an optimizer."""
    return [c for c in trainer.lr_scheduler_configs if optimizer_of(c.scheduler) is optimizer]


def optimizer_of(scheduler: Any) -> Any:
    """The optimizer of a schedule; ``None`` where it names none."""
    return getattr(scheduler, "optimizer", None)
