"""LAPACK: numpy's, for double precision, kept to the thread that calls it.

OpenBLAS, which numpy's wheels bring, takes two thirds of the time of torch's MKL on AMD, product
and eigenvalues alike. It also brings threads of its own, with which a pool of workers is many times
slower. They are held back here while the work lasts: for the whole process, so that this is for a
call of its own and not for measurements beside a training.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tempbalance.spectra import gram

Solver = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def numpy_alone() -> Iterator[Solver | None]:
    """Yield :func:`eigenvalues` while OpenBLAS has one thread for each caller.

    None where numpy has another library, or threadpoolctl is not there to ask it.
    """
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        yield None
        return
    openblas = ThreadpoolController().select(internal_api="openblas")
    if not any("numpy" in library["filepath"] for library in openblas.info()):
        yield None
        return
    _HELD.enter(openblas)
    try:
        yield eigenvalues
    finally:
        _HELD.leave()


class _Held:
    """One thread for OpenBLAS while anyone asks for it: callers overlap, and the last restores."""

    def __init__(self) -> None:
        self._lock, self._callers, self._limit = threading.Lock(), 0, contextlib.ExitStack()

    def enter(self, openblas: Any) -> None:
        with self._lock:
            if not self._callers:
                self._limit.enter_context(openblas.limit(limits=1))
            self._callers += 1

    def leave(self) -> None:
        with self._lock:
            self._callers -= 1
            if not self._callers:
                self._limit.close()


_HELD = _Held()  # of the process, as the threads of OpenBLAS are


def eigenvalues(windows: Tensor) -> Tensor:
    """As :func:`tempbalance.spectra.gram.eigenvalues`, of real windows in memory, in float64."""
    a = gram.tall(windows).double().numpy()  # (B, n, k), n >= k
    try:
        return torch.from_numpy(np.linalg.eigvalsh(a.swapaxes(-1, -2) @ a))
    except np.linalg.LinAlgError:  # of one of them: which one, the other does say
        return gram.eigenvalues(windows.double())
