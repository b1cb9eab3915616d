"""The door to our own eigensolver: all eigenvalues of a batch of real symmetric matrices on CUDA.

``torch.linalg.eigvalsh`` waits for the device after every call, and before torch 2.12 loops over
the matrices. The kernels of :mod:`.kernels` do neither. They are used where the environment says
``TEMPBALANCE_EIGENSOLVER=triton``, are checked on the device before they are believed, and make
way for the library for good as soon as anything goes wrong with them.

Accuracy is that of LAPACK in the same precision: a few units of rounding of the largest eigenvalue
(in magnitude) of each matrix. A matrix with a value that is not finite gives NaN, itself alone.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

# "triton", or "library", which is what is used unless this is set.
VARIABLE = "TEMPBALANCE_EIGENSOLVER"
# Sizes that the library is left for: below, it solves batches at once in every release; beyond, a
# single matrix fills the device.
SMALLEST, LARGEST = 33, 1024

Solve = Callable[[Tensor], Tensor]  # (B, n, n) -> (B, n)

logger = logging.getLogger("tempbalance")


def requested() -> bool:
    """Whether the environment asks for our kernels.

    Raises:
        ValueError: for another value of the variable than "triton" or "library".
    """
    wish = os.environ.get(VARIABLE) or "library"
    if wish not in ("triton", "library"):
        raise ValueError(f"{VARIABLE} must be 'triton' or 'library', got {wish!r}")
    return wish == "triton"


def eigvalsh(matrices: Tensor) -> Tensor | None:
    """Eigenvalues of symmetric matrices (B, n, n), ascending: (B, n); None where the library is to
    find them.

    Nothing is written to ``matrices``, and nothing waits for the device, but when the kernels for
    a range of sizes (to 64, 128, ...) are first used in a process: they are compiled and checked.
    """
    if not (requested() and usable(matrices)):
        return None
    return _kernels.eigvalsh(matrices)


def usable(matrices: Tensor) -> bool:
    """Whether the kernels are for these: not the stand-ins of tracing, nor in a graph capture."""
    return (
        matrices.is_cuda
        and type(matrices) is Tensor
        and matrices.dtype in (torch.float32, torch.float64)
        and SMALLEST <= matrices.shape[-1] <= LARGEST
        and not torch.cuda.is_current_stream_capturing()
    )


class Kernels:
    """The kernels of this process: loaded and checked when first used, and given up as one."""

    def __init__(self) -> None:
        self._module: ModuleType | None = None
        self._given_up = False
        self._checked: set[tuple[object, ...]] = set()
        self._lock = threading.Lock()

    def eigvalsh(self, matrices: Tensor) -> Tensor | None:
        """See :func:`eigvalsh`."""
        if self._given_up:
            return None
        try:
            with self._lock:
                solve = self._ready(matrices)
            return solve(matrices)
        except torch.cuda.OutOfMemoryError:  # of this call alone: the library may need less
            return None
        except Exception as error:  # no compiler, a kernel that fails: no run is to end by it
            self._give_up(error)
            return None

    def _ready(self, matrices: Tensor) -> Solve:
        """The solver of the module, checked for matrices like these."""
        if self._module is None:
            self._module = importlib.import_module("tempbalance.spectra.eigensolver.launch")
        n, dtype, device = matrices.shape[-1], matrices.dtype, matrices.device
        # Each of these is compiled by itself.
        key = (device, dtype, self._module.tiles(n, dtype), n % 16 == 0)
        if key not in self._checked:
            if not self._checked:
                logger.warning(
                    "compiling and checking our own eigensolver, as %s=triton asks for: once in a "
                    "process for each range of sizes, some 20 s at first",
                    VARIABLE,
                )
            check(self._module.solve, n, dtype, device)
            self._checked.add(key)
        return self._module.solve

    def _give_up(self, error: Exception) -> None:
        with self._lock:
            said, self._given_up = self._given_up, True
        if not said:
            logger.warning(
                "the library finds the eigenvalues from here on, not our own kernels: %s: %s",
                type(error).__name__,
                error,
            )


_kernels = Kernels()


def check(solve: Solve, n: int, dtype: torch.dtype, device: torch.device) -> None:
    """Let a solver find the known eigenvalues of two dense n x n matrices on a device.

    This compiles its kernels and waits for the result.

    Raises:
        ArithmeticError: if they are off by more than rounding.
    """
    matrices, truth = known(n)
    mode = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    try:
        if mode:
            torch.cuda.set_sync_debug_mode(0)
        found = solve(matrices.to(device, dtype)).cpu().double()
    finally:
        if mode:
            torch.cuda.set_sync_debug_mode(mode)
    error = float((found - truth).abs().max())  # of a norm of 1
    if not error <= 16 * (1 + n**0.5) * torch.finfo(dtype).eps:  # NaN is not
        raise ArithmeticError(f"{n} x {n} matrices are off by {error:.1e} on {device} in {dtype}")


def known(n: int) -> tuple[Tensor, Tensor]:
    """Two dense matrices (2, n, n) and their eigenvalues (2, n), in float64 on the CPU.

    H diag(values) H with the reflector H of a vector without zeros.
    """
    values = torch.linspace(-1, 1, n, dtype=torch.float64, device="cpu")
    values = torch.stack([values, torch.logspace(-4, 0, n, dtype=torch.float64, device="cpu")])
    u = torch.cos(torch.arange(n, dtype=torch.float64, device="cpu"))
    reflector = torch.eye(n, dtype=torch.float64, device="cpu") - 2 * torch.outer(u, u) / (u @ u)
    return (reflector * values.unsqueeze(1)) @ reflector, values
