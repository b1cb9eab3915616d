"""Attempt: measure layers, leaving out those that fail.

A failure is a result too, so that a measurement made elsewhere and later is taken in as one made
on the spot, and can be written to a checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch.distributed as dist

from tempbalance.layers.find import Layer
from tempbalance.measure.measurement import measured
from tempbalance.measure.method import Method
from tempbalance.measure.records import LayerRecord, Outcome

logger = logging.getLogger("tempbalance")


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
        return Result(measured(layers, method=method, group=group))
    except Exception as error:
        if group is not None or raises:
            raise
        logger.warning("measuring failed (%r); trying layer by layer", error)
    records: list[LayerRecord] = []
    failures: dict[str, str] = {}
    for layer in layers:
        try:
            records += measured([layer], method=method)
        except Exception as error:
            failures[layer.name] = repr(error)
    return Result(records, failures)
