"""Alphas of matrices as the released pruning codes print them, to 1e-4; D to 1e-4 as well."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import GOLDEN
from torch import nn

import tempbalance as tb
from tempbalance.spectra.powerlaw import Fit
from tempbalance.spectra.windows import Windows

Golden = dict[str, Any]


@pytest.fixture(scope="module")
def pruning() -> Golden:
    return dict(json.loads((GOLDEN / "methods" / "pruning.json").read_text()))


@pytest.fixture(scope="module")
def block(pruning: Golden) -> nn.Module:
    model = nn.ModuleDict()
    with np.load(GOLDEN / "methods" / "pruning.npz") as arrays:
        for name in pruning["order"]:
            weight = torch.from_numpy(arrays[f"W/{name}"])
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data = weight
            model[name.replace(".", "-")] = linear
    return model


def check(golden: Golden, model: nn.Module, name: str, windows: Windows, fit: Fit) -> None:
    report = tb.analyze(model, windows=windows, fit=fit, min_eigs=2)
    expected = golden["metrics"][name]
    for field in ("alpha", "D"):
        got = [getattr(layer, field) for layer in report]
        np.testing.assert_allclose(got, expected[field], rtol=1e-4)
    if "n_eigs" in expected:
        assert [layer.n_eigs for layer in report] == expected["n_eigs"]


@pytest.mark.parametrize(
    ("name", "fit"),
    [
        ("alpha_mid", tb.Hill()),
        ("alpha_ks", tb.KSFit()),
        ("alpha_peak", tb.PeakFit(released=True)),
    ],
)
def test_whole_matrices(pruning: Golden, block: nn.Module, name: str, fit: Fit) -> None:
    check(pruning, block, name, tb.WholeMatrix(), fit)


@pytest.mark.parametrize(("rows", "ratio", "per_dim"), [(64, 1.0, 3), (48, 1.0, 5), (40, 2.0, 4)])
@pytest.mark.parametrize(("name", "fit"), [("mid", tb.Hill()), ("peak", tb.PeakFit(released=True))])
def test_farms_windows(
    pruning: Golden, block: nn.Module, rows: int, ratio: float, per_dim: int, name: str, fit: Fit
) -> None:
    windows = tb.Farms.released_linear(rows, ratio, per_dim, None)
    key = f"alpha_{name}_farms_rows{rows}_Q{ratio}_ops{per_dim}"
    check(pruning, block, key, windows, fit)


def test_the_released_peak_depends_on_the_unit_of_the_weight() -> None:
    """On that of the weight itself, whatever unit the engine measures in.

    A power law from 1 up, and a peak at 20. Where the peak is at 2.8, log10 of it is compared.
    """
    law = (1 - (np.arange(240) + 0.5) / 240) ** -1.0
    eigenvalues = np.concatenate([law, np.linspace(20, 20.1, 16)])
    fit, alphas = tb.PeakFit(released=True), []
    for unit in (1 / 64, 2.8 / 20):
        layer = nn.Linear(256, 256, bias=False)
        layer.weight.data = torch.from_numpy(np.diag(np.sqrt(eigenvalues * unit)))
        (record,) = tb.analyze(layer, windows=tb.WholeMatrix(), fit=fit).layers
        expected = reference.peak_released(np.sort(eigenvalues * unit))
        assert (record.alpha, record.xmin) == pytest.approx(expected[:2], rel=1e-6)
        alphas.append(record.alpha)
    assert alphas[0] != pytest.approx(alphas[1], rel=0.01)
