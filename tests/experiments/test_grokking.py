"""Grokking: what is trained on, the networks, and the picture of a run."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from standins import composed

from experiments import grokking
from experiments.data.grokking import FewDigits, ModularAddition
from experiments.metrics import OneHotError
from experiments.models.grokking import SumTransformer, perceptron
from experiments.train import train

TINY = ("trainer.max_epochs=3", "data.steps=2", "data.batch_size=16")


def test_sums_are_right_and_no_pair_is_in_both_parts() -> None:
    data = ModularAddition(modulus=13, share=0.4, steps=5, batch_size=68)
    seen = []
    for loader in (data.train_dataloader(), data.test_dataloader()[0]):
        x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert torch.equal((x[:, 0] + x[:, 1]) % 13, y)
        assert bool((x[:, 2] == 13).all())
        seen.append({(int(a), int(b)) for a, b, _ in x})
    assert len(seen[0]) == data.size_of("train") == 68  # each of five batches is a whole pass
    assert len(seen[1]) == data.size_of("test") == 101
    assert not seen[0] & seen[1]


def test_digits_are_as_many_as_asked_for() -> None:
    pytest.importorskip("sklearn")
    data = FewDigits(count=1000, steps=3, batch_size=50, val_fraction=0.0)
    data.setup()
    assert (data.size_of("train"), data.size_of("val"), data.size_of("test")) == (1000, 0, 797)
    assert [len(batch[0]) for batch in data.train_dataloader()] == [50] * 3


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: FewDigits(count=1797), "count must lie between 1 and 1796"),
        (lambda: FewDigits(steps=0), "steps must be at least 1"),
        (lambda: ModularAddition(steps=0), "steps must be at least 1"),
        (lambda: ModularAddition(share=1.0), "share must be above 0"),
        (lambda: ModularAddition(val_fraction=0.1), "no validation part"),
    ],
)
def test_bad_sizes_are_refused(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_initial_weights_of_the_perceptron_are_scaled() -> None:
    torch.manual_seed(0)
    plain = perceptron(1, 8, 10, width=20, scale=1.0)
    torch.manual_seed(0)
    large = perceptron(1, 8, 10, width=20, scale=8.0)
    for a, b in zip(plain.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(8 * a, b)
    assert [tuple(p.shape) for p in plain.parameters() if p.ndim == 2] == [
        (20, 64),
        (20, 20),
        (10, 20),
    ]


def test_the_transformer_can_tell_the_order_of_a_pair() -> None:
    torch.manual_seed(0)
    logits = SumTransformer(7, width=16, heads=2)(torch.tensor([[1, 2, 7], [2, 1, 7]]))
    assert logits.shape == (2, 7)
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_error_from_one_hot_targets_by_hand() -> None:
    loss = OneHotError()(torch.tensor([[0.5, 0.0], [0.0, 2.0]]), torch.tensor([0, 1]))
    assert loss.item() == pytest.approx((0.25 + 1.0) / 4)


@pytest.mark.parametrize(
    ("experiment", "small", "layer"),
    [
        ("grokking", ["model.width=40"], "1"),
        (
            "grokking_addition",
            ["data.modulus=11", "model.width=16", "model.heads=2", "tuned.min_eigs=10"],
            "blocks.layers.0.linear1",
        ),
    ],
)
def test_a_run_logs_alpha_and_traps_and_is_drawn(
    experiment: str, small: list[str], layer: str, tmp_path: Path
) -> None:
    cfg = composed(tmp_path, f"experiment={experiment}", *TINY, *small)
    result = train(cfg)
    assert result["method"] == "watch"
    folder = Path(cfg.folder)
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for kind in ("alpha", "traps", "trap_units"):
        steps = [row["step"] for row in rows if row[f"tempbalance/{kind}/model.{layer}"]]
        assert steps == ["0", "2", "4"]
    assert [row["step"] for row in rows if row["val/accuracy"]] == ["2", "4", "6"]
    assert (folder / "grokking.png").stat().st_size > 10_000
    out = tmp_path / "both.png"
    grokking.main([str(folder), str(folder), "--out", str(out)])
    figure = grokking.draw([folder, folder])
    drawn = {line.get_label(): line for line in figure.axes[2].get_lines()}
    np.testing.assert_allclose(
        drawn[layer].get_ydata(),  # type: ignore[arg-type]
        [float(r[f"tempbalance/alpha/model.{layer}"]) for r in rows if r["tempbalance/alpha/max"]],
    )
    assert out.is_file()


def test_the_flag_makes_runs_long(tmp_path: Path) -> None:
    def steps(*more: str) -> int:
        cfg = composed(tmp_path, "experiment=grokking", *more)
        return int(cfg.trainer.max_epochs) * int(cfg.data.steps)

    assert (steps(), steps("grokking.long=true")) == (6_000, 1_000_000)
    task = instantiate(composed(tmp_path, "experiment=grokking").task)
    assert isinstance(task.loss, OneHotError)
