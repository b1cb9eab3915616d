"""Eigenvalues of a batch of Hermitian matrices by torch operations of fixed shapes alone.

Two stages. :func:`tridiagonalize` is Householder's reduction of the whole batch, column by column,
with the updates of a panel of columns deferred (as LAPACK's ``latrd``): a column reads the trailing
matrix once. :func:`eigenvalues` finds all eigenvalues of the tridiagonal matrices at once by Sturm
counts, many shifts in one sweep. No value decides what runs next, so nothing waits for the device
and a CUDA graph can replay it.

Kernels: 12 a column and 3 a panel (real), and about (n / 2 + 4 * chunks) a sweep of the second
stage, where 3 to 7 sweeps do for float32: some 14 n in all.

Sources: Golub and Van Loan, Matrix Computations, 4th ed., section 8.3.1 (reduction) and 8.4.2
(Sturm counts); Dhillon, PhD thesis, Berkeley 1997 (counts from both ends, the twisted
factorization); Demmel, Dhillon and Ren, ETNA 3 (1995), 116-149 (bisection in IEEE arithmetic).

Legend: B matrices of n x n; ``d`` (B, n) the diagonal and ``e2`` (B, n - 1) the squared magnitudes
of what is beside it. All entries are scaled so that the largest of a matrix is about 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 32
# A column of less than this share of the largest entry is zero: far below rounding, and far above
# where the squares underflow (a reflector from such a norm would not be orthogonal).
NEGLIGIBLE = {torch.float32: 2.0**-50, torch.float64: 2.0**-150}
# Shifts evaluated side by side: on a GPU as many as cost little more than the launch itself, on a
# CPU, where every one costs, few.
_LANES = {"cuda": 2**19}
_FEW_LANES = 2**13
# Entries of the pivots kept for counting at once: 16 MiB of float32.
_PIVOTS = 2**22


def panel(n: int) -> int:
    """Columns of a panel for n x n."""
    return max(1, min(PANEL, n - 2))


def work_rows(n: int) -> int:
    """Rows of the buffer that :func:`tridiagonalize` works in: the matrix and the panel."""
    return n + 4 * panel(n)


def tridiagonalize(work: Tensor) -> tuple[Tensor, Tensor]:
    """Reduce a batch to tridiagonal form: ``work`` (B, work_rows(n), n) -> d (B, n), e2 (B, n - 1).

    The first n rows are the Hermitian matrices, both halves filled, entries of at most about 1;
    the others are scratch. All of it is overwritten.

    H = I - v v^H for every column, and with w = A v - (v^H A v / 2) v the rest of the matrix
    becomes A - v w^H - w v^H. Below the matrix lie conj(w0), conj(v0), conj(w1), ... (so that one
    product gives A v and what corrects it), and below these v0, w0, v1, ...
    """
    n = work.shape[-1]
    width = panel(n)
    a, upper = work[:, :n], n + 2 * width
    real = work.dtype.to_real()
    e = torch.empty(work.shape[0], max(n - 1, 0), dtype=real, device=work.device)
    diagonal: list[Tensor] = []
    for first in range(0, n - 2, width):
        count = min(width, n - 2 - first)
        stop = first + count
        columns: list[Tensor] = []
        for k in range(count):
            j = first + k
            column = a[:, j : j + 1, j:].conj()  # (B, 1, n - j); by symmetry a row, contiguous
            done = work[:, upper : upper + 2 * k]  # v0, w0, ...
            if k:
                left = work[:, n : n + 2 * k, j].unsqueeze(1)
                column = torch.baddbmm(column, left, done[..., j:], alpha=-1)
            columns.append(column[..., 0].real)
            v = _reflector(work, column, e[:, j : j + 1], k, upper)
            product = torch.bmm(v, work[:, j + 1 : n + 2 * k, j + 1 :].mT)  # A v, and the panel's
            p, correction = product[..., : n - 1 - j], product[..., n - 1 - j :]
            if k:
                p = torch.baddbmm(p, correction, done[..., j + 1 :], alpha=-1)
            _second(work, p, v, torch.bmm(p, v.mH), k, upper)
        diagonal.append(torch.cat(columns, -1))
        rest = a[:, stop:, stop:]
        rest.baddbmm_(
            work[:, upper : upper + 2 * count, stop:].mT,
            work[:, n : n + 2 * count, stop:],
            alpha=-1,
        )
    tail = max(n - 2, 0)
    diagonal.append(a[:, tail:, tail:].diagonal(dim1=-2, dim2=-1).real)
    if n > 1:
        e[:, -1:] = a[:, n - 2, n - 1 :].abs()
    return torch.cat(diagonal, -1), e * e


def _reflector(work: Tensor, column: Tensor, norm: Tensor, k: int, upper: int) -> Tensor:
    """v of the k-th column of a panel, (B, 1, m), where it belongs; the norm goes to ``norm``."""
    n = work.shape[-1]
    if column.is_conj():
        column = column.resolve_conj()
    x = column[..., 1:]
    j = n - column.shape[-1]
    torch.linalg.vector_norm(x, dim=-1, out=norm)
    size, head = norm.unsqueeze(-1), x[..., :1]
    if work.is_complex():
        magnitude = head.abs()
        phase = torch.where(magnitude == 0, torch.ones_like(head), torch.sgn(head))
        head.add_(phase * size)
        half = size * (size + magnitude)
    else:
        signed = torch.copysign(size, head)
        head.add_(signed)
        half = signed * head
    # Where there is nothing to reflect, 1 / sqrt(inf) leaves v = 0.
    limit = NEGLIGIBLE[norm.dtype] ** 2
    inverse = F.threshold(half, limit, float("inf"), inplace=True).rsqrt_()
    row = upper + 2 * k
    v = work[:, row : row + 1, j + 1 :]
    if work.is_complex():
        torch.mul(x, inverse, out=v)
        work[:, n + 2 * k + 1, j + 1 :] = v.squeeze(1).conj()
    else:  # both places in one go: rows n + 2k + 1 and upper + 2k
        both = work[:, n + 2 * k + 1 : row + 1 : upper - n - 1, j + 1 :]
        torch.mul(x.expand_as(both), inverse, out=both)
    return v


def _second(work: Tensor, p: Tensor, v: Tensor, product: Tensor, k: int, upper: int) -> None:
    """w = p - (v^H p / 2) v of the k-th column, written where it belongs."""
    n, start = work.shape[-1], work.shape[-1] - v.shape[-1]
    row = upper + 2 * k + 1
    if work.is_complex():
        w = work[:, row : row + 1, start:]
        torch.addcmul(p, product, v, value=-0.5, out=w)
        work[:, n + 2 * k, start:] = w.squeeze(1).conj()
    else:
        both = work[:, n + 2 * k : row + 1 : upper - n + 1, start:]
        torch.addcmul(p.expand_as(both), product, v, value=-0.5, out=both)


# --- the tridiagonal matrices --------------------------------------------------------------------


def eigenvalues(d: Tensor, e2: Tensor) -> Tensor:
    """All eigenvalues of symmetric tridiagonal matrices: d (B, n), e2 (B, n - 1) -> (B, n).

    Ascending, to a few units of rounding of the largest; entries of d within about n of 1. The
    first sweep counts at shifts spread over the whole spectrum, each later one at some shifts
    between the bounds of each eigenvalue.
    """
    batch, n = d.shape
    if n <= 1:
        return d.clone()
    low, high = bounds(d, e2)
    count = _Counter(d, e2)
    lanes = _LANES.get(d.device.type, _FEW_LANES) // 2
    first = min(14, max(4, (lanes // batch).bit_length() - 1))
    each = min(7, max(1, (lanes // (batch * n)).bit_length() - 1))
    bits = iterations(d.dtype) - first
    wanted = torch.arange(n, device=d.device, dtype=torch.int32)
    grid = torch.arange(2**first + 1, device=d.device, dtype=d.dtype)
    step = (high - low) * 2.0**-first
    # The number of shifts that are not above the eigenvalue: those with at most k below them.
    below = torch.searchsorted(
        count(low + step * grid[1:-1]), wanted.expand(batch, n).contiguous(), right=True
    )
    low = low + step * below
    wanted = wanted.unsqueeze(-1)
    for _ in range(-(-bits // each)):
        step = step * 2.0**-each
        shifts = low.unsqueeze(-1) + step.unsqueeze(-1) * grid[1 : 2**each]
        counts = count(shifts.reshape(batch, -1)).view(shifts.shape)
        low = low + step * (counts <= wanted).sum(-1)
    return torch.cummax(low + 0.5 * step, -1).values


def iterations(dtype: torch.dtype) -> int:
    """Halvings of the Gershgorin interval that leave less than rounding: its width is at most six
    times the norm."""
    return {torch.float32: 24, torch.float64: 53}[dtype] + 4


def least_coupling(dtype: torch.dtype) -> float:
    """What ``e2`` is lifted to: no pivot is then 0 / 0, and no eigenvalue moves by its rounding."""
    return NEGLIGIBLE[dtype] ** 2


def bounds(d: Tensor, e2: Tensor) -> tuple[Tensor, Tensor]:
    """Gershgorin's interval of each matrix, widened by rounding: two of (B, 1)."""
    e = F.pad(e2.sqrt(), (1, 1))
    radius = e[:, 1:] + e[:, :-1]
    low = (d - radius).amin(-1, keepdim=True)
    high = (d + radius).amax(-1, keepdim=True)
    size = torch.maximum(low.abs(), high.abs())
    margin = size * (4 * torch.finfo(d.dtype).eps) + NEGLIGIBLE[d.dtype]
    return low - margin, high + margin


class _Counter:
    """How many eigenvalues of each matrix lie below given shifts.

    The pivots of T - x I = L D L^T have the signs of its eigenvalues. They are taken from both
    ends to the middle at once, which halves the length of the recurrence; one operation a step:
    q_i = (d_i - x) - e2_i / q_{i-1}. A zero pivot gives an infinite one next and then recovers.
    """

    def __init__(self, d: Tensor, e2: Tensor) -> None:
        n = d.shape[-1]
        half = n // 2
        e2 = e2.clamp_min(least_coupling(d.dtype))
        if n % 2 == 0:  # an eigenvalue at infinity makes the length odd, and is never counted
            d = F.pad(d, (0, 1), value=float("inf"))
            e2 = F.pad(e2, (0, 1), value=least_coupling(d.dtype))
        # (half, B, 2, 1): the two ends side by side
        self.d = torch.stack([d[:, :half], d.flip(-1)[:, :half]], -1).movedim(1, 0).unsqueeze(-1)
        e2 = torch.stack([e2[:, :half], e2.flip(-1)[:, :half]], -1).movedim(1, 0).unsqueeze(-1)
        self.e2 = e2  # behind each entry, the last ones beside the middle
        self.middle = d[:, half, None]

    def __call__(self, shifts: Tensor) -> Tensor:
        """(B, L) -> (B, L), int32."""
        half, batch = self.d.shape[:2]
        lanes = shifts.shape[-1]
        chunk = max(1, _PIVOTS // (2 * batch * lanes))
        found = torch.zeros(shifts.shape, dtype=torch.int32, device=shifts.device)
        last: Tensor | None = None
        for start in range(0, half, chunk):
            pivots = self.d[start : start + chunk] - shifts.unsqueeze(1)  # (c, B, 2, L)
            for i in range(pivots.shape[0]):
                if last is not None:
                    pivots[i].addcdiv_(self.e2[start + i - 1], last, value=-1)
                last = pivots[i]
            found += (pivots < 0).sum((0, 2), dtype=torch.int32)
        assert last is not None
        middle = self.middle - shifts
        for end in range(2):
            middle = middle.addcdiv_(self.e2[-1, :, end], last[:, end], value=-1)
        return found.add_(middle < 0)
