"""Units: what shares one rate, and from alphas to the multiplier of every layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from tempbalance.assign import Assignment, Population, block_of, normalized
from tempbalance.layers import Layer

Unit = str | Callable[[str], str]


def multipliers(
    layers: Sequence[Layer],
    active: Sequence[Layer],
    alphas: Mapping[str, float | None],
    assign: Assignment,
    unit: Unit = "layer",
    normalize: bool = False,
) -> dict[str, float]:
    """The multiplier of every active layer that has an alpha (of all, if none is looked at).

    The assignment sees the other layers too, without an alpha: places do not shift.
    """
    names = {layer.name for layer in active}
    units: dict[str, list[Layer]] = {}
    for layer in layers:
        units.setdefault(unit_of(layer, unit, assign), []).append(layer)
    means = []
    for members in units.values():
        known = [a for m in members if (a := alphas.get(m.name)) is not None]
        means.append(sum(known) / len(known) if known else float("nan"))
    population = Population(
        kinds=tuple(members[0].kind for members in units.values()),
        sizes=tuple(sum(m.numel for m in members) for members in units.values()),
        names=tuple(units),
    )
    rates = assign(means, population)
    rates = torch.where(torch.isfinite(rates) & (rates > 0), rates, torch.ones_like(rates))
    target = {
        m.name: float(rate)
        for members, rate in zip(units.values(), rates, strict=True)
        for m in members
        if m.name in names and (alphas.get(m.name) is not None or not assign.uses_alphas)
    }
    if normalize and target:
        sizes = {layer.name: float(layer.numel) for layer in layers}
        values = normalized(
            torch.tensor(list(target.values()), dtype=torch.float64, device="cpu"),
            torch.tensor([sizes[name] for name in target], dtype=torch.float64, device="cpu"),
        )
        target = dict(zip(target, map(float, values), strict=True))
    return target


def unit_of(layer: Layer, unit: Unit, assign: Assignment) -> str:
    """The name of the unit that a layer votes with."""
    if not assign.uses_alphas:  # nothing to average
        return layer.name
    if callable(unit):
        return unit(layer.name)
    return {"layer": layer.name, "block": block_of(layer.name), "type": layer.kind}[unit]
