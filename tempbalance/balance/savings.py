"""Savings: which layers are measured when it is time to, and how old the alphas of the rest are."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tempbalance.balance.sketch import changes, decode, encode, sketches
from tempbalance.layers.find import Layer
from tempbalance.measure.ranks import cost, largest
from tempbalance.spectra.windows import Windows

_MAX_AGE = 10


@dataclass(frozen=True)
class Savings:
    """Rules for leaving layers out of a measurement; by default none is.

    Args:
        moved: leave out layers that have moved by less than this share of their weight, up to
            scale, since they were measured.
        max_age: but not more than so many times in a row; 10 with ``moved``.
        per_update: at most so many layers at once, or (a float) as many as make this share of the
            cost of all, those first that were measured longest ago.

    Raises:
        ValueError: for a value out of range.
    """

    moved: float | None = None
    max_age: int | None = None
    per_update: int | float | None = None

    def __post_init__(self) -> None:
        moved, age, some = self.moved, self.max_age, self.per_update
        if moved is not None and not (_is_number(moved) and 0 < moved < 1):
            raise ValueError(
                f"moved must be a share between 0 and 1, such as 0.01, got {moved!r}; None "
                "measures every layer"
            )
        if age is not None and moved is None:
            raise ValueError("max_age bounds how often moved leaves a layer out: set moved too")
        if age is not None and not (_is_whole(age) and age >= 1):
            raise ValueError(f"max_age must be an integer of at least 1, got {age!r}")
        whole = _is_whole(some) and some >= 1  # type: ignore[operator]
        share = isinstance(some, float) and 0 < some <= 1
        if some is not None and not (whole or share):
            raise ValueError(
                "per_update must be a number of layers (an integer of at least 1) or a share of "
                f"the cost (a float, at most 1.0), got {some!r}; None measures every layer"
            )

    @property
    def oldest(self) -> int:
        return _MAX_AGE if self.max_age is None else self.max_age

    def __bool__(self) -> bool:
        return self.moved is not None or self.per_update is not None


@dataclass(frozen=True)
class Choice:
    """Layers to measure, those whose alpha is kept, and sketches of the weights as they are."""

    chosen: list[Layer]
    kept: list[str]
    sketches: dict[str, Tensor] = field(default_factory=dict)


class Ages:
    """How old each layer's alpha is, and what its weight was like when it was measured.

    Attributes:
        ages: by name, measurements since the one that this layer was part of: 0 if in the last.
    """

    def __init__(self, savings: Savings) -> None:
        self.savings = savings
        self.ages: dict[str, int] = {}
        self._sketches: dict[str, Tensor] = {}

    def choose(
        self,
        layers: Sequence[Layer],
        alphas: Mapping[str, float | None],
        windows: Windows,
        group: dist.ProcessGroup | None,
        everything: bool = False,
    ) -> Choice:
        """Divide layers into those to measure now and those to leave out.

        Args:
            everything: leave none out.
        """
        rules = self.savings
        current = self._sketch(layers, group) if rules.moved is not None else {}
        if everything:
            return Choice(list(layers), [], current)
        needed = list(layers)
        if rules.moved is not None:
            still = self._still(layers, alphas, current, rules.moved, group)
            needed = [layer for layer in layers if layer.name not in still]
        if rules.per_update is not None:
            needed = self._oldest(needed, layers, windows, rules.per_update)
        names = {layer.name for layer in needed}
        chosen = [layer for layer in layers if layer.name in names]
        kept = [layer.name for layer in layers if layer.name not in names]
        return Choice(chosen, kept, {name: current[name] for name in names if name in current})

    def _sketch(
        self, layers: Sequence[Layer], group: dist.ProcessGroup | None
    ) -> dict[str, Tensor]:
        try:
            return sketches(layers)
        except Exception:
            if group is not None:  # the other ranks go on to a collective
                raise
        out: dict[str, Tensor] = {}
        for layer in layers:  # one that cannot be read is measured, and fails there
            with contextlib.suppress(Exception):
                out |= sketches([layer])
        return out

    def _still(
        self,
        layers: Sequence[Layer],
        alphas: Mapping[str, float | None],
        current: Mapping[str, Tensor],
        threshold: float,
        group: dist.ProcessGroup | None,
    ) -> set[str]:
        """Layers that may keep their alpha, the same on every rank. One read a device."""
        names = [
            layer.name
            for layer in layers
            if alphas.get(layer.name) is not None
            and layer.name in self._sketches
            and layer.name in current
            and self.ages.get(layer.name, self.savings.oldest) < self.savings.oldest
        ]
        by_device: dict[torch.device, list[str]] = {}
        for name in names:
            by_device.setdefault(current[name].device, []).append(name)
        still: set[str] = set()
        for device, some in by_device.items():
            for name in some:  # from a checkpoint they come on the CPU
                self._sketches[name] = self._sketches[name].to(device)
            before = [self._sketches[name] for name in some]
            change = changes([current[name] for name in some], before)
            moved = largest((~(change < threshold)).to(torch.uint8), group)
            still |= {name for name, flag in zip(some, moved.tolist(), strict=True) if not flag}
        return still

    def _oldest(
        self,
        needed: Sequence[Layer],
        layers: Sequence[Layer],
        windows: Windows,
        limit: int | float,
    ) -> list[Layer]:
        """The first of those that wait longest, in definition order among equals."""
        queue = sorted(needed, key=lambda layer: -self.ages.get(layer.name, math.inf))
        if isinstance(limit, int):
            return queue[:limit]
        left = limit * sum(cost(layer, windows) for layer in layers)
        taken = []
        for layer in queue:
            if left <= 0:
                break
            taken.append(layer)
            left -= cost(layer, windows)
        return taken

    def took(self, chosen: Sequence[str], kept: Sequence[str], new: Mapping[str, Tensor]) -> None:
        """A measurement has taken effect; layers that were no part of it are forgotten."""
        ages = {name: self.ages[name] + 1 for name in kept if name in self.ages}
        self.ages = ages | dict.fromkeys(chosen, 0)
        self._sketches = {**self._sketches, **new}
        self._sketches = {n: s for n, s in self._sketches.items() if n in self.ages}

    def forget(self) -> None:
        self.ages, self._sketches = {}, {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "ages": dict(self.ages),
            "sketches": {name: encode(s) for name, s in self._sketches.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.ages = {name: int(age) for name, age in state.get("ages", {}).items()}
        self._sketches = {name: decode(s) for name, s in state.get("sketches", {}).items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
