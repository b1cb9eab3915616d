"""Rates that equalize the progress of alpha, or relative updates without alpha (experimental).

Between two looks a layer's weight W moves by the relative update u = ||W' - W|| / ||W||, and its
alpha by |d alpha|. Its progress is q = |d alpha| / u: how far alpha goes for an update of one. The
aim is that relative updates are in proportion to q^-gamma:

- gamma = 1: every layer's alpha goes as far between two looks (u q = |d alpha| is equal). A layer
  whose alpha hardly follows its updates gets larger ones.
- gamma = 0: relative updates are equal; alpha plays no part. This is the control.
- gamma < 0: the roles exchanged: where alpha follows well, updates grow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from tempbalance.assign import Population, bounded
from tempbalance.assign.contract import Alphas, valid, vector
from tempbalance.balance.options import with_options
from tempbalance.integrations.lightning import TempBalanceCallback
from tempbalance.layers import Layer


@dataclass(frozen=True)
class Equalizer:
    """From relative updates u and moves |d alpha| (L,) to new logs of multipliers (L,).

    log m <- log m + damping (-gamma log q - log u), q = max(|d alpha|, floor) / u, then shifted so
    that the geometric mean of m over parameters is 1, within the bounds. As u is nearly in
    proportion to m, this approaches u ~ q^-gamma, at once with ``damping`` 1.

    Args:
        gamma: how much alpha counts; 0 not at all.
        damping: the share of the way that is gone at a look, in logs.
        floor: the least move of alpha that counts, above the noise of a small matrix.
        bounds: least and largest multiplier.

    Raises:
        ValueError: unless 0 < damping <= 1, 0 < floor and 0 < bounds[0] < 1 < bounds[1].
    """

    gamma: float = 1.0
    damping: float = 0.5
    floor: float = 0.01
    bounds: tuple[float, float] = (0.5, 2.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bounds", tuple(float(b) for b in self.bounds))
        low, high = self.bounds
        if not (0 < self.damping <= 1 and self.floor > 0 and 0 < low < 1 < high):
            raise ValueError(
                f"Equalizer: damping in (0, 1], floor above 0, bounds around 1; got {self}"
            )

    def __call__(self, logs: Tensor, updates: Tensor, moves: Tensor, sizes: Tensor) -> Tensor:
        """All (L,): logs of multipliers, u > 0, |d alpha|, parameters -> logs of multipliers."""
        progress = moves.clamp_min(self.floor) / updates
        aim = -self.gamma * progress.log() - updates.log()
        return bounded(logs + self.damping * aim, sizes, self.bounds)


class Progress:
    """An assignment that remembers the last look: weights, alphas and multipliers by layer.

    Layers without an alpha, or whose weight has not moved since their last look, keep what they
    have; at their first look that is 1.

    Args:
        equalizer: the formula.
        layers: gives the layers of the network as they are now, by name.
    """

    uses_alphas = True
    once = False

    def __init__(self, equalizer: Equalizer, layers: Callable[[], Mapping[str, Layer]]) -> None:
        self.equalizer, self._layers = equalizer, layers
        self.forget()

    def __repr__(self) -> str:
        return f"Progress({self.equalizer})"

    def forget(self) -> None:
        self._weights: dict[str, Tensor] = {}
        self._alphas: dict[str, float] = {}
        self._logs: dict[str, float] = {}

    def __call__(self, alphas: Alphas, kinds: Sequence[str] | None = None) -> Tensor:
        values = vector(alphas)
        population = Population.of(kinds, len(values))
        names = population.names or ()
        layers = self._layers()
        updates, moves = torch.zeros_like(values), torch.zeros_like(values)
        for i in valid(values).nonzero().flatten().tolist():
            if names and names[i] in layers:
                updates[i], moves[i] = self._look(layers[names[i]], float(values[i]))
        logs = torch.tensor([self._logs.get(name, 0.0) for name in names], dtype=torch.float64)
        voting = updates > 0
        if int(voting.sum()) > 1:
            sizes = population.weights[voting]
            logs[voting] = self.equalizer(logs[voting], updates[voting], moves[voting], sizes)
            self._logs.update(zip(names, logs.tolist(), strict=True))
        return logs.exp() if names else torch.ones_like(values)

    def _look(self, layer: Layer, alpha: float) -> tuple[float, float]:
        """Relative update and move of alpha since the last look; 0 at the first."""
        weight = layer.read().cpu().clone()
        before, alpha_before = self._weights.get(layer.name), self._alphas.get(layer.name)
        if before is None or alpha_before is None:
            update = 0.0
        else:
            norm = float(torch.linalg.vector_norm(before, dtype=_double(before)))
            moved = torch.linalg.vector_norm(weight - before, dtype=_double(before))
            update = float(moved) / norm if norm else 0.0
        if before is not None and not update:
            return 0.0, 0.0  # the same look once more
        self._weights[layer.name], self._alphas[layer.name] = weight, alpha
        return update, 0.0 if alpha_before is None else abs(alpha - alpha_before)

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": dict(self._weights),
            "alphas": dict(self._alphas),
            "logs": dict(self._logs),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._weights = dict(state["weights"])
        self._alphas = dict(state["alphas"])
        self._logs = dict(state["logs"])


def _double(weight: Tensor) -> torch.dtype:
    return torch.complex128 if weight.is_complex() else torch.float64


@with_options(without=("every",), files=True)
class ProgressCallback(TempBalanceCallback):
    """Train with :class:`Progress`; keeps a copy of every measured weight, in checkpoints too.

    Args:
        gamma, damping, floor, bounds: see :class:`Equalizer`.
        options: as for :class:`~tempbalance.integrations.lightning.TempBalanceCallback`.

    Raises:
        ValueError: for options out of range, and for ``delay``: alphas and weights of one time.
    """

    def __init__(
        self,
        *,
        gamma: float = 1.0,
        damping: float = 0.5,
        floor: float = 0.01,
        bounds: Sequence[float] = (0.5, 2.0),
        **options: Any,
    ) -> None:
        if options.get("delay"):
            raise ValueError("delay must be 0: alphas and weights of one time are compared")
        low, high = bounds
        equalizer = Equalizer(gamma, damping, floor, (low, high))
        self.progress = Progress(equalizer, self._by_name)
        super().__init__(assign=self.progress, **options)

    def _by_name(self) -> dict[str, Layer]:
        return {layer.name: layer for each in self.balancers for layer in each.layers}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.progress.forget()
        super().on_fit_start(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "progress": self.progress.state_dict()}

    def _restore(self, trainer: pl.Trainer, saved: dict[str, Any]) -> None:
        super()._restore(trainer, saved)
        self.progress.load_state_dict(saved["progress"])
