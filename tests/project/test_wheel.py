"""The built archives hold what they should, and the wheel beside torch and numpy measures."""

from __future__ import annotations

from pathlib import Path

import pytest
import wheel

import tempbalance


@pytest.mark.slow
def test_wheel_needs_torch_and_numpy_alone(tmp_path: Path) -> None:
    archives = wheel.build(tmp_path)
    assert archives.wheel.name == f"tempbalance-{tempbalance.__version__}-py3-none-any.whl"
    wheel.check_contents(archives)
    wheel.check_alone(archives, tmp_path, beside_torch=True)
