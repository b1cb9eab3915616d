"""What balancing should do, tick by tick, written down plainly: no threads, whole copies, lists."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import tempbalance as tb
from tempbalance.layers import find_layers
from tempbalance.measure import measure


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
    hold: int | None = None,
    ramp: int = 0,
    assign: Any = tb.LinearMap(),  # noqa: B008
) -> Iterator[tuple[dict[str, Any], dict[str, float]]]:
    """Alphas and multipliers after each tick from 0 on; the model is moved on the way."""
    layers = find_layers(model).layers
    names = [layer.name for layer in layers]
    alphas: dict[str, float | None] = {}
    arrivals: dict[int, dict[str, Any]] = {}
    before: dict[str, float] = {}
    target: dict[str, float] = {}
    ramp_from, measured_once = 0, False

    def now(tick: int) -> dict[str, float]:
        if not target:
            return {}
        tick = tick if hold is None else min(tick, hold)
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
        ends = [end for end in (stop, hold) if end is not None]
        when = tick + (delay if measured_once else 0)
        due = tick >= start and (tick - start) % every == 0 and all(when < end for end in ends)
        if due:
            arrivals[when] = {r.name: r.alpha for r in measure(layers)}
        if tick in arrivals and all(tick < end for end in ends):
            alphas = arrivals.pop(tick)
            values = [a if (a := alphas[n]) is not None else math.nan for n in names]
            rates = dict(zip(names, map(float, assign(values)), strict=True))
            aim = {n: rates[n] for n in names if alphas[n] is not None}
            if aim != target:
                before, target, ramp_from = now(tick), aim, tick
            measured_once = True
        yield dict(alphas), now(tick)
