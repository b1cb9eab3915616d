"""Tracker: the alphas of a model kept fresh over a run.

It knows a model and a clock, and neither optimizer nor multipliers: call :meth:`Tracker.step` once
for each tick of the clock, and read ``alphas``. Enough to observe a training.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

import torch.distributed as dist
from torch import nn

from tempbalance.balance import select
from tempbalance.balance.background import Job
from tempbalance.balance.messages import Messages
from tempbalance.balance.options import Given, Options, checked, with_options
from tempbalance.balance.pending import Pending
from tempbalance.balance.shared import Shared
from tempbalance.balance.state import VERSION, check_layers, check_version
from tempbalance.layers import Host, Layer, Layers, find_layers
from tempbalance.measure import LayerRecord
from tempbalance.measure.attempt import Result, attempt
from tempbalance.measure.method import Method
from tempbalance.measure.ranks import found_group, sharded, side_group
from tempbalance.measure.snapshot import attempt_later
from tempbalance.measure.twins import below_twins, theory_marks
from tempbalance.spectra.by_layer import checked_windows

# Seconds of waiting for a measurement in the background that are worth a word.
_LONG = 0.1

Parameters = Iterable[nn.Parameter] | Callable[[], Iterable[nn.Parameter]]


@with_options()
class Tracker:
    """Alphas of the layers of a model, measured now and then.

    Args:
        model: the model, wrapped in whatever way.
        parameters: track only layers that have one of these parameters, or a function that gives
            them, for those that change; default all.
        options: see :class:`~tempbalance.balance.options.Options`; of multipliers it makes none.

    Raises:
        ValueError: for an option out of range, or if no layer can be measured.
        TypeError: for an option of another kind, such as a class where an object is due.

    Attributes:
        options: the options, checked.
        found: all layers of the model, and what is none.
        layers: the layers that are measured.
        hosts: what shares a param group: layers with their norms, and modules with a fixed
            multiplier.
        records: the last record of each layer by name; empty before the first measurement.
        seconds: wall-clock time that measuring held up the training thread, in this process.
        waited: as much of it as was waiting for a measurement in the background.
    """

    def __init__(
        self, model: nn.Module, parameters: Parameters | None = None, **options: Unpack[Given]
    ) -> None:
        self.options: Options = checked(type(self), options)
        self.records: dict[str, LayerRecord] = {}
        self.seconds = self.waited = 0.0
        self._model = model
        self._tick = 0
        self._measurements = 0
        self._alphas: dict[str, float | None] = {}
        self._messages = Messages()
        self.shared: Shared | None = None  # set by what balances one optimizer together
        # A ParameterList is callable too, as every module.
        function = callable(parameters) and not isinstance(parameters, nn.Module)
        held = parameters if parameters is None or function else list(parameters)  # type: ignore
        self._parameters = held
        self._job: Job[Result] | None = None  # the last one, be it dropped
        self._pending: Pending | None = None
        self._side: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None
        self.found: Layers
        self.layers: tuple[Layer, ...]
        self.hosts: tuple[Host, ...]
        self.fixed: dict[str, float]
        self.refresh()
        if not self.layers and not self.fixed:
            raise ValueError(select.nothing_to_balance(self.found, self.options))

    def refresh(self) -> None:
        """Look for layers again: the model, or the parameters to balance, have changed."""
        self.found = find_layers(self._model, self.options.fused)
        held = self._parameters() if callable(self._parameters) else self._parameters
        among = None if held is None else {id(p) for p in held}
        fixed = select.fixed_hosts(self._model, self.options)
        self.fixed = {host.name: value for host, value in fixed}
        apart = [host for host, _ in fixed]
        self.layers = select.balanced(self.found, self.options, among, apart)
        windows = checked_windows(self.options.windows, self.layers)
        # The last that names a parameter has it; a layer's own host has its norms too.
        layers = {layer.name for layer in self.found.layers}
        self.hosts = (*self.found.hosts, *(host for host in apart if host.name not in layers))
        for pattern in select.unmatched(self.found, self.options):
            self._messages.once(f"TempBalance: exclude={pattern!r} matches no layer")
        for text in select.idle_windows(self.found, windows):
            self._messages.warn_once(text)
        group = self.options.process_group or found_group(self._model, self.found)
        self._group = group if group is not None and dist.get_world_size(group) > 1 else None

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
        """The last alpha of every layer that is measured; ``None`` where it could not be."""
        return dict(self._alphas)

    @property
    def pending(self) -> int | None:
        """The tick at which a measurement under way takes effect; ``None`` if there is none."""
        return None if self._pending is None else self._pending.due

    @property
    def coverage(self) -> float:
        """Share (0 to 1) of the parameters that train here whose layer is measured."""
        held = self._parameters() if callable(self._parameters) else self._parameters
        all_of = [p for p in self._model.parameters() if p.requires_grad] if held is None else held
        numels = {id(p): p.numel() for p in all_of}
        measured = {id(p) for layer in self.layers for p in layer.tensors()}
        return sum(n for i, n in numels.items() if i in measured) / max(1, sum(numels.values()))

    def theory_marks(self) -> tuple[list[str], list[str]]:
        """Over- and under-trained layers; see :func:`tempbalance.measure.twins.theory_marks`."""
        return theory_marks(self._present(), self._alphas, self._method)

    def below_random(self, names: Collection[str]) -> list[str]:
        """Those of these layers whose alpha lies under that of a random matrix of the shape."""
        layers = [layer for layer in self._present() if layer.name in names]
        return below_twins(layers, self._alphas, self._method)

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
        """Before the first step: measure, unless that starts later.

        Args:
            tick: the ticks of a run without balancing that this one goes on with.
        """
        if tick:
            self.restart(tick)
        elif self._due():
            self.update()

    def step(self) -> None:
        """One tick of the clock: take in what was measured, and measure, if it is time to."""
        self._tick += 1
        with self._timed():
            if self._over(self._tick):
                self.cancel()
                self._ended()
                return
            if self._pending is not None and self._tick >= self._pending.due:
                self._collect(self._pending)
            if self._due():
                self._measure()

    def update(self) -> None:
        """Measure all layers now and at once, whatever the clock says.

        Layers whose weights are frozen are not measured. One that cannot be measured is named in
        a warning the first time. Only a failure of the process group raises.
        """
        with self._timed():
            self._measure(now=True)

    def restart(self, tick: int) -> None:
        """Forget what was measured, set the clock, and measure if it is time to.

        For weights of a run without balancing: its ticks count for ``start`` and ``stop``.
        """
        self.cancel()
        self._tick, self._measurements = tick, 0
        self._alphas, self.records = {}, {}
        if tick >= self.options.start and not self._over(tick):
            self.update()

    def cancel(self) -> None:
        """Let go of a measurement under way: it will not take effect."""
        if self._pending is not None:
            self._pending.drop()
        self._pending = None

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started

    def _over(self, tick: int) -> bool:
        """Whether nothing is measured any more."""
        ends = (self.options.stop, self.options.hold)
        return any(end is not None and tick >= end for end in ends)

    def _due(self) -> bool:
        """Whether this tick is one of those at which to measure."""
        since = self._tick - self.options.start
        if since < 0 or since % self.options.every:
            return False
        return not self._over(self._tick + self._delay())

    def _delay(self) -> int:
        """Ticks from a measurement that begins now to its effect: none for the first."""
        return self.options.delay if self._measurements else 0

    # --- what stands on it overrides -----------------------------------------------------------

    def _chosen(self) -> Sequence[Layer]:
        """The layers that a measurement is of."""
        return self._trainable()

    def _took(self) -> None:
        """A measurement has taken effect."""

    def _ended(self) -> None:
        """A tick at which nothing is measured any more."""

    # --- measuring -----------------------------------------------------------------------------

    @property
    def _method(self) -> Method:
        o = self.options
        return Method(checked_windows(o.windows), o.fit, o.min_eigs, o.budget)

    def _measure(self, now: bool = False) -> None:
        """Measure, on the spot or in the background."""
        self.cancel()
        layers = self._chosen()
        delay = 0 if now else self._delay()
        pending = Pending(self._tick, self._tick + delay, [layer.name for layer in layers])
        if not delay:
            self._take(self._result_now(layers))
            return
        work = attempt_later(layers, self._method, self._side_group())
        pending.source = self._job = Job(work, after=self._job)
        self._pending = pending

    def _result_now(self, layers: Sequence[Layer]) -> Result:
        if self.shared is None:
            return attempt(layers, self._method, self._group)
        return self.shared.result(self, layers, self._method, self._group)

    def _collect(self, pending: Pending) -> None:
        """A measurement from the background takes effect."""
        started = time.perf_counter()
        try:
            result = pending.result(raises=self._group is not None)
        except Exception:
            self._pending = None  # raised once
            raise
        waited = time.perf_counter() - started
        self.waited += waited
        if waited > _LONG:
            self._messages.once(
                "TempBalance: training waited %.2g s for the measurement of tick %d, which took "
                "longer than the %d ticks of delay; a larger delay hides it",
                *(waited, pending.tick, pending.due - pending.tick),
            )
        if result is None:  # lost with its thread: made good here
            names = set(pending.names)
            layers = [layer for layer in self._trainable() if layer.name in names]
            result = attempt(layers, self._method, self._group)
        self._take(result)

    def _take(self, result: Result) -> None:
        """A measurement takes effect."""
        self._pending = None
        self._messages.report(result)
        self.records = {record.name: record for record in result.records}
        self._alphas = {
            layer.name: self.records[layer.name].alpha if layer.name in self.records else None
            for layer in self.layers
        }
        self._measurements += 1
        self._took()

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
            "version": VERSION,
            "layers": {layer.name: list(layer.shape) for layer in self.layers},
            "tick": self._tick,
            "measurements": self._measurements,
            "alphas": dict(self._alphas),
            "reported": sorted(self._messages.named),
            "pending": None if self._pending is None else self._pending.plain(in_a_group),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` left off; measures nothing.

        Raises:
            ValueError: if the state is of other layers, naming what differs, or of another
                release. Other options than those of the run that saved it hold from now on.
        """
        check_version(state)
        check_layers(state["layers"], self.layers)
        self.cancel()
        self._tick = int(state["tick"])
        self._measurements = int(state["measurements"])
        self._alphas = dict(state["alphas"])
        self._messages.named = set(state["reported"])
        pending = state["pending"]
        self._pending = None if pending is None else Pending.from_plain(pending)
        self.records = {}
