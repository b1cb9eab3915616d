"""The tail of a spectrum that is nearest to its power law, without looking at all of all tails.

D of a tail is the largest gap between two rising curves, the fitted distribution and the rank, so
its value at any few eigenvalues is a lower bound of D, and D is at most 1/points above it (so far
the rank rises between two of them). Bounds at few points leave few tails, and so on with more.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tempbalance.spectra.tails import Tails

# Points of the bounds. The first look is at all tails, each later one at what the last has left.
_POINTS = tuple(16 * 4**i for i in range(7))
# Tails below a bound by less are kept: the same gap, computed in another order, may differ by it.
_ROUNDING = 1e-12
# Entries of one temporary: on a CPU it stays in the cache, elsewhere a call is worth its launch.
_CPU_ENTRIES, _ENTRIES = 2**17, 2**23
# On an accelerator: eigenvalues up to which every tail is looked at whole, and for more of them
# points, and the share of the tails that goes on.
LOOKED_AT_WHOLE = 8192
_DEVICE_POINTS, _DEVICE_SHARE, _DEVICE_LAST = (256, 4096), 16, 256


def nearest(tails: Tails, allowed: Tensor) -> Tensor:
    """The start (B,) among ``allowed`` (B, N) whose tail has the smallest D; the first of equals.

    A tail of one eigenvalue, or of equal ones, is no candidate; the first eigenvalue that counts
    where there is none.

    On a CPU the answer is exact. Spectra of weights take a time that grows little faster than N;
    where nearly all tails fit alike (a sample of an exact power law) it nears N^2, a few hundred
    times faster than looking at all. On an accelerator nothing may wait for the device, so the
    host does not know which tails are left: up to 8192 eigenvalues all are looked at whole, and
    for more a fixed number stays after each look. D is then at most 1/256 above the smallest,
    and nearly always equal to it.
    """
    every = tails.index.expand_as(allowed)
    alpha, _ = tails.hill(every)
    usable = allowed & torch.isfinite(alpha) & (every < tails.size - 1)
    search = _leave_some if tails.values.is_cuda else _leave_few
    d = search(tails, usable, alpha)
    found, start = d.min(-1)  # the first of equals
    return torch.where(torch.isfinite(found), start, tails.first.clamp(max=tails.size - 1))


def _leave_few(tails: Tails, usable: Tensor, alpha: Tensor) -> Tensor:
    """D (B, N) of every tail that may be the nearest, infinity for all others."""
    row, start = usable.nonzero(as_tuple=True)
    alpha = alpha[row, start]
    d = torch.full_like(tails.log, math.inf)
    least = torch.full_like(tails.log[:, 0], math.inf)  # the smallest D known of each spectrum
    for points in _POINTS:
        if len(row) * tails.size <= _CPU_ENTRIES or points >= tails.size:
            break
        bound = _by_blocks(_at(tails, points), points, row, start, alpha)
        d.fill_(math.inf)[row, start] = bound
        leads = torch.zeros_like(usable).scatter_(-1, d.argmin(-1, keepdim=True), True)[row, start]
        some = row[leads], start[leads], alpha[leads]
        least[some[0]] = least[some[0]].minimum(_by_blocks(tails.distance, tails.size, *some))
        left = bound <= least[row] + _ROUNDING
        row, start, alpha = row[left], start[left], alpha[left]
    d.fill_(math.inf)[row, start] = _by_blocks(tails.distance, tails.size, row, start, alpha)
    return d


def _leave_some(tails: Tails, usable: Tensor, alpha: Tensor) -> Tensor:
    """The same with a fixed number of tails, of the smallest bounds, left by each look."""
    batch = len(usable)
    start = tails.index.expand_as(usable)
    row = torch.arange(batch, device=start.device).unsqueeze(-1)
    for points in _DEVICE_POINTS:
        if tails.size <= max(points, LOOKED_AT_WHOLE):
            break
        bound = _rectangle(_at(tails, points), points, row, start, alpha, usable)
        most = max(_DEVICE_LAST, start.shape[-1] // _DEVICE_SHARE)
        # Sorted by place again, so that the first of equals is found.
        left = bound.topk(min(most, start.shape[-1]), largest=False).indices.sort(-1).values
        start, alpha, usable = (x.gather(-1, left) for x in (start, alpha, usable))
    d = torch.full_like(tails.log, math.inf)
    return d.scatter_(-1, start, _rectangle(tails.distance, tails.size, row, start, alpha, usable))


Gaps = Callable[[Tensor, Tensor, Tensor], Tensor]


def _at(tails: Tails, points: int) -> Gaps:
    return lambda row, start, alpha: tails.distance_at(row, start, alpha, points)


def _rectangle(
    gaps: Gaps, width: int, row: Tensor, start: Tensor, alpha: Tensor, usable: Tensor
) -> Tensor:
    """(B, M) starts -> (B, M), infinity where not usable."""
    rows = row.expand_as(start).reshape(-1)
    d = _by_blocks(gaps, width, rows, start.reshape(-1), alpha.reshape(-1)).view_as(alpha)
    return torch.where(usable, d, math.inf)


def _by_blocks(gaps: Gaps, width: int, row: Tensor, start: Tensor, alpha: Tensor) -> Tensor:
    """A number a place, (M,) each, so many at once that (places, ``width``) is bounded."""
    if not len(row):
        return alpha
    entries = _ENTRIES if row.is_cuda else _CPU_ENTRIES
    parts = (x.split(max(1, entries // width)) for x in (row, start, alpha))
    return torch.cat([gaps(*part) for part in zip(*parts, strict=True)])
