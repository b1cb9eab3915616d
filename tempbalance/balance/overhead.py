"""Overhead: how many ticks lie between measurements, so that measuring keeps to its share of time.

    share = cost / (cost + ticks * tick)

with the mean cost of the last measurements and the median time of a tick without measuring. The
first measurement of a process is not counted: it starts threads and loads libraries. What it
decides depends on time, so two runs may differ; the ticks of all measurements are kept.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tempbalance.measure.ranks import largest

logger = logging.getLogger("tempbalance")

clock: Callable[[], float] = time.perf_counter
_COSTS = 8
_TICKS = 512


class Interval:
    """Ticks between measurements: ``every``, or more of them where measuring takes too long.

    Args:
        every: the least, and what the interval is a multiple of.
        limit: the share of the time that measuring may take, or ``None``.

    Raises:
        ValueError: if the share is not between 0 and 1.

    Attributes:
        ticks: ticks between measurements now.
        measured: the ticks of all measurements so far, if there is a limit.
    """

    def __init__(self, every: int, limit: float | None) -> None:
        if limit is not None and not (isinstance(limit, float) and 0 < limit < 1):
            raise ValueError(
                f"max_overhead must be a share of the time between 0 and 1, such as 0.01, got "
                f"{limit!r}; None sets no limit"
            )
        self.every, self.limit = every, limit
        self.ticks = every
        self.measured: list[int] = []
        self._left: float | None = None  # when the last tick was over
        self._entered = 0.0
        self._spent = 0.0  # in ticks since the last measurement took effect
        self._warm = False
        self._costs: deque[float] = deque(maxlen=_COSTS)
        self._idle: deque[float] = deque(maxlen=_TICKS)
        self._busy: list[float] = []  # while a measurement ran in the background

    def allows(self, tick: int) -> bool:
        """Whether enough ticks have passed since the last measurement."""
        return self.limit is None or not self.measured or tick - self.measured[-1] >= self.ticks

    def begins(self, tick: int) -> None:
        """A measurement begins."""
        if self.limit is not None:
            self.measured.append(tick)

    def enter(self, busy: bool) -> None:
        """A tick has come; ``busy`` if a measurement ran in the background before it."""
        if self.limit is None:
            return
        self._entered = clock()
        if self._left is not None:
            (self._busy if busy else self._idle).append(self._entered - self._left)  # type: ignore

    def leave(self) -> None:
        """The tick's own work is done."""
        if self.limit is not None:
            self._left = clock()
            self._spent += self._left - self._entered

    def took_effect(
        self,
        group: dist.ProcessGroup | None,
        beside: float = 0.0,
        near: Iterable[Tensor] = (),
    ) -> None:
        """A measurement is complete: weigh its cost, and stretch or shorten the interval.

        The cost is the time that the training thread was held up (all of a measurement without
        delay; with one the copy and the wait), plus what the ticks beside a measurement in the
        background took longer than the others. A collective with a group.

        Args:
            beside: how long it ran in the background: so much it can have slowed training at most.
            near: tensors of this rank; see :func:`tempbalance.measure.ranks.collective_device`.
        """
        if self.limit is None:
            return
        now = clock()
        # Where a measurement always runs there is no tick without one.
        ticks = self._idle or self._busy or [0.0]
        tick = max(statistics.median(ticks), 1e-9)
        slowed = sum(self._busy) - tick * len(self._busy) if self._idle else 0.0
        cost = self._spent + now - self._entered + min(max(0.0, slowed), beside)
        self._spent, self._entered, self._busy = 0.0, now, []
        if not self._warm:
            self._warm = True
            return
        self._costs.append(cost)
        self._choose(statistics.fmean(self._costs), tick, group, near)

    def _choose(
        self,
        cost: float,
        tick: float,
        group: dist.ProcessGroup | None,
        near: Iterable[Tensor],
    ) -> None:
        assert self.limit is not None
        least = cost * (1 - self.limit) / (self.limit * tick)
        needed = self.every * max(1, math.ceil(least / self.every - 1e-9))
        if group is not None:
            needed = int(largest(torch.tensor([needed]), group, near)[0])
        if self.ticks < needed or needed <= self.ticks // 2:  # not for a little less
            share = cost / (cost + self.ticks * tick)
            level = logging.WARNING if needed > self.ticks else logging.INFO
            if group is not None and dist.get_rank(group):
                level = logging.DEBUG  # the first rank says it
            logger.log(
                level,
                "TempBalance: measuring takes %.3g s, %.2g%% of the time at one measurement every "
                "%d ticks of %.3g s; max_overhead is %.3g%%. It now measures every %d ticks.",
                *(cost, 100 * share, self.ticks, tick, 100 * self.limit, needed),
            )
            self.ticks = needed

    def forget(self) -> None:
        """The clock is set anew; what is known of costs stays."""
        self.measured = []

    def state_dict(self) -> dict[str, Any]:
        return {"interval": self.ticks, "measured": list(self.measured)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over interval and ticks; an interval that is no multiple of ``every`` is not."""
        ticks = int(state.get("interval", self.every))
        fits = self.limit is not None and ticks % self.every == 0
        self.ticks = ticks if fits else self.every
        self.measured = [int(tick) for tick in state.get("measured", ())]
        self._left, self._spent, self._busy = None, 0.0, []
