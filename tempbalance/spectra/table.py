"""Statistics: the eigenvalues of all layers in, one row of numbers a layer out, on the device.

Nothing here waits for the device or copies to or from the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tempbalance.spectra.powerlaw import Fit, PowerLaw
from tempbalance.spectra.spectrum import FLOAT32_FLOOR, FLOAT32_ZERO, ZERO_SHARE

# A tail whose mean log ratio is under 1e-3 is one value to within rounding and noise.
LARGEST_ALPHA = 1e3
# Columns of the table, a row a layer. KS is the Kolmogorov-Smirnov distance.
ALPHA, KS, XMIN, TAIL, COUNT, TOP, SUM, DOUBT, FAILED, PRESENT, SCALE, TOTAL = range(12)
COLUMNS = 12
_FITTED = 10  # those of a spectrum; SCALE is a layer's, and TOTAL is known without the device


def table(
    eigenvalues: Sequence[Tensor], scales: Tensor, fit: Fit, pooled: Sequence[bool], budget: int
) -> Tensor:
    """The statistics of every layer: (L, COLUMNS - 1) float64, on the device, without TOTAL.

    Args:
        eigenvalues: a layer each (P, S, k), all on one device.
        scales: (L,), what each layer's weight was multiplied by.
        fit: the power-law fit.
        pooled: for each layer, one fit of all its windows, else one a position, averaged.
        budget: bound on the extra memory, in bytes.
    """
    rows = [
        e.reshape(1 if whole else len(e), -1) for e, whole in zip(eigenvalues, pooled, strict=True)
    ]
    most = max(len(r) for r in rows)
    out = rows[0].new_zeros(len(rows), most, _FITTED, dtype=torch.float64)
    for some in _alike(rows, budget):
        scale = None  # a kernel a layer, for the fits alone that ask
        if getattr(fit, "in_units", False):
            scale = torch.cat([scales[i].expand(stop - start) for i, start, stop in some])
        fitted = _fitted([rows[i][start:stop] for i, start, stop in some], fit, scale)
        parts = fitted.split([stop - start for _, start, stop in some])
        for (i, start, stop), part in zip(some, parts, strict=True):
            out[i, start:stop] = part
    return torch.cat([_pool(out), scales.unsqueeze(-1)], dim=-1)


def ascending(values: Tensor) -> Tensor:
    """Sorted along the last dimension. numpy sorts values alone, many times faster on a CPU."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return values.sort(-1).values


def lowest_read(eigenvalues: Tensor, scale: Tensor, fit: Fit, pooled: bool) -> Tensor:
    """The smallest eigenvalue that each fit of a layer's (P, S, k) depends on: (1,) or (P,)."""
    rows = eigenvalues.reshape(1 if pooled else len(eigenvalues), -1)
    values = ascending(torch.nan_to_num(rows.double(), 0.0, 0.0, 0.0))
    first = (values <= 0).sum(-1)
    law = _law(fit, values, first, scale.expand(len(values)))
    return _lowest(fit, law, values, first)


def _law(fit: Fit, values: Tensor, first: Tensor, scales: Tensor | None) -> PowerLaw:
    """The fit of spectra (B, n), of the weights' own where it depends on the unit."""
    if scales is None or not getattr(fit, "in_units", False):
        return fit(values, first)
    unit = scales.square()
    law = fit(values / unit.unsqueeze(-1), first)
    return law._replace(xmin=law.xmin * unit)


def _lowest(fit: Fit, law: PowerLaw, values: Tensor, first: Tensor) -> Tensor:
    if not getattr(fit, "reads_all", False):
        return law.xmin
    return values.gather(-1, first.clamp(max=values.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)


def _fitted(blocks: list[Tensor], fit: Fit, scales: Tensor | None) -> Tensor:
    """Statistics of spectra of nearly one size, in blocks (b, n): (B, _FITTED), B all rows."""
    size = max(block.shape[1] for block in blocks)
    rows = sum(len(block) for block in blocks)
    batch = torch.zeros(rows, size, dtype=torch.float64, device=blocks[0].device)
    for block, part in zip(blocks, batch.split([len(b) for b in blocks]), strict=True):
        part[:, : block.shape[1]] = block
    failed = batch.isnan().any(-1)
    values = ascending(torch.nan_to_num(batch, 0.0, 0.0, 0.0))
    counts = (values > 0).sum(-1)
    law = _law(fit, values, size - counts, scales)
    top = values[:, -1]
    lost = ((values > 0) & (values < FLOAT32_ZERO * top.unsqueeze(-1))).sum(-1)
    low = ~(_lowest(fit, law, values, size - counts) >= FLOAT32_FLOOR * top)
    columns = {
        ALPHA: law.alpha,
        KS: law.d,
        XMIN: law.xmin,
        TAIL: law.n_tail,
        COUNT: counts,
        TOP: top,
        SUM: values.sum(-1),
        DOUBT: failed | ((low | (lost > ZERO_SHARE * counts)) & (top > 0)),
        FAILED: failed,
        PRESENT: torch.ones_like(top),
    }
    return torch.stack([columns[c].double() for c in range(_FITTED)], dim=-1)


def _alike(rows: list[Tensor], budget: int) -> Iterator[list[tuple[int, int, int]]]:
    """(layer, start, stop) of rows to fit together: sizes within a factor of two, in budget."""
    by_size: dict[int, list[int]] = {}
    for i, layer_rows in enumerate(rows):
        by_size.setdefault(layer_rows.shape[1].bit_length(), []).append(i)
    for bits, some in by_size.items():
        most = max(1, budget // (2**bits * 8 * 8))  # about eight temporaries of float64
        blocks: list[tuple[int, int, int]] = []
        room = most
        for i in some:
            start = 0
            while start < len(rows[i]):
                stop = min(len(rows[i]), start + room)
                blocks.append((i, start, stop))
                room -= stop - start
                start = stop
                if not room:
                    yield blocks
                    blocks, room = [], most
        if blocks:
            yield blocks


def _pool(rows: Tensor) -> Tensor:
    """(L, positions, _FITTED), zero where a layer has fewer -> (L, _FITTED): means and totals.

    A position whose spectrum has no power law (a dead block) does not enter the means.
    """
    present = rows[..., PRESENT] > 0
    alpha = rows[..., ALPHA]
    fitted = present & torch.isfinite(alpha) & (alpha <= LARGEST_ALPHA)
    used = torch.where(fitted.any(-1, keepdim=True), fitted, present).double()  # (L, P)
    out = rows.sum(1)
    for column in (ALPHA, KS, XMIN):
        values = torch.where(used > 0, rows[..., column], torch.zeros_like(used))
        out[:, column] = values.sum(-1) / used.sum(-1)
    out[:, TOP] = rows[..., TOP].amax(-1)
    return out
