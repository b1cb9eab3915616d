"""Metrics: the columns of WeightWatcher's details and summary, by the same names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from tempbalance.layers import Layer

Row = dict[str, str | int | float | bool]


def details(
    layers: Sequence[Layer],
    *,
    ids: Mapping[str, int] | None = None,
    mp_fit: bool = False,
    randomize: bool = False,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> list[Row]:
    """A row a layer, columns as in ``WeightWatcher.analyze()``; layers it would leave out have none.

    Args:
        ids: ``layer_id`` by name, as from :func:`module_ids`; default the position.
        mp_fit: also the Marchenko-Pastur fit of the weight (num_spikes, sigma_mp, mp_softrank...).
        randomize: also the shuffled weight (rand_num_spikes, max_rand_eval, rand_distance...).
        seed: of the shuffles.
        progress: called with the share of the work that was just done.
    """
    raise NotImplementedError


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Means over layers, as ``WeightWatcher.get_summary()``."""
    raise NotImplementedError


def module_ids(model: nn.Module) -> dict[str, int]:
    """WeightWatcher's ``layer_id`` of each module: its place among ``model.named_modules()``."""
    raise NotImplementedError
