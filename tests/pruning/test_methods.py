"""Pruners on one layer: the published masks and weights, a twin in float64, and exact optima."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pruning.figures import arrays, figures
from torch import Tensor

from tempbalance.pruning import Magnitude, SparseGPT, Wanda
from tempbalance.pruning.method import Method

RATIOS = figures("pruning")["intra_layer"]["ratios"]


def pruned(method: Method, weight: Tensor, inputs: Tensor, ratio: float) -> Tensor:
    """A weight pruned on inputs (samples, rows, in), one sample a call."""
    statistic = method.statistic(weight)
    if statistic is not None:
        for sample in inputs:
            statistic.add(sample.unsqueeze(0))
    return method(weight, ratio, statistic)


def error(weight: Tensor, changed: Tensor, inputs: Tensor) -> float:
    """Squared error of the outputs, of what they were."""
    x = inputs.reshape(-1, weight.shape[1])
    return float((x @ (weight - changed).mT).square().sum() / (x @ weight.mT).square().sum())


def layer(out: int = 24, inputs: int = 40, rows: int = 64) -> tuple[Tensor, Tensor]:
    """A weight and correlated inputs."""
    mixing = torch.randn(inputs, inputs) / inputs**0.5 + 0.3
    return torch.randn(out, inputs), torch.randn(4, rows // 4, inputs) @ mixing


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", ["magnitude", "wanda"])
def test_masks_are_those_published(name: str, ratio: float) -> None:
    weight, inputs = arrays()["layer/W"], arrays()["layer/X"]
    method = {"magnitude": Magnitude(), "wanda": Wanda()}[name]
    found = pruned(method, weight, inputs, ratio)
    mask = arrays()[f"layer/{name}_mask_{ratio}"]
    assert torch.equal(found == 0, mask)
    assert torch.equal(found[~mask], weight[~mask])


@pytest.mark.parametrize("ratio", RATIOS)
def test_sparsegpt_weights_are_those_published(ratio: float) -> None:
    weight, inputs = arrays()["layer/W"], arrays()["layer/X"]
    found = pruned(SparseGPT(), weight, inputs, ratio)
    torch.testing.assert_close(found, arrays()[f"layer/sparsegpt_W_{ratio}"], rtol=0, atol=1e-6)
    wanted = figures("pruning")["intra_layer"][str(ratio)]["rel_out_err"]["sparsegpt"]
    assert error(weight, found, inputs) == pytest.approx(wanted, rel=1e-4)


def test_the_statistics_are_those_published() -> None:
    weight, inputs = arrays()["layer/W"], arrays()["layer/X"]
    power, hessian = Wanda().statistic(weight), SparseGPT().statistic(weight)
    for batch in inputs.split([1, 3, 2]):  # however the samples are cut into batches
        power.add(batch)
        hessian.add(batch)
    torch.testing.assert_close(power.mean, arrays()["layer/wanda_scaler_row"], rtol=1e-6, atol=0)
    torch.testing.assert_close(hessian.mean, arrays()["layer/sparsegpt_H"], rtol=1e-5, atol=1e-4)


def sparsegpt_twin(
    weight: Tensor, inputs: Tensor, ratio: float, block: int, damping: float
) -> Tensor:
    """By the optimal brain surgeon's own steps: one inverse a column, in float64."""
    w, x = weight.double().clone(), inputs.reshape(-1, weight.shape[1]).double()
    h = 2 / len(inputs) * x.mT @ x
    h += damping * h.diagonal().mean() * torch.eye(len(h))
    inverses = [torch.linalg.inv(h[j:, j:]) for j in range(len(h))]
    price = torch.stack([inverse[0, 0] for inverse in inverses])
    removed = torch.zeros_like(w, dtype=torch.bool)
    for j in range(len(h)):
        if j % block == 0:
            columns = slice(j, min(j + block, len(h)))
            score = w[:, columns] ** 2 / price[columns]
            count = int(score.numel() * ratio) + 1
            removed[:, columns] = score <= score.flatten().sort().values[count - 1]
        for row in removed[:, j].nonzero()[:, 0].tolist():
            w[row, j:] -= w[row, j] / price[j] * inverses[j][0]
            w[row, j] = 0
    return w


@pytest.mark.parametrize(("ratio", "block"), [(0.3, 128), (0.6, 16), (0.8, 7)])
def test_sparsegpt_agrees_with_a_twin_in_float64(ratio: float, block: int) -> None:
    weight, inputs = layer(rows=200)
    found = pruned(SparseGPT(block, 0.02), weight, inputs, ratio)
    twin = sparsegpt_twin(weight, inputs, ratio, block, 0.02)
    torch.testing.assert_close(found.double(), twin, rtol=1e-3, atol=1e-4)


def test_sparsegpt_reaches_the_least_squares_optimum_where_greedy_is_exact() -> None:
    # Nothing but the first columns is removed, so that all that stay can make up for it.
    weight, inputs = layer(out=6, inputs=12, rows=100)
    weight[:, :4] *= 1e-3
    found = pruned(SparseGPT(), weight, inputs, (4 * 6 - 0.5) / weight.numel())
    assert torch.equal((found == 0).all(0), torch.arange(12) < 4)
    x = inputs.reshape(-1, 12).double()
    h = 2 / len(inputs) * x.mT @ x
    h += 0.01 * h.diagonal().mean() * torch.eye(12)
    w = weight.double()
    # argmin of tr((W - V) H (W - V)^T) with V zero in the first columns.
    best = w[:, 4:] + w[:, :4] @ h[:4, 4:] @ torch.linalg.inv(h[4:, 4:])
    torch.testing.assert_close(found[:, 4:].double(), best, rtol=1e-4, atol=1e-5)


def test_each_pruner_loses_less_than_the_one_that_knows_less() -> None:
    weight, inputs = layer(out=48, inputs=64, rows=400)
    inputs = inputs * torch.linspace(0.1, 3, 64)
    errors = [
        error(weight, pruned(method, weight, inputs, 0.6), inputs)
        for method in (SparseGPT(), Wanda(), Magnitude())
    ]
    assert errors == sorted(errors)


@given(st.integers(1, 12), st.integers(2, 40), st.floats(0.05, 0.95))
def test_wanda_is_magnitude_by_output_where_inputs_are_equally_strong(
    out: int, inputs: int, ratio: float
) -> None:
    weight = torch.randn(out, inputs)
    signs = torch.randint(0, 2, (2, 9, inputs)) * 2.0 - 1
    found = pruned(Wanda(), weight, signs, ratio)
    for row, kept in zip(weight, found, strict=True):
        order = row.abs().argsort()[: int(inputs * ratio)]
        assert torch.equal((kept == 0).nonzero()[:, 0], order.sort().values)


def test_ties_and_zero_columns_lose_exactly_what_was_asked() -> None:
    ones = torch.ones(8, 20)
    inputs = torch.ones(2, 5, 20)
    assert (pruned(Magnitude(), ones, inputs, 0.5) == 0).sum() == 81  # the threshold goes too
    assert ((pruned(Wanda(), ones, inputs, 0.5) == 0).sum(1) == 10).all()
    inputs[..., 3:9] = 0
    removed = pruned(Wanda(), ones, inputs, 0.4) == 0
    assert removed[:, 3:9].all() and (removed.sum(1) == 8).all()
    weight, inputs = layer()
    inputs[..., 5] = 0
    found = pruned(SparseGPT(), weight, inputs, 0.5)
    assert torch.isfinite(found).all() and (found[:, 5] == 0).all()
    assert torch.isfinite(pruned(SparseGPT(), weight, torch.zeros_like(inputs), 0.5)).all()


@pytest.mark.parametrize("kind", [Magnitude, Wanda, SparseGPT])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8)])
def test_patterns_keep_n_of_every_m(kind: type, pattern: tuple[int, int]) -> None:
    weight, inputs = layer()
    keep, of = pattern
    found = pruned(kind(pattern=pattern), weight, inputs, 1 - keep / of)
    assert ((found != 0).unflatten(-1, (-1, of)).sum(-1) == keep).all()
    if kind is Magnitude:
        kept = weight.abs().unflatten(-1, (-1, of)).topk(keep).values.sum()
        assert found.abs().sum().item() == pytest.approx(kept.item())


def test_half_precision_keeps_its_dtype_and_counts_ties() -> None:
    weight, inputs = layer()
    weight = weight.bfloat16()
    for method in (Magnitude(), Wanda(), SparseGPT()):
        found = pruned(method, weight, inputs.bfloat16(), 0.5)
        assert found.dtype == torch.bfloat16
        assert (found == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Wanda(pattern=(4, 4)), "N of every M"),
        (lambda: SparseGPT(damping=0.0), "damping > 0"),
        (lambda: SparseGPT(block=6, pattern=(2, 4)), "multiple of 4"),
    ],
)
def test_options_out_of_range_are_named(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()  # type: ignore[operator]
