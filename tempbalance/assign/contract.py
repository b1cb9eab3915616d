"""Contract: alphas (L,) in, multipliers of the learning rate (L,) out.

A large alpha means a light tail, an under-trained layer, and a multiplier above average. Every
assignment is a frozen object; all of them keep the same contract:

- multipliers are positive and finite;
- a layer without a number (NaN or infinite alpha) gets 1 and does not take part;
- with fewer than two layers that take part, or all alphas equal, every multiplier is 1
  (the published code gives them all the largest rate).

Assignments that look at no alpha (``uses_alphas`` is False) give every layer its rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, overload, runtime_checkable

import torch
from torch import Tensor

from tempbalance.words import check_kind

Alphas = Tensor | Sequence[float]
# Mean and standard deviation of alpha of a random matrix in each layer's place; None without one.
Nulls = Sequence[tuple[float, float] | None]


@dataclass(frozen=True)
class Population(Sequence[str]):
    """What an assignment may know of the layers beside their alphas, in definition order.

    It is the sequence of their types, so that an assignment that asks for types alone takes it as
    a list of them.

    Args:
        kinds: the name of each module's class (L,).
        sizes: real numbers in each weight (L,); ``None`` counts every layer alike.
        names: the name of each layer in the model (L,).
        nulls: gives what random matrices in the layers' places read (L,), mean and standard
            deviation of alpha. A function, because it is simulated, for those that ask.

    Raises:
        ValueError: if they are not of one length.
    """

    kinds: tuple[str, ...]
    sizes: tuple[int, ...] | None = None
    names: tuple[str, ...] | None = None
    nulls: Callable[[], Nulls] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for known in ("kinds", "sizes", "names"):
            values = getattr(self, known)
            if values is not None:
                object.__setattr__(self, known, tuple(values))
                if len(values) != len(self.kinds):
                    raise ValueError(
                        f"Population: {len(values)} {known} for {len(self.kinds)} types of layers"
                    )

    @classmethod
    def of(cls, kinds: Sequence[str] | None, count: int) -> Population:
        """What an assignment of ``count`` layers was called with; types unknown are empty.

        Raises:
            ValueError: if it is of another number of layers.
        """
        if isinstance(kinds, cls):
            known = kinds
        else:
            known = cls(("",) * count if kinds is None else tuple(kinds))
        if len(known) != count:
            raise ValueError(f"{len(known)} types for {count} layers")
        return known

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        return self.kinds[index]

    def __len__(self) -> int:
        return len(self.kinds)

    def at(self, places: Sequence[int]) -> Population:
        """Some of the layers."""
        return Population(
            tuple(self.kinds[i] for i in places),
            None if self.sizes is None else tuple(self.sizes[i] for i in places),
            None if self.names is None else tuple(self.names[i] for i in places),
            None if self.nulls is None else partial(_some, self.nulls, tuple(places)),
        )

    @property
    def weights(self) -> Tensor:
        """How much each layer counts in a mean over parameters (L,), float64."""
        return torch.tensor(self.sizes or (1,) * len(self), dtype=torch.float64, device="cpu")

    def named(self, asking: object) -> tuple[str, ...]:
        """The names of the layers.

        Raises:
            ValueError: if they are not known, naming the assignment that asks for them.
        """
        if self.names is None:
            raise ValueError(
                f"{type(asking).__name__} needs the names of the layers: call it with "
                "Population(kinds, names=[...])"
            )
        return self.names

    def null(self, asking: object) -> Nulls:
        """What random matrices in the layers' places read (L,).

        Raises:
            ValueError: if it is not known, naming the assignment that asks for it.
        """
        if self.nulls is None:
            raise ValueError(
                f"{type(asking).__name__} needs what random matrices of the layers' shapes read: "
                "call it with Population(kinds, nulls=lambda: [(mean, std), ...]), as "
                "tempbalance.null_alpha gives them"
            )
        found = self.nulls()
        if len(found) != len(self.kinds):
            raise ValueError(f"{len(found)} nulls for {len(self.kinds)} layers: one a layer")
        return found


def _some(nulls: Callable[[], Nulls], places: Sequence[int]) -> Nulls:
    every = nulls()
    return [every[i] for i in places]


@runtime_checkable
class Assignment(Protocol):
    """What the balancer asks of an assignment."""

    @property
    def uses_alphas(self) -> bool:
        """False where the multipliers are fixed, so that nothing need be measured."""
        ...

    @property
    def once(self) -> bool:
        """True where only the first measurement counts."""
        ...

    def __call__(self, alphas: Alphas, kinds: Sequence[str] | None = None) -> Tensor:
        """Alphas (L,) and the layers' types (L,) -> multipliers (L,), float64 on the CPU.

        The balancer passes a :class:`Population` for the types.
        """
        ...


def check_assignment(name: str, value: object) -> None:
    """Raises TypeError where an assignment is a name, a number or a class, not an object."""
    check_kind(
        name,
        value,
        isinstance(value, Assignment),
        "an assignment such as LinearMap() or SigmoidMap()",
    )


def vector(alphas: Alphas) -> Tensor:
    """Alphas as a float64 vector on the CPU; raises ValueError for another shape."""
    values = torch.as_tensor(alphas, dtype=torch.float64, device="cpu").detach()
    if values.ndim != 1:
        raise ValueError(f"alphas must be one-dimensional, got shape {tuple(values.shape)}")
    return values


def valid(values: Tensor) -> Tensor:
    """Which alphas are numbers that take part."""
    return torch.isfinite(values) & (values > 0)


def check_positive(owner: object, **values: float) -> None:
    """Raises ValueError for an option of an assignment that is not a positive number."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{type(owner).__name__}: {name} must be positive, got {value!r}")


def normalized(multipliers: Tensor, sizes: Tensor) -> Tensor:
    """Multipliers (L,) divided by their mean over parameters, ``sizes`` (L,) of them a layer."""
    return multipliers / ((multipliers * sizes).sum() / sizes.sum())
