"""TempBalanceLR: any learning-rate schedule, times a multiplier for each layer."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from tempbalance.assign import Assignment
from tempbalance.assign.maps import LinearMap
from tempbalance.balance.balancer import Balancer
from tempbalance.balance.messages import TAKEN_OVER, warn
from tempbalance.balance.units import Unit
from tempbalance.measure.measurement import DEFAULT_BUDGET
from tempbalance.optim.claims import claim, claimed, release, renounce
from tempbalance.optim.groups import (
    Grouping,
    check_optimizer,
    compare_groups,
    innermost,
    parameters_of,
)
from tempbalance.optim.scaled import Rate, Rates
from tempbalance.optim.schedules import check_scheduler, expand_scheduler, extend_scheduler, kept
from tempbalance.spectra.powerlaw import Fit, Hill
from tempbalance.spectra.windows import Farms, Windows
from tempbalance.words import some

logger = logging.getLogger("tempbalance")

_VERSION = 1


class TempBalanceLR(LRScheduler):
    """Learning rates per layer: those of a base schedule, times a multiplier from the spectra.

    Construct it after the optimizer and the base schedule, and step it in the base schedule's
    place. It splits the optimizer's param groups, a group a layer, in place; measures the model at
    once; and from then on keeps, in every group, base rate x multiplier.

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        cosine = CosineAnnealingLR(optimizer, T_max=200)
        scheduler = TempBalanceLR(optimizer, model, cosine)
        for epoch in range(200):
            train(...)
            scheduler.step()

    Args:
        optimizer: any optimizer that takes param groups.
        model: the model whose parameters it holds, wrapped in whatever way.
        base: the schedule to follow; ``None`` keeps the optimizer's rates. Step only this object,
            no longer the base (with the metric, for ``ReduceLROnPlateau``). Whatever combines
            schedules (``SequentialLR``, ``ChainedScheduler``) goes inside.
        windows, fit, assign: the method; see the classes.
        every: calls of :meth:`step` between measurements. Schedules stepped every batch want some
            hundreds of them.
        start, stop: calls of :meth:`step` between which layers are balanced; outside of them the
            base schedule alone holds. ``start`` leaves a warm-up in peace.
        skip_first, skip_last: leave out the first or the last layer.
        min_eigs: layers with fewer eigenvalues are not balanced and do not vote.
        exclude: patterns of layers to leave alone, by name or type.
        unit, normalize, ramp, clip, fused: see :class:`~tempbalance.Balancer`.
        budget: extra memory of a measurement, in bytes.
        process_group: ranks that share the measurement; found by itself for DDP and FSDP2.
        delay: calls of :meth:`step` from a measurement, made in the background, to its effect.
        moved, max_age, per_update, max_overhead: measure less; see
            :class:`~tempbalance.Balancer`.
        clock: ``"step"`` counts calls of :meth:`step`, and measures at construction; ``"manual"``
            leaves both to the caller, through :meth:`begin` and :meth:`tick`, so that the base
            schedule can step every batch and the measurement come once an epoch.

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

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        base: LRScheduler | None = None,
        *,
        windows: Windows = Farms(),
        fit: Fit = Hill(),
        assign: Assignment = LinearMap(),
        every: int = 1,
        start: int = 0,
        stop: int | None = None,
        skip_first: bool = False,
        skip_last: bool = False,
        min_eigs: int = 10,
        exclude: Iterable[str] = (),
        unit: Unit = "layer",
        normalize: bool = False,
        ramp: int = 0,
        clip: float | None = None,
        fused: Mapping[str, int | tuple[int, ...]] | None = None,
        budget: int = DEFAULT_BUDGET,
        process_group: dist.ProcessGroup | None = None,
        delay: int = 0,
        moved: float | None = None,
        max_age: int | None = None,
        per_update: int | float | None = None,
        max_overhead: float | None = None,
        clock: Literal["step", "manual"] = "step",
    ) -> None:
        optimizer = innermost(optimizer)
        _check_arguments(optimizer, model, base, clock)
        check_optimizer(optimizer)
        self.optimizer = optimizer
        self.base = base
        _check_parameters(optimizer, model)
        self.balancer = Balancer(
            model,
            partial(parameters_of, optimizer),
            windows=windows,
            fit=fit,
            assign=assign,
            every=every,
            start=start,
            stop=stop,
            skip_first=skip_first,
            skip_last=skip_last,
            min_eigs=min_eigs,
            exclude=exclude,
            unit=unit,
            normalize=normalize,
            ramp=ramp,
            clip=clip,
            fused=fused,
            budget=budget,
            process_group=process_group,
            delay=delay,
            moved=moved,
            max_age=max_age,
            per_update=per_update,
            max_overhead=max_overhead,
        )
        _take_over(optimizer, base)  # now that the options are known to be good
        self._model = model
        self.grouping = _split(optimizer, model, self.balancer, base)
        self._found = self.balancer.found
        self._rates = Rates(optimizer)
        self._adopting = False
        self._hooks = [
            optimizer.register_load_state_dict_pre_hook(_before_load(weakref.ref(self))),
            optimizer.register_load_state_dict_post_hook(_after_load(weakref.ref(self))),
            # A checkpoint holds optimizer and scheduler: both must know a new group, or neither.
            optimizer.register_state_dict_pre_hook(_before_save(weakref.ref(self))),
            optimizer.register_step_pre_hook(_before_step(weakref.ref(self))),
        ]
        claim(optimizer, weakref.ref(self), self._rates)
        self._base_steps = _steps_of(base)
        self._base_alone = False
        self.clock = clock
        if clock == "step":
            self.begin()
        self._log_coverage()

    # --- what torch's schedulers have ------------------------------------------------------------

    @property
    def last_epoch(self) -> int:  # type: ignore[override]
        """Steps taken, as the base schedule counts them."""
        return self.balancer.tick if self.base is None else _steps_of(self.base)

    @last_epoch.setter
    def last_epoch(self, value: int) -> None:
        raise TypeError(
            "TempBalanceLR goes around other schedules, not into them: pass the SequentialLR (or "
            "whatever combines them) as its base"
        )

    @property
    def base_lrs(self) -> list[Rate]:  # type: ignore[override]
        """The initial rates, without multipliers."""
        return list(getattr(self.base, "base_lrs", self._rates.base))

    @property
    def _step_count(self) -> int:  # type: ignore[override]
        return getattr(self.base, "_step_count", self.balancer.tick + 1)

    def get_last_lr(self) -> list[Rate]:
        """The rates in use, base times multiplier, a value a param group."""
        self._take_in_new_groups()
        return self._rates.current()

    def get_base_lr(self) -> list[Rate]:
        """The rates of the base schedule, without multipliers, a value a param group."""
        self._take_in_new_groups()
        return list(self._rates.base)

    def get_lr(self) -> list[Rate]:
        """As :meth:`get_last_lr`: nothing is computed here."""
        return self.get_last_lr()

    def step(  # type: ignore[override]
        self, metrics: Any = None, epoch: int | None = None
    ) -> None:
        """Step the base schedule, measure if it is time to, and write the new rates.

        Args:
            metrics: what ``ReduceLROnPlateau`` watches; other schedules take an epoch here, which
                torch has deprecated.
            epoch: as torch's schedules take it.
        """
        self._take_in_new_groups()
        self._look_after_base()
        if self._rates.put_back():
            logger.debug("a learning rate was changed outside of the scheduler; it is kept")
        try:
            self._step_base(metrics, epoch)
            self._rates.take()
            if self.clock == "step" and self._hooks:
                self.balancer.step()
        finally:
            self._base_steps = _steps_of(self.base)
            self._scale()

    def begin(self, tick: int = 0) -> None:
        """The first measurement, before any step; nothing if there was one (after a resume).

        Args:
            tick: the ticks of a run without balancing that this one goes on with.
        """
        if not self.balancer.tick and not self.balancer.measurements:
            self._rates.put_back()
            self.balancer.begin(tick)
            self._scale()

    def tick(self) -> None:
        """One tick of the balancing clock, with ``clock="manual"``."""
        if not self._hooks:
            return
        self._take_in_new_groups()
        self._rates.put_back()
        try:
            self.balancer.step()
        finally:
            self._scale()

    def _step_base(self, metrics: Any, epoch: int | None) -> None:
        if self.base is None:
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

    # --- what is its own -----------------------------------------------------------------------

    @property
    def alphas(self) -> dict[str, float | None]:
        """The last alpha of every balanced layer; ``None`` where it could not be measured."""
        return self.balancer.alphas

    @property
    def multipliers(self) -> dict[str, float]:
        """The multiplier of every balanced layer; all others have 1, as all have once detached."""
        return self.balancer.multipliers if self._hooks else {}

    @property
    def layer_rates(self) -> dict[str, float]:
        """The learning rate in use of every param group, by the group's name."""
        self._take_in_new_groups()
        return {
            name: float(group["lr"])
            for name, group in zip(self.grouping.names, self.optimizer.param_groups, strict=True)
        }

    def summary(self) -> str:
        """A table of the param groups: alpha, multiplier, rate, and which norms follow.

        Where measurements leave layers out, also the age of each alpha, in measurements.
        """
        rates = [float(rate) for rate in self.get_last_lr()]
        factors = self.grouping.factors(self.multipliers)
        ages = self.balancer.ages if self.balancer.savings else None
        return self.grouping.describe(self.alphas, factors, rates, ages)

    @property
    def layer_groups(self) -> dict[str, str]:
        """The name of the first param group of every layer (that of its weight)."""
        self._take_in_new_groups()
        out: dict[str, str] = {}
        for name, layers in zip(self.grouping.names, self.grouping.layers, strict=True):
            for layer in layers:
                out.setdefault(layer, name)
        return out

    def detach(self) -> None:
        """Stop balancing: base rates back in the groups, hooks removed. The groups stay split.

        :meth:`step` goes on to step the base schedule, with every multiplier 1.
        """
        self._take_in_new_groups()
        self._rates.put_back()
        self.balancer.cancel()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._scale()
        renounce(self.optimizer, self)

    def _scale(self) -> None:
        if self._found is not self.balancer.found:  # looked for again: names may have changed
            self._found = self.balancer.found
            self.grouping.locate(self._model, self._found)
        self._rates.scale(self.grouping.factors(self.multipliers), self.grouping.source)
        if not self._hooks:
            self._rates.release()

    def _take_in_changes(self) -> None:
        """Rates that were written by hand, or by a framework, are base rates.

        Where all are zero a step changes nothing: torch's distributed checkpoints make one so, and
        put the rates back.
        """
        groups = self.optimizer.param_groups
        if self._hooks and self._rates.changed() and any(float(g["lr"]) for g in groups):
            self._rates.put_back()
            self._scale()

    def _look_after_base(self) -> None:
        """Say once, and make good, that somebody else has stepped the base schedule."""
        if _steps_of(self.base) == self._base_steps:
            return
        self._base_steps = _steps_of(self.base)
        if not self._base_alone:
            self._base_alone = True
            warn(
                f"the base schedule ({type(self.base).__name__}) was stepped or loaded by itself. "
                "Step and load the TempBalanceLR alone: it does the same to its base; stepping "
                "both goes through the schedule twice as fast"
            )
        self._rates.put_back()
        self._scale()

    def _take_in_new_groups(self) -> None:
        """Groups added since the last step get names, layers and the first group's schedule.

        Groups removed since then are forgotten, by the base schedule too.
        """
        groups, left = self.optimizer.param_groups, self.grouping.left()
        if len(left) < len(self._rates.base):
            if self.base is not None:
                expand_scheduler(self.base, left, len(self._rates.base))
            self._rates.forget(left)
            self.grouping.forget(left)
        known = len(left)
        if len(groups) == known:
            return
        if self.base is not None:
            extend_scheduler(self.base, groups, known)
        before = len(groups)
        self.balancer.refresh()
        fresh = [group["lr"] for group in groups[known:]]
        source = self.grouping.split(self._model, self.balancer.found, start=known)
        if self.base is not None:
            expand_scheduler(self.base, source, before)
        added = [fresh[i - known] for i in source if i >= known]
        self._rates.grow(added, self.grouping.source)
        self._found = self.balancer.found

    def _log_coverage(self) -> None:
        found = self.balancer.found
        share = sum(layer.numel for layer in self.balancer.layers) / max(1, found.numel)
        logger.info(
            "TempBalance: %d layers in %d param groups, %.1f%% of %d parameters",
            len(self.balancer.layers),
            len(self.optimizer.param_groups),
            100 * share,
            found.numel,
        )

    # --- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain values: the balancer's and the base schedule's state, base rates, group names."""
        self._take_in_new_groups()
        self._take_in_changes()
        return {
            "tempbalance": _VERSION,
            "base": None if self.base is None else self.base.state_dict(),
            "balancer": self.balancer.state_dict(),
            "schedule": type(self.base).__name__,
            "rates": self._rates.copied(),
            "groups": self.grouping.names,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` left off, with the same rates; measures nothing.

        A state of the base schedule alone, of a run without balancing, is taken over: the model,
        which must be loaded already, is then measured.

        Raises:
            ValueError: if the state is of other layers, groups or another base, naming them, or
                is no state of a scheduler.
        """
        self._take_in_new_groups()
        if "tempbalance" not in state_dict:
            self._adopt(state_dict)
            return
        if state_dict["tempbalance"] != _VERSION:
            raise ValueError(
                f"this scheduler state has version {state_dict['tempbalance']!r}; this release of "
                f"tempbalance reads version {_VERSION}"
            )
        if (state_dict["base"] is None) != (self.base is None):
            has, wants = ("a", "none") if self.base is None else ("no", "one")
            raise ValueError(f"the checkpoint has {has} base schedule; this scheduler has {wants}")
        if state_dict["schedule"] != type(self.base).__name__:
            raise ValueError(
                f"the base schedule was {state_dict['schedule']} in the run that saved the "
                f"checkpoint and is {type(self.base).__name__} here; build the same one"
            )
        compare_groups(state_dict["groups"], self.grouping.names)
        self.balancer.load_state_dict(state_dict["balancer"])
        if self.base is not None:
            self.base.load_state_dict(copy.deepcopy(dict(state_dict["base"])))
            self._base_steps = _steps_of(self.base)
        self._rates.load(state_dict["rates"])
        self._scale()

    def _adopt(self, state: Mapping[str, Any]) -> None:
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
        self._base_steps = _steps_of(self.base)
        if rates is not None:
            self._rates.load([rates[i] for i in self.grouping.source])
        if self.clock == "step":
            self.balancer.restart(self._base_steps)
        self._scale()


def _check_arguments(optimizer: Any, model: Any, base: Any, clock: Any) -> None:
    if clock not in ("step", "manual"):
        raise ValueError(f"clock must be 'step' or 'manual', got {clock!r}")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch Optimizer, got {type(optimizer).__name__}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if base is None:
        return
    if isinstance(base, TempBalanceLR):
        raise TypeError("base is a TempBalanceLR already: pass the schedule inside it")
    if not isinstance(base, LRScheduler):
        raise TypeError(
            f"base must be a torch LRScheduler or None, got {type(base).__name__}; for schedules "
            "of other libraries use tempbalance.StepHooks"
        )
    if innermost(getattr(base, "optimizer", optimizer)) is not optimizer:
        raise ValueError("base is the schedule of another optimizer: build it on this one")


def _take_over(optimizer: Optimizer, base: LRScheduler | None) -> None:
    """End what balances an optimizer already; refuse a schedule that was built on its rates."""
    found = claimed(optimizer)
    scaled = found is not None and found.rates is not None and found.rates.reset_initial()
    if release(optimizer) is not None:
        warn(TAKEN_OVER)
    if scaled and base is not None:
        raise ValueError(
            f"the schedule ({type(base).__name__}) was built on rates that another TempBalanceLR "
            "had scaled. The optimizer has its own rates again: build the schedule anew, then the "
            "TempBalanceLR. (To be spared this, call detach() on the other one first.)"
        )


def _split(
    optimizer: Optimizer, model: nn.Module, balancer: Balancer, base: LRScheduler | None
) -> Grouping:
    """Groups and schedule split by layer; both as they were where the schedule cannot follow."""
    if base is None:
        return Grouping(optimizer, model, balancer.found)
    put_back = kept(base, optimizer.param_groups)
    before = len(optimizer.param_groups)
    try:
        # Groups may have been added since it was built.
        known = len(getattr(base, "base_lrs", optimizer.param_groups))
        extend_scheduler(base, optimizer.param_groups, known)
        grouping = Grouping(optimizer, model, balancer.found)
        expand_scheduler(base, grouping.source, before)
        check_scheduler(base, len(optimizer.param_groups))
    except ValueError:
        put_back()
        raise
    return grouping


def _check_parameters(optimizer: Optimizer, model: nn.Module) -> None:
    """Refuse an optimizer that holds none of the model's parameters."""
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for p in parameters_of(optimizer)):
        raise ValueError(
            "the optimizer holds none of this model's parameters: build the optimizer from this "
            "model (after moving, wrapping or sharding it), and pass both"
        )


def _steps_of(base: Any) -> int:
    """Steps that a schedule has taken; of a ChainedScheduler, its first one has."""
    while not hasattr(base, "last_epoch") and getattr(base, "_schedulers", None):
        base = base._schedulers[0]
    return getattr(base, "last_epoch", 0)


def _before_step(owner: weakref.ref[TempBalanceLR]) -> Any:
    def hook(*_: Any) -> None:
        scheduler = owner()
        if scheduler is None:
            return
        if len(scheduler.optimizer.param_groups) != len(scheduler._rates.base):
            scheduler._take_in_new_groups()
        scheduler._look_after_base()
        scheduler._take_in_changes()

    return torch.compiler.disable(hook)


def _before_save(owner: weakref.ref[TempBalanceLR]) -> Any:
    def hook(*_: Any) -> None:
        scheduler = owner()
        if scheduler is not None:
            scheduler._take_in_new_groups()
            scheduler._take_in_changes()

    return hook


def _before_load(owner: weakref.ref[TempBalanceLR]) -> Any:
    def hook(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
        scheduler = owner()
        if scheduler is None:
            return None
        scheduler._take_in_new_groups()
        if not scheduler.grouping.is_unsplit(state):
            scheduler.grouping.check(state)
            return None
        scheduler._adopting = True
        return scheduler.grouping.expand(state)

    return hook


def _after_load(owner: weakref.ref[TempBalanceLR]) -> Any:
    def hook(optimizer: Optimizer) -> None:
        scheduler = owner()
        if scheduler is None:
            return
        adopting, scheduler._adopting = scheduler._adopting, False
        scheduler._rates.loaded()
        if adopting and scheduler.base is None and scheduler.clock == "step":  # no state will come
            scheduler.balancer.restart(scheduler.balancer.tick)
        scheduler._scale()

    return hook
