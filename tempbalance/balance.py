"""Balancer: when to measure, and the multiplier of every layer in between.

It knows a model and a clock, and neither optimizer nor scheduler, so that any framework can drive
it: call :meth:`Balancer.step` once for each tick of the clock, and read ``multipliers``.
"""

from __future__ import annotations

import fnmatch
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tempbalance.assign import Assignment, Clipped, LinearMap, normalized
from tempbalance.farms import Farms, Windows
from tempbalance.layers import Layer, Layers, find_layers, random_twin
from tempbalance.measure import DEFAULT_BUDGET, LayerRecord, measure
from tempbalance.powerlaw import Fit, Hill

logger = logging.getLogger("tempbalance")

Unit = str | Callable[[str], str]
_VERSION = 1
# Alphas of random layers of different shapes differ by about so much.
_MARGIN = 0.1
# As many layers that fail at once have a warning each.
_WARNINGS = 5


class BalanceWarning(UserWarning):
    """A layer could not be measured and keeps its base learning rate."""


class Balancer:
    """Multipliers of the learning rate for the layers of a model, measured now and then.

    Args:
        model: the model, wrapped in whatever way.
        parameters: balance only layers that have one of these parameters; default all.
        windows: which submatrices are measured.
        fit: the power-law fit.
        assign: alphas to multipliers.
        every: ticks between measurements.
        start: the first tick with balancing; before it all multipliers are 1 (for a warm-up).
        stop: the tick from which on multipliers are 1 again, or ``None``.
        skip_first, skip_last: leave out the first or last layer, in definition order among those
            that can be balanced.
        min_eigs: layers with fewer eigenvalues are not balanced and do not vote.
        exclude: patterns of layers to leave alone, by name or type (``("lm_head", "SpectralConv",
            "encoder.*")``): not measured, no vote, base rate.
        unit: what shares one rate: ``"layer"``, ``"block"`` (a numbered module, such as
            ``layer1.0`` or ``h.3``), ``"type"`` (the module's class), or a function from a layer's
            name to that of its unit. A unit votes with the mean alpha of its layers. Without
            effect on assignments that look at no alpha.
        normalize: divide by the mean multiplier over parameters, so that only the spread is left.
        ramp: ticks over which new multipliers are approached, linearly.
        clip: clip alphas to so many robust standard deviations around the median.
        fused: projections that share one weight, by name pattern: ``{"*.qkv": 3}``.
        budget: extra memory of a measurement, in bytes.
        process_group: ranks that share the work. Default: those of a model wrapped in DDP, all of
            them for one with sharded parameters (FSDP2), else none.

    Raises:
        ValueError: for an option out of range, or if no layer can be balanced.

    Attributes:
        records: the last measurement, a record a layer by name; empty before the first.
        seconds: wall-clock time spent measuring, in this process.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Iterable[nn.Parameter] | None = None,
        *,
        windows: Windows = Farms(),
        fit: Fit = Hill(),
        assign: Assignment = LinearMap(),
        every: int = 1,
        start: int = 0,
        stop: int | None = None,
        skip_first: bool = False,
        skip_last: bool = False,
        min_eigs: int = 10,
        exclude: Iterable[str] = (),
        unit: Unit = "layer",
        normalize: bool = False,
        ramp: int = 0,
        clip: float | None = None,
        fused: Mapping[str, int | tuple[int, ...]] | None = None,
        budget: int = DEFAULT_BUDGET,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        _check_options(every, start, stop, ramp, min_eigs, unit)
        if isinstance(exclude, str):
            raise ValueError(f"exclude takes a list of patterns: exclude=[{exclude!r}]")
        self.windows, self.fit = windows, fit
        self.assign = assign if clip is None else Clipped(assign, clip)
        self.every, self.start, self.stop, self.ramp = every, start, stop, ramp
        self.skip_first, self.skip_last = skip_first, skip_last
        self.min_eigs, self.unit, self.normalize = min_eigs, unit, normalize
        self.exclude = tuple(exclude)
        self.fused, self.budget = fused, budget
        self.process_group = process_group
        self.records: dict[str, LayerRecord] = {}
        self.seconds = 0.0
        self._model = model
        self._tick = 0
        self._measurements = 0
        self._alphas: dict[str, float | None] = {}
        self._target: dict[str, float] = {}
        self._before: dict[str, float] = {}
        self._ramp_from = 0
        self._reported: set[str] = set()
        self._among: set[int] | None = None
        self.found: Layers
        self.layers: tuple[Layer, ...]
        self.refresh(parameters)
        if not self.layers:
            raise ValueError(self._nothing_to_balance())

    def refresh(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Look for layers again: the model, or the parameters to balance, have changed."""
        self.found = find_layers(self._model, self.fused)
        if parameters is not None:
            self._among = {id(p) for p in parameters}
        among = self._among
        able = [
            layer
            for layer in self.found.layers
            if layer.eigenvalues >= self.min_eigs
            and not self._excluded(layer)
            and (among is None or any(id(p) in among for p in layer.tensors()))
        ]
        first = 1 if self.skip_first else 0
        self.layers = tuple(able[first : len(able) - 1 if self.skip_last else len(able)])
        group = self.process_group or _default_group(self._model, self.found)
        self._group = group if group is not None and dist.get_world_size(group) > 1 else None

    def _excluded(self, layer: Layer) -> bool:
        return any(
            fnmatch.fnmatchcase(text, pattern)
            for pattern in self.exclude
            for text in (layer.name, layer.kind)
        )

    @property
    def tick(self) -> int:
        """Calls of :meth:`step` so far."""
        return self._tick

    @property
    def measurements(self) -> int:
        """Measurements so far, those before a resume included."""
        return self._measurements

    @property
    def alphas(self) -> dict[str, float | None]:
        """The last alpha of every balanced layer; ``None`` where it could not be measured."""
        return dict(self._alphas)

    @property
    def multipliers(self) -> dict[str, float]:
        """The multiplier of every balanced layer at this tick; all others have 1."""
        if not self._target:
            return {}
        share = 1.0 if not self.ramp else min(1.0, (self._tick - self._ramp_from) / self.ramp)
        if share >= 1.0:
            return dict(self._target)
        return {
            name: (1 - share) * self._before.get(name, 1.0) + share * target
            for name, target in self._target.items()
        }

    def begin(self) -> None:
        """The tick before the first step: measure, unless balancing starts later."""
        if self._due():
            self.update()

    def step(self) -> None:
        """One tick of the clock: measure if it is time to."""
        self._tick += 1
        if self._due():
            self.update()
        elif self._tick == self.stop:
            self._aim(dict.fromkeys(self._target, 1.0))

    def update(self) -> None:
        """Measure now, and take the new multipliers.

        Layers whose weights are frozen are not measured and have multiplier 1. A layer that cannot
        be measured keeps its base rate; a warning names it the first time. Only a failure of the
        process group raises.
        """
        started = time.perf_counter()
        try:
            layers = [layer for layer in self.layers if layer.trainable]
        except (KeyError, AttributeError):  # a weight was parametrized, pruned or removed
            self.refresh()
            layers = [layer for layer in self.layers if layer.trainable]
        if self.assign.uses_alphas:
            records = self._measure(layers)
            self.records = {record.name: record for record in records}
            self._report(records)
        self._alphas = {layer.name: self._alpha(layer.name) for layer in self.layers}
        self._aim(self._assign(layers))
        self._measurements += 1
        self.seconds += time.perf_counter() - started

    def restart(self, tick: int) -> None:
        """Forget what was measured, set the clock, and measure if it is time to.

        For weights of a run without balancing: its ticks count for ``start`` and ``stop``.
        """
        self._tick = self._ramp_from = tick
        self._measurements = 0
        self._target, self._before, self._alphas, self.records = {}, {}, {}, {}
        if tick >= self.start and (self.stop is None or tick < self.stop):
            self.update()

    def _measure(self, layers: list[Layer]) -> list[LayerRecord]:
        def some(chosen: list[Layer]) -> list[LayerRecord]:
            return measure(
                chosen,
                windows=self.windows,
                fit=self.fit,
                min_eigs=self.min_eigs,
                budget=self.budget,
                group=self._group,
            )

        try:
            return some(layers)
        except Exception as error:
            if self._group is not None:  # the other ranks wait in a collective
                raise
            logger.warning("measuring failed (%r); trying layer by layer", error)
        records: list[LayerRecord] = []
        for layer in layers:
            try:
                records += some([layer])
            except Exception as error:
                if layer.name not in self._reported:
                    self._reported.add(layer.name)
                    what = f"layer {layer.name!r} could not be measured: {error!r}"
                    self._warn(f"{what}. It keeps its base learning rate.")
        return records

    def _due(self) -> bool:
        since = self._tick - self.start
        if since < 0 or since % self.every or (self.stop is not None and self._tick >= self.stop):
            return False
        # Without alphas it costs nothing, and layers that were added or unfrozen get their rate.
        return not (self.assign.once and self.assign.uses_alphas and self._measurements)

    def _alpha(self, name: str) -> float | None:
        record = self.records.get(name)
        return record.alpha if record is not None else None

    def _aim(self, target: dict[str, float]) -> None:
        if target == self._target:
            return  # a ramp under way goes on
        self._before, self._target = self.multipliers, target
        self._ramp_from = self._tick

    def _assign(self, layers: list[Layer]) -> dict[str, float]:
        """The multiplier of every layer that is balanced now.

        The assignment sees frozen layers too, without an alpha: places do not shift.
        """
        active = {layer.name for layer in layers}
        units: dict[str, list[Layer]] = {}
        for layer in self.layers:
            units.setdefault(self._unit(layer), []).append(layer)
        means = []
        for members in units.values():
            known = [a for m in members if (a := self._alphas[m.name]) is not None]
            means.append(sum(known) / len(known) if known else float("nan"))
        rates = self.assign(means, [members[0].kind for members in units.values()])
        rates = torch.where(torch.isfinite(rates) & (rates > 0), rates, torch.ones_like(rates))
        target = {
            m.name: float(rate)
            for members, rate in zip(units.values(), rates, strict=True)
            for m in members
            if m.name in active
            and (self._alphas[m.name] is not None or not self.assign.uses_alphas)
        }
        if self.normalize and target:
            sizes = {layer.name: float(layer.numel) for layer in layers}
            values = normalized(
                torch.tensor(list(target.values()), dtype=torch.float64),
                torch.tensor([sizes[name] for name in target], dtype=torch.float64),
            )
            target = dict(zip(target, map(float, values), strict=True))
        return target

    def _unit(self, layer: Layer) -> str:
        if not self.assign.uses_alphas:  # nothing to average
            return layer.name
        if callable(self.unit):
            return self.unit(layer.name)
        return {"layer": layer.name, "block": block_of(layer.name), "type": layer.kind}[self.unit]

    def _report(self, records: list[LayerRecord]) -> None:
        new = [r for r in records if not r.outcome.measured and r.name not in self._reported]
        self._reported.update(r.name for r in new)
        if len(new) > _WARNINGS:
            names = [r.name for r in new]
            self._warn(
                f"{len(new)} layers cannot be measured and keep their base learning rate: "
                f"{_some(names)}. The first: {new[0].message}"
            )
            return
        for record in new:
            self._warn(f"{record.message}. It keeps its base learning rate.")

    def _warn(self, text: str) -> None:
        warnings.warn(text, BalanceWarning, stacklevel=5)

    def _nothing_to_balance(self) -> str:
        if self.found.layers:
            small = ", ".join(f"{x.name} ({x.eigenvalues})" for x in self.found.layers[:5])
            return (
                "no layer to balance: of the layers that can be measured none is left by the "
                f"options (min_eigs={self.min_eigs}, skip_first={self.skip_first}, "
                f"skip_last={self.skip_last}, exclude={list(self.exclude)}) or has "
                "parameters in the optimizer. Measurable layers and their numbers of "
                f"eigenvalues: {small}"
            )
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in self.found.skipped[:5])
        return f"no layer to balance: the model has no weight matrix ({reasons or 'no parameter'})"

    def theory_marks(self) -> tuple[list[str], list[str]]:
        """Layers that theory calls over-trained, and under-trained, by the last measurement.

        Over-trained: alpha under 2, and under that of a random matrix of the same shape by more
        than the margin (small windows read just under 2 at random). Under-trained: alpha within
        the margin of the random one. The margin is 0.1. Random matrices are drawn from a
        generator of their own.

        Source: Martin and Mahoney (2021), JMLR 22 (165); Prakash and Martin on anti-grokking.
        """
        self.refresh()
        layers = [layer for layer in self.layers if self._alphas.get(layer.name) is not None]
        random = [random_twin(layer) for layer in layers]
        records = measure(
            random, windows=self.windows, fit=self.fit, min_eigs=self.min_eigs, budget=self.budget
        )
        over, under = [], []
        for layer, record in zip(layers, records, strict=True):
            alpha, baseline = self._alphas[layer.name], record.alpha
            if alpha is None or baseline is None:
                continue
            if alpha < min(2.0, baseline - _MARGIN):
                over.append(layer.name)
            elif abs(alpha - baseline) <= _MARGIN:
                under.append(layer.name)
        return over, under

    # --- state -------------------------------------------------------------------------------

    def __getstate__(self) -> object:
        raise TypeError(
            "balancing is bound to its model and cannot be copied or pickled: save state_dict(), "
            "build a new one on the copied model and optimizer, and load the state there"
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain values by layer name; loads with ``weights_only=True``."""
        return {
            "version": _VERSION,
            "layers": {layer.name: list(layer.shape) for layer in self.layers},
            "tick": self._tick,
            "measurements": self._measurements,
            "alphas": dict(self._alphas),
            "target": dict(self._target),
            "before": dict(self._before),
            "ramp_from": self._ramp_from,
            "reported": sorted(self._reported),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` left off; measures nothing.

        Raises:
            ValueError: if the state is of another model or other options, naming what differs.
        """
        if state.get("version") != _VERSION:
            raise ValueError(
                f"this balancer state has version {state.get('version')!r}; this release of "
                f"tempbalance reads version {_VERSION}"
            )
        self._compare(state["layers"])
        self._tick = int(state["tick"])
        self._measurements = int(state["measurements"])
        self._alphas = dict(state["alphas"])
        self._target = dict(state["target"])
        self._before = dict(state["before"])
        self._ramp_from = int(state["ramp_from"])
        self._reported = set(state["reported"])
        self.records = {}

    def _compare(self, saved: Mapping[str, Any]) -> None:
        here = {layer.name: list(layer.shape) for layer in self.layers}
        gone = [name for name in saved if name not in here]
        new = [name for name in here if name not in saved]
        changed = [
            f"{n} ({saved[n]} in the checkpoint, {here[n]} here)"
            for n in here
            if n in saved and list(saved[n]) != here[n]
        ]
        differences = [
            f"{what}: {_some(names)}"
            for what, names in (
                ("only in the checkpoint", gone),
                ("only in this model", new),
                ("of another shape", changed),
            )
            if names
        ]
        if differences:
            raise ValueError(
                "the checkpoint balances other layers than this model. "
                + "; ".join(differences)
                + ". Build the same model, with the same skip_first, skip_last, min_eigs, "
                "exclude and fused, and put the same parameters into the optimizer."
            )


def block_of(name: str) -> str:
    """The block of a layer: its name up to the first numbered module that holds more than it.

    >>> block_of("layer1.0.downsample.0"), block_of("h.3.attn.c_attn"), block_of("conv1")
    ('layer1.0', 'h.3', 'conv1')
    """
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if re.fullmatch(r"(.*_)?\d+", part):
            return ".".join(parts[: i + 1])
    return ".".join(parts[:-1]) or name


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _check_options(
    every: int, start: int, stop: int | None, ramp: int, min_eigs: int, unit: Unit
) -> None:
    for name, value, least in (
        ("every", every, 1),
        ("start", start, 0),
        ("ramp", ramp, 0),
        ("min_eigs", min_eigs, 2),
    ):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if stop is not None and not (isinstance(stop, int) and stop > start):
        raise ValueError(
            f"stop must be an integer after start={start}, got {stop!r}; None never stops"
        )
    if not callable(unit) and unit not in ("layer", "block", "type"):
        raise ValueError(f"unit must be 'layer', 'block', 'type' or a function, got {unit!r}")


def _default_group(model: nn.Module, found: Layers) -> dist.ProcessGroup | None:
    """Ranks that hold the same model and step together, where that can be seen."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return module.process_group
    sharded = any(hasattr(p, "full_tensor") for x in found.layers for p in x.tensors())
    return dist.group.WORLD if sharded else None
