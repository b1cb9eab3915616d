"""Fits against exact Pareto samples, hand-worked spectra, and the slow twin."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempbalance import Hill, KSFit, PeakFit
from tempbalance.spectra.powerlaw import Fit, PowerLaw

TWINS: list[tuple[Fit, Callable[[npt.NDArray[np.float64]], reference.Law]]] = [
    (Hill(), reference.hill),
    (Hill(1.5), lambda v: reference.hill(v, 1.5)),
    (Hill(4), lambda v: reference.hill(v, 4)),
    (KSFit(), reference.ks),
    (PeakFit(), reference.peak),
    (PeakFit(released=True), reference.peak_released),
]


def one(fit: Fit, values: npt.NDArray[np.float64], padding: int = 0) -> list[float]:
    padded = np.concatenate([np.zeros(padding), np.sort(values)])
    law = fit(torch.from_numpy(padded).unsqueeze(0), torch.tensor([padding]))
    return [float(column) for column in law]


def spectrum(kind: str, n: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    values = {
        "pareto": lambda: rng.pareto(1.5, n) + 1,
        "lognormal": lambda: rng.lognormal(0, 2, n),
        "wishart": lambda: np.linalg.svd(rng.standard_normal((n, n)), compute_uv=False) ** 2,
        "steps": lambda: np.repeat(np.arange(1.0, n // 4 + 2), 4)[:n],
    }[kind]()
    return np.sort(np.asarray(values, dtype=np.float64))


@pytest.mark.parametrize(("fit", "twin"), TWINS, ids=lambda x: str(x)[:14])
@pytest.mark.parametrize("kind", ["pareto", "lognormal", "wishart", "steps"])
@pytest.mark.parametrize("n", [10, 27, 150])
@pytest.mark.parametrize("padding", [0, 13])
def test_agrees_with_the_slow_twin(
    fit: Fit,
    twin: Callable[[npt.NDArray[np.float64]], reference.Law],
    kind: str,
    n: int,
    padding: int,
) -> None:
    values = spectrum(kind, n, np.random.default_rng(n))
    if isinstance(
        fit, PeakFit
    ):  # a bin may hold no eigenvalue in the range: a rule of our own, below
        logs = np.log10(values)
        counts, edges = np.histogram(logs, 100)
        mode = 10 ** (edges[counts.argmax()] + np.diff(edges)[0] / 2)
        if fit.released:
            mode = 10 ** edges[counts.argmax()]
        low = math.log10(0.95 * mode) if fit.released else 0.95 * mode
        if not ((values[:-1] >= low) & (values[:-1] <= 1.5 * mode)).any():
            pytest.skip("no candidate near the peak")
    law = twin(values)
    np.testing.assert_allclose(one(fit, values, padding), law, rtol=1e-9)


@pytest.mark.parametrize("alpha", [1.3, 2.0, 3.5, 6.0])
@pytest.mark.parametrize("xmin_pos", [2, 4])
def test_hill_recovers_a_pareto_law(alpha: float, xmin_pos: float) -> None:
    """A tail of an exact Pareto law is one too; the standard error is (alpha - 1) / sqrt(n)."""
    rng = np.random.default_rng(0)
    n, repeats = 4000, 60
    samples = (1 - rng.random((repeats, n))) ** (-1 / (alpha - 1))
    samples.sort(-1)
    law = Hill(xmin_pos)(torch.from_numpy(samples), torch.zeros(repeats, dtype=torch.long))
    tail = n - int(n / xmin_pos)
    error = (alpha - 1) / math.sqrt(tail)
    assert law.n_tail.tolist() == [tail] * repeats
    assert float((law.alpha - alpha).abs().max()) < 4 * error
    assert abs(float(law.alpha.mean()) - alpha) < 3 * error / math.sqrt(repeats)
    assert float(law.alpha.std()) == pytest.approx(error, rel=0.35)


@pytest.mark.parametrize("fit", [KSFit(), PeakFit()])
def test_searches_find_a_pareto_tail_under_a_bulk(fit: Fit) -> None:
    """Half of the sample is uniform below 1, the other an exact law above it."""
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.random(1500), (1 - rng.random(1500)) ** (-1 / 1.5)])
    alpha, xmin, d, n_tail = one(fit, values)
    assert alpha == pytest.approx(2.5, abs=4 * 1.5 / math.sqrt(n_tail))
    assert 0.8 < xmin < 1.6
    assert d < 1.6 / math.sqrt(n_tail)


def test_hill_by_hand() -> None:
    """1 2 4 8 16: i = 2, ln(4/4) + ln(8/4) + ln(16/4) = 3 ln 2, alpha = 1 + 1 / ln 2."""
    alpha, xmin, d, n_tail = one(Hill(), np.array([1.0, 2, 4, 8, 16]))
    assert (xmin, n_tail) == (4.0, 3)
    assert alpha == pytest.approx(1 + 1 / math.log(2))
    # P(8) = 1 - 1/e against 1/3, P(16) = 1 - 1/e^2 against 2/3.
    assert d == pytest.approx(1 - math.exp(-1) - 1 / 3)


def test_both_ends_of_the_peak_bind() -> None:
    rng = np.random.default_rng(2)
    values = np.sort(np.concatenate([rng.lognormal(0, 0.05, 300), 30 * (rng.pareto(1.5, 300) + 1)]))
    _, xmin, _, _ = one(PeakFit(), values)
    counts, edges = np.histogram(np.log10(values), bins=100)
    mode = 10 ** (edges[counts.argmax()] + np.diff(edges)[0] / 2)
    assert 0.95 * mode <= xmin <= 1.5 * mode
    _, free, _, _ = one(KSFit(), values)
    assert not 0.95 * mode <= free <= 1.5 * mode


@given(
    n=st.integers(2, 60),
    scale=st.floats(1e-12, 1e12),
    seed=st.integers(0, 99),
    fit=st.sampled_from([Hill(), Hill(3), KSFit(), PeakFit()]),
)
def test_scale_moves_xmin_alone(n: int, scale: float, seed: int, fit: Fit) -> None:
    values = np.sort(np.random.default_rng(seed).lognormal(0, 1, n))
    plain, scaled = one(fit, values), one(fit, values * scale)
    if fit == PeakFit():  # a value on the edge of a bin may fall into the other one
        return
    assert scaled[0] == pytest.approx(plain[0], rel=1e-7)
    assert scaled[1] == pytest.approx(plain[1] * scale, rel=1e-9)
    assert scaled[2] == pytest.approx(plain[2], rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("fit", [Hill(), KSFit(), PeakFit()])
@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])  # all below 1, around it, all above
def test_a_batch_is_its_rows(fit: Fit, unit: float, device: torch.device) -> None:
    rng = np.random.default_rng(3)
    first = torch.tensor([0, 5, 30, 38, 40], device=device)
    values = torch.from_numpy(unit * np.sort(rng.lognormal(0, 2, (5, 40)), -1)).to(device)
    batch: PowerLaw = fit(values, first)
    for i in range(5):
        row = fit(values[i : i + 1], first[i : i + 1])
        for got, expected in zip(batch, row, strict=True):
            torch.testing.assert_close(got[i], expected[0], equal_nan=True, rtol=1e-12, atol=0)
    assert torch.isnan(batch.alpha[-1])  # nothing counts: no number
    assert batch.n_tail[-1] == 0


@pytest.mark.parametrize("fit", [Hill(), KSFit(), PeakFit()])
@pytest.mark.parametrize("values", [[2.0], [2.0] * 8, [1.0, 1.0, 1.0, 2.0]])
def test_degenerate_spectra_give_no_error(fit: Fit, values: list[float]) -> None:
    alpha, xmin, d, n_tail = one(fit, np.array(values))
    assert alpha > 1  # inf where the tail is one value: the caller reports "no spread"
    assert xmin in values
    assert math.isnan(d) == math.isinf(alpha)
    assert n_tail >= 1


@pytest.mark.parametrize("bad", [1, 0.5, 0, -2, math.nan, math.inf])
def test_xmin_pos_must_be_above_one(bad: float) -> None:
    with pytest.raises(ValueError, match="xmin_pos"):
        Hill(bad)


@pytest.mark.parametrize("bad", [{"bins": 0}, {"low": 0.0}, {"low": 2.0}, {"high": math.nan}])
def test_peak_range_must_be_one(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="PeakFit"):
        PeakFit(**bad)  # type: ignore[arg-type]
