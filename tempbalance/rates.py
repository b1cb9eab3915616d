"""Rates: the base learning rate of each param group, and base times multiplier written over it.

Most schedules compute the next rate from ``group["lr"]``, so a multiplier left in it compounds.
Here the base rates are put back before a schedule steps and scaled again after it. Tensor rates
are written in place; on an accelerator nothing is read back.

Each group also holds its base rate, so that the optimizer's state alone says what was scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Rate = float | Tensor

# The entry of a param group with its rate before the multiplier.
KEY = "tempbalance_base_lr"


class Rates:
    """Base and written learning rates of an optimizer's groups, by position."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.base: list[Rate] = []
        self.factors: list[float] = []
        self._written: list[Rate] = []
        self.take()

    def take(self) -> None:
        """Take the groups' rates as they stand as the base rates."""
        self.base = [_copy(group["lr"]) for group in self.optimizer.param_groups]
        self.factors = [1.0] * len(self.base)
        self._written = [_copy(rate) for rate in self.base]

    def scale(self, factors: Sequence[float]) -> None:
        """Write base times factor into every group. A factor of 1 writes the base rate itself."""
        self.factors = list(factors)
        for i, group in enumerate(self.optimizer.param_groups):
            factor = self.factors[i]
            scaled = self.base[i] if factor == 1.0 else self.base[i] * factor
            _write(group, scaled)
            _write(group, self.base[i], KEY)
            self._written[i] = _copy(scaled)

    def put_back(self) -> bool:
        """Write the base rates back. True if somebody else had changed a rate meanwhile.

        A changed rate becomes the new base: divided by its factor, or as it is where groups of
        different factors were given the same number, as a hand-written schedule does.
        """
        groups = self.optimizer.param_groups
        changed = self._rewritten(self.changed())
        unscaled = self._are_unscaled(changed)
        for i in changed:
            rate = groups[i]["lr"]
            self.base[i] = _copy(rate if unscaled else rate / self.factors[i])
        for group, rate in zip(groups, self.base, strict=True):
            _write(group, rate)
        return bool(changed)

    def changed(self) -> list[int]:
        """The groups whose rate is not what was written last."""
        groups = self.optimizer.param_groups
        return [i for i, g in enumerate(groups) if _differs(g["lr"], self._written[i])]

    def _rewritten(self, changed: list[int]) -> list[int]:
        """These groups, and those that were given a number that they had already.

        In a linear warm-up 3/2 of one step's rate is the next one's: a group whose factor is 1.5
        does not change when all groups of its base rate are given that.
        """
        now = [float(group["lr"]) for group in self.optimizer.param_groups] if changed else []
        out = set(changed)
        for base in {float(self.base[i]) for i in changed}:
            same = [i for i, rate in enumerate(self.base) if float(rate) == base]
            if len({now[i] for i in same}) == 1:
                out.update(same)
        return sorted(out)

    def _are_unscaled(self, changed: Sequence[int]) -> bool:
        """Whether groups of one base rate and different factors were given one number."""
        rates = {i: float(self.optimizer.param_groups[i]["lr"]) for i in changed}
        by_base: dict[float, list[int]] = {}
        for i in changed:
            by_base.setdefault(float(self.base[i]), []).append(i)
        telling = [s for s in by_base.values() if len({self.factors[i] for i in s}) > 1]
        if not telling:  # each base rate has one group: only one number for all of them tells
            telling = [list(changed)] if len({self.factors[i] for i in changed}) > 1 else []
        return bool(telling) and all(len({rates[i] for i in some}) == 1 for some in telling)

    def load(self, base: Sequence[Rate]) -> None:
        """Base rates from a checkpoint; write them with :meth:`scale`."""
        self.base = [_copy(rate) for rate in base]
        self._written = [_copy(group["lr"]) for group in self.optimizer.param_groups]

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
            "initial_lr" in groups[i] and not _differs(groups[i]["initial_lr"], self._written[i])
            for i in scaled
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

    def grow(self, base: Sequence[Rate]) -> None:
        """Groups were added at the end, with these base rates."""
        self.base += [_copy(rate) for rate in base]
        self.factors += [1.0] * len(base)
        self._written += [_copy(rate) for rate in base]

    def forget(self, left: Sequence[int]) -> None:
        """Groups were removed: all but those of these places."""
        self.base = [self.base[i] for i in left]
        self.factors = [self.factors[i] for i in left]
        self._written = [self._written[i] for i in left]

    def copied(self) -> list[Rate]:
        """The base rates, tensors copied, for a checkpoint."""
        return [_copy(rate) for rate in self.base]

    def current(self) -> list[Rate]:
        """The rates in the groups now, tensors copied."""
        return [_copy(group["lr"]) for group in self.optimizer.param_groups]


def _write(group: dict[str, Any], rate: Rate, key: str = "lr") -> None:
    if not isinstance(group["lr"], Tensor):
        group[key] = float(rate)
    elif key in group:
        group[key].copy_(torch.as_tensor(rate))
    else:
        group[key] = _copy(rate)


def _copy(rate: Rate) -> Rate:
    return rate.detach().clone() if isinstance(rate, Tensor) else float(rate)


def _differs(now: Rate, written: Rate) -> bool:
    if isinstance(now, Tensor) and now.device.type != "cpu":
        return False  # comparing would wait for the device
    return float(now) != float(written)
