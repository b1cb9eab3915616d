"""Ramp: from the multipliers before to new ones, linearly over some ticks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Ramp:
    """Multipliers by layer name at every tick. Names that are not in it have 1.

    Args:
        ticks: how long an approach takes; 0 for at once.
    """

    def __init__(self, ticks: int) -> None:
        self.ticks = ticks
        self.target: dict[str, float] = {}
        self._before: dict[str, float] = {}
        self._start = 0

    def at(self, tick: int) -> dict[str, float]:
        share = 1.0 if not self.ticks else min(1.0, (tick - self._start) / self.ticks)
        if share >= 1.0:
            return dict(self.target)
        return {
            name: (1 - share) * self._before.get(name, 1.0) + share * target
            for name, target in self.target.items()
        }

    def aim(self, target: dict[str, float], tick: int) -> None:
        """Approach new multipliers from here on; if they are the same, as before."""
        if target == self.target:
            return
        self._before, self.target = self.at(tick), target
        self._start = tick

    def forget(self, tick: int) -> None:
        self.target, self._before, self._start = {}, {}, tick

    def state_dict(self) -> dict[str, Any]:
        return {
            "target": dict(self.target),
            "before": dict(self._before),
            "start": self._start,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.target = dict(state["target"])
        self._before = dict(state["before"])
        self._start = int(state["start"])
