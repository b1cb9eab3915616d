"""Two gloo processes: the ranks share the layers and hold the same multipliers, bit for bit."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from processes import Command
from releases import LIGHTNING, needs_fully_shard

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed"),
]
needs_lightning = pytest.mark.skipif(not LIGHTNING, reason="Lightning is not installed")
HERE = Path(__file__).resolve().parents[1]


def run(case: str, folder: Path) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = (str(HERE / "two_ranks.py"), case)
    ranks = [
        Command(folder / f"{rank}.log", *script, str(rank), port, str(folder)) for rank in range(2)
    ]
    outputs = [rank.finish(timeout=240)[1] for rank in ranks]
    results = [folder / f"{rank}.json" for rank in range(2)]
    assert all(r.exists() for r in results), "\n".join(outputs)[-4000:]
    return [json.loads(r.read_text()) for r in results]


def test_ddp_shares_the_layers(tmp_path: Path) -> None:
    a, b = run("ddp", tmp_path)
    assert a["multipliers"] == b["multipliers"]
    assert a["alphas"] == b["alphas"]
    assert a["rates"] == b["rates"]
    assert len(set(a["multipliers"].values())) > 1
    # Four layers, each measured by one rank alone, at construction and after each step.
    assert [x + y for x, y in zip(a["counts"], b["counts"], strict=True)] == [4] * 4


def test_ddp_shares_the_layers_of_rates_and_decays(tmp_path: Path) -> None:
    a, b = run("decay", tmp_path)
    assert (a["rates"], a["decays"]) == (b["rates"], b["decays"])
    assert len(set(a["decays"])) > 2 and a["same"] and b["same"]
    assert [x + y for x, y in zip(a["counts"], b["counts"], strict=True)] == [4] * 4


@needs_fully_shard
def test_fsdp2_measures_gathered_weights(tmp_path: Path) -> None:
    a, b = run("fsdp2", tmp_path)
    for key in ("multipliers", "alphas", "rates", "after"):
        assert a[key] == b[key]
    assert a["first"] == pytest.approx(a["whole"], rel=1e-6)
    assert a["alphas"] == pytest.approx(a["after"], rel=1e-6)
    assert a["alphas"] != a["first"]


@needs_fully_shard
def test_spectra_of_sharded_weights(tmp_path: Path) -> None:
    """A rank that fails does not go on alone, where it would wait for the others."""
    a, b = run("spectra_fsdp2", tmp_path)
    assert a["kept"] == b["kept"] and len(a["kept"]) == 4
    assert (a["error"], b["error"]) == (None, "OutOfMemoryError: no room")


def test_measured_in_the_background(tmp_path: Path) -> None:
    """As measured at ticks 3, 6 and 9, two ticks later; saved by one rank in between."""
    a, b = run("background", tmp_path)
    assert a == b
    assert a["pending"] == 5
    for tick in range(5, 10):
        assert a["seen"][tick - 1] == a["expected"][2 if tick < 8 else 5]
    assert a["again"][:10] == a["seen"][:10]  # the other one was updated by hand then
    assert a["again"][10] == a["expected"][8] != a["seen"][10]
    assert a["measurements"] == [4, 4]


@needs_fully_shard
def test_sharded_weights_in_the_background(tmp_path: Path) -> None:
    a, b = run("background_fsdp2", tmp_path)
    assert a == b
    for tick in range(3, 13, 2):  # effects of the measurements at 2, 4, ...
        assert a["alphas"][tick - 1] == pytest.approx(a["whole"][tick - 2], rel=1e-6)


def test_a_failure_of_one_rank_in_the_background_is_raised_on_all(tmp_path: Path) -> None:
    a, b = run("background_failure", tmp_path)
    assert b["error"] == "OutOfMemoryError: no room"
    assert "failed on another rank" in a["error"]
    assert a["pending"] is b["pending"] is None  # it is raised once


def test_a_failure_of_one_rank_on_the_spot_is_raised_on_all(tmp_path: Path) -> None:
    a, b = run("failure", tmp_path)
    assert b["error"] == "OutOfMemoryError: no room"
    assert "failed on another rank" in a["error"]


@needs_fully_shard
def test_a_snapshot_of_weights_that_are_gathered_just_now(tmp_path: Path) -> None:
    """As they are after an evaluation, until the next step frees their memory."""
    a, b = run("fsdp2_unsharded", tmp_path)
    assert a == b
    assert a["taken"] == pytest.approx(a["whole"], rel=1e-6)


@needs_lightning
def test_lightning_ddp(tmp_path: Path) -> None:
    a, b = run("lightning", tmp_path)
    assert a == b
    assert len(set(a["multipliers"].values())) > 1
    assert len(list(tmp_path.rglob("tempbalance.csv"))) == 1


@needs_lightning
@needs_fully_shard
def test_lightning_fsdp2_and_its_resume(tmp_path: Path) -> None:
    a, b = run("lightning_fsdp2", tmp_path)
    assert a == b
    assert a["resumed"] == a["multipliers"]
    assert a["resumed_rates"] == a["rates"]
