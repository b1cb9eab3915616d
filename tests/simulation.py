"""What balancing should do, tick by tick, written down plainly: no threads, whole copies, lists."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

import tempbalance as tb
from tempbalance.layers.find import Layer, find_layers
from tempbalance.measure.measurement import measure
from tempbalance.measure.ranks import cost


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    sizes = [12, 16, 20, 14, 12, 18]
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))


def move(model: nn.Module, tick: int) -> None:
    """Weights of this tick: in turn layers move a lot, hardly at all, or in scale alone."""
    generator = torch.Generator().manual_seed(tick)
    with torch.no_grad():
        for i, layer in enumerate(find_layers(model).layers):
            weight = layer.module.weight
            noise = torch.randn(weight.shape, generator=generator) * weight.norm()
            noise /= weight.numel() ** 0.5
            how = (tick + i) % 4
            if how == 0:
                weight.add_(noise, alpha=0.2)
            elif how == 1:
                weight.add_(noise, alpha=1e-4)
            elif how == 2:
                weight.mul_(0.9)


def simulate(
    model: nn.Module,
    ticks: int,
    *,
    every: int = 1,
    delay: int = 0,
    start: int = 0,
    stop: int | None = None,
    ramp: int = 0,
    moved: float | None = None,
    max_age: int | None = None,
    per_update: int | float | None = None,
    assign: Any = tb.LinearMap(),  # noqa: B008
) -> Iterator[tuple[dict[str, Any], dict[str, float], dict[str, int]]]:
    """Alphas, multipliers and ages after each tick from 0 on; the model is moved on the way."""
    layers = {layer.name: layer for layer in find_layers(model).layers}
    names = list(layers)
    alphas: dict[str, float | None] = {}
    ages: dict[str, int] = {}
    copies: dict[str, np.ndarray] = {}
    arrivals: dict[int, tuple[list[str], dict[str, Any], dict[str, np.ndarray]]] = {}
    before: dict[str, float] = {}
    target: dict[str, float] = {}
    ramp_from, measured_once = 0, False

    def now(tick: int) -> dict[str, float]:
        if not target:
            return {}
        share = 1.0 if ramp == 0 else min(1.0, (tick - ramp_from) / ramp)
        if share >= 1.0:
            return dict(target)
        return {n: (1 - share) * before.get(n, 1.0) + share * target[n] for n in names}

    for tick in range(ticks + 1):
        if tick:
            move(model, tick)
        if tick == stop:
            aim = dict.fromkeys(target, 1.0)
            if aim != target:
                before, target, ramp_from = now(tick), aim, tick
        over = stop is not None and tick >= stop
        due = tick >= start and (tick - start) % every == 0 and not over
        if due and measured_once and stop is not None and tick + delay >= stop:
            due = False

        def take(tick: int) -> None:
            nonlocal alphas, ages, before, target, ramp_from, measured_once
            chosen, found, whole = arrivals.pop(tick)
            alphas |= found
            copies.update(whole)
            ages = {n: 0 if n in chosen else ages[n] + 1 for n in names if n in chosen or n in ages}
            values = [a if (a := alphas.get(n)) is not None else math.nan for n in names]
            rates = dict(zip(names, map(float, assign(values)), strict=True))
            aim = {n: rates[n] for n in names if alphas.get(n) is not None}
            if aim != target:
                before, target, ramp_from = now(tick), aim, tick
            measured_once = True

        if tick in arrivals and not over:
            take(tick)
        if due:
            weights = {n: _numpy(layers[n]) for n in names}
            chosen = list(names)
            if measured_once and moved is not None:
                oldest = 10 if max_age is None else max_age
                chosen = [
                    n
                    for n in names
                    if n not in ages
                    or ages[n] >= oldest
                    or not _change(weights[n], copies[n]) < moved
                ]
            if measured_once and per_update is not None:
                chosen = _in_turn(chosen, ages, layers, per_update)
            records = measure([layers[n] for n in chosen]) if chosen else []
            found = {r.name: r.alpha for r in records}
            when = tick + (delay if measured_once else 0)
            arrivals[when] = (chosen, found, {n: weights[n] for n in chosen})
            if when == tick:
                take(tick)
        yield dict(alphas), now(tick), dict(ages)


def _numpy(layer: Layer) -> np.ndarray:
    return layer.read().double().numpy().copy()


def _change(now: np.ndarray, before: np.ndarray) -> float:
    scale = (now * before).sum() / (before**2).sum()
    return float(np.sqrt(((now - scale * before) ** 2).sum() / (now**2).sum()))


def _in_turn(
    chosen: list[str], ages: dict[str, int], layers: dict[str, Layer], limit: int | float
) -> list[str]:
    queue = sorted(chosen, key=lambda n: -ages.get(n, 10**9))
    if isinstance(limit, int):
        some = set(queue[:limit])
    else:
        costs = {n: cost(layer, tb.Farms()) for n, layer in layers.items()}
        some, done = set(), 0.0
        for n in queue:
            if done >= limit * sum(costs.values()):
                break
            some.add(n)
            done += costs[n]
    return [n for n in layers if n in some]
