"""Darcy flow: random coefficient fields and a sparse finite-volume solution."""

import numpy as np
from scipy import fft, sparse
from scipy.sparse.linalg import spsolve

FloatArray = np.ndarray


def gaussian_field(
    rng: np.random.Generator, cells: int, alpha: float = 2.0, tau: float = 3.0, modes: int = 64
) -> FloatArray:
    """Sample of N(0, C), C = tau^(2 alpha - 2) (-Laplace + tau^2)^(-alpha), Neumann, on [0, 1]^2.

    Values (cells + 1, cells + 1) at the nodes i / cells, boundary included. The Karhunen-Loeve
    sum runs over the first min(modes, cells) cosines a dimension, without the constant one, so
    that one seed gives one function, whatever the grid that resolves it.

    Source: the covariance of the Darcy set in Li et al. 2021 (alpha 2, tau 3).
    """
    draws = rng.standard_normal((modes, modes))
    wave = np.arange(modes)
    square = wave[:, None] ** 2 + wave[None, :] ** 2
    amplitude = tau ** (alpha - 1) * (np.pi**2 * square + tau**2) ** (-alpha / 2)
    # Cosines of unit L2 norm: a factor sqrt 2 for each dimension that is not constant.
    unit = np.where(wave == 0, 1.0, np.sqrt(2.0))
    coefficients = draws * amplitude * unit[:, None] * unit[None, :]
    coefficients[0, 0] = 0.0
    kept = min(modes, cells)
    full = np.zeros((cells + 1, cells + 1))
    full[:kept, :kept] = coefficients[:kept, :kept]
    # The DCT of type 1 counts every term but the first (and the last, not used here) twice.
    half = np.full(cells + 1, 0.5)
    half[0] = 1.0
    return fft.dctn(full * half[:, None] * half[None, :], type=1)


def solve_darcy(a: FloatArray, forcing: float | FloatArray = 1.0) -> FloatArray:
    """Solve -div(a grad u) = forcing on [0, 1]^2 with u = 0 on the boundary.

    `a` (n + 1, n + 1) > 0 at the nodes i / n, boundary included; `forcing` a number or such an
    array; gives u of the same shape. Finite volumes around the nodes; the flux between two nodes
    uses the harmonic mean of their coefficients, which is exact for a jump halfway between them.
    Second order for smooth a.

    Raises: ValueError for an `a` that is not square, is under 3 nodes a side, or not positive.
    """
    if a.ndim != 2 or a.shape[0] != a.shape[1] or a.shape[0] < 3:
        raise ValueError(f"solve_darcy needs a square array of at least 3x3 nodes, not {a.shape}")
    if not np.all(a > 0):
        raise ValueError(f"solve_darcy needs a positive coefficient; the least is {a.min()}")
    nodes = a.shape[0]
    inner = nodes - 2
    vertical = 2 * a[:-1] * a[1:] / (a[:-1] + a[1:])
    horizontal = 2 * a[:, :-1] * a[:, 1:] / (a[:, :-1] + a[:, 1:])
    up, down = vertical[:-1, 1:-1], vertical[1:, 1:-1]
    left, right = horizontal[1:-1, :-1], horizontal[1:-1, 1:]
    # Couplings to the next column and the next row; the last of a row couples to the boundary.
    east = right.copy()
    east[:, -1] = 0.0
    east_flat, south_flat = east.ravel()[:-1], down[:-1].ravel()
    matrix = sparse.diags(
        [(up + down + left + right).ravel(), -east_flat, -east_flat, -south_flat, -south_flat],
        [0, 1, -1, inner, -inner],
        format="csc",
    )
    step = 1.0 / (nodes - 1)
    load = np.broadcast_to(forcing, a.shape)[1:-1, 1:-1].ravel() * step**2
    u = np.zeros_like(a, dtype=np.float64)
    # A symmetric ordering fills in a third of what the default one does on this matrix.
    u[1:-1, 1:-1] = spsolve(matrix, load, permc_spec="MMD_AT_PLUS_A").reshape(inner, inner)
    return u


def darcy_sample(
    seed: int, index: int, cells: int, high: float, low: float, alpha: float, tau: float
) -> tuple[FloatArray, FloatArray]:
    """Sample `index` of a seeded set: where a is high (bool) and u, both (cells + 1, cells + 1)."""
    rng = np.random.default_rng([seed, index])
    mask = gaussian_field(rng, cells, alpha, tau) >= 0
    return mask, solve_darcy(np.where(mask, high, low))
