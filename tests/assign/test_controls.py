"""Controls that know more of a layer than its alpha: sizes, types and blocks."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tempbalance as tb
from tempbalance.assign import Assignment

NAN = float("nan")
layer = st.tuples(
    st.one_of(st.floats(1.5, 9.0), st.just(NAN)),
    st.sampled_from(["Conv2d", "Linear", "SpectralConv"]),
    st.integers(1, 10**8),
)
layers = st.lists(layer, min_size=1, max_size=20)


def split(some: list[tuple[float, str, int]]) -> tuple[list[float], tb.Population]:
    alphas, kinds, sizes = zip(*some, strict=True)
    return list(alphas), tb.Population(kinds, sizes=sizes)


def test_a_population_is_the_list_of_its_types() -> None:
    some = tb.Population(("Conv2d", "Linear"), sizes=(9, 10))
    assert list(some) == ["Conv2d", "Linear"] and some[1] == "Linear" and len(some) == 2
    assert tb.PerType({"Conv2d": 0.5})([2.0, 3.0], some).tolist() == [0.5, 1.0]
    with pytest.raises(ValueError, match="1 sizes for 2"):
        tb.Population(("Conv2d", "Linear"), sizes=(9,))
    with pytest.raises(ValueError, match="2 types for 3"):
        tb.Averaged(tb.LinearMap())([2.0, 3.0, 4.0], some)


def test_level_over_parameters_and_over_layers() -> None:
    """98% of the parameters at 0.5, 2% at 1.5: the level is 0.52, the mean over layers is 1."""
    about = tb.Population(("Linear", "Linear", "Linear"), sizes=(98, 2, 1000))
    alphas = [2.0, 4.0, NAN]
    level = tb.Averaged(tb.LinearMap(0.5, 1.5))
    assert level(alphas, about).tolist() == pytest.approx([0.52, 0.52, 1.0], abs=1e-15)
    plain = tb.Averaged(tb.LinearMap(0.5, 1.5), by_parameters=False)
    assert plain(alphas, about).tolist() == [1.0, 1.0, 1.0]
    assert level(alphas).tolist() == [1.0, 1.0, 1.0]  # sizes unknown: every layer alike


@given(layers, st.booleans())
def test_averages_keep_what_all_parameters_together_move(
    some: list[tuple[float, str, int]], within: bool
) -> None:
    alphas, about = split(some)
    inner = tb.SigmoidMap(1.0)
    got = tb.Averaged(inner, within_type=within)(alphas, about).tolist()
    plain = inner(alphas, about).tolist()
    for kind in {"Conv2d", "Linear", "SpectralConv"} if within else {None}:
        mine = [i for i, (a, k, _) in enumerate(some) if k == (kind or k) and not math.isnan(a)]
        assert len({got[i] for i in mine}) <= 1
        moved = math.fsum(got[i] * some[i][2] for i in mine)
        assert moved == pytest.approx(math.fsum(plain[i] * some[i][2] for i in mine))
    assert all(m == 1.0 for m, (a, _, _) in zip(got, some, strict=True) if math.isnan(a))


@given(layers, st.integers(0, 5))
def test_shuffled_within_a_type_keeps_the_rates_of_every_type(
    some: list[tuple[float, str, int]], seed: int
) -> None:
    alphas, about = split(some)
    got = tb.Shuffled(tb.LinearMap(), seed, within_type=True)(alphas, about).tolist()
    plain = tb.LinearMap()(alphas).tolist()
    for kind in set(about):
        mine = [i for i in range(len(some)) if about[i] == kind]
        assert Counter(got[i] for i in mine) == Counter(plain[i] for i in mine)


def test_shuffled_within_a_type_shuffles() -> None:
    alphas = [2.0 + i for i in range(12)]
    kinds = ["Conv2d", "Linear"] * 6
    plain = tb.LinearMap()(alphas).tolist()
    seen = set()
    for seed in range(5):
        got = tb.Shuffled(tb.LinearMap(), seed, within_type=True)(alphas, kinds).tolist()
        assert got != plain
        seen.add(tuple(got))
    assert len(seen) == 5


@pytest.mark.parametrize("assign", [tb.Shuffled, tb.Averaged])
def test_within_a_type_needs_types(assign: type[tb.Shuffled] | type[tb.Averaged]) -> None:
    with pytest.raises(ValueError, match=rf"{assign.__name__}.*types of the layers"):
        assign(tb.LinearMap(), within_type=True)([2.0, 3.0])


def test_rates_by_type_of_a_first_measurement() -> None:
    about = tb.Population(("Conv2d", "Linear", "Conv2d", "Linear"), sizes=(1, 5, 3, 5))
    assign = tb.PerType.measured(tb.LinearMap(0.5, 1.5))
    got = assign([2.0, 3.0, 4.0, NAN], about)  # plain 0.5, 1.0, 1.5, 1.0
    assert got.tolist() == [1.25, 1.0, 1.25, 1.0]
    assert assign.once and assign.uses_alphas
    with pytest.raises(TypeError, match=r"PerType\.measured\(map\)"):
        tb.PerType(tb.LinearMap())  # type: ignore[arg-type]


def test_blocks_inside_and_across() -> None:
    """Means 3 and 5: 10 ** -+0.25 of each block (tau = ln 3), times 0.5 to 1.5 within it."""
    names = ("h.0.a", "h.0.b", "h.0.c", "h.1.a", "h.1.b", "head")
    about = tb.Population(("Linear",) * 6, names=names)
    alphas = [2.0, 3.0, 4.0, 5.0, NAN, NAN]
    inside = tb.PerBlock(tb.LinearMap(0.5, 1.5))
    assert inside(alphas, about).tolist() == [0.5, 1.0, 1.5, 1.0, 1.0, 1.0]
    both = tb.PerBlock(tb.LinearMap(0.5, 1.5), across=tb.SigmoidMap(1.0, math.log(3)))
    low, high = 10**-0.25, 10**0.25
    wanted = [0.5 * low, low, 1.5 * low, high, 1.0, 1.0]
    assert both(alphas, about).tolist() == pytest.approx(wanted, rel=1e-12)
    assert both.uses_alphas and not both.once


MAPS: list[Assignment] = [tb.LinearMap(0.1, 1.9), tb.SigmoidMap(1.0, 10), tb.StandardSigmoid()]
AROUND = [
    tb.Averaged,
    tb.Clipped,
    tb.Frozen,
    tb.Reversed,
    tb.Shuffled,
    tb.PerBlock,
    lambda a: tb.Averaged(a, within_type=True),
    lambda a: tb.Shuffled(a, within_type=True),
]


@given(st.lists(layer, min_size=2, max_size=9))
def test_controls_compose_in_every_order(some: list[tuple[float, str, int]]) -> None:
    alphas, about = split(some)
    names = tuple(f"h.{i // 3}.{'qkv'[i % 3]}" for i in range(len(some)))
    about = tb.Population(about.kinds, about.sizes, names)
    bases = [*MAPS, tb.DepthDecay(), tb.DepthLinear(), tb.PerType({"Linear": 0.3}), tb.Constant(2)]
    for base, (first, second) in itertools.product(bases, itertools.product(AROUND, AROUND)):
        got = second(first(base))(alphas, about)
        assert torch.isfinite(got).all() and (got > 0).all()
        if base.uses_alphas:
            bad = [m for m, a in zip(got.tolist(), alphas, strict=True) if math.isnan(a)]
            assert bad == [1.0] * len(bad)
