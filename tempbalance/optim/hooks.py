"""StepHooks: multipliers only while the optimizer steps, for schedules that are not torch's.

Where a framework owns the schedule and the checkpoint, or the training loop writes ``group["lr"]``
by hand, nothing may change between steps. Here the param groups are split only while
``optimizer.step()`` runs, and are the user's own before and after it: schedules, loggers and
checkpoints see no difference.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tempbalance.balance.balancer import Balancer
from tempbalance.balance.messages import TAKEN_OVER, warn
from tempbalance.layers.layer import Host
from tempbalance.optim.claims import claim, release, renounce
from tempbalance.optim.groups import (
    Group,
    check_optimizer,
    innermost,
    parameters_of,
    partition,
)


class StepHooks:
    """Learning rates per layer without touching schedule, param groups or checkpoints.

        hooks = StepHooks(optimizer, model, every=100)

    Each ``optimizer.step()`` uses rate x multiplier; every ``every`` of them the model is
    measured. ``get_last_lr()`` of a schedule and a learning-rate logger show the rates without
    multipliers: read ``hooks.multipliers`` for those.

    The balancer's state is not in the optimizer's: save ``hooks.state_dict()`` as well.

    Where a step raises and the loop goes on (out of memory, say), the groups are whole again from
    the next step, or the next state dict, on: let no schedule step in between.

    Args:
        optimizer: any optimizer that takes param groups.
        model: the model whose parameters it holds.
        every: optimizer steps between measurements. Those that a GradScaler skips do not count,
            but with a fused optimizer, which skips them itself.
        begin: measure at once; not where a state is loaded next.
        options: as for :class:`~tempbalance.Balancer`, with ``start``, ``stop``, ``ramp``
            and ``delay`` in optimizer steps.

    Raises:
        ValueError: as :class:`~tempbalance.TempBalanceLR`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        *,
        every: int = 100,
        begin: bool = True,
        **options: Any,
    ) -> None:
        optimizer = innermost(optimizer)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch Optimizer, got {type(optimizer).__name__}")
        check_optimizer(optimizer)
        self.optimizer = optimizer
        self.balancer = Balancer(model, partial(parameters_of, optimizer), every=every, **options)
        if release(optimizer) is not None:
            warn(TAKEN_OVER)
        self._known = self._ids()
        self._hosts: dict[int, Host] = {}
        self._whole: list[Group] | None = None  # the user's groups, while a step runs
        self._parts: list[tuple[Group, Group]] = []  # (part, the user's group it is of)
        self._find_hosts()
        owner = weakref.ref(self)
        self._handles = [
            optimizer.register_step_pre_hook(_calling(owner, "_before_step")),
            optimizer.register_step_post_hook(_calling(owner, "_after_step")),
            # A step that was interrupted must not leave its groups in a checkpoint.
            optimizer.register_state_dict_pre_hook(_calling(owner, "_restore")),
            optimizer.register_load_state_dict_pre_hook(_calling(owner, "_restore")),
        ]
        # The optimizer keeps the object alive: its hooks are all that most users need of it.
        claim(optimizer, lambda: self)
        if begin:
            self.balancer.begin()

    @property
    def alphas(self) -> dict[str, float | None]:
        """The last alpha of every balanced layer; ``None`` where it could not be measured."""
        return self.balancer.alphas

    @property
    def multipliers(self) -> dict[str, float]:
        """The multiplier of every balanced layer; all others have 1, as all have once detached."""
        return self.balancer.multipliers if self._handles else {}

    def detach(self) -> None:
        """Stop balancing: from here on every layer has its group's rate."""
        self._restore()
        self.balancer.cancel()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        renounce(self.optimizer, self)

    def state_dict(self) -> dict[str, Any]:
        """Plain values by layer name."""
        return self.balancer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` left off; measures nothing."""
        self.balancer.load_state_dict(state)

    def _ids(self) -> list[int]:
        return [id(p) for p in parameters_of(self.optimizer)]

    def _find_hosts(self) -> None:
        self._found = self.balancer.found
        self._hosts = {id(p): host for host in self._found.hosts for p in host.parameters}

    def _before_step(self) -> None:
        self._restore()  # where the last step raised between the hooks
        if self._known != (known := self._ids()):  # a group was added, or a parameter exchanged
            self.balancer.refresh()
            self._known = known
        if self._found is not self.balancer.found:
            self._find_hosts()
        multipliers = self.balancer.multipliers
        self._parts = []
        for group in self.optimizer.param_groups:
            for host, members in partition(group, self._hosts):
                rates = [multipliers.get(name, 1.0) for name in host.layers] if host else [1.0]
                factor = sum(rates) / len(rates) if len(rates) > 1 else rates[0]
                part = {**group, "params": [group["params"][i] for i in members]}
                if factor != 1.0:
                    part["lr"] = group["lr"] * factor
                self._parts.append((part, group))
        # The list stays the same object: wrappers (SAM) share it with the optimizer inside.
        self._whole = list(self.optimizer.param_groups)
        self.optimizer.param_groups[:] = [part for part, _ in self._parts]

    def _after_step(self) -> None:
        # What an optimizer counts in its groups (and not in its state) is kept.
        for part, group in self._parts:
            for key, value in part.items():
                if key not in ("params", "lr"):
                    group[key] = value
        self._restore()
        self.balancer.step()

    def _restore(self) -> None:
        if self._whole is not None:
            self.optimizer.param_groups[:] = self._whole
        self._whole, self._parts = None, []


def _calling(owner: weakref.ref[StepHooks], method: str) -> Any:
    def hook(*_: Any) -> None:
        hooks = owner()
        if hooks is not None:
            getattr(hooks, method)()

    return torch.compiler.disable(hook)  # a compiled step must not trace the measurement
