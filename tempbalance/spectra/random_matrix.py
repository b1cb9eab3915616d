"""Eigenvalues of W W^H where the entries of W are independent: the laws of bulk and largest one.

Legend: ``long`` >= ``short`` the sides of W; entries of mean 0 and variance 1 (E|w|^2 where they
are complex).
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch


def largest(long: int, short: int, is_complex: bool = False) -> tuple[float, float]:
    """Centre and scale of the largest eigenvalue: (lambda_1 - centre) / scale is Tracy-Widom.

    Real: mu = (sqrt(n - 1) + sqrt(p))^2, sigma = (sqrt(n - 1) + sqrt(p)) (1 / sqrt(n - 1) +
    1 / sqrt(p))^(1/3) with n = long, p = short; complex: the same with n for n - 1.

    Source: Johnstone (2001), Annals of Statistics 29, theorem 1.1; complex: Johansson (2000).
    """
    root_n = math.sqrt(long if is_complex else long - 1)
    root_p = math.sqrt(short)
    return (root_n + root_p) ** 2, (root_n + root_p) * (1 / root_n + 1 / root_p) ** (1 / 3)


@functools.lru_cache
def tracy_widom_level(chance: float, is_complex: bool = False) -> float:
    """What a Tracy-Widom variable exceeds by this chance (0 to 0.5): real beta = 1, complex 2.

    >>> round(tracy_widom_level(0.01), 3), round(tracy_widom_level(0.05, True), 3)
    (2.023, -0.232)
    """
    if not 0 < chance < 0.5:
        raise ValueError(f"a chance must lie between 0 and 0.5, got {chance!r}")
    low, high = -3.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _exceeds(middle, is_complex) > chance else (low, middle)
    return (low + high) / 2


def _exceeds(level: float, is_complex: bool) -> float:
    """The chance of a Tracy-Widom variable above a level, to 1e-13.

    F_1(s) = det(1 - V), F_2(s) = det(1 - V) det(1 + V), V(x, y) = Ai((x + y) / 2) / 2 on (s, inf).

    Source: Ferrari and Spohn (2005), J. Phys. A 38, L557; quadrature: Bornemann (2010), Math.
    Comp. 79, 871.
    """
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(80))
    x, root = level + 9 * (nodes + 1), torch.sqrt(9 * weights)  # on (s, s + 18)
    kernel = torch.special.airy_ai((x.unsqueeze(-1) + x) / 2) / 2 * root.unsqueeze(-1) * root
    values = torch.linalg.eigvalsh(kernel)
    log = torch.log1p(-values).sum()
    if is_complex:
        log = log + torch.log1p(values).sum()
    return float(-torch.expm1(log))


@functools.lru_cache
def bulk_median(long: int, short: int, points: int = 4000) -> float:
    """The median eigenvalue of a large random matrix of these sides.

    With lambda / long = 1 + q + 2 sqrt(q) cos(t), q = short / long, the density is proportional
    to sin(t)^2 / lambda on 0 < t < pi.

    Source: Marchenko and Pastur (1967).
    """
    q = short / long
    t = (np.arange(points) + 0.5) * math.pi / points
    value = 1 + q + 2 * math.sqrt(q) * np.cos(t)  # falling
    share = np.cumsum(np.sin(t) ** 2 / value)
    return long * float(np.interp(0.5, share / share[-1], value))
