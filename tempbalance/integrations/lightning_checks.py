"""Lightning checks: what of a trainer cannot go together with the callback."""

from __future__ import annotations

import importlib
from typing import Any

from tempbalance.integrations.lightning_logs import is_a

_REFUSED = {
    "FSDPStrategy": "it flattens the weights, so that no layer has a matrix of its own",
    "DeepSpeedStrategy": "it builds its own optimizer from flattened weights",
}
_AVERAGING = "StochasticWeightAveraging"


def check_trainer(trainer: Any, callback: Any, observe: bool) -> None:
    """Refuse strategies and callbacks that cannot go together with the callback.

    Raises:
        ValueError: with the reason and the cure.
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


def config_class(trainer: Any) -> Any:
    """``LRSchedulerConfig`` of the package that the trainer is of."""
    own = next(cls for cls in type(trainer).__mro__ if cls.__name__ == "Trainer")
    package = own.__module__.removesuffix(".trainer.trainer")
    return importlib.import_module(f"{package}.utilities.types").LRSchedulerConfig
