"""Units: what shares one rate, and from alphas to the multiplier of every layer."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch

from tempbalance.assign import Assignment, Population, block_of, normalized
from tempbalance.assign.contract import Nulls
from tempbalance.layers import Layer
from tempbalance.measure.method import Method
from tempbalance.measure.null import null_alphas

logger = logging.getLogger("tempbalance")

Unit = str | Callable[[str], str]


def multipliers(
    layers: Sequence[Layer],
    active: Sequence[Layer],
    alphas: Mapping[str, float | None],
    assign: Assignment,
    unit: Unit = "layer",
    normalize: bool = False,
    method: Method | None = None,
) -> dict[str, float]:
    """The multiplier of every active layer that has an alpha (of all, if none is looked at).

    The assignment sees the other layers too, without an alpha: places do not shift. One that asks
    what random matrices read gets that of the ``method`` by which alphas were measured.
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
        nulls=None if method is None else lambda: _nulls(units, alphas, method),
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


def _nulls(
    units: Mapping[str, Sequence[Layer]], alphas: Mapping[str, float | None], method: Method
) -> Nulls:
    """Mean and standard deviation of alpha of random matrices in each unit's place.

    A unit's alpha is the mean of its layers', whose random matrices are independent.
    """
    known = [m for members in units.values() for m in members if alphas.get(m.name) is not None]
    logger.debug("simulating random matrices of the shapes of %d layers", len(known))
    null = null_alphas(known, method)
    out: list[tuple[float, float] | None] = []
    for members in units.values():
        each = [null[m.name] for m in members if m.name in null]
        mean = sum(n.mean for n in each) / max(1, len(each))
        std = math.hypot(*(n.std for n in each)) / max(1, len(each))
        out.append((mean, std) if each else None)
    return out
