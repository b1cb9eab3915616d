"""Laws of random matrices against published figures and against simulated matrices."""

from __future__ import annotations

import numpy as np
import pytest

from tempbalance.spectra.random_matrix import bulk_median, largest, tracy_widom_level


@pytest.mark.parametrize(
    ("chance", "is_complex", "level"),
    [  # Bejan (2005), tables; Prahofer's tabulated F_1 and F_2 give the same digits
        (0.10, False, 0.4501),
        (0.05, False, 0.9793),
        (0.01, False, 2.0234),
        (0.05, True, -0.2325),
        (0.01, True, 0.4776),
    ],
)
def test_tracy_widom_levels_are_the_tabulated_ones(
    chance: float, is_complex: bool, level: float
) -> None:
    assert tracy_widom_level(chance, is_complex) == pytest.approx(level, abs=2e-4)


@pytest.mark.parametrize("is_complex", [False, True])
def test_far_levels_follow_the_known_tail(is_complex: bool) -> None:
    """1 - F_1(s) ~ exp(-2/3 s^1.5) / (4 sqrt(pi) s^0.75), 1 - F_2 ~ exp(-4/3 s^1.5) / (16 pi
    s^1.5): with a relative correction that falls as s^-1.5.
    """
    for chance in (1e-5, 1e-7, 1e-9):
        s = tracy_widom_level(chance, is_complex)
        if is_complex:
            tail = np.exp(-4 / 3 * s**1.5) / (16 * np.pi * s**1.5)
        else:
            tail = np.exp(-2 / 3 * s**1.5) / (4 * np.sqrt(np.pi) * s**0.75)
        assert abs(tail / chance - 1) < 1.5 / s**1.5


@pytest.mark.parametrize("is_complex", [False, True])
def test_the_largest_eigenvalue_scatters_by_the_law(is_complex: bool) -> None:
    rng = np.random.default_rng(0)
    long, short, repeats = 96, 48, 1500
    w = rng.standard_normal((repeats, long, short))
    if is_complex:
        w = (w + 1j * rng.standard_normal(w.shape)) / np.sqrt(2)
    top = np.linalg.svd(w, compute_uv=False)[:, 0] ** 2
    centre, scale = largest(long, short, is_complex)
    units = (top - centre) / scale
    for chance in (0.3, 0.1, 0.03):
        share = float((units > tracy_widom_level(chance, is_complex)).mean())
        assert share == pytest.approx(chance, abs=4 * np.sqrt(chance / repeats))


@pytest.mark.parametrize("shape", [(300, 300), (300, 150), (400, 40)])
def test_the_median_of_the_bulk(shape: tuple[int, int]) -> None:
    w = np.random.default_rng(1).standard_normal(shape)
    values = np.linalg.svd(w, compute_uv=False) ** 2
    assert bulk_median(*shape) == pytest.approx(float(np.median(values)), rel=0.03)


@pytest.mark.parametrize("chance", [0.0, 0.5, -1.0, float("nan")])
def test_a_chance_must_be_one(chance: float) -> None:
    with pytest.raises(ValueError, match="chance"):
        tracy_widom_level(chance)
