"""Assignments: published figures, hand-worked values, float64 twins, and the contract of them all.

The twins are plain Python over lists, and use nothing of the package.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from schedules import ASSIGNMENTS

import tempbalance as tb
from tempbalance.assign import Assignment, normalized

NAN, INF = float("nan"), float("inf")
MAPS: dict[str, Assignment] = {
    "linear": tb.LinearMap(0.1, 1.9),
    "sqrt": tb.SqrtShare(),
    "log2": tb.Log2Share(),
    "rank": tb.RankMap(0.5, 1.5),
    "sigmoid": tb.SigmoidMap(1.0, 10),
    "sigmoid_sides": tb.SigmoidMap((0.5, 1.0), 5),
    "standard_sigmoid": tb.StandardSigmoid(1.5, 2.0),
}
ALL = {**ASSIGNMENTS, **{f"map_{name}": value for name, value in MAPS.items()}}
LOOKING = {name: a for name, a in ALL.items() if a.uses_alphas}


# --- twins ---------------------------------------------------------------------------------------


def linear(a: list[float], s1: float, s2: float) -> list[float]:
    return [s1 + (s2 - s1) * (x - min(a)) / (max(a) - min(a)) for x in a]


def share(a: list[float], f: Callable[[float], float]) -> list[float]:
    total = math.fsum(map(f, a))
    return [f(x) * len(a) / total for x in a]


def rank(a: list[float], s1: float, s2: float) -> list[float]:
    places = [[i for i, y in enumerate(sorted(a)) if y == x] for x in a]
    return [s1 + (s2 - s1) * (sum(p) / len(p)) / len(a) for p in places]


def sigmoid(a: list[float], below: float, above: float, tau: float) -> list[float]:
    mean = math.fsum(a) / len(a)
    out = []
    for x in a:
        z = max(-700.0, min(700.0, tau * (x - mean)))
        s = above if x > mean else below
        out.append(10 ** (s * (1 / (1 + math.exp(-z)) - 0.5)))
    return out


def standard_sigmoid(a: list[float], top: float, tau: float) -> list[float]:
    mean = math.fsum(a) / len(a)
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in a) / len(a))
    return [top / (1 + math.exp(-tau * (x - mean) / std)) for x in a]


TWINS: dict[str, Callable[[list[float]], list[float]]] = {
    "linear": lambda a: linear(a, 0.1, 1.9),
    "sqrt": lambda a: share(a, math.sqrt),
    "log2": lambda a: share(a, math.log2),
    "rank": lambda a: rank(a, 0.5, 1.5),
    "sigmoid": lambda a: sigmoid(a, 1.0, 1.0, 10),
    "sigmoid_sides": lambda a: sigmoid(a, 0.5, 1.0, 5),
    "standard_sigmoid": lambda a: standard_sigmoid(a, 1.5, 2.0),
}

alphas = st.lists(st.floats(1.01, 60.0), min_size=2, max_size=30)


@given(alphas)
def test_against_twins(values: list[float]) -> None:
    assume(max(values) > min(values))
    for name, assign in MAPS.items():
        got = assign(values).tolist()
        # A share has no multiplier under 1/1000; no alpha here comes near it.
        assert got == pytest.approx(TWINS[name](values), rel=1e-9), name


def test_published_figures(golden: dict[str, Any]) -> None:
    seen = set()
    for case in golden["balance"]:
        function, rate = case["function"], case["untuned_lr"]
        if function == "tb_std_sigmoid":
            assign: Assignment = tb.SigmoidMap((case["s_min"], case["s_max"]), case["tau"])
        else:
            ends = [case[k] for k in ("lr_min_ratio", "lr_max_ratio") if k in case]
            kinds = {"tb_linear_map": tb.LinearMap, "tb_sqrt": tb.SqrtShare}
            kinds |= {"tb_log2": tb.Log2Share, "tb_step": tb.RankMap}
            assign = kinds[function](*ends)
        seen.add(function)
        assert (rate * assign(case["alpha"])).tolist() == pytest.approx(case["lr"], rel=1e-4)
    assert len(seen) == 5


def test_hand_worked() -> None:
    a = [2.0, 3.0, 4.0, 6.0]
    assert tb.LinearMap(0.5, 1.5)(a).tolist() == [0.5, 0.75, 1.0, 1.5]
    assert tb.LinearMap(1.5, 0.5)(a).tolist() == [1.5, 1.25, 1.0, 0.5]
    assert tb.RankMap(0.5, 1.5)([4.0, 2.0, 3.0, 6.0]).tolist() == [1.0, 0.5, 0.75, 1.25]
    assert tb.RankMap(0.5, 1.5)([3.0, 3.0, 2.0, 6.0]).tolist() == [0.875, 0.875, 0.5, 1.25]
    assert tb.SqrtShare()([4.0, 16.0]).tolist() == pytest.approx([2 / 3, 4 / 3], abs=1e-15)
    assert tb.Log2Share()([2.0, 8.0]).tolist() == pytest.approx([0.5, 1.5], abs=1e-15)
    assert tb.Log2Share()([1.0, 8.0]).tolist() == pytest.approx([1e-3, 2.0], abs=1e-15)
    # mean 3, offsets -+1, sigmoid(tau) = 3/4 at tau = ln 3: 10 ** (-+ s / 4)
    got = tb.SigmoidMap((1.0, 2.0), math.log(3))([2.0, 4.0]).tolist()
    assert got == pytest.approx([10**-0.25, 10**0.5], rel=1e-12)
    assert tb.Reversed(tb.LinearMap(0.5, 1.5))(a).tolist() == [1.5, 1.25, 1.0, 0.5]
    assert tb.Averaged(tb.LinearMap(0.5, 1.5))([*a, NAN]).tolist() == [0.9375] * 4 + [1.0]
    assert tb.Constant(0.8)([2.0, NAN]).tolist() == [0.8, 0.8]
    kinds = ["Conv2d", "Linear", "Conv1d"]
    by_type = tb.PerType({"Conv2d": 0.6, "Linear": 1.3}, default=0.9)
    assert by_type([2.0, 3.0, NAN], kinds).tolist() == [0.6, 1.3, 0.9]


def test_sigmoid_stays_within_its_decades() -> None:
    got = tb.SigmoidMap(1.0, 1000)([2.0, 3.0, 4.0, 40.0])
    assert got.min() == pytest.approx(10**-0.5) and got.max() == pytest.approx(10**0.5)


# --- the contract --------------------------------------------------------------------------------

anything = st.lists(
    st.one_of(
        st.floats(1.0, 1e3),
        st.sampled_from([2.0, 2.0, 3.0, 0.0, -1.0, 1e-300, 1.0, 1e6, NAN, INF, -INF]),
    ),
    max_size=12,
)


@given(anything)
def test_multipliers_are_positive_and_finite_and_bad_layers_have_one(values: list[float]) -> None:
    kinds = ["Conv2d", "Linear", "Other"] * 4
    valid = [math.isfinite(a) and a > 0 for a in values]
    for name, assign in ALL.items():
        got = assign(values, kinds[: len(values)])
        assert got.shape == (len(values),) and got.dtype == torch.float64, name
        assert all(math.isfinite(m) and m > 0 for m in got.tolist()), name
        if assign.uses_alphas:
            bad = [m for m, ok in zip(got.tolist(), valid, strict=True) if not ok]
            assert bad == [1.0] * len(bad), name


@pytest.mark.parametrize("name", LOOKING)
def test_nothing_to_compare_is_one(name: str) -> None:
    for values in ([], [3.0], [2.5] * 4, [NAN, 3.0, INF], [NAN] * 3):
        assert LOOKING[name](values).tolist() == [1.0] * len(values)


@given(alphas, st.integers(0, 20))
def test_layers_without_a_number_do_not_vote(values: list[float], place: int) -> None:
    place = min(place, len(values))
    longer = [*values[:place], NAN, *values[place:]]
    for name, assign in LOOKING.items():
        if name == "shuffled":  # its permutation is of places
            continue
        got = assign(longer).tolist()
        assert got.pop(place) == 1.0
        assert got == assign(values).tolist(), name


@given(alphas, st.randoms())
def test_order_of_layers_does_not_matter(values: list[float], random: Any) -> None:
    order = list(range(len(values)))
    random.shuffle(order)
    for name, assign in LOOKING.items():
        if name == "shuffled":
            continue
        got, plain = assign([values[i] for i in order]), assign(values)
        assert got.tolist() == pytest.approx([plain[i].item() for i in order], rel=1e-9), name


@given(alphas)
def test_larger_alpha_larger_multiplier(values: list[float]) -> None:
    for name, assign in LOOKING.items():
        if name == "shuffled":
            continue
        sign = -1 if name == "reversed" else 1
        pairs = sorted(zip(values, (sign * assign(values)).tolist(), strict=True))
        assert all(b[1] >= a[1] - 1e-12 for a, b in itertools.pairwise(pairs)), name


@given(st.lists(st.integers(2, 60), min_size=2, max_size=20), st.integers(1, 50))
def test_shifted_alphas(values: list[int], shift: int) -> None:
    """Linear, rank and sigmoid maps see only differences; the shares flatten."""
    assume(max(values) > min(values))
    moved = [a + shift for a in values]
    for assign in (tb.LinearMap(), tb.RankMap(), tb.SigmoidMap(), tb.Clipped(tb.LinearMap(), 2.0)):
        assert assign(moved).tolist() == pytest.approx(assign(values).tolist(), rel=1e-9)
    for assign in (tb.SqrtShare(), tb.Log2Share()):
        before, after = assign(values), assign(moved)
        assert after.max() - after.min() < before.max() - before.min()
        assert after.mean().item() == pytest.approx(1.0)


# --- controls ------------------------------------------------------------------------------------


@given(st.lists(st.floats(2, 9), min_size=1, max_size=15, unique=True), st.integers(0, 5))
def test_shuffled_is_a_permutation_and_the_same_each_time(values: list[float], seed: int) -> None:
    shuffled, plain = tb.Shuffled(tb.LinearMap(), seed), tb.LinearMap()
    got = shuffled(values).tolist()
    assert sorted(got) == sorted(plain(values).tolist())
    assert got == shuffled(values).tolist()
    # The permutation is of places: with other alphas the same places exchange.
    other = [10 - a for a in values]
    to = [plain(values).tolist().index(m) for m in got]
    assert shuffled(other).tolist() == [plain(other).tolist()[i] for i in to]


@given(st.integers(3, 12), st.integers(0, 5), st.integers(0, 11))
def test_shuffled_hardly_changes_when_a_layer_drops_out(size: int, seed: int, gone: int) -> None:
    """Of all layers one takes from another than before: who took from the layer that is gone."""
    gone %= size
    assign = tb.Shuffled(tb.RankMap(2.0, 2.0 + size), seed)
    values = [2.0 + i for i in range(size)]  # the multiplier names the place it comes from

    def sources(some: list[float]) -> list[int]:
        plain = assign.map(some).tolist()
        return [plain.index(m) for m in assign(some).tolist()]

    before = sources(values)
    after = sources([NAN if i == gone else a for i, a in enumerate(values)])
    changed = [i for i in range(size) if i != gone and before[i] != after[i]]
    assert changed == [i for i in range(size) if i != gone and before[i] == gone]
    assert sorted(after) == list(range(size))


def test_shuffled_fixed_rates_are_shuffled_too() -> None:
    assign = tb.Shuffled(tb.PerType({"Conv2d": 0.5, "Linear": 1.5}), seed=2)
    kinds = ["Conv2d", "Conv2d", "Linear", "Linear"]
    got = assign([NAN] * 4, kinds).tolist()
    assert sorted(got) == [0.5, 0.5, 1.5, 1.5] and got != [0.5, 0.5, 1.5, 1.5]
    assert not assign.uses_alphas


@given(alphas)
def test_reversed_mirrors(values: list[float]) -> None:
    mirrored = [min(values) + (max(values) - a) for a in values]
    for assign in MAPS.values():
        got = tb.Reversed(assign)(values).tolist()
        assert got == pytest.approx(assign(mirrored).tolist(), rel=1e-9)
    twice = tb.Reversed(tb.Reversed(tb.LinearMap()))(values)
    assert twice.tolist() == pytest.approx(tb.LinearMap()(values).tolist(), abs=1e-6)


def test_clipping() -> None:
    """Median 3, median deviation 1: within 3 +- 2 * 1.4826."""
    inner = Seen()
    tb.Clipped(inner, 2.0)([1.0, 2.0, 3.0, 4.0, 50.0, NAN])
    assert inner.seen[:4] == [1.0, 2.0, 3.0, 4.0]
    assert inner.seen[4] == pytest.approx(3 + 2 * 1.4826) and math.isnan(inner.seen[5])
    # More than half are equal: the mean deviation, 2 here, takes the place of the median one.
    tb.Clipped(inner, 1.0)([2.0, 2.0, 2.0, 2.0, 12.0])
    assert inner.seen == [2.0, 2.0, 2.0, 2.0, pytest.approx(2 + 1.2533 * 2)]


class Seen:
    """An assignment that keeps what it was given."""

    uses_alphas, once = True, False

    def __init__(self) -> None:
        self.seen: list[float] = []

    def __call__(self, alphas: Any, kinds: Any = None) -> torch.Tensor:
        self.seen = torch.as_tensor(alphas).tolist()
        return torch.ones(len(self.seen), dtype=torch.float64)


@given(st.lists(st.tuples(st.floats(0.01, 10), st.integers(1, 10**9)), min_size=1, max_size=9))
def test_normalized_has_mean_one_over_parameters(pairs: list[tuple[float, int]]) -> None:
    m, n = [p[0] for p in pairs], [p[1] for p in pairs]
    got = normalized(torch.tensor(m, dtype=torch.float64), torch.tensor(n, dtype=torch.float64))
    assert math.fsum(a * b for a, b in zip(got.tolist(), n, strict=True)) == pytest.approx(sum(n))
    ratios = [a / b for a, b in zip(got.tolist(), m, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))


@pytest.mark.parametrize(
    "make",
    [
        lambda: tb.LinearMap(0.0, 1.5),
        lambda: tb.LinearMap(0.5, INF),
        lambda: tb.RankMap(-0.5, 1.5),
        lambda: tb.SigmoidMap(0.0),
        lambda: tb.SigmoidMap((0.5, NAN)),
        lambda: tb.SigmoidMap(700.0),
        lambda: tb.SigmoidMap(0.5, -1),
        lambda: tb.Clipped(tb.LinearMap(), 0),
        lambda: tb.Constant(0.0),
        lambda: tb.PerType({"Linear": -1.0}),
        lambda: tb.PerType({}, default=0.0),
        lambda: tb.PerType({})([2.0, 3.0]),
        lambda: tb.PerType({})([2.0, 3.0], ["Linear"]),
        lambda: tb.LinearMap()([[2.0, 3.0]]),
    ],
)
def test_options_out_of_range(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"positive|decades|types|one-dimensional"):
        make()


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_the_default_device_does_not_matter(name: str) -> None:
    """On the meta device no value can be read: whatever is made there fails."""
    alphas, kinds = [2.0, 3.5, 5.0, NAN], ["Linear", "Conv2d", "Linear", "Conv2d"]
    wanted = ASSIGNMENTS[name](alphas, kinds)
    with torch.device("meta"):
        got = ASSIGNMENTS[name](alphas, kinds)
    assert got.device.type == "cpu" and torch.equal(got, wanted)


def test_assignments_are_frozen_and_say_what_they_look_at() -> None:
    for assign in ALL.values():
        assert isinstance(assign, Assignment)
        with pytest.raises(AttributeError):
            assign.anything = 1  # type: ignore[attr-defined]
    assert tb.Frozen(tb.LinearMap()).once and not tb.Shuffled(tb.LinearMap()).once
    assert tb.Reversed(tb.Frozen(tb.LinearMap())).once
    assert not tb.Constant().uses_alphas and not tb.PerType({}).uses_alphas
