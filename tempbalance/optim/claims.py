"""Claims: one object scales a field of an optimizer's groups at a time, and leaves it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from torch.optim import Optimizer

from tempbalance.optim.scaled import Scaled

# The attribute of an optimizer that leads to its claims.
_MARK = "_tempbalance"


class Owner(Protocol):
    """What scales a field of an optimizer's groups."""

    def detach(self) -> None:
        """Put the optimizer's own values back, and let go of it."""


@dataclass(frozen=True)
class Claim:
    """Who scales a field: ``owner()``, or nobody any more; and the values to put back then."""

    owner: Callable[[], Owner | None]
    scaled: Scaled | None = None


def claims(optimizer: Optimizer) -> dict[str, Claim]:
    """The claims on an optimizer, by field."""
    found: dict[str, Claim] = getattr(optimizer, _MARK, {})
    return found


def claim(
    optimizer: Optimizer,
    field: str,
    owner: Callable[[], Owner | None],
    scaled: Scaled | None = None,
) -> None:
    """Note who scales a field of an optimizer's groups."""
    setattr(optimizer, _MARK, {**claims(optimizer), field: Claim(owner, scaled)})


def renounce(optimizer: Optimizer, owner: Owner) -> None:
    """End the claims of an owner, if it has any."""
    _keep(optimizer, {f: c for f, c in claims(optimizer).items() if c.owner() is not owner})


def release(optimizer: Optimizer, fields: Iterable[str]) -> list[Owner]:
    """End whatever claims there are on some fields: factors must not be put on twice.

    Returns:
        Who had them, where they are still alive.
    """
    found = []
    for field in fields:
        one = claims(optimizer).get(field)
        if one is None:
            continue
        owner = one.owner()
        if owner is not None:
            owner.detach()  # which renounces all of its fields
            found.append(owner)
            continue
        _keep(optimizer, {f: c for f, c in claims(optimizer).items() if f != field})
        if one.scaled is not None:
            one.scaled.release()
    return found


def _keep(optimizer: Optimizer, left: dict[str, Claim]) -> None:
    if left:
        setattr(optimizer, _MARK, left)
    elif hasattr(optimizer, _MARK):
        delattr(optimizer, _MARK)
