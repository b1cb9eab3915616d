"""Balanced: param groups split by layer, with base value x multiplier in a field of each.

What :class:`~tempbalance.TempBalanceLR` and :class:`~tempbalance.AlphaDecay` have in common: they
differ in the field, and in the schedules that they step.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

from torch import nn
from torch.optim import Optimizer

from tempbalance.balance.balancer import Balancer
from tempbalance.balance.messages import TAKEN_OVER, warn
from tempbalance.balance.options import Given
from tempbalance.balance.shared import Shared
from tempbalance.layers import Host
from tempbalance.optim.checks import check_clock, check_optimizer, check_parameters
from tempbalance.optim.claims import claim, claims, release, renounce
from tempbalance.optim.group_state import compare_groups, expand_state, is_unsplit, refuse_others
from tempbalance.optim.groups import Grouping, parameters_of
from tempbalance.optim.scaled import Scaled, put_back_all_but
from tempbalance.optim.schedules import check_scheduler, expand_scheduler, extend_scheduler, kept
from tempbalance.optim.trial import check_split
from tempbalance.optim.weakly import calling

logger = logging.getLogger("tempbalance")

VERSION = 2
Clock = Literal["step", "manual"]


class Balanced:
    """Splits an optimizer's groups by layer, measures, and scales fields of them.

    Args:
        optimizer: the innermost one; changed in place, once all else is known to be good.
        model: the model whose parameters it holds.
        schedules: torch schedules of this optimizer, whose lists follow the split.
        clock: ``"step"`` measures at construction; ``"manual"`` leaves it to :meth:`begin`.
        inverse: further fields, which are divided by the multiplier.
        options: see :class:`~tempbalance.balance.options.Options`.
    """

    field: ClassVar[str]
    """The entry of the param groups that is multiplied."""

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        schedules: Sequence[Any],
        clock: Clock,
        inverse: Sequence[str],
        options: Given,
    ) -> None:
        check_clock(clock)
        fields = (self.field, *inverse)
        check_optimizer(optimizer, fields)
        check_parameters(optimizer, model)
        self.optimizer = optimizer
        self.clock = clock
        self.balancer = self._new_balancer(model, optimizer, options)
        check_split(optimizer, self.balancer.hosts)
        self._take_over(fields)  # now that the options are known to be good
        self._schedules = list(schedules)
        self._shared = self.balancer.shared = self._find_shared()
        self.grouping = self._split()
        self._found = self.balancer.found
        self._scaled = {name: Scaled(optimizer, name) for name in fields}
        self._adopting = self._stale_said = False
        self._hooks = [
            optimizer.register_load_state_dict_pre_hook(calling(self, "_before_load")),
            optimizer.register_load_state_dict_post_hook(calling(self, "_after_load")),
            # A checkpoint holds optimizer and scheduler: both must know a new group, or neither.
            optimizer.register_state_dict_pre_hook(calling(self, "_before_save")),
            optimizer.register_step_pre_hook(calling(self, "_before_step")),
        ]
        for name, scaled in self._scaled.items():
            claim(optimizer, name, weakref.ref(self), scaled)

    def _new_balancer(self, model: nn.Module, optimizer: Optimizer, options: Given) -> Balancer:
        return Balancer(model, partial(parameters_of, optimizer), **options)

    def _take_over(self, fields: Sequence[str]) -> None:
        """End what scales these fields already."""
        if release(self.optimizer, fields):
            warn(TAKEN_OVER)

    def _find_shared(self) -> Shared:
        """What is measured for another that balances this optimizer need not be measured twice."""
        return next((other._shared for other in self._others()), Shared())

    def _others(self) -> list[Balanced]:
        """Those that balance other fields of this optimizer."""
        owners: list[Any] = [one.owner() for one in claims(self.optimizer).values()]
        found = [x for x in owners if isinstance(x, Balanced) and x is not self]
        return list({id(x): x for x in found}.values())

    def _hosts(self) -> Sequence[Host]:
        """What has a value of its own."""
        return self.balancer.hosts

    def _split(self) -> Grouping:
        """Groups and schedules split by layer; all as they were where one cannot follow."""
        optimizer, hosts, others = self.optimizer, self._hosts(), self._others()
        for other in others:
            other._take_in_new_groups()
            other._take_in_changes()
        put_back = [kept(schedule, optimizer.param_groups) for schedule in self._schedules]
        try:
            for schedule in self._schedules:
                self._catch_up(schedule)
            before = len(optimizer.param_groups)
            grouping = Grouping(optimizer, hosts)
            for schedule in self._schedules:
                expand_scheduler(schedule, grouping.source, before)
                check_scheduler(schedule, len(optimizer.param_groups))
        except ValueError:
            for undo in put_back:
                undo()
            raise
        self._tell(others, grouping, grouping.source, before)
        return grouping

    def _tell(
        self, others: Sequence[Balanced], own: Grouping, source: Sequence[int], before: int
    ) -> None:
        """Others that know the groups as they were before a split follow it, and say more."""
        for other in others:
            if len(other._main.base) == before:
                if list(source) != list(range(before)):
                    other._refine(source, before, self._schedules)
                own.inherit(other.grouping)

    def _refine(self, source: Sequence[int], before: int, followed: Sequence[Any]) -> None:
        """Another object has split the groups further, with some schedules."""
        for schedule in self._schedules:
            if not any(schedule is one for one in followed):
                expand_scheduler(schedule, source, before)
        self.grouping.refine(source)
        for scaled in self._scaled.values():
            scaled.refine(source)
        self._scale()

    def _catch_up(self, schedule: Any) -> None:
        """A schedule of fewer groups: another object has split them, or some were added."""
        groups = self.optimizer.param_groups
        known = len(getattr(schedule, "base_lrs", groups))
        for one in claims(self.optimizer).values():
            other: Any = one.owner()
            grouping = getattr(other, "grouping", None)
            if grouping is not None and known == len(grouping.original) < len(groups):
                expand_scheduler(schedule, grouping.source, known)
                return
        extend_scheduler(schedule, groups, known)

    # --- what it knows -------------------------------------------------------------------------

    @property
    def alphas(self) -> dict[str, float | None]:
        """The last alpha of every balanced layer; ``None`` where it could not be measured."""
        return self.balancer.alphas

    @property
    def multipliers(self) -> dict[str, float]:
        """The multiplier of every balanced layer; all others have 1, as all have once detached."""
        return self.balancer.multipliers if self._hooks else {}

    @property
    def layer_groups(self) -> dict[str, str]:
        """The name of the first param group of every layer (that of its weight)."""
        self._take_in_new_groups()
        out: dict[str, str] = {}
        for name, layers in zip(self.grouping.names, self.grouping.layers, strict=True):
            for layer in layers:
                out.setdefault(layer, name)
        return out

    def summary(self) -> str:
        """A table of the param groups: alpha, multiplier, value in use, and which norms follow."""
        self._take_in_new_groups()
        values = [float(group[self.field]) for group in self.optimizer.param_groups]
        factors = self.grouping.factors(self.multipliers)
        column = "rate" if self.field == "lr" else "decay"
        return self.grouping.describe(self.alphas, factors, values, column)

    def _values(self) -> dict[str, float]:
        """The value in use of every param group, by the group's name."""
        self._take_in_new_groups()
        return {
            name: float(group[self.field])
            for name, group in zip(self.grouping.names, self.optimizer.param_groups, strict=True)
        }

    # --- the clock -----------------------------------------------------------------------------

    def begin(self, tick: int = 0) -> None:
        """The first measurement, before any step; nothing if there was one (after a resume).

        Args:
            tick: the ticks of a run without balancing that this one goes on with.
        """
        if not self.balancer.tick and not self.balancer.measurements:
            self._put_back()
            self.balancer.begin(tick)
            self._scale()

    def tick(self) -> None:
        """One tick of the balancing clock, with ``clock="manual"``."""
        if not self._hooks:
            return
        self._take_in_new_groups()
        self._put_back()
        try:
            self.balancer.step()
        finally:
            self._scale()

    def detach(self) -> None:
        """Stop balancing: base values back in the groups, hooks removed. The groups stay split."""
        self._take_in_new_groups()
        self._put_back()
        self.balancer.cancel()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._scale()
        renounce(self.optimizer, self)

    # --- base and scaled values ----------------------------------------------------------------

    @property
    def _main(self) -> Scaled:
        return self._scaled[self.field]

    def _put_back(self) -> bool:
        """Base values into the groups; whether somebody else had changed one meanwhile."""
        changed = [scaled.put_back() for scaled in self._scaled.values()]
        return any(changed)

    def _scale(self) -> None:
        if self._found is not self.balancer.found:  # looked for again: names may have changed
            self._found = self.balancer.found
            self.grouping.locate(self._hosts())
        factors = self.grouping.factors(self.multipliers)
        for name, scaled in self._scaled.items():
            own = factors if name == self.field else [1.0 / factor for factor in factors]
            scaled.scale(own, self.grouping.source)
            if not self._hooks:
                scaled.release()

    def _take_in_changes(self) -> None:
        """Values that were written by hand, or by a framework, are base values.

        Where all rates are zero a step changes nothing: torch's distributed checkpoints make one
        so, and put the rates back.
        """
        groups = self.optimizer.param_groups
        if not self._hooks or not any(scaled.changed() for scaled in self._scaled.values()):
            return
        if any(float(group["lr"]) for group in groups):
            self._warn_of_stale()
            self._put_back()
            self._scale()

    def _warn_of_stale(self) -> None:
        """Say so, once, where somebody writes the groups as they were before the split."""
        before, now = len(self.grouping.original), len(self.optimizer.param_groups)
        written = self._main.changed()
        if self._stale_said or before >= now or written != list(range(before)):
            return
        self._stale_said = True
        these = "first param group" if before == 1 else f"first {before} param groups"
        warn(
            f"the {self.field} of the {these} was written, and that of the other {now - before} "
            "was not: this is for the groups before they were split by layer, and most layers "
            "keep the old value. Write to all (for group in optimizer.param_groups: ...), pass "
            "the schedule to TempBalanceLR(optimizer, model, schedule), or use "
            "tempbalance.StepHooks(optimizer, model), which leaves the groups whole"
        )

    def _take_in_new_groups(self) -> None:
        """Groups added since the last step get names, layers and the first group's schedule.

        Groups removed since then are forgotten, by the schedules too.
        """
        groups, left = self.optimizer.param_groups, self.grouping.left()
        if len(left) < len(self._main.base):
            for schedule in self._schedules:
                expand_scheduler(schedule, left, len(self._main.base))
            for scaled in self._scaled.values():
                scaled.forget(left)
            self.grouping.forget(left)
        known = len(left)
        if len(groups) == known:
            return
        for schedule in self._schedules:
            extend_scheduler(schedule, groups, known)
        before = len(groups)
        self.balancer.refresh()
        fresh = {name: [group[name] for group in groups[known:]] for name in self._scaled}
        source = self.grouping.split(self._hosts(), start=known)
        for schedule in self._schedules:
            expand_scheduler(schedule, source, before)
        for name, scaled in self._scaled.items():
            added = [fresh[name][i - known] for i in source if i >= known]
            scaled.grow(added, self.grouping.source)
        self._tell(self._others(), self.grouping, source, before)
        self._found = self.balancer.found

    # --- the optimizer's hooks -----------------------------------------------------------------

    def _before_step(self, *_: Any) -> None:
        self._shared.moment += 1
        if len(self.optimizer.param_groups) != len(self._main.base):
            self._take_in_new_groups()
        self._look_after_schedules()
        self._take_in_changes()

    def _look_after_schedules(self) -> None:
        """Before every step of the optimizer."""

    def _before_save(self, *_: Any) -> None:
        self._take_in_new_groups()
        self._take_in_changes()

    def _before_load(self, _: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
        self._take_in_new_groups()
        if not is_unsplit(self.grouping, state):
            refuse_others(self.grouping, state)
            # Split for another object alone: this one's multipliers are of other weights.
            self._adopting = not any(self._main.key in g for g in state["param_groups"])
            return None
        self._adopting = True
        return expand_state(self.grouping, state)

    def _after_load(self, *_: Any) -> None:
        adopting, self._adopting = self._adopting, False
        put_back_all_but(self.optimizer, claims(self.optimizer))
        for scaled in self._scaled.values():
            scaled.loaded()
        if adopting:
            self._adopted()
        self._scale()

    def _adopted(self) -> None:
        """An optimizer's state of a run without balancing was loaded."""
        if self.clock == "step":
            self.balancer.restart(self.balancer.tick)

    # --- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain values: the balancer's state, base values, group names."""
        self._take_in_new_groups()
        self._take_in_changes()
        return {
            "tempbalance": VERSION,
            "field": self.field,
            "balancer": self.balancer.state_dict(),
            "bases": {name: scaled.copied() for name, scaled in self._scaled.items()},
            "groups": self.grouping.names,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` left off; measures nothing.

        Raises:
            ValueError: if the state is of other layers, groups or another kind, naming them.
        """
        self._take_in_new_groups()
        if state_dict.get("tempbalance") != VERSION:
            raise ValueError(
                f"this state has version {state_dict.get('tempbalance')!r}; this release of "
                f"tempbalance reads version {VERSION}. Go on with the release that saved it, or "
                "load the states of model, optimizer and schedule alone: the model is then "
                "measured anew"
            )
        if state_dict["field"] != self.field:
            raise ValueError(
                f"this is the state of what balances {state_dict['field']!r}; a "
                f"{type(self).__name__} balances {self.field!r}"
            )
        self._check_schedules(state_dict)
        compare_groups(state_dict["groups"], self.grouping.names)
        self.balancer.load_state_dict(state_dict["balancer"])
        self._load_schedules(state_dict)
        for name, scaled in self._scaled.items():
            if name in state_dict["bases"]:  # else an option of this run alone
                scaled.load(state_dict["bases"][name])
        self._scale()

    def _check_schedules(self, state_dict: Mapping[str, Any]) -> None:
        """Refuse the state of another schedule, before anything is touched."""

    def _load_schedules(self, state_dict: Mapping[str, Any]) -> None:
        """What is stepped here takes its own state."""

    def _log_coverage(self) -> None:
        logger.info(
            "TempBalance: %d layers in %d param groups, %.1f%% of the parameters",
            len(self.balancer.layers),
            len(self.optimizer.param_groups),
            100 * self.balancer.coverage,
        )
