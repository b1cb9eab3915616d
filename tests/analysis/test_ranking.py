"""Ranking: the metrics by their definitions, Kendall's tau by counting, and what is no series."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tempbalance as tb

pytest.importorskip("scipy")

Models = dict[str, nn.Module]


def family(count: int, layers: int = 2) -> Models:
    """Models of one architecture whose weights grow, so that the norms rank them."""
    made: Models = {}
    for i in range(count):
        torch.manual_seed(i)
        net = nn.Sequential(*[nn.Linear(32, 32) for _ in range(layers)])
        with torch.no_grad():
            for weight in net.parameters():
                weight.mul_(1.5**i)
        made[f"m{i}"] = net
    return made


def test_metrics_are_means_over_layers() -> None:
    models = family(2)
    ranking = tb.rank(models)
    weights: list[Tensor] = [m.weight.detach().double() for m in models["m1"]]  # type: ignore
    report = tb.analyze(models["m1"], windows=tb.WholeMatrix(), fit=tb.KSFit())
    alphas = [r.alpha for r in report]
    values = [torch.linalg.svdvals(w).square().numpy() for w in weights]
    row = ranking.metrics["m1"]
    assert row["log_norm"] == pytest.approx(np.mean([np.log10(v.sum()) for v in values]))
    assert row["log_spectral_norm"] == pytest.approx(np.mean([np.log10(v.max()) for v in values]))
    assert row["stable_rank"] == pytest.approx(np.mean([v.sum() / v.max() for v in values]))
    assert row["mean_alpha"] == pytest.approx(np.mean(alphas))  # type: ignore[arg-type]
    hat = np.mean([a * np.log10(v.max()) for a, v in zip(alphas, values, strict=True)])
    assert row["weighted_alpha"] == pytest.approx(hat)
    norm = np.mean([np.log10((v**a).sum()) for a, v in zip(alphas, values, strict=True)])
    assert row["log_alpha_norm"] == pytest.approx(norm)
    assert (row["parameters"], row["depth"]) == (2 * (32 * 32 + 32), 2)


def test_tau_and_its_exact_p_by_counting() -> None:
    models = family(5)
    scores = dict(zip(models, (0.9, 0.7, 0.8, 0.5, 0.6), strict=True))
    ranking = tb.rank(models, scores)
    each = {c.metric: c for c in ranking.correlations}
    order = [list(scores.values())[i] for i in range(5)]  # log_norm rises with the index

    def tau(y: list[float]) -> float:
        pairs = list(itertools.combinations(range(5), 2))
        return sum(float(np.sign(y[j] - y[i])) for i, j in pairs) / len(pairs)

    every = [tau(list(p)) for p in itertools.permutations(order)]
    exact = np.mean([abs(t) >= abs(tau(order)) - 1e-12 for t in every])
    assert each["log_norm"].tau == pytest.approx(tau(order))
    assert each["log_norm"].p == pytest.approx(exact)
    assert (
        each["log_norm"].expected == -1 and "claimed" not in str(ranking).split("log_norm")[2][:60]
    )
    low, high = each["log_norm"].interval or (1, -1)
    assert -1 <= low <= tau(order) <= high <= 1
    assert each["depth"].tau is None  # the same in all
    worse = tb.rank(models, scores, higher_is_better=False)
    assert {c.metric: c.expected for c in worse.correlations}["log_norm"] == 1
    json.dumps(ranking.to_dict(), allow_nan=False)


def test_three_models_are_no_evidence() -> None:
    ranking = tb.rank(family(3), {"m0": 1, "m1": 2, "m2": 3})
    assert all(c.interval is None for c in ranking.correlations)
    assert {c.metric: c.p for c in ranking.correlations}["log_norm"] == pytest.approx(1 / 3)
    assert "not evidence" in str(ranking)
    wrong = next(line for line in str(ranking).splitlines() if line.startswith("  log_norm"))
    assert "not the order that is claimed" in wrong


def test_layers_that_a_model_lacks_or_cannot_measure_are_left_out_everywhere() -> None:
    models = family(2)
    nn.init.zeros_(models["m0"][1].weight)  # type: ignore[index, arg-type]
    ranking = tb.rank(models)
    alone = tb.rank({name: nn.Sequential(net[0]) for name, net in models.items()})  # type: ignore[index]
    assert ranking.metrics["m1"]["mean_alpha"] == alone.metrics["m1"]["mean_alpha"]
    assert "without an alpha in some model: 1" in ranking.notes[0]


def test_a_series_of_several_depths_is_one(caplog: pytest.LogCaptureFixture) -> None:
    models = {f"depth{n}": family(1, n)["m0"] for n in (2, 3, 4)}
    ranking = tb.rank(models)
    assert [row["depth"] for row in ranking.metrics.values()] == [2, 3, 4]
    assert not ranking.notes and not caplog.records


def test_models_that_are_no_series_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    other = nn.ModuleDict({"0": nn.Linear(32, 32), "a": nn.Linear(32, 32), "b": nn.Linear(32, 32)})
    with caplog.at_level(logging.WARNING, "tempbalance"):
        ranking = tb.rank({"a": family(1)["m0"], "b": other})
    assert "do not look like one series" in caplog.text
    assert "do not look like one series" in str(ranking)
    with pytest.raises(ValueError, match="no layer in common"):
        tb.rank({"a": family(1)["m0"], "b": nn.ModuleDict({"x": nn.Linear(32, 32)})})


def test_scores_must_fit() -> None:
    with pytest.raises(ValueError, match="no score for m1"):
        tb.rank(family(2), {"m0": 1.0})
    with pytest.raises(ValueError, match="no model for z"):
        tb.rank(family(2), {"m0": 1.0, "m1": 2.0, "z": 3.0})
    with pytest.raises(ValueError, match="at least two"):
        tb.rank(family(1))


def test_paths_name_themselves(tmp_path: Path) -> None:
    for name, net in family(2).items():
        torch.save(net.state_dict(), tmp_path / f"{name}.pt")
    assert list(tb.rank([tmp_path / "m0.pt", tmp_path / "m1.pt"]).metrics) == ["m0.pt", "m1.pt"]
