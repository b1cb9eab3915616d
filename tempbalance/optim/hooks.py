"""StepHooks: multipliers only while the optimizer steps, for schedules that are not torch's.

Where a framework owns the schedule and the checkpoint, or the training loop writes ``group["lr"]``
by hand, nothing may change between steps. Here the param groups are split only while
``optimizer.step()`` runs, and are the user's own before and after it: schedules, loggers and
checkpoints see no difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Unpack

from torch import nn
from torch.optim import Optimizer

from tempbalance.balance.balancer import Balancer
from tempbalance.balance.messages import TAKEN_OVER, warn
from tempbalance.balance.options import Given, GivenAssign, check_names, with_options
from tempbalance.balance.shared import Shared
from tempbalance.balance.tracker import Parameters
from tempbalance.layers import Host, without_norms
from tempbalance.optim.checks import check_decay, check_flag, check_optimizer, check_parameters
from tempbalance.optim.claims import check_one_decay, claim, release, renounce
from tempbalance.optim.decay import ASSIGN, EVERY, AlphaDecay
from tempbalance.optim.groups import Group, by_parameter, common, mean_multiplier, parameters_of
from tempbalance.optim.parts import Parts
from tempbalance.optim.stepping import Unseen, stepping
from tempbalance.optim.trial import check_split
from tempbalance.optim.weakly import calling
from tempbalance.optim.wrapped import innermost, reads_the_rate


@with_options()
class StepHooks:
    """Learning rates per layer without touching schedule, param groups or checkpoints.

    One line after the optimizer::

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
        tick: optimizer steps that the run has behind it already, where it is resumed and no state
            of these hooks was saved: they count for ``start``, ``stop`` and ``hold``.
        keep_decay: see :class:`~tempbalance.TempBalanceLR`.
        decay: balance weight decay too: the options of a :class:`~tempbalance.AlphaDecay` (``{}``
            for its defaults), in optimizer steps. For decay alone, ``assign=Constant(1.0)``.
        options: see :class:`~tempbalance.balance.options.Options`, in optimizer steps.

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
        tick: int = 0,
        keep_decay: bool = False,
        decay: Given | None = None,
        **options: Unpack[GivenAssign],
    ) -> None:
        check_names(type(self), options)
        around, optimizer = optimizer, innermost(optimizer)
        check_parameters(optimizer, model)
        if (wrapper := reads_the_rate(around)) is not None:
            raise ValueError(
                f"{wrapper} uses the learning rate outside of the inner optimizer's step, where "
                "these hooks cannot put a multiplier on: use tempbalance.TempBalanceLR, which "
                "keeps the rates of the layers in the groups"
            )
        both = keep_decay or decay is not None
        fields = ("lr", "weight_decay") if both else ("lr",)
        check_flag("keep_decay", keep_decay)
        if keep_decay:
            check_one_decay(optimizer, keeps=True)
        check_optimizer(optimizer, fields)
        if not isinstance(tick, int) or tick < 0:
            raise ValueError(f"tick must be the number of steps so far, got {tick!r}")
        self.optimizer = optimizer
        self._keep_decay, self._model = keep_decay, model
        parameters = partial(parameters_of, optimizer)
        self.balancer = Balancer(model, parameters, every=every, **options)
        self.decay = None if decay is None else self._decay_balancer(model, parameters, decay)
        check_split(optimizer, self.balancer.hosts)
        if release(optimizer, fields):
            warn(TAKEN_OVER)
        self._factors: list[Mapping[str, float]] = [{}, {}]  # of rate and decay, in this step
        self._inside = 0  # steps inside of a step: of a subclass that calls its parent's
        self._known = self._ids()
        self._parts = Parts(self._scale, fields)
        self._locate()
        self._handles = [
            optimizer.register_step_pre_hook(calling(self, "_before_step")),
            optimizer.register_step_post_hook(calling(self, "_after_step")),
            # A step that was interrupted must not leave its groups in a checkpoint.
            optimizer.register_state_dict_pre_hook(calling(self, "_restore")),
            optimizer.register_load_state_dict_pre_hook(calling(self, "_restore")),
        ]
        # The optimizer keeps the object alive: its hooks are all that most users need of it.
        for field in fields:
            claim(optimizer, field, lambda: self)
        self._unseen = Unseen(optimizer)
        if begin:
            self.begin(tick)

    def _decay_balancer(self, model: nn.Module, parameters: Parameters, decay: Given) -> Balancer:
        check_names(AlphaDecay, decay)
        check_decay(self.optimizer)
        if self._keep_decay:
            raise ValueError(
                "keep_decay and decay both write the weight decay of every layer: use one of them"
            )
        defaults: Given = {"assign": ASSIGN, "every": EVERY}
        given: Given = {**defaults, **decay}
        found = Balancer(model, parameters, **given)
        self.balancer.shared = found.shared = Shared()
        return found

    @property
    def balancers(self) -> list[Balancer]:
        """Of the rate, and of the decay where there is one."""
        return [self.balancer] if self.decay is None else [self.balancer, self.decay]

    @property
    def alphas(self) -> dict[str, float | None]:
        """The last alpha of every balanced layer; ``None`` where it could not be measured."""
        return self.balancer.alphas

    @property
    def multipliers(self) -> dict[str, float]:
        """The multiplier of every balanced layer; all others have 1, as all have once detached."""
        return self.balancer.multipliers if self._handles else {}

    @property
    def decay_multipliers(self) -> dict[str, float]:
        """The multiplier of every layer's weight decay, with ``decay``."""
        return self.decay.multipliers if self.decay is not None and self._handles else {}

    def begin(self, tick: int = 0) -> None:
        """The first measurement, before any step; nothing if there was one (after a resume).

        Args:
            tick: optimizer steps that the run has behind it.
        """
        for balancer in self.balancers:
            if not balancer.tick and not balancer.measurements:
                balancer.begin(tick)

    def detach(self) -> None:
        """Stop balancing: from here on every layer has its group's rate."""
        self._restore()
        for balancer in self.balancers:
            balancer.cancel()
        for handle in self._handles:
            handle.remove()
        self._unseen.end()
        self._handles = []
        renounce(self.optimizer, self)

    def state_dict(self) -> dict[str, Any]:
        """Plain values by layer name, and what the optimizer counts in each layer's group."""
        return {
            **self.balancer.state_dict(),
            "parts": self._parts.state_dict(),
            "decay": None if self.decay is None else self.decay.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` left off; measures nothing."""
        self.balancer.load_state_dict(state)
        if self.decay is not None and state.get("decay") is not None:
            self.decay.load_state_dict(state["decay"])
        self._parts.load_state_dict(state.get("parts", ()), self.optimizer)

    def _ids(self) -> list[int]:
        return [id(p) for p in parameters_of(self.optimizer)]

    def _locate(self) -> None:
        self._found = [balancer.found for balancer in self.balancers]
        rated: Sequence[Host] = self.balancer.hosts
        decayed = () if self.decay is None else without_norms(self.decay.hosts, self._model)
        self._hosts = by_parameter(rated), by_parameter(decayed)
        self._parts.locate(rated if self.decay is None else common(rated, decayed))

    def _scale(self, part: Group, host: Host | None) -> None:
        if host is None:
            return
        first = id(part["params"][0])
        rate, decay = (
            mean_multiplier(hosts[first].layers if first in hosts else (), multipliers)
            for hosts, multipliers in zip(self._hosts, self._factors, strict=True)
        )
        if rate != 1.0:
            part["lr"] = part["lr"] * rate
            decay = decay / rate if self._keep_decay else decay
        if decay != 1.0:
            part["weight_decay"] = part["weight_decay"] * decay

    def _before_step(self, *_: Any) -> None:
        self._unseen.end()
        if self._parts.open and stepping(self.optimizer) > 1:
            self._inside += 1
            return
        self._inside = 0
        self._restore()  # where the last step raised between the hooks
        if self._known != (known := self._ids()):  # a group was added, or a parameter exchanged
            for balancer in self.balancers:
                balancer.refresh()
            self._known = known
        if any(b.found is not x for b, x in zip(self.balancers, self._found, strict=True)):
            self._locate()
        self._factors = [self.multipliers, self.decay_multipliers]
        self._parts.split(self.optimizer)

    def _after_step(self, *_: Any) -> None:
        if self._inside:
            self._inside -= 1
            return
        self._parts.keep()
        self._restore()
        if self.balancer.shared is not None:
            self.balancer.shared.moment += 1
        for balancer in self.balancers:
            balancer.step()

    def _restore(self, *_: Any) -> None:
        self._parts.restore(self.optimizer)
