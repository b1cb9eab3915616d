"""The search for xmin against a look at all of all tails, and how much of them it looks at."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tempbalance import KSFit
from tempbalance.spectra.nearest import LOOKED_AT_WHOLE
from tempbalance.spectra.powerlaw import PowerLaw
from tempbalance.spectra.tails import Tails

Values = npt.NDArray[np.float64]


def distances(values: Values) -> Values:
    """D of the tail from each eigenvalue, all of it; infinity where the tail is one value."""
    d = np.full(len(values), math.inf)
    for i in range(len(values) - 1):
        ratio = values[i:] / values[i]
        total, k = math.fsum(np.log(ratio)), len(ratio)
        if total > 1e-12:
            d[i] = np.abs(1 - ratio ** (-k / total) - np.arange(k) / k).max()
    return d


def spectrum(kind: str, n: int, rng: np.random.Generator) -> Values:
    values = {
        "pareto": lambda: (1 - rng.random(n)) ** (-1 / 1.5),
        "lognormal": lambda: rng.lognormal(0, 3, n),
        "bulk and tail": lambda: np.concatenate(
            [rng.random(n // 2), (1 - rng.random(n - n // 2)) ** (-1 / 2)]
        ),
        # Tails that are all alike: bounds leave many of them for long.
        "geometric": lambda: np.exp(np.arange(n) * 30 / n),
        "quantiles": lambda: (1 - (np.arange(n) + 0.5) / n) ** (-1 / 1.5),
        "repeated": lambda: np.round(rng.lognormal(0, 2, n) + 1),
        "one outlier": lambda: np.append(rng.normal(5, 0.1, n - 1) ** 2, 1e6),
    }[kind]()
    return np.sort(values)


KINDS = [
    *("pareto", "lognormal", "bulk and tail", "geometric", "quantiles", "repeated", "one outlier"),
]


def fitted(values: Values, padding: int = 0) -> PowerLaw:
    padded = np.concatenate([np.zeros(padding), values])
    return KSFit()(torch.from_numpy(padded).unsqueeze(0), torch.tensor([padding]))


def check_nearest(values: Values, law: PowerLaw) -> None:
    d = distances(values)
    assert float(law.d) == pytest.approx(d.min(), rel=1e-9, abs=1e-13)
    start = len(values) - int(law.n_tail)
    assert d[start] == pytest.approx(d.min(), rel=1e-9, abs=1e-13)
    assert float(law.xmin) == values[start]
    if np.sum(d <= d.min() + 1e-12) == 1:  # no other one within rounding
        assert start == d.argmin()


@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(8, 400),
    padding=st.integers(0, 9),
    seed=st.integers(0, 10**6),
)
def test_the_nearest_of_all_tails_is_found(kind: str, n: int, padding: int, seed: int) -> None:
    values = spectrum(kind, n, np.random.default_rng(seed))
    if values[0] < values[-1]:
        check_nearest(values, fitted(values, padding))


@pytest.mark.parametrize("kind", KINDS)
def test_the_nearest_is_found_where_bounds_decide(kind: str) -> None:
    values = spectrum(kind, 5000, np.random.default_rng(0))
    check_nearest(values, fitted(values, 7))


@pytest.mark.parametrize(("kind", "most"), [("lognormal", 40), ("pareto", 500)])
def test_few_gaps_are_looked_at(kind: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gaps an eigenvalue: all of them would be 20,000, and then 100,000.

    Where every tail is a power law (an exact Pareto sample) bounds have little to tell apart.
    """
    gaps, whole = [0], Tails._gap

    def counted(self: Tails, log_ratio: Tensor, *rest: Tensor) -> Tensor:
        gaps[0] += log_ratio.numel()
        return whole(self, log_ratio, *rest)

    monkeypatch.setattr(Tails, "_gap", counted)
    for n in (40_000, 200_000):
        gaps[0] = 0
        fitted(spectrum(kind, n, np.random.default_rng(1)))
        assert gaps[0] < most * n


@pytest.mark.parametrize("kind", KINDS)
def test_an_accelerator_finds_it_without_a_look_at_the_bounds(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More eigenvalues than are looked at whole: D is within the bound that is stated."""
    n = LOOKED_AT_WHOLE + 2000
    values = spectrum(kind, n, np.random.default_rng(2))
    exact = fitted(values)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    law = fitted(values)
    assert float(exact.d) <= float(law.d) * (1 + 1e-12)
    assert float(law.d) <= float(exact.d) + 1 / 256
    if kind != "geometric":  # in which all tails are as good as one
        assert float(law.d) == pytest.approx(float(exact.d), rel=1e-9)


def test_an_accelerator_looks_at_all_of_a_small_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    values = spectrum("repeated", 700, np.random.default_rng(3))
    exact = fitted(values, 5)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    for one, other in zip(exact, fitted(values, 5), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
