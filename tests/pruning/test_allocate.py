"""Allocation: the published ratios, and what holds of every allocation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pruning.figures import by_block, figures

from tempbalance.pruning import allocate

SMOLLM2_SIZES = [331776, 110592, 110592, 331776, 884736, 884736, 884736] * 30


def published() -> list[Any]:
    """(alphas, sizes, case) of each published allocation."""
    cases = []
    for name in ("pruning", "llama-7b-hf", "smollm2"):
        found = figures(name)
        for case in found["allocation"]:
            metrics = found.get("metrics")
            alphas = metrics[case["metric"]]["alpha"] if metrics else found["alpha"]
            sizes = found.get("numel", SMOLLM2_SIZES)
            label = "-".join(
                [name, case.get("metric", "alpha_peak"), case.get("mapping", "block_wise"),
                 str(case["sparsity"]), str(case["epsilon"])]
            )  # fmt: skip
            cases.append(pytest.param(alphas, sizes, case, id=label))
    return cases


@pytest.mark.parametrize(("alphas", "sizes", "case"), published())
def test_ratios_are_those_published_where_none_is_above_one(
    alphas: list[float], sizes: list[float], case: dict[str, Any]
) -> None:
    a, p = torch.tensor(alphas, dtype=torch.float64), torch.tensor(sizes, dtype=torch.float64)
    if case.get("mapping", "block_wise") == "block_wise":
        a, p = by_block(alphas, sizes)
    wanted = torch.tensor(case.get("block_ratios") or case["ratios"], dtype=torch.float64)
    limit = 0.9999 if case["n_above_1"] == 0 else 0.98
    ratios = allocate(a, p, case["sparsity"], spread=case["epsilon"], limit=limit)
    assert (ratios @ p / p.sum()).item() == pytest.approx(case["sparsity"], rel=1e-12)
    if case["n_above_1"]:
        # What is cut off goes to the others, in proportion.
        below = ratios < limit
        assert ratios.max() == limit and not below.all()
        growth = ratios[below] / wanted[below]
        assert (growth > 1).all() and torch.allclose(growth, growth[:1].expand_as(growth))
    else:
        torch.testing.assert_close(ratios, wanted, rtol=1e-6, atol=1e-7)


alphas_and_sizes = st.integers(1, 12).flatmap(
    lambda n: st.tuples(
        st.lists(
            st.floats(-1e6, 1e6) | st.just(float("nan")) | st.just(float("inf")),
            min_size=n, max_size=n,
        ),
        st.lists(st.integers(1, 10**9), min_size=n, max_size=n),
    )
)  # fmt: skip


@given(alphas_and_sizes, st.floats(0, 1), st.floats(0, 0.99), st.floats(0.05, 1))
def test_the_total_is_met_no_limit_is_passed_and_order_is_kept(
    layers: tuple[list[float], list[int]], share: float, spread: float, limit: float
) -> None:
    alphas, sizes = layers
    total = share * limit
    ratios = allocate(alphas, sizes, total, spread=spread, limit=limit)
    p = torch.tensor(sizes, dtype=torch.float64)
    assert (ratios @ p / p.sum()).item() == pytest.approx(total, rel=1e-9, abs=1e-12)
    assert ratios.min() >= 0 and ratios.max() <= limit
    a = torch.tensor(alphas, dtype=torch.float64)
    known = torch.isfinite(a)
    order = a[known].argsort()
    assert (ratios[known][order].diff() >= -1e-12).all()


@pytest.mark.parametrize("alphas", [[3.0, 3.0], [float("nan"), 4.0], [float("nan")] * 2])
def test_equal_or_unknown_alphas_give_every_layer_the_total(alphas: list[float]) -> None:
    assert allocate(alphas, [10, 30], 0.6).tolist() == pytest.approx([0.6, 0.6])


def test_an_unknown_alpha_gets_the_middle_of_the_map() -> None:
    low, middle, high = allocate([2.0, float("nan"), 4.0], [1, 1, 1], 0.5, spread=0.4).tolist()
    assert (low, middle, high) == pytest.approx((0.3, 0.5, 0.7))


def test_a_total_beyond_what_the_others_can_give_is_refused() -> None:
    # With a spread of 1 the first layer keeps all; 0.98 of the other is 0.49 of both.
    assert allocate([2.0, 3.0], [1, 1], 0.49, spread=1.0).tolist() == pytest.approx([0, 0.98])
    with pytest.raises(ValueError, match=r"no allocation removes 0\.6.*can give 0\.49"):
        allocate([2.0, 3.0], [1, 1], 0.6, spread=1.0)


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        (([1.0, 2.0], [1.0], 0.5), {}, "one alpha and one size"),
        (([], [], 0.5), {}, "one alpha and one size"),
        (([1.0], [0.0], 0.5), {}, "sizes must be positive"),
        (([1.0], [1.0], 0.99), {}, "limit=0.98"),
        (([1.0], [1.0], float("nan")), {}, "total=nan"),
        (([1.0], [1.0], 0.5), {"spread": 1.5}, "spread"),
        (([1.0], [1.0], 0.5), {"limit": 1.1}, "limit"),
    ],
)
def test_what_makes_no_sense_is_named(arguments: Any, options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        allocate(*arguments, **options)
