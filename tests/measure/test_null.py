"""Null: what random matrices read, against numpy, figures of the study, and known laws."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tempbalance as tb
from tempbalance.measure import null as module
from tempbalance.measure.method import Method
from tempbalance.measure.null import null_alphas


def hill(spectra: Sequence[np.ndarray]) -> float:
    """Hill's estimator on the upper half of the pooled eigenvalues, in plain numpy."""
    values = np.sort(np.concatenate(spectra))
    tail = values[len(values) // 2 :]
    return float(1 + len(tail) / np.log(tail / tail[0]).sum())


def simulated(slices: int, rows: int, cols: int, draws: int, is_complex: bool) -> list[float]:
    """Alphas of whole Gaussian slices, pooled, by singular values in float64."""
    draw = np.random.default_rng(5)
    out = []
    for _ in range(draws):
        w = draw.normal(size=(slices, rows, cols))
        if is_complex:
            w = w + 1j * draw.normal(size=w.shape)
        out.append(hill([np.linalg.svd(s, compute_uv=False) ** 2 for s in w]))
    return out


@pytest.mark.parametrize(
    ("shape", "stack", "is_complex"),
    [
        ((20, 20), (1, 20, 20), False),
        ((48, 30), (1, 48, 30), False),
        ((24, 16, 3, 3), (9, 24, 16), False),
        ((7, 12, 12), (7, 12, 12), True),
    ],
)
def test_mean_and_spread_are_those_of_an_independent_simulation(
    shape: tuple[int, ...], stack: tuple[int, int, int], is_complex: bool
) -> None:
    got = tb.null_alpha(shape, tb.WholeMatrix(), is_complex=is_complex)
    alphas = simulated(*stack, 400, is_complex)
    mean, std = statistics.fmean(alphas), statistics.stdev(alphas)
    assert got.draws == 64
    # Four standard errors of a mean and of a standard deviation of 64, and of 400.
    assert got.mean == pytest.approx(mean, abs=4 * std * math.sqrt(1 / 64 + 1 / 400))
    assert got.std == pytest.approx(std, rel=4 * math.sqrt(1 / 126 + 1 / 798))


def test_figures_of_the_study() -> None:
    """A square Gaussian matrix of 20 reads 2.26 +- 0.16, where Hill's own formula says 0.40."""
    null = tb.null_alpha((20, 20), tb.WholeMatrix(), draws=400)
    assert null.mean == pytest.approx(2.26, abs=0.03)
    assert null.std == pytest.approx(0.16, abs=0.02)


def marchenko_pastur(q: float) -> float:
    """Hill's alpha of the upper half of the Marchenko-Pastur law of a ratio of sides q <= 1."""
    t = (np.arange(200_000) + 0.5) * math.pi / 200_000
    value = (1 + q + 2 * math.sqrt(q) * np.cos(t))[::-1]
    share = (np.sin(t) ** 2)[::-1] / value
    share /= share.sum()
    upper = np.cumsum(share) >= 0.5
    logs = np.log(value[upper] / value[upper][0])
    return float(1 + 1 / np.average(logs, weights=share[upper]))


@pytest.mark.parametrize("shape", [(512, 512), (512, 256), (512, 128), (512, 64)])
def test_against_the_law_of_large_matrices(shape: tuple[int, int]) -> None:
    """A ranking by plain alpha ranks shapes; windows of one ratio take that out."""
    whole = tb.null_alpha(shape, tb.WholeMatrix(), draws=16)
    wanted = marchenko_pastur(shape[1] / shape[0])
    # Of N eigenvalues the law is off by about 1 / N, and the mean of 16 by a quarter of the noise.
    assert abs(whole.mean - wanted) < whole.std + wanted / shape[1]
    windows = tb.null_alpha(shape, tb.Farms(rows=64), draws=4)
    assert windows.mean == pytest.approx(2.114, abs=0.02)


def test_large_matrices_vary_less_and_need_fewer_draws() -> None:
    nulls = [tb.null_alpha((n, n), tb.WholeMatrix()) for n in (16, 64, 256)]
    assert nulls[0].std > 2 * nulls[1].std > 4 * nulls[2].std
    assert [n.draws for n in nulls] == [64, 64, 64]
    kind = module._Kind((1, 4096, 4096), False, tb.WholeMatrix(), tb.Hill(), "cpu")
    assert kind.enough() == 8


@dataclass(frozen=True)
class Scaled:
    """Hill's fit of a weight times a factor: its eigenvalues times the square."""

    factor: float
    in_units = True

    def __call__(self, eigenvalues: Tensor, first: Tensor) -> Any:
        return tb.Hill()(eigenvalues * self.factor**2, first)


@settings(max_examples=20)
@given(st.floats(1e-6, 1e6), st.integers(8, 24), st.integers(8, 24))
def test_the_scale_of_the_entries_does_not_matter(factor: float, rows: int, cols: int) -> None:
    plain = tb.null_alpha((rows, cols), draws=3)
    scaled = tb.null_alpha((rows, cols), fit=Scaled(factor), draws=3)
    assert scaled == pytest.approx(plain, rel=1e-5)


@settings(max_examples=15)
@given(st.integers(6, 30), st.integers(6, 30))
def test_a_weight_and_its_transpose_have_one_null(rows: int, cols: int) -> None:
    a, b = (tb.null_alpha(shape, draws=24) for shape in ((rows, cols), (cols, rows)))
    error = math.hypot(a.std, b.std) / math.sqrt(24)
    assert abs(a.mean - b.mean) < 5 * error


def test_simulated_once_and_from_a_generator_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain = module.measured

    def counted(layers: Any, **options: Any) -> Any:
        calls.append(len(layers))
        return plain(layers, **options)

    monkeypatch.setattr(module, "measured", counted)
    before = torch.get_rng_state()
    first = tb.null_alpha((33, 21), draws=5)
    assert tb.null_alpha((33, 21), tb.Farms(), tb.Hill(), draws=5) == first
    assert calls == [2, 2, 2]  # always by twos
    # Fewer are the first of them, more go on from there; another shape, windows or fit is another.
    fewer = tb.null_alpha((33, 21), draws=2)
    assert len(calls) == 3 and fewer.draws == 2
    tb.null_alpha((33, 21), draws=7)
    assert len(calls) == 4
    tb.null_alpha((33, 21), tb.WholeMatrix(), draws=5)
    tb.null_alpha((33, 21), fit=tb.KSFit(), draws=5)
    assert len(calls) == 10
    assert torch.equal(torch.get_rng_state(), before)
    module._memory.cache_clear()
    assert tb.null_alpha((33, 21), draws=2) == fewer  # the same in every process
    with torch.device("meta"):  # no value can be read of what is made there
        module._memory.cache_clear()
        assert tb.null_alpha((33, 21), draws=2) == fewer


@dataclass
class Mutable:
    """A fit without a hash, which may change: nothing of it is remembered."""

    share: float

    def __call__(self, eigenvalues: Tensor, first: Tensor) -> Any:
        return tb.Hill(self.share)(eigenvalues, first)


def test_a_fit_of_ones_own() -> None:
    fit = Mutable(2.0)
    assert tb.null_alpha((30, 20), fit=fit, draws=3) == tb.null_alpha((30, 20), draws=3)
    fit.share = 4.0
    assert tb.null_alpha((30, 20), fit=fit, draws=3) == tb.null_alpha(
        (30, 20), fit=tb.Hill(4.0), draws=3
    )


def test_layers_have_the_null_of_their_shape_as_the_readers_see_it() -> None:
    net = nn.Sequential(nn.Conv2d(12, 20, 3), nn.Flatten(), nn.Linear(40, 30))
    report = tb.analyze(net)
    method = Method(tb.ByLayer({"Linear": tb.WholeMatrix(), "*": tb.Farms()}))
    shares: list[float] = []
    module._memory.cache_clear()
    for _ in range(2):  # simulated, and remembered
        nulls = null_alphas(report.layers, method, progress=shares.append)
        assert sum(shares) == pytest.approx(1.0)
        shares.clear()
    assert nulls["0"] == tb.null_alpha(tuple(net[0].weight.shape))  # type: ignore[arg-type]
    assert nulls["0"] == tb.null_alpha(report["0"].shape)
    assert nulls["2"] == tb.null_alpha((30, 40), tb.WholeMatrix())


@pytest.mark.parametrize("shape", [(5,), (0, 4), (3, 4, 5, 6, 7, 8), (2.0, 3), 7, "ab", (True, 3)])
def test_a_shape_that_is_none(shape: Any) -> None:
    with pytest.raises(ValueError, match=r"shape must be \(out, in\)"):
        tb.null_alpha(shape)


def test_other_arguments_out_of_range() -> None:
    with pytest.raises(ValueError, match="no alpha: too small"):
        tb.null_alpha((1, 9))
    with pytest.raises(ValueError, match="draws must be at least 1"):
        tb.null_alpha((9, 9), draws=0)
    with pytest.raises(TypeError, match="windows must be an object, got the class"):
        tb.null_alpha((9, 9), tb.Farms)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="windows of one layer"):
        tb.null_alpha((9, 9), {"*": tb.Farms()})  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(64, 27), (33, 7), (20, 20)])
def test_what_was_drawn_before_and_beside_changes_nothing(shape: tuple[int, int]) -> None:
    def fresh(*before: int) -> tb.NullAlpha:
        module._memory.cache_clear()
        for draws in before:
            tb.null_alpha(shape, tb.Farms(), tb.Hill(), draws=draws)
        return tb.null_alpha(shape, tb.Farms(), tb.Hill(), draws=8)

    assert fresh() == fresh(1) == fresh(7) == fresh(3, 5)
