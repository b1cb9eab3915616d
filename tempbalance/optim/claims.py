"""Claims: one object balances an optimizer at a time, and leaves it as it found it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch.optim import Optimizer

from tempbalance.optim.scaled import Rates

# The attribute of an optimizer that leads to its claim.
_MARK = "_tempbalance"


class Owner(Protocol):
    """What balances an optimizer."""

    def detach(self) -> None:
        """Put the optimizer's own rates back, and let go of it."""


class Claim:
    """Who balances an optimizer, and the rates to put back if that is gone."""

    def __init__(self, owner: Callable[[], Owner | None], rates: Rates | None) -> None:
        self.owner = owner
        self.rates = rates


def claim(
    optimizer: Optimizer, owner: Callable[[], Owner | None], rates: Rates | None = None
) -> None:
    """Note who balances an optimizer: ``owner()``, or nobody any more if that is ``None``."""
    setattr(optimizer, _MARK, Claim(owner, rates))


def claimed(optimizer: Optimizer) -> Claim | None:
    """The claim on an optimizer, if there is one."""
    return getattr(optimizer, _MARK, None)


def renounce(optimizer: Optimizer, owner: Owner) -> None:
    """End the claim of an owner, if it has one."""
    found = claimed(optimizer)
    if found is not None and found.owner() is owner:
        delattr(optimizer, _MARK)


def release(optimizer: Optimizer) -> Owner | None:
    """End whatever claim there is: multipliers must not be put on twice.

    Returns:
        Who had the optimizer, where it is still alive.
    """
    found = claimed(optimizer)
    if found is None:
        return None
    owner = found.owner()
    if owner is not None:
        owner.detach()
    else:
        delattr(optimizer, _MARK)
        if found.rates is not None:
            found.rates.release()
    return owner
