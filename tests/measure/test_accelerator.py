"""The path of accelerators, without one: the same numbers, no wait but one, bounded memory."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tempbalance as tb
from tempbalance.layers.find import find_layers
from tempbalance.measure import Outcome, engine, measurement
from tempbalance.measure import measure as measured
from tempbalance.measure.measurement import Measurement
from tempbalance.measure.method import Method
from tempbalance.measure.snapshot import attempt_later
from tempbalance.spectra import batches, gpu, gram, scale

WINDOWS = {
    "whole": tb.WholeMatrix(),
    "largest": tb.Farms(),
    "many": tb.Farms(rows=8, stride=3),
    "wide": tb.Farms(aspect_ratio=0.5, rows=12),
    "released": tb.Farms.released_linear(10, 1.5, per_dim=4),
    "positions": tb.Farms(rows=9, pool="alpha"),
}


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6, 5, 4, dtype=torch.complex64))


def network() -> nn.Module:
    """Layers of every kind and in every state that the engine treats apart."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(12, 20, 3),
            "grouped": nn.Conv2d(24, 24, 3, groups=2),
            "linear": nn.Linear(40, 40),
            "bf16": nn.Linear(48, 16).to(torch.bfloat16),
            "f64": nn.Linear(30, 20).double(),
            "tiny": nn.Linear(24, 24),
            "low rank": nn.Linear(36, 36),
            "steep": nn.Linear(32, 32),
            "nan": nn.Linear(20, 20),
            "zero": nn.Linear(20, 20),
        }
    )
    with torch.no_grad():
        model["tiny"].weight.mul_(1e-25)
        model["low rank"].weight.copy_(torch.randn(36, 20) @ torch.randn(20, 36))
        q = torch.linalg.qr(torch.randn(2, 32, 32)).Q
        model["steep"].weight.copy_(q[0] * torch.arange(1.0, 33.0) ** -3 @ q[1])
        model["nan"].weight[3, 4] = math.nan
        model["zero"].weight.zero_()
    return model


def same(one: list[Any], other: list[Any], rtol: float) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a.name, a.outcome, a.n_eigs, a.n_tail) == (b.name, b.outcome, b.n_eigs, b.n_tail)
        for name in ("alpha", "D", "xmin", "spectral_norm", "stable_rank", "log_norm"):
            x, y = getattr(a, name), getattr(b, name)
            assert (x is None) == (y is None)
            assert x is None or x == pytest.approx(y, rel=rtol, abs=1e-6), (a.name, name)


@pytest.fixture
def batched(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors measured as an accelerator's are."""
    monkeypatch.setattr(scale, "on_pool", lambda device: False)


@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("budget", [1, 200_000, 2**30])
def test_batches_give_the_numbers_of_the_pool(
    windows: Any, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = find_layers(network()).layers
    expected = measured(layers, windows=windows, min_eigs=4, keep_spectra=True)
    monkeypatch.setattr(scale, "on_pool", lambda device: False)
    found = measured(layers, windows=windows, min_eigs=4, keep_spectra=True, budget=budget)
    same(found, expected, 1e-5)
    outcomes = {record.name: record.outcome for record in found}
    assert outcomes["nan"] is Outcome.NON_FINITE and outcomes["zero"] is Outcome.ALL_ZERO
    for a, b in zip(found, expected, strict=True):
        if a.eigenvalues is not None:
            assert b.eigenvalues is not None
            top = float(b.eigenvalues[-1])
            np.testing.assert_allclose(a.eigenvalues, b.eigenvalues, atol=1e-5 * top)


def test_batches_of_complex_windows(batched: None) -> None:
    model = nn.ModuleDict({"spectral": Complex()})
    (layer,) = find_layers(model).layers
    (found,) = measured([layer], min_eigs=4, keep_spectra=True)
    weight = layer.read().to(torch.complex128).numpy()
    exact = np.sort((np.linalg.svd(weight, compute_uv=False) ** 2).ravel())
    assert found.eigenvalues is not None
    np.testing.assert_allclose(found.eigenvalues, exact, rtol=2e-4, atol=1e-5 * exact[-1])


# --- nothing waits -------------------------------------------------------------------------------


def _fakes_cuda() -> bool:
    try:
        with FakeTensorMode():
            nn.Linear(2, 2, device="cuda")
    except RuntimeError:
        return False
    return True


needs_fakes = pytest.mark.skipif(not _fakes_cuda(), reason="this torch asks the driver for fakes")


class Watch(TorchDispatchMode):
    """Notes what would wait for a device: reads of values, copies between devices, data shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.launches = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        devices = {
            t.device.type
            for t in tree_leaves((args, kwargs, out))
            if isinstance(t, Tensor) and t.ndim + t.numel() > 0
        }
        crosses = len(devices) > 1 and name in ("_to_copy", "copy_", "index", "index_put_")
        if crosses or name in ("_local_scalar_dense", "nonzero", "item", "masked_select"):
            self.waits.append(name)
        self.launches += not (func.is_view or name in ("device", "empty", "detach"))
        return out


def fake_measurement(
    monkeypatch: pytest.MonkeyPatch, build: Callable[[], nn.Module], **options: Any
) -> tuple[list[str], int]:
    """What would have waited, and how many kernels were launched, on CUDA."""
    reads: list[int] = []

    def read_back(values: Tensor) -> np.ndarray:
        assert values.device.type == "cuda"
        reads.append(values.numel())
        table = np.ones(values.numel())
        table.reshape(-1, 11)[:, 7] = 0  # no doubt: no second look
        return table

    monkeypatch.setattr(engine, "read_back", read_back)
    monkeypatch.setattr("tempbalance.spectra.grid._uploaded", uploaded)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: t.device.type == "cuda"))
    monkeypatch.setattr(gram, "worth_a_gpu", lambda: True)
    with FakeTensorMode(), torch.device("cuda"), Watch() as watch:
        model = build()
        watch.waits, watch.launches = [], 0
        measured(find_layers(model).layers, **options)
    assert len(reads) == 1
    return watch.waits, watch.launches


def uploaded(values: list[int], device: Any) -> Tensor:
    """A stand-in for the pinned upload, which does not wait but needs a driver."""
    return torch.zeros(len(values), dtype=torch.long, device=device)


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 16, 3), nn.Linear(64, 32), nn.Linear(50, 40))


@needs_fakes
@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("fit", [tb.Hill(), tb.KSFit(), tb.PeakFit()], ids=str)
def test_one_read_and_no_other_wait(
    windows: Any, fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, _ = fake_measurement(monkeypatch, small, windows=windows, fit=fit)
    assert waits == []


@needs_fakes
def test_one_read_for_mixed_dtypes_and_spectral_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed() -> nn.Module:
        half = nn.Linear(40, 30, dtype=torch.bfloat16)
        return nn.ModuleList([half, nn.Linear(30, 30, dtype=torch.float64), Complex()])

    assert fake_measurement(monkeypatch, mixed)[0] == []


@needs_fakes
def test_the_watch_sees_waits() -> None:
    with FakeTensorMode(), Watch() as watch:
        x = torch.ones(3, device="cuda")
        x.cpu()
        torch.zeros(3).to("cuda")
        assert watch.waits == ["_to_copy", "_to_copy"]
        with pytest.raises(Exception, match="."):
            x.sum().item()


@needs_fakes
def test_launches_grow_by_few_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "solve", lambda matrices: matrices.diagonal(dim1=1, dim2=2))
    counts = []
    for depth in (10, 20, 40):

        def build(depth: int = depth) -> nn.Module:
            return nn.Sequential(*(nn.Linear(24, 24) for _ in range(depth)))

        counts.append(fake_measurement(monkeypatch, build)[1])
    grown = [(b - a) / n for a, b, n in zip(counts, counts[1:], (10, 20), strict=False)]
    assert grown[0] == grown[1]  # linear in the number of layers
    assert grown[0] <= 6


# --- snapshots -----------------------------------------------------------------------------------


def in_a_thread(function: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def body() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert not errors, errors


def test_a_snapshot_is_of_the_weights_at_construction() -> None:
    model = network()
    layers = find_layers(model).layers
    expected = measured(layers, min_eigs=4)
    taken = Measurement(layers, Method(min_eigs=4), snapshot=True)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    in_a_thread(taken.compute)
    assert taken.finish() == expected
    assert measured(layers, min_eigs=4) != expected


class Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def aliasing(kind: str) -> nn.Module:
    """Layers whose weight is read as a tensor of its own in most cases, and not in this one."""
    if kind == "grouped":
        return nn.Sequential(nn.Conv2d(64, 64, 1, groups=4))
    layer = nn.Linear(32, 32)
    parametrize.register_parametrization(layer, "weight", Same())
    return nn.Sequential(layer)


@pytest.mark.parametrize("kind", ["grouped", "parametrized"])
def test_a_snapshot_never_shares_memory_with_the_model(kind: str) -> None:
    torch.manual_seed(0)
    model = aliasing(kind)
    layers = find_layers(model).layers
    assert layers[0].is_own_memory(layers[0].read())
    expected = measured(layers, min_eigs=4)
    taken = Measurement(layers, Method(min_eigs=4), snapshot=True)
    later = attempt_later(layers, Method(min_eigs=4), None)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) ** 5)
    taken.compute()
    assert taken.finish() == expected
    assert later(lambda _: None).records == expected
    assert measured(layers, min_eigs=4) != expected


@pytest.fixture
def reduced() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def refuse(*_: Any) -> Any:
    raise AssertionError("a global setting was touched")


def test_layer_by_layer_in_the_background_touches_no_setting(
    reduced: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    layers = find_layers(nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))).layers
    expected = measured(layers)
    later = attempt_later(layers, Method(), None)
    whole = engine.spectra

    def failing(tasks: list[batches.Task], *rest: Any) -> list[Tensor]:
        if any(task.name == "1" for task in tasks):
            raise torch.cuda.OutOfMemoryError("no room")
        return whole(tasks, *rest)

    monkeypatch.setattr(engine, "spectra", failing)
    monkeypatch.setattr(measurement, "full_precision", refuse)
    found = []
    in_a_thread(lambda: found.append(later(lambda _: None)))
    assert set(found[0].failures) == {"1"} and "no room" in found[0].failures["1"]
    same(found[0].records, [expected[0], expected[2]], 1e-5)
    assert "trying layer by layer" in caplog.text


def test_a_layer_that_cannot_be_copied_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(nn.Module):
        works = True

        def forward(self, x: Tensor) -> Tensor:
            if not self.works:
                raise RuntimeError("no such weight")
            return x * 1.0

    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)))
    parametrize.register_parametrization(model[1], "weight", Broken())
    layers = find_layers(model).layers
    expected = measured(layers)
    Broken.works = False
    result = attempt_later(layers, Method(), None)(lambda _: None)
    assert set(result.failures) == {"1"} and "no such weight" in result.failures["1"]
    same(result.records, [expected[0], expected[2]], 1e-6)


def test_autocast_is_off_on_every_device() -> None:
    before = torch.is_autocast_enabled("cuda")
    try:
        torch.set_autocast_enabled("cuda", True)
        with gram.full_precision("cpu", "cuda"):
            assert not torch.is_autocast_enabled("cuda")
        assert torch.is_autocast_enabled("cuda")
    finally:
        torch.set_autocast_enabled("cuda", before)


def test_beside_the_training_no_setting_is_touched_and_none_matters(
    reduced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layers = find_layers(nn.Sequential(nn.Linear(64, 64), nn.Linear(300, 300))).layers
    expected = measured(layers)
    taken = Measurement(layers, snapshot=True)
    monkeypatch.setattr(measurement, "full_precision", refuse)
    wide: list[bool] = []
    whole = engine.spectra

    def watched(tasks: list[batches.Task], *rest: Any) -> list[Tensor]:
        wide.extend(task.wide for task in tasks)
        return whole(tasks, *rest)

    monkeypatch.setattr(engine, "spectra", watched)
    torch.set_float32_matmul_precision("highest")  # too late to matter
    in_a_thread(taken.compute)
    same(taken.finish(), expected, 1e-5)
    assert wide == [True, True]


# --- beside a training on CUDA, by a stand-in ----------------------------------------------------


class Driver:
    """A stand-in for CUDA's streams and events: what was made and done, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        driver = self

        class Stream:
            def __init__(self, device: Any = None) -> None:
                driver.done.append("stream")

            def wait_stream(self, other: Any) -> None:
                driver.done.append("wait")

        class Event:
            def record(self, stream: Any) -> None:
                driver.done.append("record")

            def synchronize(self) -> None:
                driver.done.append("synchronize")

        @contextlib.contextmanager
        def on(stream: Any) -> Iterator[None]:
            driver.done.append("enter")
            yield

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", on)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: t.device.type == "cuda"))
        monkeypatch.setattr(engine, "spectra", self._spectra)
        engine.side_stream.cache_clear()

    def _spectra(self, tasks: Any, *_: Any) -> Any:
        self.done.append("spectra on " + tasks[0].slices.device.type)
        raise InterruptedError  # far enough


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    yield Driver(monkeypatch)
    engine.side_stream.cache_clear()


@needs_fakes
@pytest.mark.parametrize("worth", [True, False])
def test_one_stream_a_device_and_the_work_is_the_threads(
    worth: bool, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies alone are made in the training thread; where CUDA loops, in pinned memory."""
    monkeypatch.setattr(gram, "worth_a_gpu", lambda: worth)
    for repeat in range(40):
        driver.done.clear()
        with FakeTensorMode(), torch.device("cuda"):
            model = nn.Sequential(nn.Linear(40, 40), nn.Conv2d(8, 16, 3))
            taken = Measurement(find_layers(model).layers, snapshot=True)
            copied = list(driver.done)
            with pytest.raises(InterruptedError):
                taken.compute()
        used = driver.done[len(copied) :]
        if worth:
            assert copied == (["stream"] if repeat == 0 else []) + ["wait"]
            assert used == ["enter", "spectra on cuda"]
        else:
            assert copied == ["record", "record"]
            assert used == ["synchronize", "spectra on cpu"]


# --- large windows and memory --------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 40), (90, 40), (40, 90)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("path", ["pool", "batches"])
def test_a_large_window_in_parts(
    shape: tuple[int, int], dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(*shape).to(dtype)
    layers = find_layers(model).layers
    expected = measured(layers, windows=tb.WholeMatrix(), keep_spectra=True)
    if path == "batches":
        monkeypatch.setattr(scale, "on_pool", lambda device: False)
    read: list[tuple[int, ...]] = []
    original = batches.converted

    def watched(windows: Tensor, *rest: Any) -> Tensor:
        read.append(tuple(windows.shape))
        return original(windows, *rest)

    for module in (batches, gram):
        monkeypatch.setattr(module, "LARGE", 500)
    monkeypatch.setattr(gram, "converted", watched)
    found = measured(layers, windows=tb.WholeMatrix(), keep_spectra=True)
    assert max(math.prod(part) for part in read) <= 500
    assert sum(part[0] for part in read) == max(shape)
    same(found, expected, 2e-5)


def test_a_window_over_the_budget_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    layers = find_layers(nn.ModuleDict({"big": nn.Linear(123, 77)})).layers
    with caplog.at_level(logging.WARNING, logger="tempbalance"):
        for _ in range(2):
            measured(layers, budget=1000)
    (message,) = [r.getMessage() for r in caplog.records]
    assert "'big'" in message and "77 x 77" in message and "rows=" in message


_PEAK = """
import resource, sys, threading, time
import torch, tempbalance as tb
from torch import nn
rows, cols, window, budget, chunk = map(int, sys.argv[1:6])
tb.analyze(nn.Linear(300, 300))  # libraries, threads
with torch.device("meta"):
    layer = nn.Linear(cols, rows, bias=False, dtype=torch.bfloat16)
layer = layer.to_empty(device="cpu")
with torch.no_grad():
    for part in layer.weight.split(512):
        part.copy_(torch.randn(part.shape))
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before, peak, done = resident(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
windows = tb.Farms(rows=window or None)
record = tb.analyze(layer, windows=windows, budget=budget).layers[0]
done = True
thread.join()
print(peak - before, record.alpha)
"""


def peak_of(rows: int, cols: int, window: int, budget: int) -> tuple[int, float]:
    """Growth of the process's memory over a measurement of one bf16 layer, and its alpha."""
    out = subprocess.run(
        [sys.executable, "-c", _PEAK, *map(str, (rows, cols, window, budget, 0))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    grown, alpha = out.stdout.split()
    return int(grown), float(alpha)


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")


@needs_proc
@pytest.mark.slow
def test_one_large_window_stays_within_the_budget() -> None:
    """The Gram matrix, the solver's copy of it and a part of the window: no copy of the window."""
    size = 3000
    budget = 2 * 4 * size**2 + 4 * batches.LARGE
    grown, alpha = peak_of(size, size + 600, 0, budget)
    assert grown <= budget + 12 * 2**20
    assert alpha == pytest.approx(2.12, abs=0.05)


@needs_proc
@pytest.mark.slow
def test_a_layer_of_a_large_language_model_stays_within_the_budget() -> None:
    """4096 x 14336 in bf16, 112 MiB, its 224 windows of 512 x 512: within 16 MiB."""
    budget = 16 * 2**20
    grown, alpha = peak_of(4096, 14336, 512, budget)
    assert grown <= budget
    assert alpha == pytest.approx(2.12, abs=0.02)


def test_the_solver_has_the_memory_of_the_windows(
    batched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Tensor]] = []
    gathered, solve = gpu._gathered, gram.solve

    def watched(some: Any) -> Tensor:
        batch = gathered(some)
        made.append(weakref.ref(batch))
        return batch

    def checks(matrices: Tensor) -> Tensor:
        assert made[-1]() is None
        return solve(matrices)

    monkeypatch.setattr(gpu, "_gathered", watched)
    monkeypatch.setattr(gram, "solve", checks)
    measured(find_layers(small()).layers)
    assert made


def test_chunks_are_of_one_size(batched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = gram.eigenvalues

    def watched(windows: Tensor, wide: bool = False) -> Tensor:
        sizes.append(len(windows))
        return original(windows, wide)

    monkeypatch.setattr(gram, "eigenvalues", watched)
    layers = find_layers(nn.Sequential(*(nn.Linear(20, 20) for _ in range(12)))).layers
    measured(layers, budget=5 * 8000)  # room for five at a time
    assert sizes == [4, 4, 4]
