"""Balancer: when to measure, and the multiplier of every layer in between.

It knows a model and a clock, and neither optimizer nor scheduler, so that any framework can drive
it: call :meth:`Balancer.step` once for each tick of the clock, and read ``multipliers``.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tempbalance.assign import Assignment, Clipped, check_assignment
from tempbalance.assign.maps import LinearMap
from tempbalance.balance import overhead
from tempbalance.balance.background import Job
from tempbalance.balance.checks import (
    check_flags,
    check_layers,
    check_options,
    check_version,
    checked_patterns,
    nothing_to_balance,
)
from tempbalance.balance.messages import BalanceWarning as BalanceWarning
from tempbalance.balance.messages import Messages
from tempbalance.balance.overhead import Interval
from tempbalance.balance.pending import Pending
from tempbalance.balance.ramp import Ramp
from tempbalance.balance.savings import Ages, Savings
from tempbalance.balance.units import Unit, multipliers
from tempbalance.layers.find import Layer, Layers, find_layers
from tempbalance.measure.attempt import Result, attempt
from tempbalance.measure.measurement import DEFAULT_BUDGET, LayerRecord
from tempbalance.measure.method import Method, check_engine
from tempbalance.measure.ranks import found_group, sharded, side_group, world_size
from tempbalance.measure.snapshot import attempt_later
from tempbalance.measure.twins import theory_marks
from tempbalance.spectra.powerlaw import Fit, Hill
from tempbalance.spectra.windows import Farms, Windows

_VERSION = 1
# Seconds of waiting for a measurement in the background that are worth a word.
_LONG = 0.1


class Balancer:
    """Multipliers of the learning rate for the layers of a model, measured now and then.

    Args:
        model: the model, wrapped in whatever way.
        parameters: balance only layers that have one of these parameters, or a function that
            gives them, for those that change; default all.
        windows: which submatrices are measured.
        fit: the power-law fit.
        assign: alphas to multipliers.
        every: ticks between measurements.
        start: the first tick with balancing; before it all multipliers are 1 (for a warm-up).
        stop: the tick from which on multipliers are 1 again, or ``None``.
        skip_first, skip_last: leave out the first or last layer, in definition order among those
            that can be balanced.
        min_eigs: layers with fewer eigenvalues are not balanced and do not vote.
        exclude: patterns of layers to leave alone, by name or type (``("lm_head", "SpectralConv",
            "encoder.*")``): not measured, no vote, base rate.
        unit: what shares one rate: ``"layer"``, ``"block"`` (a numbered module, such as
            ``layer1.0`` or ``h.3``), ``"type"`` (the module's class), or a function from a layer's
            name to that of its unit. A unit votes with the mean alpha of its layers. Without
            effect on assignments that look at no alpha.
        normalize: divide by the mean multiplier over parameters, so that only the spread is left.
        ramp: ticks over which new multipliers are approached, linearly.
        clip: clip alphas to so many robust standard deviations around the median.
        fused: projections that share one weight, by name pattern: ``{"*.qkv": 3}``.
        budget: extra memory of a measurement, in bytes.
        process_group: ranks that share the work. Default: those of a model wrapped in DDP, all of
            them for one with sharded parameters (FSDP2), else none.
        delay: ticks from a measurement to its effect, at most ``every``. With 0 training waits.
            Otherwise the weights are copied, and measured in the background while training goes
            on; the new multipliers hold from exactly ``delay`` ticks later on, when training waits
            if it must. The first measurement has no delay.
        moved: leave out layers that have moved by less than this share of their weight, up to
            scale, since they were measured; such as 0.01.
        max_age: but at most so many times in a row; 10 with ``moved``.
        per_update: measure at most so many layers at once, or (a float) as many as make this
            share of the cost of all, in turn. The first measurement is of all.
        max_overhead: the share of the time that measuring may take; where it takes more, the
            interval grows to a multiple of ``every``. What is measured when then depends on time.

    Raises:
        ValueError: for an option out of range, or if no layer can be balanced.
        TypeError: for an option of another kind, such as a class where an object is due.

    Attributes:
        records: the last record of each layer by name; empty before the first measurement.
        seconds: wall-clock time that measuring held up the training thread, in this process.
        waited: as much of it as was waiting for a measurement in the background.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Iterable[nn.Parameter] | Callable[[], Iterable[nn.Parameter]] | None = None,
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
    ) -> None:
        check_options(every, start, stop, ramp, min_eigs, unit, delay)
        check_engine(windows, fit, budget)
        check_assignment("assign", assign)
        check_flags(skip_first=skip_first, skip_last=skip_last, normalize=normalize)
        self.windows, self.fit = windows, fit
        self.assign = assign if clip is None else Clipped(assign, clip)
        self.every, self.start, self.stop, self.ramp = every, start, stop, ramp
        self.skip_first, self.skip_last = skip_first, skip_last
        self.min_eigs, self.unit, self.normalize = min_eigs, unit, normalize
        self.exclude = checked_patterns(exclude)
        self.fused, self.budget = fused, budget
        self.process_group, self.delay = process_group, delay
        self.savings = Savings(moved, max_age, per_update)
        self.records: dict[str, LayerRecord] = {}
        self.seconds = self.waited = 0.0
        self._model = model
        self._tick = 0
        self._measurements = 0
        self._alphas: dict[str, float | None] = {}
        self._ramp = Ramp(ramp)
        self._messages = Messages()
        # A ParameterList is callable too, as every module.
        function = callable(parameters) and not isinstance(parameters, nn.Module)
        held = parameters if parameters is None or function else list(parameters)  # type: ignore
        self._parameters = held
        self._ages = Ages(self.savings)
        self._interval = Interval(every, max_overhead)
        self._job: Job[Result] | None = None  # the last one, be it dropped
        self._pending: Pending | None = None
        self._side: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None
        self.found: Layers
        self.layers: tuple[Layer, ...]
        self.refresh()
        if not self.layers:
            raise ValueError(
                nothing_to_balance(self.found, min_eigs, skip_first, skip_last, self.exclude)
            )

    def refresh(self) -> None:
        """Look for layers again: the model, or the parameters to balance, have changed."""
        self.found = find_layers(self._model, self.fused)
        held = self._parameters() if callable(self._parameters) else self._parameters
        among = None if held is None else {id(p) for p in held}
        able = [
            layer
            for layer in self.found.layers
            if layer.eigenvalues >= self.min_eigs
            and not self._excluded(layer)
            and (among is None or any(id(p) in among for p in layer.tensors()))
        ]
        for pattern in self.exclude:
            if not any(_matches(pattern, layer) for layer in self.found.layers):
                self._messages.once(f"TempBalance: exclude={pattern!r} matches no layer")
        first = 1 if self.skip_first else 0
        self.layers = tuple(able[first : len(able) - 1 if self.skip_last else len(able)])
        group = self.process_group or found_group(self._model, self.found)
        self._group = group if group is not None and dist.get_world_size(group) > 1 else None
        if group is None and self._interval.limit is not None and (ranks := world_size()) > 1:
            self._messages.once(
                "TempBalance: max_overhead depends on time, and nothing says which of the %d ranks "
                "train one model: each measures when it sees fit, and replicas would drift apart. "
                "Pass the model as DistributedDataParallel wraps it, or process_group",
                ranks,
            )

    def _excluded(self, layer: Layer) -> bool:
        return any(_matches(pattern, layer) for pattern in self.exclude)

    # --- what it knows -------------------------------------------------------------------------

    @property
    def tick(self) -> int:
        """Calls of :meth:`step` so far."""
        return self._tick

    @property
    def measurements(self) -> int:
        """Measurements that have taken effect so far, those before a resume included."""
        return self._measurements

    @property
    def alphas(self) -> dict[str, float | None]:
        """The last alpha of every balanced layer; ``None`` where it could not be measured."""
        return dict(self._alphas)

    @property
    def ages(self) -> dict[str, int]:
        """By layer, how many measurements its alpha is old: 0 if it is of the last one."""
        return dict(self._ages.ages)

    @property
    def pending(self) -> int | None:
        """The tick at which a measurement under way takes effect; ``None`` if there is none."""
        return None if self._pending is None else self._pending.due

    @property
    def interval(self) -> int:
        """Ticks between measurements: ``every``, or more where ``max_overhead`` asks for it."""
        return self._interval.ticks

    @property
    def measured_at(self) -> list[int]:
        """With ``max_overhead``, the ticks of all measurements so far."""
        return list(self._interval.measured)

    @property
    def multipliers(self) -> dict[str, float]:
        """The multiplier of every balanced layer at this tick; all others have 1."""
        return self._ramp.at(self._tick)

    def theory_marks(self) -> tuple[list[str], list[str]]:
        """Over- and under-trained layers; see :func:`tempbalance.measure.twins.theory_marks`."""
        return theory_marks(self._present(), self._alphas, self._method)

    @property
    def sharded(self) -> bool:
        """Whether weights are sharded, so that reading them takes every rank."""
        return sharded(self._present())

    def spectra(self) -> Result:
        """All layers measured now, by this process alone, with their eigenvalues.

        A layer that cannot be measured is left out. Sharded weights need every rank, and raise
        what goes wrong: ranks that went on one by one would wait for each other in vain.
        """
        method = replace(self._method, keep_spectra=True)
        return attempt(self._present(), method, raises=self._group is not None and self.sharded)

    # --- the clock -----------------------------------------------------------------------------

    def begin(self, tick: int = 0) -> None:
        """Before the first step: measure, unless balancing starts later.

        Args:
            tick: the ticks of a run without balancing that this one goes on with.
        """
        if tick:
            self.restart(tick)
        elif self._due():
            with self._working():
                self._measure()

    def step(self) -> None:
        """One tick of the clock: take in what was measured, and measure, if it is time to."""
        self._tick += 1
        due = self._due()
        if due and self._interval.limit is not None:
            self._let_devices_finish()
        with self._working():
            if self.stop is not None and self._tick >= self.stop:
                self.cancel()
                if self._tick == self.stop:
                    self._ramp.aim(dict.fromkeys(self._ramp.target, 1.0), self._tick)
                return
            if self._pending is not None and self._tick >= self._pending.due:
                self._collect(self._pending)
            if due and self._interval.allows(self._tick):
                self._measure()

    def update(self) -> None:
        """Measure all layers now, and take the new multipliers, whatever the options.

        Layers whose weights are frozen are not measured and have multiplier 1. A layer that cannot
        be measured keeps its base rate; a warning names it the first time. Only a failure of the
        process group raises.
        """
        with self._working():
            self._measure(everything=True)

    def restart(self, tick: int) -> None:
        """Forget what was measured, set the clock, and measure if it is time to.

        For weights of a run without balancing: its ticks count for ``start`` and ``stop``.
        """
        self.cancel()
        self._tick, self._measurements = tick, 0
        self._alphas, self.records = {}, {}
        self._ramp.forget(tick)
        self._ages.forget()
        self._interval.forget()
        if tick >= self.start and (self.stop is None or tick < self.stop):
            self.update()

    def cancel(self) -> None:
        """Let go of a measurement under way: it will not take effect."""
        if self._pending is not None:
            self._pending.drop()
        self._pending = None

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        started = overhead.clock()
        self._interval.enter(busy=self._pending is not None and self._pending.running)
        try:
            yield
        finally:
            self._interval.leave()
            self.seconds += overhead.clock() - started

    def _due(self) -> bool:
        """Whether this tick is one of those at which to measure, by the options alone."""
        since = self._tick - self.start
        if since < 0 or since % self.every:
            return False
        if self.stop is not None and self._tick + self._delay() >= self.stop:
            return False
        # Without alphas it costs nothing, and layers that were added or unfrozen get their rate.
        return not (self.assign.once and self.assign.uses_alphas and self._measurements)

    def _delay(self) -> int:
        """Ticks from a measurement that begins now to its effect: none for the first."""
        return self.delay if self.assign.uses_alphas and self._measurements else 0

    # --- measuring -----------------------------------------------------------------------------

    @property
    def _method(self) -> Method:
        return Method(self.windows, self.fit, self.min_eigs, self.budget)

    def _measure(self, everything: bool = False) -> None:
        """Measure, now or in the background."""
        self.cancel()
        self._interval.begins(self._tick)
        layers = self._trainable() if self.assign.uses_alphas else []
        first = everything or not self._measurements
        choice = self._ages.choose(layers, self._alphas, self.windows, self._group, first)
        delay = 0 if everything else self._delay()
        pending = Pending(
            self._tick,
            self._tick + delay,
            [layer.name for layer in choice.chosen],
            choice.kept,
            choice.sketches,
        )
        if not delay:
            self._take(pending, attempt(choice.chosen, self._method, self._group))
            return
        self._pending = pending
        work = attempt_later(choice.chosen, self._method, self._side_group())
        pending.source = self._job = Job(work, after=self._job)

    def _collect(self, pending: Pending) -> None:
        """A measurement from the background takes effect."""
        started = overhead.clock()
        try:
            result = pending.result(raises=self._group is not None)
        except Exception:
            self._pending = None  # raised once
            raise
        waited = overhead.clock() - started
        self.waited += waited
        if waited > _LONG:
            self._messages.once(
                "TempBalance: training waited %.2g s for the measurement of tick %d, which took "
                "longer than the %d ticks of delay; a larger delay hides it",
                *(waited, pending.tick, pending.due - pending.tick),
            )
        if result is None:  # lost with its thread: made good here
            names = set(pending.chosen)
            layers = [layer for layer in self._trainable() if layer.name in names]
            result = attempt(layers, self._method, self._group)
        self._take(pending, result)

    def _take(self, pending: Pending, result: Result) -> None:
        """A measurement takes effect."""
        self._pending = None
        self._messages.report(result)
        new = {record.name: record for record in result.records}
        kept = set(pending.kept)
        records = {name: r for name, r in self.records.items() if name in kept} | new
        names = [layer.name for layer in self.layers]
        self.records = {name: records[name] for name in names if name in records}
        alphas = {name: a for name, a in self._alphas.items() if name in kept}
        alphas |= {name: record.alpha for name, record in new.items()}
        self._alphas = {name: alphas.get(name) for name in names}
        self._ages.took(pending.chosen, pending.kept, pending.sketches)
        self._ramp.aim(self._assigned(), self._tick)
        self._measurements += 1
        near = [tensor for layer in self.layers for tensor in layer.tensors()]
        self._interval.took_effect(self._group, pending.seconds, near)

    def _assigned(self) -> dict[str, float]:
        """The multipliers that the alphas known now make."""
        active = self._trainable()
        return multipliers(
            self.layers, active, self._alphas, self.assign, self.unit, self.normalize
        )

    def _trainable(self) -> list[Layer]:
        return [layer for layer in self._present() if layer.trainable]

    def _present(self) -> tuple[Layer, ...]:
        """The layers, looked for again where a module or a weight is not what it was.

        It may have been exchanged, parametrized, pruned or removed.
        """
        modules = {id(module) for module in self._model.modules()}
        try:
            same = all(id(layer.module) in modules for layer in self.layers)
            for layer in self.layers:
                layer.tensors()
        except (KeyError, AttributeError):
            same = False
        if not same:
            before = [layer.name for layer in self.layers]
            self.refresh()
            self._messages.lost(before, self.found, [layer.name for layer in self.layers])
        return self.layers

    def _side_group(self) -> dist.ProcessGroup | None:
        """The group of the background's exchanges; every rank comes here at the same tick."""
        if self._group is None:
            return None
        if self._side is None or self._side[0] is not self._group:
            self._side = (self._group, side_group(self._group))
        return self._side[1]

    def _let_devices_finish(self) -> None:
        """Work that training has queued is none of a measurement's cost."""
        for device in {p.device for p in self._model.parameters()}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    # --- state -------------------------------------------------------------------------------

    def __getstate__(self) -> object:
        raise TypeError(
            "balancing is bound to its model and cannot be copied or pickled: save state_dict(), "
            "build a new one on the copied model and optimizer, and load the state there"
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain values by layer name; loads with ``weights_only=True``.

        Waits for a measurement that is under way: its results are part of the state. One rank may
        call this alone.
        """
        in_a_group = self._group is not None
        return {
            "version": _VERSION,
            "layers": {layer.name: list(layer.shape) for layer in self.layers},
            "tick": self._tick,
            "measurements": self._measurements,
            "alphas": dict(self._alphas),
            "reported": sorted(self._messages.named),
            "options": self._options,
            "pending": None if self._pending is None else self._pending.plain(in_a_group),
            **self._ramp.state_dict(),
            **self._ages.state_dict(),
            **self._interval.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` left off; measures nothing.

        Raises:
            ValueError: if the state is of other layers, naming what differs. Other options than
                those of the run that saved it (``assign``, ``every``, ...) hold from now on.
        """
        check_version(state, _VERSION)
        check_layers(state["layers"], self.layers)
        self.cancel()
        self._tick = int(state["tick"])
        self._measurements = int(state["measurements"])
        self._alphas = dict(state["alphas"])
        self._messages.named = set(state["reported"])
        pending = state.get("pending")
        self._pending = None if pending is None else Pending.from_plain(pending)
        self._ramp.load_state_dict(state)
        self._ages.load_state_dict(state)
        self._interval.load_state_dict(state)
        self.records = {}
        self._apply_options(state.get("options", self._options))

    @property
    def _options(self) -> dict[str, Any]:
        """The options that make multipliers of alphas, to tell whether a state had others."""
        unit = self.unit if isinstance(self.unit, str) else "function"
        plain = type(self.assign).__repr__ is object.__repr__  # holds an address
        return {
            "assign": type(self.assign).__qualname__ if plain else repr(self.assign),
            "unit": unit,
            "normalize": self.normalize,
            "start": self.start,
            "stop": self.stop,
        }

    def _apply_options(self, saved: Mapping[str, Any]) -> None:
        """Options that are not those of the run that saved the state hold at once."""
        if saved == self._options:
            return
        if self._tick < self.start or (self.stop is not None and self._tick >= self.stop):
            self.cancel()
            self._ramp.aim(dict.fromkeys(self._ramp.target, 1.0), self._tick)
        elif self._measurements:
            known = any(alpha is not None for alpha in self._alphas.values())
            if self.assign.uses_alphas and not known:
                self._measurements = 0  # of a run that needed none: the first is still to come
            self._ramp.aim(self._assigned(), self._tick)


def _matches(pattern: str, layer: Layer) -> bool:
    return any(fnmatch.fnmatchcase(text, pattern) for text in (layer.name, layer.kind))
