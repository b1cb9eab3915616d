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


def check_one_decay(optimizer: Optimizer, keeps: bool) -> None:
    """Refuse ``keep_decay`` beside an AlphaDecay: both write the weight decay of every layer.

    Args:
        keeps: whether the new object has ``keep_decay``; else it is an AlphaDecay.

    Raises:
        ValueError: naming what has written the decay so far, and the cure.
    """
    found = claims(optimizer)
    owner = found["weight_decay"].owner() if "weight_decay" in found else None
    has_rates = "lr" in found and found["lr"].owner() is owner
    if owner is None or has_rates is keeps:
        return
    name = type(owner).__name__
    why = "leave out keep_decay here"
    if has_rates:
        why = f"leave out keep_decay (with StepHooks: decay) where the {name} is built"
    raise ValueError(
        f"a {name} writes the weight decay of every layer of this optimizer already, and two "
        f"objects cannot: {why}, or call the {name}'s detach() first"
    )


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
