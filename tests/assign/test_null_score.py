"""NullScore: by hand, against a twin in plain Python, and its invariants."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from schedules import train_step
from torch import nn

import tempbalance as tb

NAN = math.nan
Null = tuple[float, float] | None


def population(
    kinds: Sequence[str], nulls: Sequence[Null], sizes: Sequence[int] | None = None
) -> tb.Population:
    names = tuple(f"h.{i}.{kind.lower()}" for i, kind in enumerate(kinds))
    return tb.Population(
        tuple(kinds), None if sizes is None else tuple(sizes), names, lambda: nulls
    )


def twin(z: list[float], sizes: list[int], c: float) -> list[float]:
    """Multipliers of one type, by the formula, without bounds."""
    mean = math.fsum(z) / len(z)
    variance = math.fsum((x - mean) ** 2 for x in z) / (len(z) - 1)
    k = max(0.0, 1 - 1 / variance) if variance else 0.0
    centre = math.fsum(x * n for x, n in zip(z, sizes, strict=True)) / sum(sizes)
    return [math.exp(c * k * (x - centre)) for x in z]


def test_hand_worked() -> None:
    """z of (1, 3, -1): variance 4, k = 3/4; of (5,): alone; of (0, 1): variance 1/2, so k = 0."""
    kinds = ["Conv2d", "Conv2d", "Linear", "Conv2d", "Conv1d", "Conv1d", "Conv2d"]
    alphas = [2.1, 2.6, 4.0, 1.9, 2.0, 2.1, NAN]
    nulls = [(2.0, 0.1), (2.0, 0.2), (3.0, 0.2), (2.0, 0.1), (2.0, 0.1), (2.0, 0.1), (2.0, 0.1)]
    layers = population(kinds, nulls, [10, 10, 50, 20, 5, 7, 9])
    # Mean z over parameters (10 + 30 - 20) / 40 = 1/2.
    wanted = [math.exp(0.2 * 0.75 * (z - 0.5)) for z in (1, 3, -1)]
    got = tb.NullScore(c=0.2)(alphas, layers).tolist()
    assert got == pytest.approx([*wanted[:2], 1.0, wanted[2], 1.0, 1.0, 1.0], rel=1e-12)
    turned = tb.NullScore(c=-0.2)(alphas, layers).tolist()
    assert turned == pytest.approx([1 / m for m in got], rel=1e-12)


def test_a_role_in_place_of_the_class() -> None:
    names = ("h.0.q_proj", "h.1.q_proj", "h.0.up", "h.1.up", "head")
    layers = tb.Population(("Linear",) * 5, None, names, lambda: [(2.0, 0.1)] * 5)
    assign = tb.ByRole(tb.NullScore(0.01, bounds=None))
    alphas = [2.2, 2.6, 3.0, 3.1, 9.0]
    got = assign(alphas, layers).tolist()
    assert got == pytest.approx([*twin([2.0, 6.0], [1, 1], 0.01), 1.0, 1.0, 1.0])
    # (1 is the share of q_proj alone: up has a variance of 1/2, and head is alone.)
    swapped = tb.ByRole(tb.Shuffled(tb.LinearMap(), seed=0, within_type=True))(alphas, layers)
    plain = tb.LinearMap()(alphas).tolist()
    for pair in (slice(0, 2), slice(2, 4), slice(4, 5)):
        assert sorted(swapped.tolist()[pair]) == sorted(plain[pair])
    assert assign.uses_alphas and not assign.once and tb.ByRole(tb.Frozen(tb.LinearMap())).once
    with pytest.raises(ValueError, match="ByRole needs the names"):
        assign(alphas, ["Linear"] * 5)


layers_of = st.lists(
    st.tuples(
        st.floats(1.1, 12.0),  # alpha
        st.sampled_from(["Conv2d", "Linear"]),
        st.floats(1.9, 4.0),  # its null
        st.floats(0.005, 0.5),
        st.integers(1, 10**7),  # parameters
    ),
    min_size=2,
    max_size=14,
    unique_by=lambda row: row[0],
)


@given(layers_of, st.floats(-0.5, 0.5).filter(lambda c: abs(c) > 1e-3))
def test_against_a_twin_and_its_geometric_mean(rows: list[Any], c: float) -> None:
    alphas, kinds, means, stds, sizes = map(list, zip(*rows, strict=True))
    layers = population(kinds, list(zip(means, stds, strict=True)), sizes)
    free = tb.NullScore(c, bounds=None)(alphas, layers).tolist()
    held = tb.NullScore(c, bounds=(0.5, 1.6))(alphas, layers).tolist()
    for kind in set(kinds):
        at = [i for i, k in enumerate(kinds) if k == kind]
        z = [(alphas[i] - means[i]) / stds[i] for i in at]
        n = [sizes[i] for i in at]
        if len(at) == 1:
            assert free[at[0]] == held[at[0]] == 1.0
            continue
        logs = [math.log(m) for m in twin(z, n, c)] if max(map(abs, z)) * abs(c) < 200 else None
        if logs is not None:
            assert [math.log(free[i]) for i in at] == pytest.approx(logs, rel=1e-7, abs=1e-9)
        # The geometric mean over the parameters of a type is 1, within the bounds too.
        for got in (free, held):
            if logs is not None or got is held:
                total = math.fsum(math.log(got[i]) * sizes[i] for i in at) / sum(n)
                assert total == pytest.approx(0.0, abs=1e-9)
        assert all(0.5 - 1e-12 <= held[i] <= 1.6 + 1e-12 for i in at)
        # Bounds exchange no two layers.
        order = sorted(at, key=lambda i: free[i])
        assert all(held[b] >= held[a] - 1e-9 for a, b in itertools.pairwise(order))


@given(layers_of, st.randoms())
def test_order_does_not_matter_and_layers_without_a_number_do_not_vote(
    rows: list[Any], random: Any
) -> None:
    def called(some: list[Any]) -> list[float]:
        alphas, kinds, means, stds, sizes = map(list, zip(*some, strict=True))
        nulls = [None if m is None else (m, s) for m, s in zip(means, stds, strict=True)]
        return tb.NullScore()(alphas, population(kinds, nulls, sizes)).tolist()

    plain = called(rows)
    order = list(range(len(rows)))
    random.shuffle(order)
    assert called([rows[i] for i in order]) == pytest.approx([plain[i] for i in order], rel=1e-9)
    longer = [*rows, (NAN, "Linear", 2.0, 0.1, 5), (3.33, "Linear", None, 0.1, 7)]
    got = called(longer)
    assert got[: len(rows)] == pytest.approx(plain, rel=1e-9) and got[len(rows) :] == [1.0, 1.0]


@pytest.mark.parametrize("values", [[], [3.0], [2.5] * 4, [NAN, 3.0], [NAN] * 3])
def test_nothing_to_compare_is_one(values: list[float]) -> None:
    layers = population(["Linear"] * len(values), [(2.0, 0.1)] * len(values))
    assert tb.NullScore()(values, layers).tolist() == [1.0] * len(values)


def test_controls_go_around_it() -> None:
    alphas = [2.1, 2.6, 1.9, 2.3]
    layers = population(["Linear"] * 4, [(2.0, 0.1)] * 4, [5, 5, 20, 10])
    plain = tb.NullScore()(alphas, layers)
    shuffled = tb.Shuffled(tb.NullScore(), seed=1, within_type=True)(alphas, layers)
    assert sorted(shuffled.tolist()) == sorted(plain.tolist()) and not torch.equal(shuffled, plain)
    # Of layers of one null, alphas mirrored are scores mirrored.
    mirrored = tb.Reversed(tb.NullScore())(alphas, layers)
    assert mirrored.tolist() == pytest.approx(tb.NullScore(-0.1)(alphas, layers).tolist())
    level = tb.Averaged(tb.NullScore())(alphas, layers)
    assert level.unique().numel() == 1
    assert tb.Frozen(tb.NullScore()).once and tb.Frozen(tb.NullScore()).uses_alphas
    assert torch.equal(tb.Clipped(tb.NullScore(), 9.0)(alphas, layers), plain)
    names = ("h.0.a", "h.0.b", "h.1.a", "h.1.b")
    blocks = tb.Population(("Linear",) * 4, (1,) * 4, names, lambda: [(2.0, 0.1)] * 4)
    got = tb.PerBlock(tb.NullScore())(alphas, blocks)
    apart = [
        tb.NullScore()(alphas[i : i + 2], population(["Linear"] * 2, [(2.0, 0.1)] * 2))
        for i in (0, 2)
    ]
    assert got.tolist() == torch.cat(apart).tolist()


def test_bad_options_and_what_it_needs() -> None:
    for bad in (0.0, NAN, math.inf):
        with pytest.raises(ValueError, match="NullScore: c must be"):
            tb.NullScore(bad)
    for bounds in ((1.1, 2.0), (0.5, 0.9), (0.0, 2.0), (0.5,), (0.5, math.inf)):
        with pytest.raises(ValueError, match="with 1 between them"):
            tb.NullScore(bounds=bounds)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NullScore needs what random matrices"):
        tb.NullScore()([2.0, 3.0], ["Linear", "Linear"])


# --- in a training -------------------------------------------------------------------------------


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Conv2d(24, 32, 3)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 10)),
    )


def heavy(model: nn.Sequential) -> nn.Sequential:
    with torch.no_grad():
        for place in (2, 4):
            weight = model[place].weight
            weight.mul_(torch.exp(place * torch.randn(weight.shape[0], 1, 1, 1)))
    return model


def test_the_balancer_gives_each_layer_its_own_null() -> None:
    model = heavy(net(0))
    windows = tb.ByLayer({"Linear": tb.WholeMatrix(), "*": tb.Farms()})
    assign = tb.NullScore(0.003, bounds=None)
    balancer = tb.Balancer(model, assign=assign, windows=windows, fit=tb.KSFit())
    balancer.update()
    z, sizes = [], []
    for name in ("0", "2", "4"):
        weight = model[int(name)].weight
        null = tb.null_alpha(tuple(weight.shape), tb.Farms(), tb.KSFit())
        z.append((balancer.alphas[name] - null.mean) / null.std)
        sizes.append(weight.numel())
    got = [balancer.multipliers[name] for name in ("0", "2", "4")]
    assert got == pytest.approx(twin(z, sizes, 0.003), rel=1e-9) and max(got) > 1.001
    # Two linear layers, both random: chance explains them, or they differ by little.
    assert balancer.multipliers["7"] == pytest.approx(1.0, abs=0.05)


def test_a_unit_of_several_layers_has_the_null_of_their_mean() -> None:
    model = heavy(net(1))
    unit = {"0": "a", "2": "a", "4": "b"}
    balancer = tb.Balancer(
        model, assign=tb.NullScore(0.003, None), unit=lambda name: unit.get(name, name)
    )
    balancer.update()
    nulls = [tb.null_alpha(tuple(model[i].weight.shape)) for i in (0, 2, 4)]
    alphas = [balancer.alphas[name] or NAN for name in ("0", "2", "4")]
    std = math.hypot(nulls[0].std, nulls[1].std) / 2
    z = [(alphas[0] + alphas[1] - nulls[0].mean - nulls[1].mean) / 2 / std]
    z.append((alphas[2] - nulls[2].mean) / nulls[2].std)
    sizes = [sum(model[i].weight.numel() for i in (0, 2)), model[4].weight.numel()]
    got = [balancer.multipliers[name] for name in ("0", "2", "4")]
    a, b = twin(z, sizes, 0.003)
    assert got == pytest.approx([a, a, b], rel=1e-9)


@pytest.mark.parametrize("cls", [tb.TempBalanceLR, tb.AlphaDecay])
def test_resume_is_bit_for_bit(cls: Any) -> None:
    def build(seed: int) -> tuple[nn.Sequential, torch.optim.Optimizer, Any]:
        model = heavy(net(seed))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        assign = tb.NullScore(0.02)
        more = {"clock": "step"} if cls is tb.AlphaDecay else {}
        return model, optimizer, cls(optimizer, model, every=2, ramp=2, assign=assign, **more)

    def run(model: Any, optimizer: Any, balanced: Any, start: int, stop: int) -> None:
        for i in range(start, stop):
            train_step(model, optimizer, i)
            balanced.step()

    whole, parts, again = build(3), build(3), build(4)
    run(*whole, 0, 8)
    run(*parts, 0, 5)
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in parts], buffer)
    buffer.seek(0)
    for part, state in zip(again, torch.load(buffer, weights_only=True), strict=True):
        part.load_state_dict(state)
    run(*again, 5, 8)
    assert whole[2].state_dict() == again[2].state_dict()
    for a, b in zip(whole[0].parameters(), again[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(set(whole[2].balancer.multipliers.values())) > 2
