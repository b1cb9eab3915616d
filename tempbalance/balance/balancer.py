"""Balancer: from the alphas of a tracker to the multiplier of every layer at every tick.

It knows neither optimizer nor scheduler, so that any framework can drive it: call
:meth:`Balancer.step` once for each tick of the clock, and read ``multipliers``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from torch import nn

from tempbalance.balance.messages import warn
from tempbalance.balance.options import Given, with_options
from tempbalance.balance.ramp import Ramp
from tempbalance.balance.tracker import Parameters, Tracker
from tempbalance.balance.units import multipliers, unit_of
from tempbalance.layers import Layer

# Where less than this share of what trains is measured, balancing is worth a warning.
_HALF = 0.5


@with_options()
class Balancer(Tracker):
    """Multipliers for the layers of a model, measured now and then.

    Args:
        model: the model, wrapped in whatever way.
        parameters: balance only layers that have one of these parameters, or a function that
            gives them, for those that change; default all.
        options: see :class:`~tempbalance.balance.options.Options`.

    Raises:
        ValueError: for an option out of range, or if no layer can be balanced.
        TypeError: for an option of another kind, such as a class where an object is due.

    Attributes:
        records: the last record of each layer by name; empty before the first measurement.
        seconds: wall-clock time that measuring held up the training thread, in this process.
        waited: as much of it as was waiting for a measurement in the background.

    Layers whose weights are frozen are not measured and have multiplier 1. A layer that cannot be
    measured keeps its base rate; a warning names it the first time.
    """

    def __init__(
        self, model: nn.Module, parameters: Parameters | None = None, **options: Unpack[Given]
    ) -> None:
        super().__init__(model, parameters, **options)
        self._ramp = Ramp(self.options.ramp)
        self._warn_of_little()

    @property
    def multipliers(self) -> dict[str, float]:
        """The multiplier of every balanced layer at this tick; all others have 1."""
        hold = self.options.hold
        return self._ramp.at(self._tick if hold is None else min(self._tick, hold))

    @property
    def settled(self) -> bool:
        """Whether the first multipliers are the last ones: no clock counts."""
        o = self.options
        return bool(o.assign.once or not self.layers) and not (o.start or o.stop or o.ramp)

    def restart(self, tick: int) -> None:
        self._ramp.forget(tick)
        super().restart(tick)

    # --- what the tracker asks -----------------------------------------------------------------

    def _due(self) -> bool:
        # Without alphas it costs nothing, and layers that were added or unfrozen get their rate.
        assign = self.options.assign
        settled = assign.once and assign.uses_alphas and self._measurements
        return super()._due() and not settled

    def _delay(self) -> int:
        return super()._delay() if self.options.assign.uses_alphas else 0

    def _chosen(self) -> Sequence[Layer]:
        return super()._chosen() if self.options.assign.uses_alphas else []

    def _took(self) -> None:
        self._ramp.aim(self._assigned(), self._tick)

    def _ended(self) -> None:
        if self._tick == self.options.stop:
            self._ramp.aim(dict.fromkeys(self._ramp.target, 1.0), self._tick)

    def _assigned(self) -> dict[str, float]:
        """The multipliers that the alphas known now make."""
        o = self.options
        active = self._trainable()
        known = multipliers(
            self.layers, active, self._alphas, o.assign, o.unit, o.normalize, self._method
        )
        return {**known, **self.fixed}

    def _warn_of_little(self) -> None:
        """Say so where balancing can do nothing, or little."""
        o = self.options
        if not o.assign.uses_alphas:
            return
        voters = {unit_of(layer, o.unit, o.assign) for layer in self.layers}
        if len(voters) == 1 and not self.fixed:
            warn(
                f"one layer is left to balance ({self.layers[0].name!r}): alphas are compared with "
                "each other, so its multiplier will always be 1. Lower min_eigs, exclude less, "
                "choose a smaller unit, or register readers for the other weights "
                "(tempbalance.readers.register)"
            )
        elif voters and (coverage := self.coverage) < _HALF:
            left = max(self.found.skipped, key=lambda s: s.numel, default=None)
            why = f" The largest part that is not: {left.name}, {left.reason}." if left else ""
            warn(
                f"{len(self.layers)} layers with {coverage:.0%} of the parameters are balanced; "
                f"the others keep the base rate.{why} tempbalance.analyze(model) lists every "
                "parameter with the reason; readers for other weights are registered with "
                "tempbalance.readers.register"
            )

    # --- state -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "ramp": self._ramp.state_dict(),
            "options": self._options_that_count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._ramp.load_state_dict(state["ramp"])
        if state["options"] != self._options_that_count:
            self._apply_options()

    @property
    def _options_that_count(self) -> dict[str, Any]:
        """The options that make multipliers of alphas, to tell whether a state had others."""
        o = self.options
        plain = type(o.assign).__repr__ is object.__repr__  # holds an address
        return {
            "assign": type(o.assign).__qualname__ if plain else repr(o.assign),
            "unit": o.unit if isinstance(o.unit, str) else "function",
            "normalize": o.normalize,
            "fixed": dict(self.fixed),
            "start": o.start,
            "stop": o.stop,
        }

    def _apply_options(self) -> None:
        """Options that are not those of the run that saved the state hold at once."""
        o = self.options
        if self._tick < o.start or (o.stop is not None and self._tick >= o.stop):
            self.cancel()
            self._ramp.aim(dict.fromkeys(self._ramp.target, 1.0), self._tick)
        elif self._measurements:
            known = any(alpha is not None for alpha in self._alphas.values())
            if o.assign.uses_alphas and not known:
                self._measurements = 0  # of a run that needed none: the first is still to come
            self._ramp.aim(self._assigned(), self._tick)
