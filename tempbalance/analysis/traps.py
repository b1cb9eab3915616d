"""Traps: atypical entries of a weight, seen in the spectrum of the shuffled weight.

Shuffling destroys whatever the entries of a weight have to do with each other; what is left is
how large they are. If they are of one kind, the eigenvalues of the shuffled weight end where those
of a random matrix end, and how far a largest eigenvalue strays from there is known: it has the
Tracy-Widom law. One beyond is a trap. It means atypical entries and says nothing of correlation,
so the largest entry and the kurtosis stand beside it.

Source: WeightWatcher's correlation traps; where this differs from its numbers: the mean of the
entries is removed (it is a spike of its own), the variance is that of the bulk, the threshold is
in units of the largest eigenvalue's own scatter, and several shuffles are made of one seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tempbalance.layers import Layer
from tempbalance.measure.measurement import DEFAULT_BUDGET
from tempbalance.spectra.gram import full_precision
from tempbalance.spectra.random_matrix import bulk_median, largest, tracy_widom_level
from tempbalance.spectra.spectrum import Task, spectra
from tempbalance.spectra.windows import WholeMatrix

# Sides below this tell too little: of few eigenvalues none is far from the others.
SMALLEST_SIDE = 5

_Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Traps:
    """What shuffling a weight shows; ``None`` where it cannot tell.

    Each slice of a stack (a kernel position, a Fourier mode) is shuffled apart and has a mean and
    a variance of its own. A number of a layer is that of all slices together.
    """

    traps: int | None = None  # eigenvalues beyond the threshold, over all slices
    trap_units: float | None = None  # the farthest one above the random edge, in units of its law
    largest_entry: float | None = None  # largest |entry - mean| over the standard deviation
    kurtosis: float | None = None  # of the entries, in excess of a Gaussian's


def find_traps(
    layers: Sequence[Layer],
    *,
    false_alarms: float = 0.01,
    shuffles: int = 5,
    seed: int = 0,
    budget: int = DEFAULT_BUDGET,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Traps]:
    """Correlation traps of every layer, by its name; counts and units are medians over shuffles.

    A layer at a time: extra memory is two copies of it in float32 and the Gram matrices of its
    slices, within the budget. What a layer gets does not depend on the other layers, but for the
    threshold.

    Args:
        false_alarms: the chance (0 to 0.5) that any of all slices of all layers is taken for one
            with a trap when none has one. The threshold is the Tracy-Widom quantile of
            1 - false_alarms / slices (Bonferroni). A median of several shuffles exceeds it less
            often than a single one, for which this holds.
        shuffles: how many; of an even number the lower median is taken.
        seed: of the shuffles.
        budget: bound on the memory for eigenvalues, in bytes.
        progress: called with the share of the work (0 to 1) that was just done.

    Raises:
        ValueError: for ``shuffles`` below 1 or ``false_alarms`` outside 0 to 0.5.
    """
    if shuffles < 1:
        raise ValueError(f"shuffles must be at least 1, got {shuffles!r}")
    if not 0 < false_alarms < 0.5:
        raise ValueError(f"false_alarms must lie between 0 and 0.5, got {false_alarms!r}")
    tests = sum(layer.shape[0] for layer in layers if min(layer.shape[1:]) >= SMALLEST_SIDE)
    chance = false_alarms / max(1, tests)
    costs = [layer.shape[0] * math.prod(layer.shape[1:]) * min(layer.shape[1:]) for layer in layers]
    found = {}
    for layer, cost in zip(layers, costs, strict=True):
        found[layer.name] = _traps_of(layer.read(), chance, shuffles, seed, budget, layer.name)
        if progress is not None:
            progress(cost / sum(costs))
    return found


@torch.no_grad()
def _traps_of(
    weight: Tensor, chance: float, shuffles: int, seed: int, budget: int, name: str
) -> Traps:
    """Of a weight (S, rows, cols)."""
    entries = _standardized(weight)
    if not len(entries) or not bool(torch.isfinite(entries).all()):
        return Traps()
    size = entries.abs()
    gaussian = 2 if weight.is_complex() else 3  # E|w|^4 of variance 1
    largest_entry = float(size.max())
    kurtosis = float(size.square_().square_().mean(dtype=torch.float64)) - gaussian
    if min(weight.shape[1:]) < SMALLEST_SIDE:
        return Traps(None, None, largest_entry, kurtosis)
    del size
    level = tracy_widom_level(chance, weight.is_complex())
    generator = np.random.default_rng(seed)
    counts, units = [], []
    for _ in range(shuffles):
        generator.permuted(entries.numpy(), axis=1, out=entries.numpy())
        values = _eigenvalues(entries, weight, budget, name)
        each = [_outliers(v, weight.shape[1:], weight.is_complex(), level) for v in values]
        counts.append(sum(count for count, _ in each))
        units.append(max(unit for _, unit in each))
    middle = (shuffles - 1) // 2
    return Traps(sorted(counts)[middle], sorted(units)[middle], largest_entry, kurtosis)


def _standardized(weight: Tensor) -> Tensor:
    """Entries of the slices whose entries differ: (S, rows * cols), mean 0, variance 1, a copy.

    On the CPU, where the shuffles are the same for a weight on any device.
    """
    flat = weight.cpu().flatten(1)
    flat = flat.to(torch.complex64 if flat.is_complex() else torch.float32, copy=True)
    flat /= torch.nan_to_num(flat.abs().amax(-1, keepdim=True), 1.0, 1.0).clamp_min(1e-38)
    flat -= flat.mean(-1, keepdim=True)
    std = torch.linalg.vector_norm(flat, dim=-1, keepdim=True) / math.sqrt(flat.shape[1])
    flat /= std
    return flat[(~(std <= 1e-6)).squeeze(-1)]  # all alike, to rounding


def _eigenvalues(entries: Tensor, weight: Tensor, budget: int, name: str) -> _Values:
    """(S, rows * cols) -> (S, k) ascending, computed where the weight is."""
    device = weight.device if weight.device.type == "cuda" else torch.device("cpu")
    slices = entries.view(-1, *weight.shape[1:]).to(device)
    grid = WholeMatrix().grid(*weight.shape[1:])
    one = torch.ones((), dtype=torch.float64, device=device)
    with full_precision(device.type):
        (values,) = spectra([Task(slices, grid, one, name)], budget)
    return values[0].double().cpu().numpy()


def _outliers(
    values: _Values, shape: torch.Size, is_complex: bool, level: float
) -> tuple[int, float]:
    """How many eigenvalues (k,) lie beyond the level, and how far the largest, in its units.

    Candidates are those beyond it where the variance is that of the median eigenvalue, which no
    few outliers move and which, unlike a quantile of the entries, is that of the bulk whatever
    their distribution. Of f candidates the smallest must be one also where it counts for the
    variance itself, sigma^2 = (sum lambda - sum of the f - 1 larger) / ((N - f + 1) (M - f + 1)):
    the largest such f, so that outliers do not hide each other, and scatter of the median makes
    none (the generalized extreme Studentized deviate test, Rosner 1983).
    """
    short, long = sorted(shape)

    def units(value: float, variance: float, outliers: int) -> float:
        centre, scale = largest(long - outliers, short - outliers, is_complex)
        return float((value / variance - centre) / scale)

    def variance(outliers: int) -> float:
        rest = float(values[: short - outliers].sum())
        return rest / ((long - outliers) * (short - outliers))

    centre, scale = largest(long, short, is_complex)
    bulk = float(np.median(values)) / bulk_median(long, short)
    count = int((values > bulk * (centre + level * scale)).sum())
    while count and units(values[-count], variance(count - 1), count - 1) <= level:
        count -= 1
    return count, units(values[-1], variance(count), 0)
