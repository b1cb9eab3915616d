"""Eigenvalues: against float64 SVDs, for every dtype, any budget, and no trace left behind."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tempbalance import Farms, WholeMatrix, analyze
from tempbalance.spectra.batches import Task
from tempbalance.spectra.gram import full_precision, reduced
from tempbalance.spectra.scale import unit_scale
from tempbalance.spectra.spectrum import needs_float64, spectra, spectra_float64
from tempbalance.spectra.windows import Windows

BUDGET = 2**28


def task(slices: Tensor, windows: Windows) -> Task:
    return Task(slices, windows.grid(*slices.shape[1:]), unit_scale(slices))


def exact(slices: Tensor, windows: Windows) -> npt.NDArray[np.float64]:
    """(P, S, k) by one float64 SVD a window."""
    array = slices.cpu()
    array = array.to(torch.complex128) if array.is_complex() else array.double()
    grid = windows.grid(*slices.shape[1:])
    found = [
        [np.linalg.svd(w.numpy(), compute_uv=False)[::-1] ** 2 for w in position]
        for position in grid.gather(array)
    ]
    return np.array(found)


def unscaled(values: Tensor, of: Task) -> npt.NDArray[np.float64]:
    return np.asarray((values.double() / of.scale**2).cpu().numpy())


@pytest.mark.parametrize(
    "windows", [Farms(), Farms(2.0), Farms(0.5, rows=12), Farms(rows=16, stride=5), WholeMatrix()]
)
@pytest.mark.parametrize("shape", [(1, 40, 40), (9, 70, 30), (3, 20, 90), (300, 6, 4)])
def test_eigenvalues(windows: Windows, shape: tuple[int, int, int], device: torch.device) -> None:
    one = task(torch.randn(shape, device=device), windows)
    truth = exact(one.slices, windows)
    (single,) = spectra([one], BUDGET)
    assert single.dtype == torch.float32
    assert single.device.type == device.type
    tolerance = 2e-6 * truth.max()
    np.testing.assert_allclose(unscaled(single, one), truth, rtol=2e-5, atol=tolerance)
    everywhere = torch.ones(single.shape[:2], dtype=torch.bool, device=device)
    (double,) = spectra_float64([(one, single, everywhere)], BUDGET)
    np.testing.assert_allclose(unscaled(double, one), truth, rtol=1e-9, atol=1e-12 * truth.max())


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.complex64,
        torch.complex128,
    ],
)
@pytest.mark.parametrize("size", [(50, 20), (230, 210)])  # the second is large enough for blocks
def test_dtypes(dtype: torch.dtype, size: tuple[int, int], device: torch.device) -> None:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    slices = torch.randn(2, *size, dtype=wide).to(dtype).to(device)
    one = task(slices, Farms())
    (values,) = spectra([one], BUDGET)
    truth = exact(slices, Farms())
    np.testing.assert_allclose(unscaled(values, one), truth, rtol=1e-4, atol=1e-6 * truth.max())


def test_one_batch_of_many_layers(device: torch.device) -> None:
    """Layers of the same and of other window shapes, real and complex, in their own order."""
    shapes = [(1, 40, 20), (9, 20, 40), (1, 64, 64), (2, 20, 20), (1, 30, 20), (5, 3, 2)]
    tasks = [task(torch.randn(shape, device=device), Farms()) for shape in shapes]
    tasks.insert(2, task(torch.randn(4, 20, 20, dtype=torch.complex64, device=device), Farms()))
    for one, values in zip(tasks, spectra(tasks, BUDGET), strict=True):
        truth = exact(one.slices, Farms())
        np.testing.assert_allclose(unscaled(values, one), truth, rtol=1e-4, atol=2e-6 * truth.max())


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("budget", [1, 30_000, 1_000_000, 2**28])
def test_any_budget_gives_the_same(budget: int, device: torch.device) -> None:
    tasks = [
        task(torch.randn(shape, device=device), windows)
        for shape, windows in itertools.product(
            [(1, 90, 40), (25, 16, 8), (1, 230, 200)], [Farms(), Farms(rows=8, stride=9)]
        )
    ]
    expected = spectra(tasks, 2**30)
    for values, other in zip(expected, spectra(tasks, budget), strict=True):
        # A budget of one window leaves the pool: other threads, other rounding of the same sums.
        torch.testing.assert_close(values, other, rtol=1e-5, atol=2e-6 * float(values.max()))
    masks = [torch.rand(values.shape[:2], device=device) < 0.5 for values in expected]
    redo = list(zip(tasks, expected, masks, strict=True))
    for one, other in zip(spectra_float64(redo, 2**30), spectra_float64(redo, budget), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13 * float(one.max()))


@given(exponent=st.integers(-1070, 1023), double=st.booleans())
def test_unit_scale(exponent: int, double: bool) -> None:
    exponent = exponent if double else max(-148, min(127, exponent))
    largest = 2.0**exponent
    tensor = torch.tensor([0.0, -largest], dtype=torch.float64 if double else torch.float32)
    scale = float(unit_scale(tensor))
    assert np.frexp(scale)[0] == 0.5  # a power of two: scaling is exact
    assert 2.0**-80 < largest * scale < 8
    if -126 < exponent < 126:
        assert 1 <= largest * scale < 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_unit_scale_marks_what_is_not_finite(bad: float) -> None:
    assert unit_scale(torch.tensor([1.0, bad])) == 0
    assert unit_scale(torch.tensor([1.0, complex(0, bad)])) == 0
    assert unit_scale(torch.zeros(3)) == 1
    assert unit_scale(torch.tensor([complex(3e38, 3e38)], dtype=torch.complex64)) > 0


@pytest.mark.parametrize("exponent", [-149, -130, -60, 60, 120])
def test_scaling_is_exact(exponent: int, device: torch.device) -> None:
    """The same weight, as far from 1 as float32 reaches: the same eigenvalues, but for scale."""
    slices = torch.randint(1, 8, (1, 30, 20), device=device).float()
    one, other = task(slices, Farms()), task(slices * 2.0**exponent, Farms())
    (plain,), (scaled,) = spectra([one], BUDGET), spectra([other], BUDGET)
    shift = 2.0 ** (exponent + float(torch.log2(other.scale / one.scale)))
    torch.testing.assert_close(scaled, plain * shift**2, rtol=1e-4, atol=1e-6 * shift**2 * 2e4)


def test_a_layer_that_is_not_finite_is_nan_and_alone(device: torch.device) -> None:
    slices = torch.randn(3, 40, 20, device=device)
    bad = slices.clone()
    bad[1, 5, 5] = float("nan")
    tasks = [task(slices, Farms()), task(bad, Farms()), task(slices, Farms())]
    first, _, last = spectra(tasks, BUDGET)
    assert tasks[1].scale == 0
    assert torch.isfinite(first).all()
    assert torch.equal(first, last)


def test_zeros_are_exact_in_float64(device: torch.device) -> None:
    slices = torch.randn(1, 64, 20, device=device) @ torch.randn(1, 20, 64, device=device)
    one = task(slices, Farms())
    (single,) = spectra([one], BUDGET)
    mask = torch.ones_like(single[..., 0], dtype=torch.bool)
    assert (single > 0).all()
    (double,) = spectra_float64([(one, single, mask)], BUDGET)
    assert int((double > 0).sum()) == 20
    assert (double >= 0).all()


def test_only_what_is_marked_is_redone() -> None:
    one = task(torch.randn(3, 64, 30), Farms())
    (single,) = spectra([one], BUDGET)
    mask = torch.zeros(single.shape[:2], dtype=torch.bool)
    mask[1, 2] = True
    (double,) = spectra_float64([(one, single, mask)], BUDGET)
    same = double == single.double()
    assert same[~mask].all()
    assert not same[mask].all()
    np.testing.assert_allclose(unscaled(double, one)[1, 2], exact(one.slices, Farms())[1, 2])


def test_needs_float64() -> None:
    values = torch.logspace(0, 1, 40).expand(3, 2, 40).clone()
    assert not needs_float64(values, torch.tensor([2.0])).any()
    assert needs_float64(values, torch.tensor([1e-3])).all()  # 1e-4 of the largest
    assert needs_float64(values, torch.tensor([float("nan")])).all()
    values[1, 0, :3] = 1e-9  # under what float32 can tell from zero: too many
    values[2, 1] = float("nan")
    mask = needs_float64(values, torch.tensor([2.0]))
    assert mask.tolist() == [[False, False], [True, False], [False, True]]
    zeros = torch.zeros(1, 1, 8)
    assert not needs_float64(zeros, torch.tensor([float("nan")])).any()


def test_progress_adds_up_to_one() -> None:
    done: list[float] = []
    tasks = [task(torch.randn(9, 128, 128), Farms(rows=32, stride=8)) for _ in range(3)]
    spectra(tasks, BUDGET, done.append)
    assert sum(done) == pytest.approx(1)
    assert len(done) >= 3


# --- what a measurement must leave as it was ---------------------------------------------------


def _set_backend(backend: str, value: str) -> None:
    matmul = getattr(getattr(torch.backends, backend), "matmul", None)
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has one precision for all backends")
    matmul.fp32_precision = value


def _allow_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


WAYS: dict[str, Callable[[], None]] = {
    "highest": lambda: torch.set_float32_matmul_precision("highest"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": _allow_tf32,
    "cuda alone": lambda: _set_backend("cuda", "tf32"),
    "mkldnn alone": lambda: _set_backend("mkldnn", "bf16"),
}


def readings() -> dict[str, object]:
    """What each setting of precision reads, where it can be read: torch refuses some mixtures."""
    found: dict[str, object] = {}
    reads: dict[str, Callable[[], object]] = {
        "all": torch.get_float32_matmul_precision,
        "allow_tf32": lambda: torch.backends.cuda.matmul.allow_tf32,
        "cuda": lambda: getattr(torch.backends.cuda.matmul, "fp32_precision", None),
        "mkldnn": lambda: torch.backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
    }
    for name, read in reads.items():
        with contextlib.suppress(RuntimeError, AttributeError):
            found[name] = read()
    return found


@pytest.fixture
def precision_as_it_was() -> Iterator[None]:
    before = readings()
    yield
    torch.set_float32_matmul_precision(str(before["all"]))
    for name in ("cuda", "mkldnn"):
        if before.get(name) is not None:
            getattr(torch.backends, name).matmul.fp32_precision = before[name]


@pytest.mark.usefixtures("precision_as_it_was")
@pytest.mark.parametrize("way", WAYS)
def test_precision_is_suspended_and_restored(way: str) -> None:
    one = task(torch.randn(1, 256, 256), Farms())
    with full_precision("cpu"):
        (expected,) = spectra([one], BUDGET)
    WAYS[way]()
    before = readings()
    with full_precision("cpu"):
        (values,) = spectra([one], BUDGET)
        assert not reduced()
        # A parametrization, or torch.compile of one, may ask: none of these raises.
        assert torch.get_float32_matmul_precision() == "highest"
        assert torch.backends.cuda.matmul.allow_tf32 is False
    assert readings() == before
    assert torch.equal(values, expected)
    with pytest.raises(ValueError, match="stop"), full_precision("cpu"):
        raise ValueError("stop")
    assert readings() == before


@pytest.mark.usefixtures("precision_as_it_was")
def test_products_in_float64_do_without_the_setting() -> None:
    """What a thread beside the training does, where it may not touch the user's setting."""
    torch.set_float32_matmul_precision("medium")
    assert reduced()
    slices = torch.randn(2, 230, 210)
    for dtype in (torch.float32, torch.complex64):
        one = replace(task(slices.to(dtype), Farms()), wide=True)
        (values,) = spectra([one], BUDGET)
        truth = exact(one.slices, Farms())
        np.testing.assert_allclose(unscaled(values, one), truth, rtol=1e-5, atol=2e-7 * truth.max())


def test_autocast_is_suspended_and_restored() -> None:
    one = task(torch.randn(1, 40, 30), Farms())  # one batch: computed in this very thread
    (expected,) = spectra([one], BUDGET)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with full_precision("cpu"):
            (values,) = spectra([one], BUDGET)
        assert torch.is_autocast_enabled("cpu")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert torch.equal(values, expected)


def threads_of_a_new_thread() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_the_number_of_threads_is_the_users() -> None:
    tasks = [task(torch.randn(9, 128, 128), Farms(rows=64, stride=8)) for _ in range(3)]
    start = torch.get_num_threads()
    inherited = threads_of_a_new_thread()
    spectra(tasks, BUDGET)
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (start, inherited)
    try:
        for count in (3, 2, 1):
            torch.set_num_threads(count)
            inherited = threads_of_a_new_thread()
            values = spectra(tasks, BUDGET)
            assert (torch.get_num_threads(), threads_of_a_new_thread()) == (count, inherited)
            assert torch.isfinite(torch.stack(values)).all()
    finally:
        torch.set_num_threads(start)


def test_the_pool_gives_what_one_thread_gives() -> None:
    """Bit for bit: a run may be resumed on a machine with another number of cores."""
    tasks = [task(torch.randn(4, 260, 230), Farms(rows=128, stride=40)) for _ in range(2)]
    start = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        many = spectra(tasks, BUDGET)
        torch.set_num_threads(1)
        one = spectra(tasks, BUDGET)
    finally:
        torch.set_num_threads(start)
    assert all(torch.equal(a, b) for a, b in zip(many, one, strict=True))


def test_measuring_in_a_thread_of_the_user() -> None:
    one = task(torch.randn(4, 128, 128), Farms(rows=64, stride=16))
    (expected,) = spectra([one], BUDGET)
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.extend(spectra([one], BUDGET)))
    thread.start()
    thread.join()
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=2e-6 * float(expected.max()))


# --- the float32 Gram matrix and its guard: a table of spectra ------------------------------------


@functools.cache
def spectra_families(n: int) -> dict[str, npt.NDArray[np.float64]]:
    """Square matrices from healthy to nearly singular, by the shape of their spectrum."""
    rng = np.random.default_rng(n)
    i = np.arange(1, n + 1, dtype=float)

    def orthogonal() -> npt.NDArray[np.float64]:
        return np.asarray(np.linalg.qr(rng.standard_normal((n, n)))[0])

    def of(singular: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return (orthogonal() * singular) @ orthogonal()

    def noise() -> npt.NDArray[np.float64]:
        return rng.standard_normal((n, n)) / np.sqrt(n)

    low = rng.standard_normal((n, n // 8)) @ rng.standard_normal((n // 8, n)) / n * 2
    direction = np.outer(orthogonal()[:, 0], orthogonal()[0])
    families = {"gauss": noise(), "student": rng.standard_t(2.5, (n, n))}
    families |= {f"i^-{p}": of(i**-p) for p in (0.5, 1, 1.5, 2)}
    families |= {f"condition {c:.0e}": of(np.geomspace(1, 1 / c, n)) for c in (10, 1e3, 1e4, 1e6)}
    families |= {f"low rank + {e}": low + e * noise() for e in (0.1, 0.03, 0.01, 1e-3)}
    families |= {f"spike {s:.0f}": noise() + s * direction for s in (10, 100, 1000)}
    families |= {f"i^-{p} + noise": of(i**-p) + 1e-3 * noise() for p in (1.5, 2)}
    return families


FAMILIES = list(spectra_families(16))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("n", [64, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_of_every_family_to_1e_5(name: str, n: int, dtype: torch.dtype) -> None:
    weight = torch.from_numpy(spectra_families(n)[name]).to(dtype)
    layer = nn.Linear(n, n, bias=False, dtype=dtype)
    layer.weight.data = weight
    law = reference.hill(reference.eigenvalues([weight.double().numpy()]))
    record = analyze(layer, windows=WholeMatrix()).layers[0]
    assert record.alpha == pytest.approx(law.alpha, rel=1e-5)
    assert pytest.approx(law.d, rel=1e-4) == record.D


def test_double_precision_is_the_same_on_any_number_of_cores() -> None:
    """A BLAS of threads of its own would round otherwise, and the pool's workers wait for them."""
    threadpoolctl = pytest.importorskip("threadpoolctl")
    generator = torch.Generator().manual_seed(0)
    slices = torch.randn(2, 384, 384, generator=generator, dtype=torch.float64)
    found = []
    for threads in (1, 2):
        with threadpoolctl.threadpool_limits(threads, user_api="blas"):
            found.append(spectra([task(slices, WholeMatrix())], BUDGET)[0])
    assert torch.equal(*found)
