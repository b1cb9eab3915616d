"""The benchmark of pruning on a tiny model: what is timed, and what is reckoned from it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("rich")
from benchmarks import pruning
from benchmarks.llm import Transformer

TINY = Transformer("tiny", 2, 64, 160, 4, 4, 100, "none")
CPU = torch.device("cpu")


def test_the_time_of_a_model_is_that_of_its_windows() -> None:
    whole, farms, ten, fifteen = pruning.measuring(TINY, pruning.strategies(rows=48), CPU)
    # Square matrices: 4 a block, 64 x 64, whole and as one window; 64 x 160 has three of 64.
    assert whole["windows_of_the_model"] == 2 * 7
    assert farms["windows_of_the_model"] == 2 * (4 + 3 * 3)
    assert ten["windows_of_the_model"] == 2 * 7 * 100
    # Of 17 places along 64 the published grid takes every step of (64 - 48) // 14 = 1: 15.
    assert fifteen["windows_of_the_model"] == 2 * 7 * 225
    # The same four windows were timed for both.
    assert ten["timed_s"] == fifteen["timed_s"] > 0
    assert fifteen["reckoned_model_s"] == pytest.approx(2.25 * ten["reckoned_model_s"])


def test_fits_and_pruners_are_timed() -> None:
    rows = pruning.fitting((200,), CPU)
    assert {row["fit"] for row in rows} == set(pruning.FITS) and all(row["s"] > 0 for row in rows)
    rows = pruning.pruning([(16, 24)], CPU)
    assert [row["pruner"] for row in rows] == ["magnitude", "wanda", "sparsegpt"]
    assert all(row["s"] > 0 for row in rows)
