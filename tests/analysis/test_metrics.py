"""WeightWatcher's columns, against figures that WeightWatcher 0.7.7 printed for the same weights.

They were recorded (golden/weightwatcher.json) by ``np.random.seed(0)`` and
``WeightWatcher(model=network()).analyze(mp_fit=True, randomize=True)``, numpy 2.4, on a CPU.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import GOLDEN
from torch import Tensor, nn

from tempbalance.analysis.metrics import details, model_weights, module_ids, summary
from tempbalance.analysis.released_bulk import fit_bulk, random_columns
from tempbalance.layers import find_layers

Golden = dict[str, Any]
# Differences of two numbers that are nearly equal, and the root of one: noise, where they are 0.
NOISE = {"rand_distance": 1e-7, "ww_maxdist": 1e-12}


def network() -> nn.ModuleDict:
    """A layer of every kind that it reads, in every state that its fit treats apart."""
    model = nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 16, 5),
            "depthwise": nn.Conv2d(16, 16, 3, groups=16),
            "grouped": nn.Conv2d(16, 24, 3, groups=2),
            "wide": nn.Conv2d(30, 12, 3),
            "body": nn.Sequential(nn.Linear(60, 30), nn.Linear(20, 80), nn.LayerNorm(80)),
            "table": nn.Embedding(50, 24),
            "square": nn.Linear(40, 40),
            "deficient": nn.Linear(40, 32),
            "few": nn.Linear(12, 9),
            "small": nn.Linear(15, 40),
            "too small": nn.Linear(7, 40),
            "heavy": nn.Linear(64, 48),
        }
    )
    rng = np.random.RandomState(7)
    for parameter in model.parameters():
        parameter.data = torch.from_numpy(0.2 * rng.standard_normal(parameter.shape)).float()
    weight_of(model["deficient"])[20:] = 0
    heavy = weight_of(model["heavy"])
    heavy *= torch.from_numpy(np.arange(1.0, 65.0) ** -1.2).float()
    heavy[5, 6] = 9.0
    return model


def weight_of(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.data


@pytest.fixture(scope="module")
def recorded() -> Golden:
    return dict(json.loads((GOLDEN / "weightwatcher.json").read_text()))


def same(name: str, got: Any, expected: Any) -> None:
    if expected is None:  # the root of a rounding below zero, there
        assert got <= NOISE[name], name
    elif isinstance(expected, str) or isinstance(got, str):
        assert got == expected, name
    else:
        assert got == pytest.approx(expected, rel=1e-6, abs=NOISE.get(name, 0)), name


def test_every_column_is_that_of_weightwatcher(recorded: Golden) -> None:
    model = network()
    weights, ids = model_weights(model), module_ids(model)
    rows = details(weights, ids=ids, mp_fit=True, randomize=True, seed=0)
    assert [row["longname"] for row in rows] == [row["longname"] for row in recorded["details"]]
    for row, expected in zip(rows, recorded["details"], strict=True):
        assert row.keys() == expected.keys()
        for name, value in expected.items():
            same(name, row[name], value)
    means = summary(rows)
    assert means.keys() == recorded["summary"].keys()
    for name, value in recorded["summary"].items():
        same(name, means[name], value)


def test_columns_without_the_asked_for_ones(recorded: Golden) -> None:
    rows = details(model_weights(network()))
    asked = {name for name in recorded["details"][0] if name.startswith(("rand_", "ww_", "bulk"))}
    asked |= {"max_rand_eval", "num_traps", "num_spikes", "sigma_mp", "mp_softrank", "W_scale"}
    assert rows[0].keys() == recorded["details"][0].keys() - asked
    assert "mp_softrank" not in summary(rows)


def test_layers_of_the_package_have_the_same_rows(recorded: Golden) -> None:
    """What is measured elsewhere in the package, and is one weight there too."""
    expected = {row["longname"]: row for row in recorded["details"]}
    rows = details(find_layers(network()).layers)
    assert {"stem", "wide", "body.0", "square", "heavy"} <= {str(row["longname"]) for row in rows}
    for row in rows:
        name = str(row["longname"])
        if name != "grouped":  # of two groups each, where WeightWatcher has one slice
            for column in row.keys() - {"layer_id"}:
                same(column, row[column], expected[name][column])


# --- the recipe alone, on its own figures ---------------------------------------------------------


@pytest.fixture(scope="module")
def traps() -> Golden:
    return dict(json.loads((GOLDEN / "methods" / "traps.json").read_text()))["layers"]


@pytest.fixture(scope="module")
def arrays() -> dict[str, npt.NDArray[Any]]:
    with np.load(GOLDEN / "methods" / "traps.npz") as found:
        return dict(found)


def test_bulk_fits_are_the_released_ones(
    traps: Golden, arrays: dict[str, npt.NDArray[Any]]
) -> None:
    for name, layer in traps.items():
        expected = layer["first_seed"]
        sides = expected["N"], expected["M"]
        for prefix, values in (
            ("", arrays[f"evals/{name}"]),
            ("rand_", arrays[f"rand_evals/{name}"]),
        ):
            bulk = fit_bulk(np.sort(values), *sides)
            assert bulk.num_spikes == expected[f"{prefix}num_spikes"]
            assert bulk.sigma_mp == pytest.approx(expected[f"{prefix}sigma_mp"], rel=1e-6)
            assert bulk.mp_softrank == pytest.approx(expected[f"{prefix}mp_softrank"], rel=1e-6)
            assert bulk.bulk_max == pytest.approx(expected[f"{prefix}bulk_max"], rel=1e-6)


def test_shuffles_are_those_of_the_seed(traps: Golden, arrays: dict[str, npt.NDArray[Any]]) -> None:
    for name, layer in traps.items():
        weight = arrays[f"W/{name}"].astype(np.float64)
        first = layer["first_seed"]
        for expected in layer["seeds"][:2]:
            generator = np.random.RandomState(expected["seed"])
            values = np.sort(arrays[f"evals/{name}"])
            found = random_columns(weight[None], values, first["N"], first["M"], generator)
            for column in expected.keys() - {"seed"}:
                assert found[column] == pytest.approx(expected[column], rel=1e-6), column


def test_of_a_plateau_the_first_point_is_the_mode() -> None:
    """Rounding must not choose among equal densities; sigma is what WeightWatcher 0.7.7 has."""
    values = np.array([0.37, 0.4, 0.656, 1.615, 1.964, 2.744, 2.847, 3.09, 4.318])
    assert fit_bulk(values, 32, 1).sigma_mp == pytest.approx(0.5240267999208963, rel=1e-6)


def test_a_spectrum_of_zeros_has_no_bulk() -> None:
    assert fit_bulk(np.zeros(20), 30, 20).num_spikes == -1


# --- what it leaves out ---------------------------------------------------------------------------


class Spectral(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def test_complex_and_broken_weights_have_no_row(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"good": nn.Linear(20, 30), "broken": nn.Linear(20, 30)})
    weight_of(model["broken"])[2, 3] = math.nan
    model["complex"] = Spectral(torch.randn(9, 9, 4, dtype=torch.complex64))
    rows = details(find_layers(model).layers, mp_fit=True)
    assert [row["longname"] for row in rows] == ["good"]
    assert "'broken'" in caplog.text and "'complex'" in caplog.text


def test_an_all_zero_weight_fails_and_says_so() -> None:
    layer = nn.Linear(20, 30)
    layer.weight.data.zero_()
    (row,) = details(model_weights(nn.ModuleDict({"zero": layer})), mp_fit=True)
    assert (row["status"], row["alpha"], row["warning"]) == ("failed", -1.0, "")
    assert (row["norm"], row["matrix_rank"], row["rank_loss"]) == (0.0, 0, 20)


def test_an_extreme_alpha_norm_is_a_number() -> None:
    """WeightWatcher raises tiny eigenvalues to the power alpha, which is then 0."""
    weight = torch.diag(1e-2 * torch.linspace(1, 1.001, 30, dtype=torch.float64)).float()
    layer = nn.Linear(30, 30)
    layer.weight.data = weight
    (row,) = details(model_weights(nn.ModuleDict({"flat": layer})))
    assert float(row["alpha"]) > 100
    assert float(row["log_alpha_norm"]) == pytest.approx(-4 * float(row["alpha"]), rel=0.05)
