"""Controls: around a map, or without alpha. They tell a gain by alpha from one by any rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tempbalance.assign.contract import (
    Alphas,
    Assignment,
    Population,
    check_assignment,
    check_positive,
    valid,
    vector,
)
from tempbalance.assign.depth import block_of, role_of


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

    def _voting(self, values: Tensor) -> Tensor:
        """Which layers have a multiplier of the map (L,)."""
        return valid(values) if self.map.uses_alphas else torch.ones_like(values).bool()


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
        check_positive(self, mads=self.mads)

    def __call__(self, alphas: Alphas, kinds: Sequence[str] | None = None) -> Tensor:
        values = vector(alphas)
        voting = valid(values)
        if voting.any():
            median = values[voting].quantile(0.5)
            deviation = (values[voting] - median).abs()
            sigma = 1.4826 * deviation.quantile(0.5) or 1.2533 * deviation.mean()
            reach = self.mads * sigma
            clipped = values.clamp(median - reach, median + reach)
            values = torch.where(voting, clipped, values)
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
        values = vector(alphas)
        voting = valid(values)
        if voting.any():
            low, high = values[voting].min(), values[voting].max()
            mirrored = (low + (high - values)).clamp(low, high)
            values = torch.where(voting, mirrored, values)
        return self.map(values, kinds)


@dataclass(frozen=True)
class Averaged(_Around):
    """Every layer gets the mean of the multipliers: is it only the level that changed?

    Args:
        map: the assignment.
        by_parameters: the mean over parameters, so that as much of the network's weight moves
            faster as slower; False takes the plain mean over layers, in which a small layer counts
            as much as a large one.
        within_type: a mean for each type of layer, by the name of its module's class.

    Raises:
        ValueError: when called without the layers' types, with ``within_type``.
    """

    by_parameters: bool = True
    within_type: bool = False

    def __call__(self, alphas: Alphas, kinds: Sequence[str] | None = None) -> Tensor:
        values = vector(alphas)
        multipliers = self.map(values, kinds).clone()
        layers = Population.of(kinds, len(values))
        weights = layers.weights if self.by_parameters else torch.ones_like(values)
        for places in _groups(self, kinds, self._voting(values), self.within_type):
            weight = weights[places]
            multipliers[places] = (multipliers[places] * weight).sum() / weight.sum()
        return multipliers


@dataclass(frozen=True)
class Shuffled(_Around):
    """The same multipliers given to other layers, by one fixed permutation a seed.

    If this gains as much, it is the spread of rates that helps and not alpha. Where a layer drops
    out, the one that had its multiplier takes what the layer itself would have had; all others
    keep theirs.

    Args:
        map: the assignment.
        seed: of the permutation.
        within_type: exchange between layers of one type alone, by the name of the module's class:
            types keep their rates, and only what alpha says within a type is lost.

    Raises:
        ValueError: when called without the layers' types, with ``within_type``.
    """

    seed: int = 0
    within_type: bool = False

    def __call__(self, alphas: Alphas, kinds: Sequence[str] | None = None) -> Tensor:
        values = vector(alphas)
        multipliers = self.map(values, kinds)
        generator = torch.Generator().manual_seed(self.seed)
        keys = torch.rand(len(values), generator=generator, device="cpu")
        voting = self._voting(values)
        takes_part = voting.tolist()
        out = multipliers.clone()
        for places in _groups(self, kinds, torch.ones_like(voting), self.within_type):
            order = keys[places].argsort().tolist()
            source = {place: places[i] for place, i in zip(places, order, strict=True)}
            for place in places:
                if takes_part[place]:  # along its cycle to the next that takes part
                    giver = source[place]
                    while not takes_part[giver]:
                        giver = source[giver]
                    out[place] = multipliers[giver]
        return out


def _groups(
    asking: object, kinds: Sequence[str] | None, among: Tensor, within_type: bool
) -> list[list[int]]:
    """Places of layers: those ``among`` (L,) all together, or those of each type."""
    places = [i for i, does in enumerate(among.tolist()) if does]
    if not within_type:
        return [places] if places else []
    if kinds is None:
        raise ValueError(
            f"{type(asking).__name__}(within_type=True) needs the types of the layers: call it "
            "with kinds=[...]"
        )
    types = dict.fromkeys(kinds[i] for i in places)
    return [[i for i in places if kinds[i] == kind] for kind in types]


@dataclass(frozen=True)
class ByRole(_Around):
    """The map is told each layer's role in place of the class of its module.

    The role is the last part of the name that is no number (``q_proj`` of ``h.3.attn.q_proj``). In
    a transformer all layers are of one class; by their roles ``NullScore``, ``PerType`` and what
    has ``within_type`` tell them apart: ``ByRole(Shuffled(LinearMap(), within_type=True))``.

    Raises:
        ValueError: when called without the names of the layers.
    """

    def __call__(self, alphas: Alphas, kinds: Sequence[str] | None = None) -> Tensor:
        layers = Population.of(kinds, len(vector(alphas)))
        roles = tuple(role_of(name) for name in layers.named(self))
        return self.map(alphas, replace(layers, kinds=roles))


@dataclass(frozen=True)
class PerBlock:
    """Multipliers within each block of the network, and of each block.

    A layer's is that of its alpha among the alphas of its block (``inside``; ``layer_*`` of the
    released code of layer-wise rates), times that of its block's mean alpha among the blocks
    (``across``; the block's rate of Model Balancing). A layer outside of all blocks is one of its
    own. For one rate a block alone, the balancer's ``unit="block"`` does without this.

    Raises:
        ValueError: when called without the names of the layers.
        TypeError: for what is no assignment.
    """

    inside: Assignment
    across: Assignment | None = None

    def __post_init__(self) -> None:
        check_assignment("PerBlock: inside", self.inside)
        if self.across is not None:
            check_assignment("PerBlock: across", self.across)

    @property
    def uses_alphas(self) -> bool:
        return self.inside.uses_alphas or (self.across is not None and self.across.uses_alphas)

    @property
    def once(self) -> bool:
        return self.inside.once and (self.across is None or self.across.once)

    def __call__(self, alphas: Alphas, kinds: Sequence[str] | None = None) -> Tensor:
        values = vector(alphas)
        layers = Population.of(kinds, len(values))
        blocks: dict[str, list[int]] = {}
        for i, name in enumerate(layers.named(self)):
            blocks.setdefault(block_of(name), []).append(i)
        out = torch.ones_like(values)
        for places in blocks.values():
            out[places] = self.inside(values[places], layers.at(places))
        if self.across is not None:
            voting = valid(values)
            means = [values[p][voting[p]].mean() for p in blocks.values()]  # NaN where none votes
            about = Population(tuple(layers[p[0]] for p in blocks.values()), names=tuple(blocks))
            rates = self.across(torch.stack(means) if means else values, about)
            for places, rate in zip(blocks.values(), rates, strict=True):
                out[places] *= rate
            if self.uses_alphas:
                out[~voting] = 1.0
        return out


# --- without alpha -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Constant:
    """One multiplier for every balanced layer: is it only the mean rate that changed?"""

    mean: float = 1.0
    uses_alphas = False
    once = True

    def __post_init__(self) -> None:
        check_positive(self, mean=self.mean)

    def __call__(self, alphas: Alphas, kinds: Sequence[str] | None = None) -> Tensor:
        return torch.full_like(vector(alphas), self.mean)


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
                f"{self.multipliers!r}; those of a first measurement are PerType.measured(map)"
            )
        object.__setattr__(self, "multipliers", dict(self.multipliers))
        check_positive(self, default=self.default, **self.multipliers)

    @staticmethod
    def measured(map: Assignment) -> Frozen:
        """One multiplier a type, kept: the mean over parameters of what ``map`` gives at first."""
        return Frozen(Averaged(map, within_type=True))

    def __call__(self, alphas: Alphas, kinds: Sequence[str] | None = None) -> Tensor:
        if kinds is None:
            raise ValueError("PerType needs the types of the layers: call it with kinds=[...]")
        if len(kinds) != len(vector(alphas)):
            raise ValueError(f"PerType: {len(kinds)} types for {len(vector(alphas))} layers")
        rates = [float(self.multipliers.get(kind, self.default)) for kind in kinds]
        return torch.tensor(rates, dtype=torch.float64, device="cpu")
