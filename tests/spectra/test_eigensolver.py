"""Our own eigensolver can never break a run: on request, checked, and otherwise the library."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tempbalance as tb
from tempbalance.layers.find import find_layers
from tempbalance.measure.method import Method
from tempbalance.measure.snapshot import attempt_later
from tempbalance.spectra import gram
from tempbalance.spectra.eigensolver import solver

LAUNCH = "tempbalance.spectra.eigensolver.launch"


class Device:
    """A stand-in for the kernels and their device: what was solved, and how it fails."""

    def __init__(self, fails: Callable[[Tensor], Tensor] | None = None) -> None:
        self.calls: list[int] = []
        self.fails = fails

    def tiles(self, n: int, dtype: torch.dtype) -> object:
        return n, dtype

    def solve(self, matrices: Tensor) -> Tensor:
        self.calls.append(len(matrices))
        if self.fails is not None:
            return self.fails(matrices)
        return torch.linalg.eigvalsh(matrices)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Device]:
    """Matrices on the CPU solved as if they were on a device with our kernels."""

    def start(fails: Callable[[Tensor], Tensor] | None = None, wish: str = "triton") -> Device:
        device = Device(fails)
        monkeypatch.setenv(solver.VARIABLE, wish)
        monkeypatch.setattr(solver, "usable", lambda matrices: matrices.shape[-1] >= 33)
        monkeypatch.setattr(solver, "_kernels", solver.Kernels())
        monkeypatch.setitem(
            sys.modules, LAUNCH, SimpleNamespace(solve=device.solve, tiles=device.tiles)
        )
        return device

    return start


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 40), nn.Linear(50, 64), nn.Linear(40, 40))


def alphas() -> list[float | None]:
    return [layer.alpha for layer in tb.analyze(model(), windows=tb.WholeMatrix())]


def refuse(_: Tensor) -> Tensor:
    raise ValueError("no such instruction")


def no_room(_: Tensor) -> Tensor:
    raise torch.cuda.OutOfMemoryError("no room")


def test_kernels_are_used_on_request_and_checked_once(
    pretend: Callable[..., Device], caplog: pytest.LogCaptureFixture
) -> None:
    expected = alphas()
    device = pretend()
    for _ in range(2):
        assert alphas() == pytest.approx(expected, rel=1e-5)
    sizes = 2  # 40 and 50: a check of two matrices each, once
    assert device.calls.count(2) == sizes and len(device.calls) > sizes
    (said,) = (record.getMessage() for record in caplog.records)
    assert "compiling" in said and "20 s" in said


@pytest.mark.parametrize("wish", ["library", None])
def test_without_a_request_the_library_solves(
    wish: str | None, pretend: Callable[..., Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = pretend(refuse, wish or "")
    if wish is None:
        monkeypatch.delenv(solver.VARIABLE)
    assert None not in alphas()
    assert device.calls == []


def test_the_request_holds_beside_a_training_too(pretend: Callable[..., Device]) -> None:
    layers = find_layers(model()).layers
    for wish, used in (("library", False), ("triton", True)):
        device = pretend(wish=wish)
        result = attempt_later(layers, Method(), None)(lambda _: None)
        assert not result.failures and len(result.records) == 3
        assert bool(device.calls) is used


@pytest.mark.parametrize(
    ("fails", "reason"),
    [
        (refuse, "no such instruction"),
        (lambda matrices: torch.linalg.eigvalsh(matrices) * 1.001, "off by"),
        (lambda matrices: torch.linalg.eigvalsh(matrices) * float("nan"), "off by nan"),
    ],
)
def test_kernels_that_fail_their_check_are_left_alone_and_named_once(
    fails: Any, reason: str, pretend: Callable[..., Device], caplog: pytest.LogCaptureFixture
) -> None:
    expected = alphas()
    device = pretend(fails)
    for _ in range(3):  # a compiler that is missing is missing for every size
        assert alphas() == expected
    assert len(device.calls) == 1
    (said,) = [text for text in caplog.messages if "compiling" not in text]
    assert reason in said and "the library" in said


def test_a_launch_that_raises_later_leaves_all_to_the_library(
    pretend: Callable[..., Device], caplog: pytest.LogCaptureFixture
) -> None:
    expected = alphas()
    device = pretend()
    alphas()
    device.fails = refuse
    caplog.clear()
    before = len(device.calls)
    for _ in range(3):
        assert alphas() == expected
    assert len(device.calls) == before + 1
    (said,) = caplog.messages
    assert "no such instruction" in said


def test_memory_that_is_short_once_disables_nothing(
    pretend: Callable[..., Device], caplog: pytest.LogCaptureFixture
) -> None:
    expected = alphas()
    device = pretend(no_room)
    assert alphas() == expected
    device.fails = None
    device.calls.clear()
    assert alphas() == pytest.approx(expected, rel=1e-5)
    assert device.calls.count(2) == 2 and len(device.calls) > 2  # checked now, and used
    assert not [text for text in caplog.messages if "from here on" in text]


def test_without_triton(
    pretend: Callable[..., Device],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = alphas()
    pretend()
    monkeypatch.delitem(sys.modules, LAUNCH)
    monkeypatch.setitem(sys.modules, "triton", None)
    for _ in range(2):
        assert alphas() == expected
    assert len(caplog.messages) == 1 and "triton" in caplog.text


def test_another_wish_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(solver.VARIABLE, "ours")
    with pytest.raises(ValueError, match=r"TEMPBALANCE_EIGENSOLVER must be .*'ours'"):
        gram.solve(torch.eye(3)[None])


def test_the_folder_can_be_deleted() -> None:
    code = """
import sys
sys.modules["tempbalance.spectra.eigensolver"] = None
import torch, tempbalance
assert tempbalance.analyze(torch.nn.Linear(40, 40)).layers[0].alpha
assert not [name for name in sys.modules if "eigensolver." in name]
"""
    environment = {**os.environ, solver.VARIABLE: "triton"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)


def test_where_a_gpu_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it solves a batch at once: else the pool of CPU threads is faster."""
    monkeypatch.delenv(solver.VARIABLE, raising=False)
    worth = {version: gram.worth_a_gpu(version)
             for version in ("2.4.1", "2.11.0+cu128", "2.12.0a0+git123", "3.0")}  # fmt: skip
    assert worth == {"2.4.1": False, "2.11.0+cu128": False, "2.12.0a0+git123": True, "3.0": True}
    monkeypatch.setenv(solver.VARIABLE, "triton")
    assert gram.worth_a_gpu("2.4.1")


@pytest.mark.parametrize("n", [1, 2, 5, 40])
def test_the_known_matrices(n: int) -> None:
    dense, values = solver.known(n)
    torch.testing.assert_close(torch.linalg.eigvalsh(dense), values, atol=1e-14, rtol=0)
    assert n < 3 or bool((dense.triu(2)[0] != 0).sum() > n)  # not tridiagonal already
