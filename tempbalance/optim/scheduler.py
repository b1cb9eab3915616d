"""TempBalanceLR: any learning-rate schedule, times a multiplier for each layer."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from tempbalance.balance.messages import TAKEN_OVER, warn
from tempbalance.balance.options import Given, check_names, with_options
from tempbalance.optim.balanced import Balanced, Clock
from tempbalance.optim.checks import check_flag
from tempbalance.optim.claims import check_one_decay, claims, release
from tempbalance.optim.follow import check_not_forgotten, steps_of
from tempbalance.optim.foreign import Foreign, base_of
from tempbalance.optim.scaled import Value
from tempbalance.optim.schedules import expand_scheduler
from tempbalance.optim.stepping import Stillness
from tempbalance.optim.wrapped import innermost
from tempbalance.words import some

logger = logging.getLogger("tempbalance")


@with_options()
class TempBalanceLR(Balanced, LRScheduler):
    """Learning rates per layer: those of a base schedule, times a multiplier from the spectra.

    Construct it after the optimizer and the base schedule, and step it in the base schedule's
    place. It splits the optimizer's param groups, a group a layer, in place; measures the model at
    once; and from then on keeps, in every group, base rate x multiplier::

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        cosine = CosineAnnealingLR(optimizer, T_max=200)
        scheduler = TempBalanceLR(optimizer, model, cosine)
        for epoch in range(200):
            train(...)
            scheduler.step()

    Args:
        optimizer: any optimizer that takes param groups.
        model: the model whose parameters it holds, wrapped in whatever way.
        base: the schedule to follow, torch's or any object whose ``step`` writes the rates of
            ``optimizer.param_groups`` (timm's schedulers); ``None`` keeps the optimizer's rates.
            Step only this object, no longer the base, with the arguments that the base takes.
            Whatever combines schedules (``SequentialLR``, ``ChainedScheduler``) goes inside.
        clock: ``"step"`` counts calls of :meth:`step`, and measures at construction; ``"manual"``
            leaves both to the caller, through :meth:`begin` and :meth:`tick`, so that the base
            schedule can step every batch and the measurement come once an epoch.
        keep_decay: divide each group's weight decay by its multiplier, so that a step's decay
            (rate x decay) stays what it was and only the gradient's part is scaled.
        options: see :class:`~tempbalance.balance.options.Options`. ``every``, ``start``, ``stop``,
            ``hold``, ``ramp`` and ``delay`` are in calls of :meth:`step`: schedules stepped every
            batch want some hundreds of them as ``every``.

    Raises:
        ValueError: if the optimizer is not this model's, no layer can be measured, an option is
            out of range, or the base schedule cannot serve a group a layer.
        TypeError: if an argument is not what it should be.

    A layer that cannot be measured (NaN, all zero) keeps its base rate and is named once in a
    :class:`~tempbalance.BalanceWarning`; training goes on.

    To resume, build everything as before and load the states of model, optimizer and scheduler,
    the model first. Optimizer and scheduler states of a run without balancing are taken over too;
    the steps of that run count for ``start`` and ``stop``.
    """

    field = "lr"

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        base: Any = None,
        *,
        clock: Clock = "step",
        keep_decay: bool = False,
        **options: Unpack[Given],
    ) -> None:
        check_names(type(self), options)
        optimizer = innermost(optimizer)
        if isinstance(base, TempBalanceLR):
            raise TypeError("base is a TempBalanceLR already: pass the schedule inside it")
        check_flag("keep_decay", keep_decay)
        if keep_decay:
            check_one_decay(optimizer, keeps=True)
        self.base = base_of(optimizer, base)
        check_not_forgotten(optimizer, base)
        # What the user steps may stand around the schedule, and leave steps out (accelerate's).
        self._around = None if isinstance(self.base, Foreign) or base is self.base else base
        self._base_steps = steps_of(self.base)
        self._base_alone = False
        self._stillness: Stillness | None = None
        inverse = ("weight_decay",) if keep_decay else ()
        follow = [self.base] if isinstance(self.base, LRScheduler) else []
        super().__init__(optimizer, model, follow, clock, inverse, options)
        if isinstance(self.base, Foreign):
            self.base.grouping = self.grouping
        if clock == "step":
            self.begin()
            # Without alphas and a schedule a step does nothing.
            self._stillness = Stillness(self.base is not None or not self.balancer.settled)
            weakref.finalize(self, self._stillness.ends)
        self._log_coverage()

    def _take_over(self, fields: Sequence[str]) -> None:
        """End what balances already; refuse a schedule that was built on its rates."""
        found = claims(self.optimizer).get("lr")
        scaled = found is not None and found.scaled is not None and found.scaled.reset_initial()
        if release(self.optimizer, fields):
            warn(TAKEN_OVER)
        if scaled and self.base is not None:
            raise ValueError(
                f"the schedule ({type(self.base).__name__}) was built on rates that another "
                "TempBalanceLR had scaled. The optimizer has its own rates again: build the "
                "schedule anew, then the TempBalanceLR. (To be spared this, call detach() on the "
                "other one first.)"
            )

    # --- what torch's schedulers have ------------------------------------------------------------

    @property
    def last_epoch(self) -> int:  # type: ignore[override]
        """Steps taken, as the base schedule counts them."""
        return self.balancer.tick if self.base is None else steps_of(self.base)

    @last_epoch.setter
    def last_epoch(self, value: int) -> None:
        raise TypeError(
            "TempBalanceLR counts its own steps. Call its step() where the schedule's stood (with "
            "Ignite add_event_handler(event, lambda _: scheduler.step()) in place of "
            "LRScheduler); it goes around other schedules, not into them: pass a SequentialLR (or "
            "whatever combines them) as its base"
        )

    @property
    def base_lrs(self) -> list[Value]:  # type: ignore[override]
        """The initial rates, without multipliers."""
        return list(getattr(self.base, "base_lrs", self._main.base))

    @property
    def _step_count(self) -> int:  # type: ignore[override]
        return getattr(self.base, "_step_count", self.balancer.tick + 1)

    def get_last_lr(self) -> list[Value]:
        """The rates in use, base times multiplier, a value a param group."""
        self._take_in_new_groups()
        return self._main.current()

    def get_base_lr(self) -> list[Value]:
        """The rates of the base schedule, without multipliers, a value a param group."""
        self._take_in_new_groups()
        return list(self._main.base)

    def get_lr(self) -> list[Value]:
        """As :meth:`get_last_lr`: nothing is computed here."""
        return self.get_last_lr()

    @property
    def layer_rates(self) -> dict[str, float]:
        """The learning rate in use of every param group, by the group's name."""
        return self._values()

    def step(  # type: ignore[override]
        self, metrics: Any = None, epoch: int | None = None, **more: Any
    ) -> None:
        """Step the base schedule, measure if it is time to, and write the new rates.

        Args:
            metrics: what ``ReduceLROnPlateau`` watches; other schedules take an epoch here, which
                torch has deprecated.
            epoch: as torch's schedules take it.
            more: what the schedule of another library takes by name.
        """
        if self._stillness is not None:
            self._stillness.stepped()
        self._around_base(lambda: self._step_base(metrics, epoch, more), tick=True)

    def step_update(self, *arguments: Any, **named: Any) -> None:
        """For timm's schedulers: their step of every update, which counts no tick here."""
        base = self.base
        if not isinstance(base, Foreign):
            raise TypeError("step_update is for timm's schedulers; this base has step() alone")
        self._around_base(lambda: base.call("step_update", *arguments, **named), tick=False)

    def _around_base(self, step: Callable[[], None], tick: bool) -> None:
        """Base values in the groups while the base steps, base times multiplier after it."""
        self._take_in_new_groups()
        self._look_after_schedules()
        if self._put_back():
            logger.debug("a value was changed outside of the scheduler; it is kept")
        before = steps_of(self.base)
        try:
            step()
            self._main.take()
            left_out = self._around is not None and steps_of(self.base) == before
            if tick and self.clock == "step" and self._hooks and not left_out:
                self.balancer.step()
        finally:
            self._base_steps = steps_of(self.base)
            self._scale()

    def _step_base(self, metrics: Any, epoch: int | None, more: Mapping[str, Any]) -> None:
        if self.base is None:
            return
        if isinstance(self.base, Foreign):
            if metrics is None and epoch is not None:
                more = {**more, "epoch": epoch}
            given = [] if metrics is None else [metrics] if epoch is None else [metrics, epoch]
            self.base.step(*given, **more)
            return
        if more:
            raise TypeError(f"{self._schedule_name} takes no {some(list(more))} in step()")
        if self._around is not None:
            self._around.step(*([] if metrics is None else [metrics]))
            return
        if isinstance(self.base, ReduceLROnPlateau):
            if metrics is None:
                raise TypeError(
                    "the base is ReduceLROnPlateau: call step(metrics) with what it watches"
                )
            self.base.step(metrics, epoch)
            return
        epoch = metrics if epoch is None else epoch
        self.base.step() if epoch is None else self.base.step(epoch)

    def detach(self) -> None:
        """Stop balancing: base rates back in the groups, hooks removed. The groups stay split.

        :meth:`step` goes on to step the base schedule, with every multiplier 1.
        """
        super().detach()
        if self._stillness is not None:
            self._stillness.stepped()  # or no longer meant to be

    def _before_step(self, *arguments: Any) -> None:
        super()._before_step(*arguments)
        if self._stillness is not None:
            self._stillness.optimized()

    def _look_after_schedules(self) -> None:
        """Say once, and make good, that somebody else has stepped the base schedule."""
        if steps_of(self.base) == self._base_steps:
            return
        self._base_steps = steps_of(self.base)
        if not self._base_alone:
            self._base_alone = True
            warn(
                f"the base schedule ({type(self.base).__name__}) was stepped or loaded by itself. "
                "Step and load the TempBalanceLR alone: it does the same to its base; stepping "
                "both goes through the schedule twice as fast"
            )
        self._put_back()
        self._scale()

    # --- state ---------------------------------------------------------------------------------

    @property
    def _schedule_name(self) -> str:
        return self.base.name if isinstance(self.base, Foreign) else type(self.base).__name__

    def state_dict(self) -> dict[str, Any]:
        """Plain values: the balancer's and the base schedule's state, base rates, group names."""
        return {
            **super().state_dict(),
            "base": None if self.base is None else self.base.state_dict(),
            "schedule": self._schedule_name,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` left off, with the same rates; measures nothing.

        A state of the base schedule alone, of a run without balancing, is taken over: the model,
        which must be loaded already, is then measured.

        Raises:
            ValueError: if the state is of other layers, groups or another base, naming them, or
                is no state of a scheduler.
        """
        if "tempbalance" in state_dict:
            super().load_state_dict(state_dict)
        else:
            self._take_in_new_groups()
            self._adopt(state_dict)

    def _check_schedules(self, state_dict: Mapping[str, Any]) -> None:
        if (state_dict["base"] is None) != (self.base is None):
            has, wants = ("a", "none") if self.base is None else ("no", "one")
            raise ValueError(f"the checkpoint has {has} base schedule; this scheduler has {wants}")
        if state_dict["schedule"] != self._schedule_name:
            raise ValueError(
                f"the base schedule was {state_dict['schedule']} in the run that saved the "
                f"checkpoint and is {self._schedule_name} here; build the same one"
            )

    def _load_schedules(self, state_dict: Mapping[str, Any]) -> None:
        if self.base is not None:
            self.base.load_state_dict(copy.deepcopy(dict(state_dict["base"])))
            self._base_steps = steps_of(self.base)

    def _adopted(self) -> None:
        if self.base is None:  # otherwise its state is still to come
            super()._adopted()

    def _adopt(self, state: Mapping[str, Any]) -> None:
        """A schedule's state of a run without balancing."""
        if not state.keys() & {"last_epoch", "_schedulers", "_last_lr"}:
            keys = some([str(key) for key in state]) or "none"
            raise ValueError(
                f"this is no scheduler's state: its keys are {keys}. Pass what "
                "scheduler.state_dict() gave"
            )
        if self.base is None:
            raise ValueError(
                "the checkpoint holds the state of a schedule, but this scheduler has none: pass "
                "that schedule as base"
            )
        before = len(self.grouping.original)
        rates = state.get("_last_lr")
        if rates is not None and len(rates) != before:
            raise ValueError(
                f"the schedule's state is of {len(rates)} param groups; this optimizer had "
                f"{before} before it was split by layer. Build it with the groups of the run that "
                "saved the state"
            )
        self.base.load_state_dict(copy.deepcopy(dict(state)))
        expand_scheduler(self.base, self.grouping.source, before)
        self._base_steps = steps_of(self.base)
        if rates is not None:
            self._main.load([rates[i] for i in self.grouping.source])
        if self.clock == "step":
            self.balancer.restart(self._base_steps)
        self._scale()
