"""The figures that the published codes print, to 1e-4 relative; they come from float32 SVDs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

import tempbalance as tb
from tempbalance.spectra.powerlaw import Fit
from tempbalance.spectra.windows import Windows

RTOL = 1e-4
Weights = dict[str, npt.NDArray[np.float32]]


@pytest.fixture(scope="module")
def model(golden_weights: Weights) -> nn.ModuleDict:
    modules = nn.ModuleDict()
    for name, weight in golden_weights.items():
        module: nn.Conv2d | nn.Linear
        if weight.ndim == 4:
            module = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], bias=False)
        else:
            module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        module.weight.data = torch.from_numpy(weight)
        modules[name] = module
    return modules


def same(report: tb.Report, names: list[str], field: str, expected: Any) -> None:
    got = np.array([getattr(report[name], field) for name in names], dtype=float)
    np.testing.assert_allclose(got, expected, rtol=RTOL)


def check(model: nn.Module, expected: dict[str, Any], windows: Windows, fit: Fit) -> tb.Report:
    report = tb.analyze(model, windows=windows, fit=fit, min_eigs=2)
    same(report, expected["name"], "alpha", expected["alpha"])
    same(report, expected["name"], "D", expected["D"])
    if "n_eigs" in expected:
        assert [report[name].n_eigs for name in expected["name"]] == expected["n_eigs"]
    return report


@pytest.mark.parametrize(
    ("key", "fit"),
    [
        ("median", tb.Hill()),
        ("median_filter_zeros", tb.Hill()),
        ("median_xmin_pos_1.5", tb.Hill(1.5)),
        ("median_xmin_pos_3", tb.Hill(3)),
        ("median_xmin_pos_4", tb.Hill(4)),
        ("goodness-of-fit", tb.KSFit()),
    ],
)
def test_plain(model: nn.Module, golden: dict[str, Any], key: str, fit: Fit) -> None:
    check(model, golden["plain"][key], tb.WholeMatrix(), fit)


def test_plain_norms(model: nn.Module, golden: dict[str, Any]) -> None:
    """The published codes scale convolutions by sqrt(1/2), which we do not: lambda is halved."""
    expected = golden["plain"]["median"]
    report = tb.analyze(model, windows=tb.WholeMatrix(), min_eigs=2)
    half = np.array([0.5 if name in golden["conv"] else 1.0 for name in expected["name"]])
    names = expected["name"]
    top = half * np.array([report[name].lambda_max for name in names], dtype=float)
    alpha = np.array([report[name].alpha for name in names], dtype=float)
    same(report, names, "lambda_max", expected["spectral_norm"] / half)
    same(report, names, "frobenius_norm", np.sqrt(expected["norm"] / half))
    np.testing.assert_allclose(alpha * np.log10(top), expected["alphahat"], rtol=RTOL)
    same(report, names, "alpha_hat", alpha * np.log10(top / half))
    ranks = golden["plain"]["median_filter_zeros"]
    same(report, ranks["name"], "stable_rank", ranks["stable_rank"])


@pytest.mark.parametrize("q", ["0.5", "0.75", "1.0", "1.25", "1.5", "2.0"])
def test_released_conv(model: nn.Module, golden: dict[str, Any], q: str) -> None:
    check(model, golden["farms_conv"][q], tb.Farms.released_conv(float(q)), tb.Hill())


@pytest.mark.parametrize("case", range(6))
def test_released_linear(model: nn.Module, golden: dict[str, Any], case: int) -> None:
    expected = golden["farms_linear"][case]
    windows = tb.Farms.released_linear(
        expected["window_rows"],
        expected["aspect_ratio"],
        expected["windows_per_dim"],
        expected["stride"],
    )
    check(model, expected, windows, tb.Hill())
