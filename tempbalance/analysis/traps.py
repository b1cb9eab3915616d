"""Traps: atypical entries of a weight, seen in the largest eigenvalue of the shuffled weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tempbalance.layers import Layer


@dataclass(frozen=True)
class Traps:
    """What shuffling a weight shows; numbers are ``None`` where the weight cannot tell.

    Each over all slices of a layer, a median over shuffles.
    """

    traps: int | None  # shuffled eigenvalues beyond the threshold
    trap_units: float | None  # the largest one above the random edge, in Tracy-Widom units
    largest_entry: float | None  # largest |entry - mean| over the standard deviation
    kurtosis: float | None  # of the entries, in excess of a Gaussian's 3


def find_traps(
    layers: Sequence[Layer],
    *,
    false_alarms: float = 0.01,
    shuffles: int = 5,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Traps]:
    """Correlation traps of every layer, by its name."""
    raise NotImplementedError
