"""Means, standard errors and paired differences of few numbers, with Student's t."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import binomtest, chi2
from scipy.stats import norm as normal
from scipy.stats import t as student


@dataclass(frozen=True)
class Mean:
    """Mean of n values; standard deviation and standard error are None for one value."""

    n: int
    mean: float
    sd: float | None
    se: float | None


@dataclass(frozen=True)
class Paired:
    """Mean difference over the seeds that both have, and the t interval around it.

    `low`, `high` and `p` (two-sided) are None under two pairs. `wins` counts the pairs in which
    the method is better, a tie as neither. `unpaired` are the seeds that only one of the two has.
    """

    n: int
    mean: float
    se: float | None
    low: float | None
    high: float | None
    p: float | None
    wins: int
    losses: int
    unpaired: tuple[int, ...]


def mean(values: Sequence[float]) -> Mean:
    """Mean and spread (n - 1 in the denominator).

    Raises: ValueError for no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("no values to average")
    centre = math.fsum(values) / n
    if n == 1:
        return Mean(1, centre, None, None)
    sd = math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (n - 1))
    return Mean(n, centre, sd, sd / math.sqrt(n))


def paired(
    method: Mapping[int, float],
    baseline: Mapping[int, float],
    mode: str,
    confidence: float = 0.95,
) -> Paired | None:
    """Differences method - baseline by seed; None where they have no seed in common.

    `mode` is `max` where larger is better, else `min`.
    """
    shared = sorted(method.keys() & baseline.keys())
    if not shared:
        return None
    differences = [method[seed] - baseline[seed] for seed in shared]
    sign = 1.0 if mode == "max" else -1.0
    wins = sum(sign * value > 0 for value in differences)
    losses = sum(sign * value < 0 for value in differences)
    unpaired = tuple(sorted(method.keys() ^ baseline.keys()))
    summary = mean(differences)
    low = high = p = None
    if summary.se is not None:
        reach = float(student.ppf(0.5 + confidence / 2, summary.n - 1)) * summary.se
        low, high = summary.mean - reach, summary.mean + reach
        if summary.se > 0:
            p = 2.0 * float(student.sf(abs(summary.mean) / summary.se, summary.n - 1))
        else:  # equal differences have no spread to go by
            p = sign_test(wins, losses)
    return Paired(summary.n, summary.mean, summary.se, low, high, p, wins, losses, unpaired)


def detectable(se: float, n: int, power: float = 0.8, level: float = 0.05) -> float:
    """The true mean difference that a two-sided t-test of n pairs with this error would find.

    With the given power, by the usual approximation: (t at 1 - level/2 + t at power) errors.
    """
    return float(student.ppf(1 - level / 2, n - 1) + student.ppf(power, n - 1)) * se


@dataclass(frozen=True)
class Pooled:
    """A fixed-effect mean over cells, and how much the cells differ beyond their errors."""

    mean: float
    low: float
    high: float
    p_heterogeneity: float  # of Cochran's Q: small where one mean does not describe all cells


def pooled(means: Sequence[float], errors: Sequence[float], confidence: float = 0.95) -> Pooled:
    """Mean with weights of inverse variance, errors taken as known (a normal interval).

    Raises: ValueError for no means, or an error that is not positive.
    """
    if not means or min(errors) <= 0:
        raise ValueError("pooling needs a mean, and an error above zero for each")
    weights = [error**-2 for error in errors]
    total = math.fsum(weights)
    centre = math.fsum(w * m for w, m in zip(weights, means, strict=True)) / total
    q = math.fsum(w * (m - centre) ** 2 for w, m in zip(weights, means, strict=True))
    reach = float(normal.ppf(0.5 + confidence / 2)) * total**-0.5
    p = float(chi2.sf(q, len(means) - 1)) if len(means) > 1 else 1.0
    return Pooled(centre, centre - reach, centre + reach, p)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p of so many wins and losses if both were as likely; ties are left out."""
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
