"""Snapshot: copy the weights now, measure the copies later, in any thread."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch.distributed as dist

from tempbalance.layers.find import Layer
from tempbalance.measure.attempt import Result
from tempbalance.measure.measurement import Measurement
from tempbalance.measure.method import Method

logger = logging.getLogger("tempbalance")

Progress = Callable[[float], None]


def attempt_later(
    layers: Sequence[Layer], method: Method, group: dist.ProcessGroup | None
) -> Callable[[Progress], Result]:
    """Copy the weights as they are now, and return what measures the copies, in any thread.

    Args:
        group: one that nothing else uses meanwhile. Of several ranks each copies what it measures;
            a failure on one of them is raised on all.
    """
    if not layers:
        return lambda _: Result([])
    return _alone(layers, method) if group is None else _together(layers, method, group)


def _alone(layers: Sequence[Layer], method: Method) -> Callable[[Progress], Result]:
    hook = _Hook()
    taken = Measurement(layers, method, snapshot=True, leaves_out=True, progress=hook)

    def work(progress: Progress) -> Result:
        hook.call = progress
        try:
            taken.compute()
        except Exception as error:
            progress(0.0)  # where the interpreter exits, threads fail to start: end here
            logger.warning("measuring failed (%r); trying layer by layer", error)
            taken.compute_each()
        return Result(taken.finish(), taken.failures)

    return work


def _together(
    layers: Sequence[Layer], method: Method, group: dist.ProcessGroup
) -> Callable[[Progress], Result]:
    hook = _Hook()
    measurement = Measurement(layers, method, group=group, snapshot=True, progress=hook)

    def work(progress: Progress) -> Result:
        hook.call = progress
        measurement.compute()
        return Result(measurement.finish())

    return work


class _Hook:
    """A progress callback that is known only later."""

    call: Progress | None = None

    def __call__(self, done: float) -> None:
        if self.call is not None:
            self.call(done)
