"""Traps of a training, at each measurement: what loggers get, and what is worth a warning."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from tempbalance.analysis.traps import Traps
from tempbalance.analysis.watch import TrapWatch
from tempbalance.balance.tracker import Tracker
from tempbalance.words import some

logger = logging.getLogger("tempbalance")


class TrapLog:
    """The traps of one fit.

    Args:
        on: whether to look at all; where not, nothing here does anything.
    """

    def __init__(self, on: bool) -> None:
        self.on = on
        self.start()

    def start(self) -> None:
        """Forget the fit before."""
        self._watch = TrapWatch()
        self._found: dict[str, Traps] = {}
        self._named: set[str] = set()

    def look(self, trackers: Sequence[Tracker], quiet: bool) -> None:
        """Look at the layers whose alpha is known, and warn of those whose traps begin to rise.

        Sharded weights need every rank.

        Args:
            quiet: do not warn: another rank does.
        """
        if not self.on:
            return
        layers = [
            layer
            for tracker in trackers
            for layer in tracker.layers
            if layer.trainable and tracker.alphas.get(layer.name) is not None
        ]
        self._found = self._watch.look(layers)
        new = [name for name in self._watch.rising() if name not in self._named]
        self._named.update(new)
        if new and not quiet:
            under = [name for t in trackers for name in t.below_random(new)]
            also = f". Alpha is below that of a random matrix of the shape in {some(under)}"
            logger.warning("TempBalance: %s%s", self._watch.message(new), also if under else "")

    def figures(self, by_layer: bool) -> dict[str, float]:
        """Of the last look: the most traps and units of a layer, or those of every layer."""
        counts = {n: float(t.traps) for n, t in self._found.items() if t.traps is not None}
        units = {n: t.trap_units for n, t in self._found.items() if t.trap_units is not None}
        out: dict[str, float] = {}
        for kind, values in (("traps", counts), ("trap_units", units)):
            if values:
                out[f"{kind}/max"] = max(values.values())
            if by_layer:
                out |= {f"{kind}/{name}": value for name, value in values.items()}
        return out

    def state_dict(self) -> dict[str, Any]:
        """Plain values: the last looks, and the layers that were named."""
        return {"seen": self._watch.state_dict(), "named": sorted(self._named)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` left off; of a run that did not look, begin."""
        self._watch.load_state_dict(state.get("seen", {}))
        self._named = set(state.get("named", ()))
