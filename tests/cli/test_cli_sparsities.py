"""``tempbalance sparsities``: the table, its JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import tempbalance
from tempbalance.cli import main
from tempbalance.pruning import by_depth, sparsities


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = nn.Module()
    model.layers = nn.ModuleList(
        nn.ModuleDict({"up": nn.Linear(40, 60), "down": nn.Linear(60, 40)}) for _ in range(3)
    )
    model.head = nn.Linear(40, 90)
    path = tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    return path


def test_the_table_names_every_layer_and_the_total(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sparsities", str(checkpoint), "--total", "0.7", "--spread", "0.2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    wanted = sparsities(tempbalance.analyze(checkpoint), 0.7, spread=0.2)
    assert {line.split()[0]: line.split()[-1] for line in lines[1:-2]} == {
        name: f"{ratio:.4f}" for name, ratio in wanted.items()
    }
    assert lines[-1] == "0.7000 of 14,400 weights in 6 layers"


def test_json_holds_the_ratios_of_a_control(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["sparsities", str(checkpoint), "--total", "0.5", "--allocation", "depth", "--json"]
    assert main(given) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["total"] == 0.5
    assert told["ratios"] == pytest.approx(by_depth(tempbalance.analyze(checkpoint), 0.5))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--total", "0.99"], "total=0.99"),
        (["--total", "0.5", "--spread", "2"], "spread"),
        (["--total", "0.5", "--allocation", "depth", "--center", "median"], "--center"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    given: list[str], said: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sparsities", str(checkpoint), *given]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
