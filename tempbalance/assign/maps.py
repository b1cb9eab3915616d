"""Assignment: alphas (L,) in, multipliers of the learning rate (L,) out.

A large alpha means a light tail, an under-trained layer, and a multiplier above average. Every
assignment is a frozen object; all of them keep the same contract:

- multipliers are positive and finite;
- a layer without a number (NaN or infinite alpha) gets 1 and does not take part;
- with fewer than two layers that take part, or all alphas equal, every multiplier is 1
  (the published code gives them all the largest rate).

:class:`Constant` and :class:`PerType` do not look at alphas at all, and give every layer its rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tempbalance.words import check_kind

Alphas = Tensor | Sequence[float]


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
        """Alphas (L,) and the layers' types (L,) -> multipliers (L,), float64 on the CPU."""
        ...


def check_assignment(name: str, value: object) -> None:
    """Raises TypeError where an assignment is a name, a number or a class, not an object."""
    check_kind(
        name,
        value,
        isinstance(value, Assignment),
        "an assignment such as LinearMap() or SigmoidMap()",
    )


class _Map:
    """The contract of the module, around a map of valid, not all equal alphas."""

    uses_alphas = True
    once = False

    def __call__(self, alphas: Alphas, kinds: Sequence[str] | None = None) -> Tensor:
        values = _vector(alphas)
        out = torch.ones_like(values)
        valid = _valid(values)
        chosen = values[valid]
        if len(chosen) < 2 or chosen.max() == chosen.min():
            return out
        out[valid] = self._map(chosen)
        return out

    def _map(self, alphas: Tensor) -> Tensor:
        raise NotImplementedError


def _vector(alphas: Alphas) -> Tensor:
    values = torch.as_tensor(alphas, dtype=torch.float64, device="cpu").detach()
    if values.ndim != 1:
        raise ValueError(f"alphas must be one-dimensional, got shape {tuple(values.shape)}")
    return values


def _valid(values: Tensor) -> Tensor:
    """Which alphas are numbers that take part."""
    return torch.isfinite(values) & (values > 0)


def _check_positive(owner: object, **values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{type(owner).__name__}: {name} must be positive, got {value!r}")


@dataclass(frozen=True)
class LinearMap(_Map):
    """s1 at the smallest alpha, s2 at the largest, linear between (TempBalance, equation 4).

    Raises:
        ValueError: if s1 or s2 is not positive.
    """

    s1: float = 0.5
    s2: float = 1.5

    def __post_init__(self) -> None:
        _check_positive(self, s1=self.s1, s2=self.s2)

    def _map(self, alphas: Tensor) -> Tensor:
        low, high = alphas.min(), alphas.max()
        share = (alphas - low) / (high - low)
        return self.s1 * (1 - share) + self.s2 * share  # exact, and positive, at both ends


@dataclass(frozen=True)
class SqrtShare(_Map):
    """Proportional to sqrt(alpha), mean 1 (``tb_sqrt`` of the released code)."""

    def _map(self, alphas: Tensor) -> Tensor:
        root = alphas.sqrt()
        return root / root.mean()


@dataclass(frozen=True)
class Log2Share(_Map):
    """Proportional to log2(alpha), mean 1 (``tb_log2`` of the released code).

    log2 vanishes at alpha = 1: no multiplier is below 1/1000.
    """

    def _map(self, alphas: Tensor) -> Tensor:
        log = torch.log2(alphas.clamp_min(1.0))
        return (log / log.mean()).clamp_min(1e-3) if log.any() else torch.ones_like(log)


@dataclass(frozen=True)
class RankMap(_Map):
    """s1 + (s2 - s1) * rank / L, with the smallest alpha at rank 0 (``tb_step``).

    The largest stays one step short of s2, as in the released code. Equal alphas share the mean
    of their ranks.

    Raises:
        ValueError: if s1 or s2 is not positive.
    """

    s1: float = 0.5
    s2: float = 1.5

    def __post_init__(self) -> None:
        _check_positive(self, s1=self.s1, s2=self.s2)

    def _map(self, alphas: Tensor) -> Tensor:
        ordered = alphas.sort().values
        first = torch.searchsorted(ordered, alphas)
        last = torch.searchsorted(ordered, alphas, right=True) - 1
        rank = (first + last).double() / 2
        return self.s1 + (self.s2 - self.s1) * rank / len(alphas)


@dataclass(frozen=True)
class SigmoidMap(_Map):
    """10 ** (s * (sigmoid(tau * (alpha - mean)) - 0.5)): TB_Sigmoid (arXiv 2410.12178, eq. 2).

    Args:
        s: the width in decades: multipliers lie in 10 ** (-s / 2) to 10 ** (s / 2). A pair gives
            one for alphas below the mean and one for those above.
        tau: steepness.

    Raises:
        ValueError: if a value is not positive, or s is above 100 (no float holds such rates).
    """

    s: float | tuple[float, float] = 0.5
    tau: float = 10.0

    def __post_init__(self) -> None:
        if not isinstance(self.s, int | float):
            object.__setattr__(self, "s", tuple(float(v) for v in self.s))
        below, above = self._widths()
        _check_positive(self, s_below=below, s_above=above, tau=self.tau)
        if max(below, above) > 100:
            raise ValueError(f"SigmoidMap: s is a width in decades, at most 100, got {self.s!r}")

    def _widths(self) -> tuple[float, float]:
        return (self.s, self.s) if isinstance(self.s, int | float) else self.s

    def _map(self, alphas: Tensor) -> Tensor:
        below, above = self._widths()
        offset = alphas - alphas.mean()
        width = torch.where(offset > 0, above, below).double()
        return 10 ** (width * (torch.sigmoid(self.tau * offset) - 0.5))


# --- around another map --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Around:
    """An assignment that changes what another is given, or what it gives."""

    map: Assignment

    def __post_init__(self) -> None:
        check_assignment(f"{type(self).__name__}: map", self.map)

    @property
    def uses_alphas(self) -> bool:
        return self.map.uses_alphas

    @property
    def once(self) -> bool:
        return self.map.once


@dataclass(frozen=True)
class Clipped(_Around):
    """Alphas clipped to the median +- ``mads`` robust standard deviations before the map.

    So that one wild alpha does not squeeze all the others to one end. A robust standard deviation
    is 1.4826 times the median absolute deviation; where that is 0, more than half of the alphas
    being equal, 1.2533 times the mean absolute deviation (Iglewicz and Hoaglin, 1993).
    """

    mads: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, mads=self.mads)

    def __call__(self, alphas: Alphas, kinds: Sequence[str] | None = None) -> Tensor:
        values = _vector(alphas)
        valid = _valid(values)
        if valid.any():
            median = values[valid].quantile(0.5)
            deviation = (values[valid] - median).abs()
            sigma = 1.4826 * deviation.quantile(0.5) or 1.2533 * deviation.mean()
            reach = self.mads * sigma
            clipped = values.clamp(median - reach, median + reach)
            values = torch.where(valid, clipped, values)
        return self.map(values, kinds)


@dataclass(frozen=True)
class Frozen(_Around):
    """The multipliers of the first measurement, kept: does following alpha matter?"""

    @property
    def once(self) -> bool:
        return True

    def __call__(self, alphas: Alphas, kinds: Sequence[str] | None = None) -> Tensor:
        return self.map(alphas, kinds)


@dataclass(frozen=True)
class Reversed(_Around):
    """The roles exchanged: alphas mirrored, so that the largest gets the smallest rate."""

    def __call__(self, alphas: Alphas, kinds: Sequence[str] | None = None) -> Tensor:
        values = _vector(alphas)
        valid = _valid(values)
        if valid.any():
            low, high = values[valid].min(), values[valid].max()
            mirrored = (low + (high - values)).clamp(low, high)
            values = torch.where(valid, mirrored, values)
        return self.map(values, kinds)


@dataclass(frozen=True)
class Averaged(_Around):
    """Every layer gets the mean of the multipliers: is it only the mean rate that changed?"""

    def __call__(self, alphas: Alphas, kinds: Sequence[str] | None = None) -> Tensor:
        values = _vector(alphas)
        multipliers = self.map(values, kinds)
        takes_part = _valid(values) if self.map.uses_alphas else torch.ones_like(values).bool()
        if takes_part.any():
            mean = multipliers[takes_part].mean()
            multipliers = torch.where(takes_part, mean, multipliers)
        return multipliers


@dataclass(frozen=True)
class Shuffled(_Around):
    """The same multipliers given to other layers, by one fixed permutation a seed.

    If this gains as much, it is the spread of rates that helps and not alpha. Where a layer drops
    out, the one that had its multiplier takes what the layer itself would have had; all others
    keep theirs.
    """

    seed: int = 0

    def __call__(self, alphas: Alphas, kinds: Sequence[str] | None = None) -> Tensor:
        values = _vector(alphas)
        multipliers = self.map(values, kinds)
        generator = torch.Generator().manual_seed(self.seed)
        source = torch.rand(len(values), generator=generator, device="cpu").argsort().tolist()
        takes_part = _valid(values).tolist() if self.map.uses_alphas else [True] * len(values)
        places = [i for i, does in enumerate(takes_part) if does]
        giver = []
        for i in places:  # along its cycle of the permutation to the next that takes part
            j = source[i]
            while not takes_part[j]:
                j = source[j]
            giver.append(j)
        out = multipliers.clone()
        out[places] = multipliers[giver]
        return out


# --- without alpha -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Constant:
    """One multiplier for every balanced layer: is it only the mean rate that changed?"""

    mean: float = 1.0
    uses_alphas = False
    once = True

    def __post_init__(self) -> None:
        _check_positive(self, mean=self.mean)

    def __call__(self, alphas: Alphas, kinds: Sequence[str] | None = None) -> Tensor:
        return torch.full_like(_vector(alphas), self.mean)


@dataclass(frozen=True)
class PerType:
    """A fixed multiplier for each type of layer, by the name of its module's class.

    ``PerType({"SpectralConv": 0.57, "Conv1d": 1.15})``; types that are not named get ``default``.

    Raises:
        ValueError: if a multiplier is not positive, or when called without the layers' types.
    """

    multipliers: Mapping[str, float]
    default: float = 1.0
    uses_alphas = False
    once = True

    def __post_init__(self) -> None:
        if not isinstance(self.multipliers, Mapping):
            raise TypeError(
                'PerType takes multipliers by the name of a module\'s class, {"Conv2d": 0.5}, got '
                f"{self.multipliers!r}"
            )
        object.__setattr__(self, "multipliers", dict(self.multipliers))
        _check_positive(self, default=self.default, **self.multipliers)

    def __call__(self, alphas: Alphas, kinds: Sequence[str] | None = None) -> Tensor:
        if kinds is None:
            raise ValueError("PerType needs the types of the layers: call it with kinds=[...]")
        if len(kinds) != len(_vector(alphas)):
            raise ValueError(f"PerType: {len(kinds)} types for {len(_vector(alphas))} layers")
        rates = [float(self.multipliers.get(kind, self.default)) for kind in kinds]
        return torch.tensor(rates, dtype=torch.float64, device="cpu")


def normalized(multipliers: Tensor, sizes: Tensor) -> Tensor:
    """Multipliers (L,) divided by their mean over parameters, ``sizes`` (L,) of them a layer."""
    return multipliers / ((multipliers * sizes).sum() / sizes.sum())
