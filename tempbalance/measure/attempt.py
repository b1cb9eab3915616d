"""Attempt: measure layers, leaving out those that fail, here or from a snapshot in the background.

A failure is a result too, so that a measurement made elsewhere and later is taken in as one made
on the spot, and can be written to a checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch.distributed as dist

from tempbalance.layers.find import Layer
from tempbalance.measure.measurement import LayerRecord, Measurement, Outcome, measure
from tempbalance.measure.method import Method

logger = logging.getLogger("tempbalance")

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Result:
    """Records of the layers that were measured; of the others, by name, what went wrong."""

    records: list[LayerRecord]
    failures: dict[str, str] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts, without the eigenvalues."""
        rows = [
            {**asdict(replace(r, eigenvalues=None)), "outcome": r.outcome.value}
            for r in self.records
        ]
        return {"records": rows, "failures": dict(self.failures)}

    @classmethod
    def from_plain(cls, state: Mapping[str, Any]) -> Result:
        records = [
            LayerRecord(**{**row, "outcome": Outcome(row["outcome"]), "shape": tuple(row["shape"])})
            for row in state["records"]
        ]
        return cls(records, dict(state["failures"]))


def attempt(
    layers: Sequence[Layer],
    method: Method,
    group: dist.ProcessGroup | None = None,
    raises: bool = False,
) -> Result:
    """Measure layers; if that fails, one by one.

    Args:
        raises: do not go on one by one; for weights that are read together with other ranks.

    Raises:
        Exception: whatever went wrong, with a group, on all of its ranks.
    """
    if not layers:
        return Result([])
    try:
        return Result(measure(layers, **method.options, group=group))
    except Exception as error:
        if group is not None or raises:
            raise
        logger.warning("measuring failed (%r); trying layer by layer", error)
    records: list[LayerRecord] = []
    failures: dict[str, str] = {}
    for layer in layers:
        try:
            records += measure([layer], **method.options)
        except Exception as error:
            failures[layer.name] = repr(error)
    return Result(records, failures)


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
    frozen: list[Layer] = []
    failures: dict[str, str] = {}
    for layer in layers:
        try:
            frozen.append(_frozen(layer))
        except Exception as error:  # what reads it is the user's, or a parametrization
            failures[layer.name] = repr(error)
    hook = _Hook()

    def start(some: list[Layer], beside: bool = False) -> Measurement:
        return Measurement(some, **method.options, snapshot=True, beside=beside, progress=hook)

    whole: Measurement | Exception
    try:
        whole = start(frozen)
    except Exception as error:
        whole = error.with_traceback(None)  # its frames hold memory that may be what was short
    on_pool = all(layer.read().device.type == "cpu" for layer in frozen)

    def work(progress: Progress) -> Result:
        hook.call = progress
        try:
            return Result(_done(whole), failures)
        except Exception as error:
            progress(0.0)  # where the interpreter exits, threads fail to start: end here
            if not on_pool:  # what is queued on a device depends on settings: not from here
                raise
            logger.warning("measuring failed (%r); trying layer by layer", error)
        records: list[LayerRecord] = []
        for layer in frozen:
            try:
                records += _done(start([layer], beside=True))
            except Exception as error:
                failures[layer.name] = repr(error)
        return Result(records, failures)

    return work


def _together(
    layers: Sequence[Layer], method: Method, group: dist.ProcessGroup
) -> Callable[[Progress], Result]:
    hook = _Hook()
    measurement = Measurement(layers, **method.options, group=group, snapshot=True, progress=hook)

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


def _done(measurement: Measurement | Exception) -> list[LayerRecord]:
    if isinstance(measurement, Exception):
        raise measurement
    measurement.compute()
    return measurement.finish()


def _frozen(layer: Layer) -> Layer:
    """The layer with a copy of its weight as it is now, which is not copied once more."""
    weight = layer.read()
    copy = weight.clone() if layer.is_own_memory(weight) else weight
    return replace(layer, _read=lambda: copy, copies=True)
