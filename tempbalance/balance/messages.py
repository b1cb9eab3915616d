"""Messages: layers that could not be measured, each named once, and what else is said once."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable

from tempbalance.layers.find import Layers
from tempbalance.measure.attempt import Result
from tempbalance.words import some

logger = logging.getLogger("tempbalance")

# As many layers that fail at once have a warning each.
_WARNINGS = 5
TAKEN_OVER = (
    "this optimizer was balanced already: what balanced it is detached now, and its layers have "
    "the base rate or are balanced anew. To balance several models with one optimizer, pass them "
    "together (torch.nn.ModuleList)"
)
_LIBRARIES = frozenset(
    ("tempbalance", "torch", "lightning", "pytorch_lightning", "transformers", "contextlib")
)


class BalanceWarning(UserWarning):
    """Something keeps its base rate that the user may think is balanced."""


class Messages:
    """What a run has been told.

    Attributes:
        named: layers whose trouble is known.
    """

    def __init__(self) -> None:
        self.named: set[str] = set()
        self._said: set[str] = set()

    def report(self, result: Result) -> None:
        """Warn of layers without an alpha that were not named before."""
        for name, error in result.failures.items():
            if name not in self.named:
                _warn(f"layer {name!r} could not be measured: {error}")
        new = [r for r in result.records if not r.outcome.measured and r.name not in self.named]
        self.named.update(result.failures, (r.name for r in new))
        if len(new) > _WARNINGS:
            warn(
                f"{len(new)} layers cannot be measured and keep their base learning rate: "
                f"{some([r.name for r in new])}. The first: {new[0].message}"
            )
            return
        for record in new:
            _warn(record.message)

    def lost(self, before: Iterable[str], found: Layers, now: Iterable[str]) -> None:
        """Warn of layers that were balanced before and are not among those now."""
        left = set(now)
        for name in before:
            if name in left or name in self.named:
                continue
            if any(other.startswith(f"{name}.") for other in left):
                continue  # its module went into another, and its name with it
            self.named.add(name)
            why = "it is gone from the model"
            if any(layer.name == name for layer in found.layers):
                why = "the optimizer does not hold its parameters"
            parts = [s for s in found.skipped if s.name.startswith(f"{name}.")]
            if parts:
                why = max(parts, key=lambda part: part.numel).reason
            _warn(f"layer {name!r} can no longer be measured: {why}")

    def once(self, text: str, *values: float) -> None:
        """Log a warning that was not logged before, whatever its values."""
        if text not in self._said:
            self._said.add(text)
            logger.warning(text, *values)

    def warn_once(self, text: str) -> None:
        """Warn of what was not said before."""
        if text not in self._said:
            self._said.add(text)
            warn(text)


def _warn(text: str) -> None:
    warn(f"{text}. It keeps its base learning rate.")


def warn(text: str) -> None:
    """Warn at the line that is neither ours nor of a library that called us."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _LIBRARIES:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, BalanceWarning, stacklevel=level)
