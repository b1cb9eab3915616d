"""Symmetric matrices of every kind that a solver of eigenvalues may meet."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]


def with_spectrum(values: Array, rng: np.random.Generator) -> Array:
    """Q diag(values) Q^T, symmetric to the last bit."""
    n = len(values)
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    matrix = (q * values) @ q.T
    return (matrix + matrix.T) / 2


def _gram(rows: Callable[[int], int]) -> Callable[[int, np.random.Generator], Array]:
    def make(n: int, rng: np.random.Generator) -> Array:
        a = rng.standard_normal((rows(n), n))
        return a.T @ a

    return make


def _condition(c: float) -> Callable[[int, np.random.Generator], Array]:
    return lambda n, rng: with_spectrum(np.geomspace(1, 1 / c, n), rng)


def second_difference(n: int) -> Array:
    """2 on the diagonal and -1 beside it: eigenvalues 2 - 2 cos(k pi / (n + 1)), k = 1 ... n."""
    return 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)


def _graded(n: int, rng: np.random.Generator) -> Array:
    scale = 10.0 ** -np.linspace(0, 12, n)
    a = rng.standard_normal((n, n))
    return (a + a.T) * np.minimum(scale[:, None], scale)


def _blocks(n: int, rng: np.random.Generator) -> Array:
    """Two halves that do not touch: the tridiagonal matrix splits."""
    a = rng.standard_normal((n, n))
    a[: n // 2, n // 2 :] = 0
    a[n // 2 :, : n // 2] = 0
    return a + a.T


FAMILIES: dict[str, Callable[[int, np.random.Generator], Array]] = {
    "square window": _gram(lambda n: n),
    "tall window": _gram(lambda n: 3 * n),
    "rank deficient": _gram(lambda n: max(1, n // 3)),
    "rank one": _gram(lambda n: 1),
    **{f"condition {c:.0e}": _condition(c) for c in (1.0, 1e2, 1e4, 1e7, 1e10)},
    "two clusters": lambda n, rng: with_spectrum(
        np.where(np.arange(n) % 2, 1.0, 0.5) + 1e-9 * np.arange(n), rng
    ),
    "indefinite": lambda n, rng: with_spectrum(np.linspace(-1, 1, n), rng),
    "spike": lambda n, rng: with_spectrum(np.r_[np.full(n - 1, 1e-4), 1.0], rng),
    "zero": lambda n, rng: np.zeros((n, n)),
    "identity": lambda n, rng: np.eye(n),
    "diagonal": lambda n, rng: np.diag(rng.standard_normal(n)),
    "one entry": lambda n, rng: np.eye(1, n * n, n - 1).reshape(n, n) * 3 + 0.0,
    "ones": lambda n, rng: np.ones((n, n)),
    "second difference": lambda n, rng: second_difference(n),
    "glued": lambda n, rng: np.diag(np.abs(np.arange(n) - n // 2) * 1.0)
    + np.eye(n, k=1) + np.eye(n, k=-1),
    "blocks": _blocks,
    "graded": _graded,
    "graded upwards": lambda n, rng: _graded(n, rng)[::-1, ::-1].copy(),
    "tiny": lambda n, rng: 1e-30 * with_spectrum(np.linspace(0, 1, n), rng),
    "huge": lambda n, rng: 1e30 * with_spectrum(np.linspace(0, 1, n), rng),
}  # fmt: skip


def every_family(n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """One matrix of every family, rounded to ``dtype``: (families, n, n), exactly symmetric."""
    rng = np.random.default_rng(seed)
    stack = np.stack([make(n, rng) for make in FAMILIES.values()])
    upper = torch.from_numpy(stack).to(dtype).triu()
    return upper + upper.triu(1).mT


def exact(matrices: Tensor) -> Array:
    """Eigenvalues by LAPACK in float64, of matrices scaled to entries near 1."""
    wide = matrices.double().cpu()
    top = wide.abs().amax((-2, -1), keepdim=True)
    top = torch.where(top > 0, top, torch.ones_like(top))
    return np.linalg.eigvalsh((wide / top).numpy()) * top[..., 0].numpy()


def tolerance(matrices: Tensor, truth: Array) -> Array:
    """What n reflections, each good to a few units of rounding, may add up to at random: (B, 1).

    4 (1 + sqrt(n)) eps ||A||, of the precision of ``matrices``, and twice that for float64, where
    LAPACK, which is compared with, errs as well.
    """
    eps = torch.finfo(matrices.dtype).eps
    several = 8 if eps < 1e-10 else 4
    norm = np.abs(truth).max(-1, keepdims=True)
    return several * (1 + np.sqrt(matrices.shape[-1])) * eps * norm
