"""Pending: a measurement that was begun at one tick and takes effect at a later one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tempbalance.balance.background import Job
from tempbalance.balance.sketch import decode, encode
from tempbalance.measure.attempt import Result

logger = logging.getLogger("tempbalance")


@dataclass
class Pending:
    """Which layers are measured and which keep their alpha, from ``tick`` to ``due``."""

    tick: int
    due: int
    chosen: list[str]
    kept: list[str]
    sketches: dict[str, Tensor] = field(default_factory=dict)
    source: Job[Result] | Result | None = None
    seconds: float = 0.0  # that it took in the background, once it is done

    @property
    def running(self) -> bool:
        return isinstance(self.source, Job)

    def result(self, raises: bool) -> Result | None:
        """Wait for it. ``None`` if there is none to be had: its thread is lost, say.

        Args:
            raises: raise what went wrong, instead of logging it.
        """
        if isinstance(self.source, Job):
            job = self.source
            try:
                self.source = job.result()
                self.seconds = job.seconds
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
            "chosen": list(self.chosen),
            "kept": list(self.kept),
            "sketches": {name: encode(sketch) for name, sketch in self.sketches.items()},
            "result": None if result is None else result.plain(),
        }

    @classmethod
    def from_plain(cls, state: Mapping[str, Any]) -> Pending:
        result = state["result"]
        return cls(
            int(state["tick"]),
            int(state["due"]),
            list(state["chosen"]),
            list(state["kept"]),
            {name: decode(text) for name, text in state["sketches"].items()},
            None if result is None else Result.from_plain(result),
        )
