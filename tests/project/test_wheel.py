"""The built archives hold what they should, and the wheel beside torch and numpy measures."""

from __future__ import annotations

from pathlib import Path

import archives
import pytest

import tempbalance


@pytest.mark.ci
def test_wheel_needs_torch_and_numpy_alone(tmp_path: Path) -> None:
    built = archives.build(tmp_path)
    assert built.wheel.name == f"tempbalance-{tempbalance.__version__}-py3-none-any.whl"
    archives.check_contents(built)
    archives.check_alone(built, tmp_path, beside_torch=True)
