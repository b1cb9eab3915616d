"""numpy's LAPACK: the eigenvalues of the other one, on one thread, whose setting is put back."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from tempbalance.analysis.lapack import eigenvalues, numpy_alone
from tempbalance.spectra import gram


@pytest.mark.parametrize("shape", [(3, 40, 30), (2, 30, 40), (5, 3, 200)])
def test_eigenvalues_are_squared_singular_values(shape: tuple[int, int, int]) -> None:
    windows = torch.from_numpy(np.random.default_rng(0).standard_normal(shape))
    expected = torch.linalg.svdvals(windows).square().flip(-1)
    torch.testing.assert_close(eigenvalues(windows), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        eigenvalues(windows), gram.eigenvalues(windows), rtol=1e-11, atol=1e-11
    )


def test_what_numpy_cannot_solve_the_other_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise np.linalg.LinAlgError

    windows = torch.randn(2, 9, 6)
    monkeypatch.setattr(np.linalg, "eigvalsh", fail)
    torch.testing.assert_close(eigenvalues(windows), gram.eigenvalues(windows.double()))


def test_openblas_has_one_thread_meanwhile_and_its_own_number_afterwards() -> None:
    threadpoolctl = pytest.importorskip("threadpoolctl")

    def threads() -> list[int]:
        found = threadpoolctl.ThreadpoolController().select(internal_api="openblas")
        return [library["num_threads"] for library in found.info()]

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = threads()
        with numpy_alone() as solver:
            assert solver is None or set(threads()) == {1}
        assert threads() == before


def test_without_threadpoolctl_there_is_no_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    with numpy_alone() as solver:
        assert solver is None


def test_callers_that_overlap_leave_the_threads_as_they_were() -> None:
    threadpoolctl = pytest.importorskip("threadpoolctl")

    def threads() -> list[int]:
        found = threadpoolctl.ThreadpoolController().select(internal_api="openblas").info()
        return [library["num_threads"] for library in found]

    before = threads()
    first, second = numpy_alone(), numpy_alone()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert threads() == before
