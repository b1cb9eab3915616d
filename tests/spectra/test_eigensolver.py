"""Our own batched eigenvalues: against float64 LAPACK and analytic laws, and without one wait."""

from __future__ import annotations

import itertools
from typing import Any

import matrices
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tempbalance.spectra import cuda_graphs, gram
from tempbalance.spectra.eigensolver import solver as eigensolver
from tempbalance.spectra.eigensolver import tridiagonal
from tempbalance.spectra.eigensolver.solver import eigvalsh, preferred, workspace_bytes

REAL = [torch.float32, torch.float64]
DTYPES = [*REAL, torch.complex64, torch.complex128]
SIZES = [1, 2, 3, 4, 5, 20, 33, 34, 35, 67]


def assert_right(found: Tensor, of: Tensor, factor: float = 1.0) -> None:
    truth = matrices.exact(of)
    assert found.dtype == of.dtype.to_real()
    assert found.shape == of.shape[:-1]
    assert found.device == of.device
    assert bool((found.diff(dim=-1) >= 0).all())
    error = np.abs(found.double().cpu().numpy() - truth)
    allowed = factor * matrices.tolerance(of, truth) + np.finfo(np.float32).tiny
    bad = (error > allowed).any(-1)
    names = list(matrices.FAMILIES) if len(bad) == len(matrices.FAMILIES) else range(len(bad))
    assert not bad.any(), [name for name, b in zip(names, bad, strict=True) if b]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_every_family(n: int, dtype: torch.dtype, device: torch.device) -> None:
    batch = matrices.every_family(n, dtype).to(device)
    assert_right(eigvalsh(batch), batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_as_good_as_lapack_at_200(dtype: torch.dtype, device: torch.device) -> None:
    batch = matrices.every_family(200, dtype).to(device)
    found = eigvalsh(batch)
    assert_right(found, batch)
    truth = matrices.exact(batch)
    norm = np.abs(truth).max(-1, keepdims=True) + 1e-300
    lapack = np.abs(torch.linalg.eigvalsh(batch.cpu()).double().numpy() - truth) / norm
    ours = np.abs(found.double().cpu().numpy() - truth) / norm
    assert ours.max() <= 4 * lapack.max()
    assert np.median(ours.max(-1)) <= np.median(lapack.max(-1))


@pytest.mark.parametrize("n", [2, 3, 10, 101])
def test_second_difference(n: int, device: torch.device) -> None:
    one = torch.from_numpy(matrices.second_difference(n)).to(device)
    law = 2 - 2 * np.cos(np.arange(1, n + 1) * np.pi / (n + 1))
    found = eigvalsh(one.unsqueeze(0))[0].cpu().numpy()
    np.testing.assert_allclose(found, law, atol=4e-15)
    np.testing.assert_allclose(
        eigvalsh(one.float().unsqueeze(0))[0].cpu().numpy(), law, atol=4 * 2e-6
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("uplo", "overwrite"), list(itertools.product("UL", [False, True])))
def test_reads_one_half_alone(dtype: torch.dtype, uplo: str, overwrite: bool) -> None:
    batch = matrices.every_family(9, dtype)[:4]
    expected = eigvalsh(batch)
    other = torch.full_like(batch, float("nan"))
    half = batch.triu() + other.tril(-1) if uplo == "U" else batch.tril() + other.triu(1)
    if dtype.is_complex:  # the imaginary part of the diagonal is not read either
        half = half + torch.diag(torch.full((9,), 1j, dtype=dtype))
    before = half.clone()
    assert torch.equal(eigvalsh(half, uplo, overwrite=overwrite), expected)
    if not overwrite:
        assert torch.equal(torch.nan_to_num(half), torch.nan_to_num(before))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_nan_and_alone(bad: float, dtype: torch.dtype) -> None:
    batch = matrices.every_family(20, dtype)[:5]
    expected = eigvalsh(batch)
    batch[1, 3, 7] = bad
    batch[3, 19, 19] = bad
    found = eigvalsh(batch)
    assert found[[1, 3]].isnan().all()
    assert torch.equal(found[[0, 2, 4]], expected[[0, 2, 4]])


@given(exponent=st.integers(-100, 100), dtype=st.sampled_from(DTYPES))
def test_scaling_by_a_power_of_two_is_exact(exponent: int, dtype: torch.dtype) -> None:
    batch = matrices.every_family(8, dtype)[:6]
    assert torch.equal(eigvalsh(batch * 2.0**exponent), eigvalsh(batch) * 2.0**exponent)


@given(seed=st.integers(0, 2**30), n=st.integers(2, 40), dtype=st.sampled_from(DTYPES))
def test_similarity_sign_and_shift(seed: int, n: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    values = np.sort(rng.uniform(-1, 1, n) ** 3)
    values /= np.abs(values).max()
    wide = torch.complex128 if dtype.is_complex else torch.float64
    a, b = (
        torch.from_numpy(matrices.with_spectrum(values, rng, dtype.is_complex)).to(wide).to(dtype)
        for _ in range(2)
    )
    eye = torch.eye(n, dtype=dtype)
    one, other, minus, moved = eigvalsh(torch.stack([a, b, -a, a + eye])).double().numpy()
    allowed = 16 * np.sqrt(n) * torch.finfo(dtype).eps
    np.testing.assert_allclose(one, values, rtol=0, atol=allowed)
    np.testing.assert_allclose(other, one, rtol=0, atol=allowed)
    np.testing.assert_allclose(minus, -one[::-1], rtol=0, atol=allowed)
    np.testing.assert_allclose(moved - 1, one, rtol=0, atol=allowed)


@given(order=st.permutations(list(range(6))))
def test_the_batch_in_any_order(order: list[int]) -> None:
    batch = matrices.every_family(21, torch.float32)[:6]
    found, expected = eigvalsh(batch[order]), eigvalsh(batch)[order]
    # Not bit for bit: on some processors MKL multiplies the last of a batch by another kernel than
    # the first. What is wrong about an order is wrong by whole eigenvalues.
    allowed = 16 * 21**0.5 * torch.finfo(torch.float32).eps
    assert ((found - expected).abs() <= allowed * expected.abs().amax(-1, keepdim=True)).all()


def test_shapes() -> None:
    a = matrices.every_family(6, torch.float32)[:6].view(2, 3, 6, 6)
    assert torch.equal(eigvalsh(a).view(6, 6), eigvalsh(a.view(6, 6, 6)))
    assert eigvalsh(a[0, 0]).shape == (6,)
    assert eigvalsh(torch.empty(0, 5, 5)).shape == (0, 5)
    assert eigvalsh(torch.empty(3, 0, 0, dtype=torch.complex64)).dtype == torch.float32
    assert torch.equal(eigvalsh(a.mT), eigvalsh(a))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: eigvalsh(torch.ones(2, 3, 4)), ValueError, r"\(2, 3, 4\)"),
        (lambda: eigvalsh(torch.ones(3)), ValueError, "n, n"),
        (lambda: eigvalsh(torch.ones(2, 2, dtype=torch.bfloat16)), TypeError, "convert"),
        (lambda: eigvalsh(torch.ones(2, 2), "X"), ValueError, "uplo"),
        (lambda: eigvalsh(torch.ones(2, 2), form="x"), ValueError, "form"),  # type: ignore[arg-type]
        (lambda: eigvalsh(torch.ones(2, 2), form="graph"), RuntimeError, "form='torch'"),
        (lambda: eigvalsh(torch.ones(2, 2), form="triton"), RuntimeError, "CUDA"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_no_gradient_is_recorded() -> None:
    a = torch.eye(4, requires_grad=True)
    assert not eigvalsh(a).requires_grad


# --- the tridiagonal matrices --------------------------------------------------------------------


@given(data=st.data(), n=st.integers(1, 30), dtype=st.sampled_from(REAL))
def test_tridiagonal_matrices(data: st.DataObject, n: int, dtype: torch.dtype) -> None:
    """Zero and tiny couplings, equal diagonals and clusters: the worst for a Sturm count."""
    entry = st.sampled_from([0.0, 1.0, -1.0, 0.5, 1e-20, 1e-38]) | st.floats(-1, 1, width=32)
    d = torch.tensor([data.draw(st.lists(entry, min_size=n, max_size=n))], dtype=dtype)
    e = torch.tensor([data.draw(st.lists(entry, min_size=n - 1, max_size=n - 1))], dtype=dtype)
    dense = torch.diag_embed(d) + torch.diag_embed(e, 1) + torch.diag_embed(e, -1)
    truth = np.linalg.eigvalsh(dense.double().numpy())
    found = tridiagonal.eigenvalues(d, e * e).double().numpy()
    np.testing.assert_allclose(found, truth, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_any_number_of_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many shifts are counted at once is a matter of speed alone."""
    batch = matrices.every_family(34, torch.float32)
    for lanes in (1, 2**11, 2**22):
        monkeypatch.setattr(tridiagonal, "_FEW_LANES", lanes)
        for pivots in (1, 2**24):
            monkeypatch.setattr(tridiagonal, "_PIVOTS", pivots)
            assert_right(eigvalsh(batch), batch)


# --- nothing waits for the device ----------------------------------------------------------------

VIEWS = [
    *("slice", "select", "unsqueeze", "squeeze", "transpose", "expand", "alias", "view", "_conj"),
    *("view_as_real", "diagonal", "permute", "empty", "new_empty", "device", "detach"),
]


class Watch(TorchDispatchMode):
    """Refuses what reads from the device, and counts what is launched."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function.__name__.split(".")[0]
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs))
                   if isinstance(t, Tensor)]  # fmt: skip
        devices = {t.device.type for t in tensors if t.ndim or name == "copy_"}
        assert name not in ("_local_scalar_dense", "nonzero", "item", "equal", "masked_select")
        assert "linalg_eigh" not in name
        assert len(devices) <= 1, f"{name} over {devices}"
        if name == "_to_copy" and "device" in kwargs:
            assert {kwargs["device"].type} == devices
        if name == "index":  # with a mask it is as bad as nonzero
            assert all(i is None or i.dtype != torch.bool for i in args[1])
        self.launches += name not in VIEWS
        return function(*args, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_host_synchronization(dtype: torch.dtype) -> None:
    for n in (1, 3, 36 if dtype in (torch.float32, torch.complex64) else 5):
        with FakeTensorMode(), Watch():
            values = eigvalsh(torch.empty(3, n, n, dtype=dtype, device="cuda"), overwrite=True)
        assert values.shape == (3, n)
        assert values.device.type == "cuda"
        assert values.dtype == dtype.to_real()


def test_the_watch_sees_a_synchronization() -> None:
    with FakeTensorMode(), Watch():
        x = torch.ones(3, device="cuda")
        for wait in (lambda: x.cpu(), lambda: torch.linalg.eigvalsh(torch.diag(x)),
                     lambda: x[x > 0], lambda: x.sum().item(),
                     lambda: torch.empty(3).copy_(x)):  # fmt: skip
            with pytest.raises(AssertionError):
                wait()


def test_kernels_grow_by_15_a_column() -> None:
    counts = []
    for n in (20, 34):
        with FakeTensorMode(), Watch() as watch:
            eigvalsh(torch.empty(9, n, n, device="cuda"))
        counts.append(watch.launches)
    assert counts[1] - counts[0] <= 15 * 14
    assert counts[0] <= 15 * 20 + 120


# --- which solver --------------------------------------------------------------------------------


def test_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(eigensolver.VARIABLE, raising=False)
    assert not preferred(64, "cpu", "2.11.0")
    assert preferred(2, "cuda", "2.11.0+cu128")
    assert preferred(1024, "cuda", "2.4.1")
    assert not preferred(1025, "cuda", "2.11.0")
    assert not preferred(64, "cuda", "2.12.0a0+git123")
    assert not preferred(64, "cuda", "3.0")
    monkeypatch.setenv(eigensolver.VARIABLE, "ours")
    assert preferred(64, "cuda", "2.15")
    assert not preferred(64, "cpu", "2.11")
    monkeypatch.setenv(eigensolver.VARIABLE, "library")
    assert not preferred(64, "cuda", "2.11")
    monkeypatch.setenv(eigensolver.VARIABLE, "mine")
    with pytest.raises(ValueError, match="TEMPBALANCE_EIGENSOLVER.*'mine'"):
        preferred(64, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_engine_uses_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(eigensolver.VARIABLE, "ours")
    with FakeTensorMode():
        windows = torch.empty(4, 12, 20, dtype=dtype, device="cuda")
        with Watch():
            values = gram.eigenvalues(windows)
    assert values.shape == (4, 12)
    assert values.dtype == dtype.to_real()
    monkeypatch.setenv(eigensolver.VARIABLE, "library")
    with FakeTensorMode(), Watch(), pytest.raises(AssertionError):
        gram.eigenvalues(windows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 33, 200])
@pytest.mark.parametrize("overwrite", [False, True])
def test_workspace_covers_what_is_made(n: int, dtype: torch.dtype, overwrite: bool) -> None:
    """The buffer, and what holds a matrix or more beside it while it is filled."""
    made: list[int] = []

    class Large(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = function(*args, **(kwargs or {}))
            views = isinstance(result, Tensor) and any(
                isinstance(a, Tensor)
                and a.untyped_storage()._cdata == result.untyped_storage()._cdata
                for a in (*args, *(kwargs or {}).values())
            )
            if isinstance(result, Tensor) and not views and result.numel() >= 3 * n * n // 2:
                made.append(result.nbytes)
            return result

    batch = torch.randn(3, n, n, dtype=dtype)
    work = batch.new_empty(3, tridiagonal.work_rows(n), n)
    with Large():
        eigensolver._load(batch, "U", overwrite, work)
    assert work.nbytes + sum(made) <= 3 * workspace_bytes(n, dtype, overwrite)
    assert workspace_bytes(n, dtype, overwrite) <= 2 * batch[0].nbytes + dtype.itemsize * n * 160


class Plan:
    """A plan without a GPU."""

    def __init__(self, shape: tuple[int, ...], like: Tensor, solve: Any, shared: Any) -> None:
        if shape[-1] == 13:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.work, self.shared = like.new_zeros(shape), shared


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> cuda_graphs.Plans:
    monkeypatch.setattr(cuda_graphs, "Plan", Plan)
    monkeypatch.setattr(cuda_graphs, "_Device", lambda _: None)
    monkeypatch.setattr(cuda_graphs, "usable", lambda _: True)
    return cuda_graphs.Plans()


def solve(work: Tensor) -> Tensor:
    return work


def test_a_graph_from_the_second_time_on(graphs: cuda_graphs.Plans) -> None:
    one = torch.zeros(1)
    assert graphs.get((2, 3, 3), one, solve) is None
    plan = graphs.get((2, 3, 3), one, solve)
    assert plan is not None
    assert graphs.get((2, 3, 3), one, solve) is plan
    for shape, like in (((3, 3, 3), one), ((2, 3, 3), one.double())):
        assert graphs.get(shape, like, solve) is None
    assert graphs.get((2, 3, 3), one, lambda work: work, True) not in (None, plan)
    assert len(graphs) == 2
    graphs.clear()
    assert graphs.get((2, 3, 3), one, solve) is None


def test_a_pool_of_graphs_ends_with_its_last_graph(
    graphs: cuda_graphs.Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its handle is of no use then, and capturing into it would fail."""
    monkeypatch.setattr(cuda_graphs, "_Device", lambda _: object())
    monkeypatch.setattr(cuda_graphs, "LIMIT_BYTES", 1000 * 4)
    one = torch.zeros(1)
    first = graphs.get((600,), one, solve, True)
    beside = graphs.get((300,), one, solve, True)
    assert first is not None and beside is not None and first.shared is beside.shared
    alone = graphs.get((900,), one, solve, True)
    assert alone is not None and alone.shared is not first.shared


def test_graphs_are_made_outside_inference_mode(graphs: cuda_graphs.Plans) -> None:
    with torch.inference_mode():
        plan = graphs.get((2,), torch.zeros(1), solve, True)
    assert plan is not None and not plan.work.is_inference()


def test_beside_a_training_graphs_are_only_replayed(graphs: cuda_graphs.Plans) -> None:
    one = torch.zeros(1)
    there = graphs.get((2,), one, solve, True)
    with cuda_graphs.only_replayed():
        assert graphs.get((2,), one, solve) is there
        assert graphs.get((3,), one, solve, True) is None
    assert graphs.get((3,), one, solve) is None  # not counted as seen either
    assert graphs.get((3,), one, solve) is not None


def test_graphs_keep_no_more_than_their_limit(
    graphs: cuda_graphs.Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "LIMIT_BYTES", 1000 * 4)
    one = torch.zeros(1)
    plans = {n: graphs.get((n,), one, solve, True) for n in (400, 500)}
    assert graphs.get((400,), one, solve, True) is plans[400]  # the last one used
    assert graphs.get((600,), one, solve, True) is not None
    assert len(graphs) == 2
    assert graphs.get((400,), one, solve, True) is plans[400]
    assert graphs.get((500,), one, solve, True) is not plans[500]
    assert graphs.get((1001,), one, solve, True) is None
    monkeypatch.setattr(cuda_graphs, "LIMIT_GRAPHS", 1)
    assert graphs.get((1,), one, solve, True) is not None
    assert len(graphs) == 1


def test_a_failed_capture_is_said_once(
    graphs: cuda_graphs.Plans, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        assert graphs.get((2, 13), torch.zeros(1), solve, True) is None
    assert len(caplog.records) == 1
    assert "stream is capturing" in caplog.text


# --- on a GPU ------------------------------------------------------------------------------------

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@cuda
@pytest.mark.parametrize("form", ["auto", "triton", "graph", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 20, 64, 200, 512])
def test_on_a_gpu(form: eigensolver.Form, dtype: torch.dtype, n: int) -> None:
    if form == "triton" and dtype.is_complex:
        pytest.skip("real only")
    for seed in range(3):  # the second and the third replay a graph
        batch = matrices.every_family(n, dtype, seed).cuda()
        batch[-1, 0, 1] = float("nan")
        found = eigvalsh(batch, form=form)
        assert found[-1].isnan().all()
        assert_right(found[:-1], batch[:-1])


@cuda
def test_an_update_never_waits() -> None:
    batch = matrices.every_family(40, torch.float32).cuda()
    eigvalsh(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for form in ("auto", "torch", "graph"):
            for _ in range(3):
                eigvalsh(batch, form=form)  # type: ignore[arg-type]
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cuda
def test_graphs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "LIMIT_GRAPHS", 2)
    for n in (5, 6, 7, 5):
        batch = matrices.every_family(n, torch.float32).cuda()
        for _ in range(2):
            assert_right(eigvalsh(batch, form="graph"), batch)
    assert len(cuda_graphs.plans._plans) == 2
    cuda_graphs.plans.clear()
