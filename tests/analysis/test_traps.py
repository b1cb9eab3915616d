"""Traps: none in random and in structured matrices, all that are planted, and what shuffling is."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import GOLDEN
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tempbalance.analysis.traps import SMALLEST_SIDE, Traps, find_traps
from tempbalance.layers import Layer, find_layers

Array = npt.NDArray[np.float64]


def linear(weight: Array | Tensor) -> nn.Linear:
    tensor = torch.as_tensor(weight)
    module = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False)
    module.weight.data = tensor if tensor.is_floating_point() else tensor.float()
    return module


def layers_of(**weights: Array | Tensor) -> list[Layer]:
    model = nn.ModuleDict({name: linear(weight) for name, weight in weights.items()})
    return list(find_layers(model).layers)


def traps_of(weight: Array | Tensor, **options: Any) -> Traps:
    (found,) = find_traps(layers_of(one=weight), **options).values()
    return found


def gaussian(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


# --- none where there are none ------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 64), (12, 12), (16, 80)])
def test_false_alarms_are_no_more_than_stated(shape: tuple[int, int]) -> None:
    """A single shuffle each, of 300 Gaussian matrices; four standard errors are allowed."""
    chance, repeats = 0.1, 300
    alarms = sum(
        bool(traps_of(gaussian(shape, seed), false_alarms=chance, shuffles=1).traps)
        for seed in range(repeats)
    )
    assert alarms <= repeats * chance + 4 * np.sqrt(repeats * chance)


def test_the_rate_is_that_of_all_layers_together() -> None:
    model = nn.ModuleDict({str(i): linear(gaussian((24, 16), i)) for i in range(400)})
    found = find_traps(find_layers(model).layers, false_alarms=0.05, shuffles=1)
    assert sum(bool(each.traps) for each in found.values()) == 0


def test_units_of_a_random_matrix_are_tracy_widom() -> None:
    """Its median is -1.27 and 98% of it lie between -3.9 and 2.0."""
    units = [traps_of(gaussian((90, 60), seed)).trap_units for seed in range(40)]
    assert all(unit is not None and -3.9 < unit < 2.03 for unit in units)
    assert np.median(np.array(units, float)) == pytest.approx(-1.27, abs=0.4)


@pytest.mark.parametrize(
    "name",
    ["gauss_sq_160", "gauss_mean_300x150", "spiked5_300x200", "powerlaw2p5_240x160",
     "powerlaw1p6_240x160", "rank20_200x100"],
)  # fmt: skip
def test_structure_and_a_mean_are_no_traps(name: str) -> None:
    """WeightWatcher counts the mean as one."""
    with np.load(GOLDEN / "methods" / "traps.npz") as arrays:
        found = traps_of(arrays[f"W/{name}"])
    assert found.traps == 0
    assert found.trap_units is not None and found.trap_units < 2


# --- all that there are -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [("outlier1_240x160", 1), ("outlier3_240x160", 3), ("outlier1_small_120x60", 1)],
)
def test_planted_entries_are_counted(name: str, count: int) -> None:
    with np.load(GOLDEN / "methods" / "traps.npz") as arrays:
        weight = arrays[f"W/{name}"]
    layer = json.loads((GOLDEN / "methods" / "traps.json").read_text())["layers"][name]
    found = traps_of(weight)
    assert found.traps == count
    assert found.trap_units is not None and found.trap_units > 20
    # The figures' own is of the entries as they are, and their mean is not quite 0.
    assert found.largest_entry == pytest.approx(layer["first_seed"]["entry_max_over_std"], rel=1e-2)


@given(
    rows=st.integers(20, 70),
    cols=st.integers(20, 70),
    count=st.integers(1, 5),
    scale=st.floats(1e-6, 1e6),
    seed=st.integers(0, 1000),
)
def test_power(rows: int, cols: int, count: int, scale: float, seed: int) -> None:
    """Entries whose square is three times the random edge are found, each of them, at any scale."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, cols))
    where = rng.choice(weight.size, count, replace=False)
    edge = (np.sqrt(rows) + np.sqrt(cols)) ** 2
    weight.flat[where] = np.sqrt(3 * edge) * rng.choice([-1, 1], count)
    found = traps_of(scale * (weight + 0.5))
    assert found.traps is not None
    # Two in one row or column of a shuffle share an eigenvalue.
    assert count - 1 <= found.traps <= count
    assert found.traps >= 1


def test_outliers_do_not_hide_each_other() -> None:
    """Six entries that double the variance of all entries together."""
    weight = gaussian((120, 120))
    weight.flat[::2411] = np.sqrt(120 * 120 / 6)
    found = traps_of(weight)
    assert found.traps is not None and found.traps >= 5


@pytest.mark.parametrize("entries", ["uniform", "laplace", "signs", "sparse"])
def test_the_bulk_sets_the_variance_whatever_the_entries_are(entries: str) -> None:
    rng = np.random.default_rng(5)
    shape = (150, 100)
    weight = {
        "uniform": rng.uniform(-1, 1, shape),
        "laplace": rng.laplace(size=shape),
        "signs": rng.choice([-1.0, 1.0], shape),
        "sparse": rng.standard_normal(shape) * (rng.random(shape) < 0.4),
    }[entries]
    assert traps_of(weight).traps == 0
    weight[3, 4] = 30 * weight.std()
    assert traps_of(weight).traps == 1


# --- of any kind of layer -----------------------------------------------------------------------


def test_slices_of_a_convolution_are_shuffled_apart() -> None:
    """Kernel positions of very different size are no trap; one entry in each of two is two."""
    conv = nn.Conv2d(40, 30, 3, bias=False)
    sizes = torch.logspace(-2, 2, 9).view(1, 1, 3, 3)
    conv.weight.data = torch.from_numpy(gaussian((30, 40, 3, 3))).float() * sizes
    (none,) = find_traps(find_layers(conv).layers).values()
    assert none.traps == 0
    assert none.kurtosis == pytest.approx(0, abs=0.2)
    conv.weight.data[0, 0, 0, 0] = 40 * 1e-2
    conv.weight.data[5, 7, 2, 2] = 40 * 1e2
    (two,) = find_traps(find_layers(conv).layers).values()
    assert two.traps == 2


class Spectral(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def test_complex_weights() -> None:
    """Each mode has the law of a complex matrix; 64 of them together give no alarm."""
    rng = np.random.default_rng(3)
    values = rng.standard_normal((16, 20, 8, 8)) + 1j * rng.standard_normal((16, 20, 8, 8))
    weight = torch.from_numpy(values).to(torch.complex64)
    (found,) = find_traps(find_layers(Spectral(weight)).layers).values()
    assert found.traps == 0
    assert found.kurtosis == pytest.approx(0, abs=0.1)
    weight[2, 3, 1, 1] = torch.tensor(30j)
    (found,) = find_traps(find_layers(Spectral(weight)).layers).values()
    assert found.traps == 1


def test_what_cannot_tell_has_no_number() -> None:
    small = gaussian((SMALLEST_SIDE - 1, 40))
    layers = layers_of(small=small, zero=np.zeros((20, 20)), nan=np.full((20, 20), np.nan))
    found = find_traps(layers)
    assert found["small"].traps is None and found["small"].trap_units is None
    assert found["small"].largest_entry == pytest.approx(
        np.abs(small - small.mean()).max() / small.std(), rel=1e-5
    )
    assert found["zero"] == found["nan"] == Traps()


def test_figures_of_the_entries() -> None:
    weight = np.random.default_rng(6).standard_t(5, (80, 50)) + 0.3
    found = traps_of(weight)
    z = (weight - weight.mean()) / weight.std()
    assert found.largest_entry == pytest.approx(np.abs(z).max(), rel=1e-5)
    assert found.kurtosis == pytest.approx((z**4).mean() - 3, rel=1e-4)


# --- a measurement that can be repeated -----------------------------------------------------------


def test_a_layer_has_the_same_numbers_beside_others_and_nothing_changes() -> None:
    weight = torch.from_numpy(np.random.default_rng(7).standard_t(4, (50, 40))).float()
    before, state = weight.clone(), np.random.random(3)
    np.random.seed(0)
    alone = traps_of(weight)
    beside = find_traps(layers_of(other=gaussian((30, 30)), one=weight))["one"]
    assert beside.trap_units == alone.trap_units
    assert traps_of(weight, seed=1).trap_units != alone.trap_units
    assert torch.equal(weight, before)
    np.testing.assert_array_equal(np.random.random(3), state)


def test_progress_adds_up_to_one() -> None:
    done: list[float] = []
    find_traps(layers_of(a=gaussian((30, 20)), b=gaussian((60, 70))), progress=done.append)
    assert sum(done) == pytest.approx(1)


@pytest.mark.parametrize("bad", [{"shuffles": 0}, {"false_alarms": 0.0}, {"false_alarms": 0.7}])
def test_options_are_checked(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        traps_of(gaussian((9, 9)), **bad)
