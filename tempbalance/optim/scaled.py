"""Rates: the base learning rate of each param group, and base times multiplier written over it.

Most schedules compute the next rate from ``group["lr"]``, so a multiplier left in it compounds.
Here the base rates are put back before a schedule steps and scaled again after it. Tensor rates
are written in place; on an accelerator nothing is read back.

Each group also holds its base rate, so that the optimizer's state alone says what was scaled.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Rate = float | Tensor

# The entry of a param group with its rate before the multiplier.
KEY = "tempbalance_base_lr"


class Rates:
    """Base and written learning rates of an optimizer's groups, by position.

    The optimizer is held weakly: it may hold this.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.base: list[Rate] = []
        self.factors: list[float] = []
        self._written: list[Rate] = []
        self._source: list[int] = []
        self._seen: list[tuple[Rate, int]] = []  # the objects written, and their versions
        self.loaded()  # the groups of a copied optimizer say what was scaled

    @property
    def optimizer(self) -> Optimizer:
        found = self._optimizer()
        assert found is not None
        return found

    def take(self) -> None:
        """Take the groups' rates as they stand as the base rates."""
        self.base = [_copy(group["lr"]) for group in self.optimizer.param_groups]
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
            _write(group, rate)
            _write(group, base, KEY)
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
            rate = groups[i]["lr"]
            self.base[i] = _copy(rate if i in unscaled else rate / self.factors[i])
        for group, rate in zip(groups, self.base, strict=True):
            _write(group, rate)
        return bool(changed)

    def changed(self) -> list[int]:
        """The groups whose rate is not what was written last."""
        groups = self.optimizer.param_groups
        return [i for i, group in enumerate(groups) if self._differs(i, group["lr"])]

    def _differs(self, i: int, now: Rate) -> bool:
        if isinstance(now, Tensor) and (now.device.type != "cpu" or not self._touched(i)):
            return False  # on an accelerator comparing would wait for it
        return float(now) != float(self._written[i])

    def _wrote(self, rates: Sequence[Rate]) -> None:
        """Note what stands in the groups now."""
        self._written = [_copy(rate) for rate in rates]
        held = [group["lr"] for group in self.optimizer.param_groups]
        self._seen = [(rate, _version(rate)) for rate in held]

    def _touched(self, i: int) -> bool:
        """Whether a rate was written by somebody else, be it with the number that it had.

        In a linear warm-up 3/2 of one step's rate is the next one's: a group whose factor is 1.5
        is given what it has.
        """
        now, (held, version) = self.optimizer.param_groups[i]["lr"], self._seen[i]
        return now is not held or _version(now) != version

    def _unscaled(self, changed: Sequence[int]) -> set[int]:
        """Those of the changed groups whose new rate holds no multiplier.

        Where parts of different factors have one number it does not; where they differ, it does.
        A group that is whole goes with the others.
        """
        rates = {i: float(self.optimizer.param_groups[i]["lr"]) for i in changed}
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

    def load(self, base: Sequence[Rate]) -> None:
        """Base rates from a checkpoint; write them with :meth:`scale`."""
        self.base = [_copy(rate) for rate in base]
        self._wrote([group["lr"] for group in self.optimizer.param_groups])

    def loaded(self) -> None:
        """The optimizer's state was loaded: of a balanced run (its groups say the base) or not."""
        for group in self.optimizer.param_groups:
            if KEY in group:
                _write(group, group[KEY])
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
            group.pop(KEY, None)

    def grow(self, base: Sequence[Rate], source: Sequence[int]) -> None:
        """Groups were added at the end, with these base rates; ``source`` is of all groups."""
        self.base += [_copy(rate) for rate in base]
        self.factors += [1.0] * len(base)
        self._source = list(source)
        self._written += [_copy(rate) for rate in base]
        added = [group["lr"] for group in self.optimizer.param_groups[len(self._seen) :]]
        self._seen += [(rate, _version(rate)) for rate in added]

    def forget(self, left: Sequence[int]) -> None:
        """Groups were removed: all but those of these places."""
        self.base = [self.base[i] for i in left]
        self.factors = [self.factors[i] for i in left]
        self._written = [self._written[i] for i in left]
        self._seen = [self._seen[i] for i in left]
        self._source = [self._source[i] for i in left if i < len(self._source)]

    def copied(self) -> list[Rate]:
        """The base rates, tensors copied, for a checkpoint."""
        return [_copy(rate) for rate in self.base]

    def current(self) -> list[Rate]:
        """The rates in the groups now, tensors copied."""
        return [_copy(group["lr"]) for group in self.optimizer.param_groups]


def _write(group: dict[str, Any], rate: Rate, key: str = "lr") -> None:
    if not isinstance(group["lr"], Tensor):
        group[key] = float(rate)
    elif isinstance(group.get(key), Tensor):
        group[key].copy_(torch.as_tensor(rate))
    else:
        group[key] = _copy(torch.as_tensor(rate))


def _version(rate: Rate) -> int:
    """How often a tensor was written in place."""
    return rate._version if isinstance(rate, Tensor) and not rate.is_inference() else 0


def _copy(rate: Rate) -> Rate:
    return rate.detach().clone() if isinstance(rate, Tensor) else float(rate)
