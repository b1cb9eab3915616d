"""Pending: a measurement that was begun at one tick and takes effect at a later one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tempbalance.balance.background import Job
from tempbalance.measure.attempt import Result

logger = logging.getLogger("tempbalance")


@dataclass
class Pending:
    """Which layers are measured, from ``tick`` to ``due``, and what comes of it."""

    tick: int
    due: int
    names: list[str]
    source: Job[Result] | Result | None = None

    def result(self, raises: bool) -> Result | None:
        """Wait for it. ``None`` if there is none to be had: its thread is lost, say.

        Args:
            raises: raise what went wrong, instead of logging it.
        """
        if isinstance(self.source, Job):
            try:
                self.source = self.source.result()
            except Exception as error:
                if raises:
                    raise
                logger.warning("measuring in the background failed: %r", error)
                self.source = None
        return self.source

    def drop(self) -> None:
        """It will not take effect."""
        if isinstance(self.source, Job):
            self.source.drop()

    def plain(self, raises: bool) -> dict[str, Any]:
        """With its result, for a checkpoint."""
        result = self.result(raises)
        return {
            "tick": self.tick,
            "due": self.due,
            "names": list(self.names),
            "result": None if result is None else result.plain(),
        }

    @classmethod
    def from_plain(cls, state: Mapping[str, Any]) -> Pending:
        result = state["result"]
        return cls(
            int(state["tick"]),
            int(state["due"]),
            list(state["names"]),
            None if result is None else Result.from_plain(result),
        )
