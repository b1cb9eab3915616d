"""Seeds, devices, and the figures that the published codes print (where they are at hand)."""

from __future__ import annotations

import gc
import json
import os
import random
from pathlib import Path
from typing import Any

# Small matrices on many threads, and several test processes on few cores, spend their time
# waiting for each other. Tests of the thread pool ask for threads themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, settings

# Each example runs a measurement: no deadline, and the same examples in every run.
settings.register_profile(
    "tempbalance",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("tempbalance")

# Tests on real data find it beside the checkout, or where the user says.
_BESIDE = Path(__file__).resolve().parents[1].parent / "shared" / "data"
if _BESIDE.is_dir():
    os.environ.setdefault("TEMPBALANCE_DATA", str(_BESIDE))

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first: none of them is left for one worker while the other has nothing to do."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """What the imports made stays: no collection of garbage need look through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    # torch.manual_seed also keeps a traceback for each kind of device that may yet be used.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and a GPU where there is one."""
    return torch.device(request.param)


GOLDEN = Path(__file__).resolve().parent / "golden"


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """``layers.json``: what the published codes print."""
    return dict(json.loads((GOLDEN / "layers.json").read_text()))


@pytest.fixture(scope="session")
def golden_weights() -> dict[str, npt.NDArray[np.float32]]:
    """``layers.npz``: the weights they were given."""
    with np.load(GOLDEN / "layers.npz") as arrays:
        return dict(arrays)
