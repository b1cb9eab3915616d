"""The preset of WeightWatcher: its columns by its names, from a model, a file and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tempbalance as tb
from tempbalance.cli import main


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(16, 24, 3), nn.Linear(60, 40), nn.Linear(4, 3))


def test_columns_have_the_names_and_values_of_the_tool() -> None:
    model = net()
    found = tb.analyze(model, preset="weightwatcher")
    rows = {row["name"]: row for row in found}
    assert list(rows) == ["0", "1"] and len(found) == 2  # of 3 eigenvalues it makes no row
    row, values = rows["1"], torch.linalg.svdvals(model[1].weight.detach().double()).square()  # type: ignore
    assert (row["layer_id"], row["N"], row["M"]) == (2, 60, 40)
    assert row["stable_rank"] == pytest.approx(float(values.sum() / values.max()))
    assert row["log_norm"] == pytest.approx(float(values.sum().log10()))
    alpha = float(row["alpha"])
    assert row["alpha_weighted"] == pytest.approx(alpha * float(values.max().log10()))
    assert row["log_alpha_norm"] == pytest.approx(float((values**alpha).sum().log10()))
    share = values / values.sum()
    entropy = -float((share * share.log()).sum()) / np.log(40)
    assert row["entropy"] == pytest.approx(entropy)
    assert {"num_spikes", "mp_softrank", "warning", "matrix_rank"} <= set(row)
    assert found.summary["alpha"] == pytest.approx(np.mean([float(r["alpha"]) for r in found]))
    assert "rand_num_spikes" not in row
    assert "rand_num_spikes" in tb.analyze(model, preset="weightwatcher", traps=True).rows[0]


def test_a_file_gives_the_same_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(net().state_dict(), tmp_path / "net.pt")
    whole = {row["name"]: row for row in tb.analyze(net(), preset="weightwatcher")}
    path = str(tmp_path / "net.pt")
    assert main(["analyze", path, "--preset", "weightwatcher", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    for row in content["details"]:
        assert row["alpha"] == pytest.approx(whole[row["name"]]["alpha"])
        assert row["log_norm"] == pytest.approx(whole[row["name"]]["log_norm"])
    assert main(["analyze", path, "--preset", "weightwatcher"]) == 0
    out = capsys.readouterr().out
    assert "alpha_weighted" in out.splitlines()[0] and "mp_softrank" in out
    assert main(["analyze", path, "--preset", "weightwatcher", "--html", "x.html"]) == 2
    assert "--html has no meaning with --preset" in capsys.readouterr().err


def test_to_pandas_is_its_data_frame() -> None:
    pd = pytest.importorskip("pandas")
    frame = tb.analyze(net(), preset="weightwatcher").to_pandas()
    assert isinstance(frame, pd.DataFrame) and list(frame["name"]) == ["0", "1"]
    assert repr(tb.analyze(net(), preset="weightwatcher")) == "Details(2 layers)"
