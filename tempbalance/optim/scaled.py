"""Scaled: the base value of a field of each param group, and base times factor written over it.

The field is ``lr`` or ``weight_decay``. Most schedules compute the next rate from ``group["lr"]``,
so a multiplier left in it compounds. Here the base values are put back before a schedule steps and
scaled again after it. Tensors are written in place; on an accelerator nothing is read back.

Each group also holds its base value, so that the optimizer's state alone says what was scaled.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Value = float | Tensor

# The entries of a param group with what a field was before the factor begin so.
_PREFIX = "tempbalance_base_"


def is_base_key(key: str) -> bool:
    """Whether an entry of a param group is a base value kept here."""
    return key.startswith(_PREFIX)


def put_back_all_but(optimizer: Optimizer, fields: Collection[str]) -> None:
    """A loaded state may hold fields that were scaled and are not here: their base values hold."""
    for group in optimizer.param_groups:
        for key in [key for key in group if is_base_key(key)]:
            field = key.removeprefix(_PREFIX)
            if field not in fields:
                _write(group, group.pop(key), field, field)


class Scaled:
    """Base and written values of a field of an optimizer's groups, by position.

    The optimizer is held weakly: it may hold this.

    Args:
        optimizer: its groups all have the field, a float or a tensor of no dimensions.
        field: the entry of the groups.
    """

    def __init__(self, optimizer: Optimizer, field: str = "lr") -> None:
        self._optimizer = weakref.ref(optimizer)
        self.field, self.key = field, _PREFIX + field
        self.base: list[Value] = []
        self.factors: list[float] = []
        self._written: list[Value] = []
        self._source: list[int] = []
        self._seen: list[tuple[Value, int]] = []  # the objects written, and their versions
        self.loaded()  # the groups of a copied optimizer say what was scaled

    @property
    def optimizer(self) -> Optimizer:
        found = self._optimizer()
        assert found is not None
        return found

    def take(self) -> None:
        """Take the values as they stand in the groups as the base values."""
        self.base = [_copy(group[self.field]) for group in self.optimizer.param_groups]
        self.factors = [1.0] * len(self.base)
        self._wrote(self.base)

    def scale(self, factors: Sequence[float], source: Sequence[int]) -> None:
        """Write base times factor into every group. A factor of 1 writes the base rate itself.

        Args:
            source: for each group, which of the user's own groups it is a part of.
        """
        self.factors, self._source = list(factors), list(source)
        scaled = [
            rate if factor == 1.0 else rate * factor
            for rate, factor in zip(self.base, self.factors, strict=True)
        ]
        for group, rate, base in zip(self.optimizer.param_groups, scaled, self.base, strict=True):
            _write(group, rate, self.field, self.field)
            _write(group, base, self.key, self.field)
        self._wrote(scaled)

    def put_back(self) -> bool:
        """Write the base rates back. True if somebody else had changed a rate meanwhile.

        A changed rate becomes the new base: divided by its factor, or as it is where the parts of
        one group were given the same number, as a hand-written schedule does.
        """
        groups = self.optimizer.param_groups
        changed = self.changed()
        if changed:
            changed = [i for i in range(len(groups)) if self._touched(i)]
        unscaled = self._unscaled(changed)
        for i in changed:
            rate = groups[i][self.field]
            self.base[i] = _copy(rate if i in unscaled else rate / self.factors[i])
        for group, rate in zip(groups, self.base, strict=True):
            _write(group, rate, self.field, self.field)
        return bool(changed)

    def changed(self) -> list[int]:
        """The groups whose rate is not what was written last."""
        groups = self.optimizer.param_groups
        return [i for i, group in enumerate(groups) if self._differs(i, group[self.field])]

    def _differs(self, i: int, now: Value) -> bool:
        if isinstance(now, Tensor) and (now.device.type != "cpu" or not self._touched(i)):
            return False  # on an accelerator comparing would wait for it
        return float(now) != float(self._written[i])

    def _wrote(self, rates: Sequence[Value]) -> None:
        """Note what stands in the groups now."""
        self._written = [_copy(rate) for rate in rates]
        held = [group[self.field] for group in self.optimizer.param_groups]
        self._seen = [(rate, _version(rate)) for rate in held]

    def _touched(self, i: int) -> bool:
        """Whether a rate was written by somebody else, be it with the number that it had.

        In a linear warm-up 3/2 of one step's rate is the next one's: a group whose factor is 1.5
        is given what it has.
        """
        now, (held, version) = self.optimizer.param_groups[i][self.field], self._seen[i]
        return now is not held or _version(now) != version

    def _unscaled(self, changed: Sequence[int]) -> set[int]:
        """Those of the changed groups whose new rate holds no multiplier.

        Where parts of different factors have one number it does not; where they differ, it does.
        A group that is whole goes with the others.
        """
        rates = {i: float(self.optimizer.param_groups[i][self.field]) for i in changed}
        known = len(self._source) == len(self.base)
        parts: dict[int, list[int]] = {}
        for i in changed:
            parts.setdefault(self._source[i] if known else i, []).append(i)
        telling = [some for some in parts.values() if len({self.factors[i] for i in some}) > 1]
        even = [some for some in telling if len({rates[i] for i in some}) == 1]
        if not telling:  # each group is whole: only one number for all of them tells
            different = len({self.factors[i] for i in changed}) > 1
            return set(changed) if different and len(set(rates.values())) == 1 else set()
        split = {i for some in telling for i in some}
        rest = set(changed) - split if len(even) == len(telling) else set()
        return rest | {i for some in even for i in some}

    def load(self, base: Sequence[Value]) -> None:
        """Base rates from a checkpoint; write them with :meth:`scale`."""
        self.base = [_copy(rate) for rate in base]
        self._wrote([group[self.field] for group in self.optimizer.param_groups])

    def loaded(self) -> None:
        """The optimizer's state was loaded: of a balanced run (its groups say the base) or not."""
        for group in self.optimizer.param_groups:
            if self.key in group:
                _write(group, group[self.key], self.field, self.field)
        self.take()

    def reset_initial(self) -> bool:
        """Whether a schedule built meanwhile took scaled rates for initial ones; put right."""
        groups = self.optimizer.param_groups
        if len(groups) != len(self.base):
            return False
        scaled = [i for i, factor in enumerate(self.factors) if factor != 1.0]
        wrong = bool(scaled) and all(
            float(groups[i].get("initial_lr", "nan")) == float(self._written[i]) for i in scaled
        )
        for i in scaled if wrong else ():
            groups[i]["initial_lr"] = _copy(self.base[i])
        return wrong

    def release(self) -> None:
        """Leave the base rates in the groups, and nothing else."""
        if len(self.optimizer.param_groups) == len(self.base):
            self.put_back()
        else:  # groups came or went unseen: what each holds tells
            self.loaded()
        for group in self.optimizer.param_groups:
            group.pop(self.key, None)

    def grow(self, base: Sequence[Value], source: Sequence[int]) -> None:
        """Groups were added at the end, with these base rates; ``source`` is of all groups."""
        self.base += [_copy(rate) for rate in base]
        self.factors += [1.0] * len(base)
        self._source = list(source)
        self._written += [_copy(rate) for rate in base]
        added = [group[self.field] for group in self.optimizer.param_groups[len(self._seen) :]]
        self._seen += [(rate, _version(rate)) for rate in added]

    def refine(self, source: Sequence[int]) -> None:
        """Groups were split further; ``source`` is where each came from."""
        self.forget(source)
        held = [group[self.field] for group in self.optimizer.param_groups]
        self._seen = [(value, _version(value)) for value in held]

    def forget(self, left: Sequence[int]) -> None:
        """Groups were removed: all but those of these places."""
        self.base = [self.base[i] for i in left]
        self.factors = [self.factors[i] for i in left]
        self._written = [self._written[i] for i in left]
        self._seen = [self._seen[i] for i in left]
        self._source = [self._source[i] for i in left if i < len(self._source)]

    def copied(self) -> list[Value]:
        """The base values, tensors copied, for a checkpoint."""
        return [_copy(rate) for rate in self.base]

    def current(self) -> list[Value]:
        """The values in the groups now, tensors copied."""
        return [_copy(group[self.field]) for group in self.optimizer.param_groups]


def _write(group: dict[str, Any], value: Value, key: str, like: str) -> None:
    """Write an entry of a group, a tensor where the group's entry ``like`` is one."""
    if not isinstance(group[like], Tensor):
        group[key] = float(value)
    elif isinstance(group.get(key), Tensor):
        group[key].copy_(torch.as_tensor(value))
    else:
        group[key] = _copy(torch.as_tensor(value))


def _version(rate: Value) -> int:
    """How often a tensor was written in place."""
    return rate._version if isinstance(rate, Tensor) and not rate.is_inference() else 0


def _copy(rate: Value) -> Value:
    return rate.detach().clone() if isinstance(rate, Tensor) else float(rate)
