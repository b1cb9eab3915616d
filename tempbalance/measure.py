"""Measure: layers in, one record a layer out, with a single read back to the host.

The pipeline of the package: layers -> windows -> spectrum -> power law. Stateless.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from tempbalance.farms import Farms, Grid, Windows
from tempbalance.layers import Layer
from tempbalance.powerlaw import Fit, Hill
from tempbalance.spectrum import (
    FLOAT32_FLOOR,
    FLOAT32_ZERO,
    ZERO_SHARE,
    Task,
    full_precision,
    needs_float64,
    pinned,
    spectra,
    spectra_float64,
    unit_scale,
)

# Extra memory of a measurement, in bytes, unless a single window needs more.
DEFAULT_BUDGET = 512 * 2**20
# A tail whose mean log ratio is under 1e-3 is one value to within rounding and noise.
_LARGEST_ALPHA = 1e3


class Outcome(enum.Enum):
    """What came of measuring a layer; :meth:`message` says what it means and what to do."""

    OK = "ok"
    RANK_DEFICIENT = "rank-deficient"
    TOO_SMALL = "too small"
    TOO_FEW_EIGENVALUES = "too few eigenvalues"
    ALL_ZERO = "all zero"
    NO_SPREAD = "no spread"
    NON_FINITE = "non-finite"
    NOT_CONVERGED = "not converged"

    @property
    def measured(self) -> bool:
        """Whether the layer has an alpha."""
        return self in (Outcome.OK, Outcome.RANK_DEFICIENT)

    def message(self, layer: Layer | LayerRecord, min_eigs: int) -> str:
        """One sentence for a person: the layer, its shape, the meaning and the cure."""
        slices, rows, cols = layer.shape
        text = _MESSAGES[self].format(eigenvalues=slices * min(rows, cols), min_eigs=min_eigs)
        return f"layer {layer.name!r} ({slices} x {rows} x {cols}): {text}"


_MESSAGES = {
    Outcome.OK: "measured",
    Outcome.RANK_DEFICIENT: (
        "some eigenvalues are zero to rounding (dead channels, pruning or a low-rank factor); "
        "alpha is that of the others"
    ),
    Outcome.TOO_SMALL: (
        "it has {eigenvalues} eigenvalues, under min_eigs={min_eigs}; lower min_eigs to measure it"
    ),
    Outcome.TOO_FEW_EIGENVALUES: (
        "of its {eigenvalues} eigenvalues fewer than min_eigs={min_eigs} are not zero: the weight "
        "is close to low rank; look for dead channels, or lower min_eigs"
    ),
    Outcome.ALL_ZERO: "every weight is zero; initialize it, or leave the layer out",
    Outcome.NO_SPREAD: (
        "its eigenvalues are all equal (an identity or orthogonal initialization), so there is no "
        "tail to fit; train it first"
    ),
    Outcome.NON_FINITE: (
        "the weight holds NaN or infinity; go back to an earlier checkpoint and lower the "
        "learning rate, or clip gradients"
    ),
    Outcome.NOT_CONVERGED: (
        "the eigensolver did not converge, in float64 either; measure it with windows=Farms(rows="
        "128), and please report the weight"
    ),
}


class MeasurementError(ValueError):
    """Raised by ``analyze(..., strict=True)`` for a layer that could not be measured in full."""


@dataclass(frozen=True)
class LayerRecord:
    """What was measured of one layer. Eigenvalues are those of W W^H, not its singular values.

    With windows, all figures are of the windows' pooled spectrum; with ``WholeMatrix()`` they are
    those of the weight. Numbers are ``None`` where the layer has none, never NaN or infinite.
    """

    name: str
    kind: str
    shape: tuple[int, int, int]  # slices, rows, cols
    numel: int  # real numbers in the weight
    outcome: Outcome
    message: str
    alpha: float | None = None  # power-law exponent
    D: float | None = None  # Kolmogorov-Smirnov distance of the fit
    xmin: float | None = None  # lower end of the tail, an eigenvalue
    n_tail: int | None = None  # eigenvalues in the tail
    n_eigs: int = 0  # eigenvalues that count, over all windows
    lambda_max: float | None = None  # largest eigenvalue
    spectral_norm: float | None = None  # its root, the largest singular value
    frobenius_norm: float | None = None  # root of the sum of the eigenvalues
    stable_rank: float | None = None  # sum of the eigenvalues / lambda_max
    alpha_hat: float | None = None  # alpha * log10(lambda_max)
    log_norm: float | None = None  # log10 of the sum of the eigenvalues
    eigenvalues: npt.NDArray[np.float64] | None = field(default=None, repr=False, compare=False)


def measure(
    layers: Sequence[Layer],
    *,
    windows: Windows = Farms(),
    fit: Fit = Hill(),
    min_eigs: int = 10,
    budget: int = DEFAULT_BUDGET,
    keep_spectra: bool = False,
    group: dist.ProcessGroup | None = None,
    progress: Callable[[float], None] | None = None,
) -> list[LayerRecord]:
    """Measure layers on the devices where their weights are; one read back for all of them.

    Where float32 is not enough for a layer (a second look that a healthy network rarely needs),
    its windows are redone in float64 and read once more.

    Args:
        layers: as from :func:`tempbalance.layers.find_layers`.
        windows: which submatrices.
        fit: the power-law fit.
        min_eigs: a layer with fewer eigenvalues gets no alpha.
        budget: extra memory in bytes; a single window is never split.
        keep_spectra: read the eigenvalues back too, and keep them in the records.
        group: share the work among the ranks of this process group, all of which must call;
            every rank gets the same records, bit for bit.
        progress: called with the share of the work that was just done.
    """
    engine = _Engine(windows, fit, budget, keep_spectra, progress)
    owners = _share(layers, engine.windows, group)
    rank = dist.get_rank(group) if group is not None else 0
    with torch.no_grad(), full_precision(_device_type(layers)):
        stats, values = engine.run(layers, [owner == rank for owner in owners])
        if group is not None:
            stats = _exchange(stats, _device_type(layers), group)
    return [
        _record(layer, row, kept, min_eigs)
        for layer, row, kept in zip(layers, stats, values, strict=True)
    ]


class Measurement:
    """Stand-in until the engine's own is merged."""

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        windows: Windows = Farms(),
        fit: Fit = Hill(),
        min_eigs: int = 10,
        budget: int = DEFAULT_BUDGET,
        keep_spectra: bool = False,
        group: dist.ProcessGroup | None = None,
        progress: Callable[[float], None] | None = None,
        snapshot: bool = False,
    ) -> None:
        from dataclasses import replace

        self.layers, self.min_eigs, self.group = list(layers), min_eigs, group
        owners = _share(layers, windows, group)
        rank = dist.get_rank(group) if group is not None else 0
        self.mine = [owner == rank for owner in owners]
        self.engine = _Engine(windows, fit, budget, keep_spectra, progress)
        if snapshot:
            for i, layer in enumerate(layers):
                if self.mine[i] or layer.copies:
                    w = layer.read()
                    w = w.clone() if self.mine[i] else w
                    self.layers[i] = replace(layer, _read=lambda w=w: w, copies=False)

    def compute(self) -> None:
        with torch.no_grad(), full_precision(_device_type(self.layers)):
            self.stats, self.values = self.engine.run(self.layers, self.mine)

    def finish(self) -> list[LayerRecord]:
        if self.group is not None:
            self.stats = _exchange(self.stats, _device_type(self.layers), self.group)
        return [
            _record(layer, row, kept, self.min_eigs)
            for layer, row, kept in zip(self.layers, self.stats, self.values, strict=True)
        ]


# Columns of the table that is read back, a row a layer.
_ALPHA, _D, _XMIN, _TAIL, _COUNT, _TOTAL, _TOP, _SUM, _DOUBT, _FAILED, _SCALE = range(11)
_COLUMNS = 11


class _Engine:
    def __init__(
        self,
        windows: Windows,
        fit: Fit,
        budget: int,
        keep_spectra: bool,
        progress: Callable[[float], None] | None,
    ) -> None:
        self.windows, self.fit, self.budget = windows, fit, budget
        self.keep_spectra, self.progress = keep_spectra, progress
        self.workers = torch.get_num_threads()  # of the calling thread: the user's

    def run(
        self, layers: Sequence[Layer], mine: Sequence[bool]
    ) -> tuple[npt.NDArray[np.float64], list[npt.NDArray[np.float64] | None]]:
        """The table (L, columns), zero for layers that are not ``mine``, and the eigenvalues."""
        stats = np.zeros((len(layers), _COLUMNS))
        values: list[npt.NDArray[np.float64] | None] = [None] * len(layers)
        costs = [cost(layer, self.windows) * own for layer, own in zip(layers, mine, strict=True)]
        for batch in self._batches(layers, mine):
            for some in _by_device(batch):
                share = sum(costs[i] for i in some) / sum(costs)
                slices = {i: batch[i] for i in some}
                on_cpu = all(s.device.type == "cpu" for s in slices.values())
                compute = functools.partial(self._compute, layers, slices, share)
                rows, kept = pinned(compute) if on_cpu else compute()
                for i, row, keep in zip(some, rows, kept, strict=True):
                    stats[i], values[i] = row, keep
        return stats, values

    @torch.no_grad()  # per thread
    def _compute(
        self, layers: Sequence[Layer], slices: dict[int, Tensor], share: float
    ) -> tuple[npt.NDArray[np.float64], list[npt.NDArray[np.float64] | None]]:
        tasks = [
            Task(s, self.windows.grid(*layers[i].shape[1:]), unit_scale(s))
            for i, s in slices.items()
        ]
        progress = self._part_of_progress(share)
        return self._finish(tasks, spectra(tasks, self.budget, progress, self.workers))

    def _part_of_progress(self, share: float) -> Callable[[float], None] | None:
        report = self.progress
        return None if report is None else lambda done: report(done * share)

    def _batches(
        self, layers: Sequence[Layer], mine: Sequence[bool]
    ) -> Iterator[dict[int, Tensor]]:
        """Weights to compute together: all, unless reading them makes tensors of their own."""
        batch: dict[int, Tensor] = {}
        copied = 0
        for i, (layer, is_mine) in enumerate(zip(layers, mine, strict=True)):
            if not is_mine and not layer.copies:
                continue
            slices = layer.read()  # a collective where the weight is sharded: on every rank
            if not is_mine:
                continue
            if slices.device.type not in ("cpu", "cuda"):
                slices = slices.cpu()  # no eigensolver, or no float64, on the others
            if slices.element_size() == 1:
                slices = slices.float()  # float8 has no arithmetic
            batch[i] = slices
            copied += slices.numel() * slices.element_size() if layer.copies else 0
            if copied > self.budget // 2:
                yield batch
                batch, copied = {}, 0
        if batch:
            yield batch

    def _finish(
        self, tasks: list[Task], eigenvalues: list[Tensor]
    ) -> tuple[npt.NDArray[np.float64], list[npt.NDArray[np.float64] | None]]:
        """Fit, read back, and redo in float64 what needs it. All tensors on one device."""
        stats, kept = self._read(self._table(tasks, eigenvalues), eigenvalues)
        doubtful = [i for i, row in enumerate(stats) if row[_DOUBT] and row[_SCALE]]
        redo: list[tuple[Task, Tensor, Tensor]] = []
        again_of: list[int] = []
        for i in doubtful:
            mask = needs_float64(eigenvalues[i].double(), self._tail_ends(eigenvalues[i]))
            if mask.any():
                redo.append((tasks[i], eigenvalues[i], mask))
                again_of.append(i)
        if redo:
            better = spectra_float64(redo, self.budget, self.workers)
            again, kept_again = self._read(
                self._table([task for task, _, _ in redo], better), better
            )
            for i, row, keep in zip(again_of, again, kept_again, strict=True):
                stats[i], kept[i] = row, keep
        return stats, kept

    def _tail_ends(self, eigenvalues: Tensor) -> Tensor:
        """xmin of each fit of one layer's eigenvalues (P, S, k): (1,) or (P,)."""
        rows = eigenvalues.reshape(1 if self.windows.pool == "spectrum" else len(eigenvalues), -1)
        values = _ascending(torch.nan_to_num(rows.double(), 0.0, 0.0, 0.0))
        return self.fit(values, (values <= 0).sum(-1)).xmin

    def _table(self, tasks: list[Task], eigenvalues: list[Tensor]) -> Tensor:
        """The statistics of every layer: (L, columns) float64, on the device."""
        pooled = self.windows.pool == "spectrum"
        rows = [e.reshape(1 if pooled else len(e), -1) for e in eigenvalues]
        most = max(len(r) for r in rows)
        device = rows[0].device
        table = torch.zeros(len(rows), most, _COLUMNS, dtype=torch.float64, device=device)
        for some in _alike(rows, self.budget):
            fitted = self._rows([rows[i][start:stop] for i, start, stop in some])
            parts = fitted.split([stop - start for _, start, stop in some])
            for (i, start, stop), part in zip(some, parts, strict=True):
                table[i, start:stop] = part
        n_rows = _host([len(r) for r in rows]).to(device)
        scales = torch.stack([task.scale for task in tasks])
        return _pool(table, n_rows, scales)

    def _rows(self, blocks: list[Tensor]) -> Tensor:
        """Statistics of spectra of nearly one size, in blocks (b, n): (B, columns), B all rows."""
        size = max(block.shape[1] for block in blocks)
        rows = sum(len(block) for block in blocks)
        batch = torch.zeros(rows, size, dtype=torch.float64, device=blocks[0].device)
        for block, part in zip(blocks, batch.split([len(b) for b in blocks]), strict=True):
            part[:, : block.shape[1]] = block
        failed = batch.isnan().any(-1)
        values = _ascending(torch.nan_to_num(batch, 0.0, 0.0, 0.0))
        counts = (values > 0).sum(-1)
        law = self.fit(values, size - counts)
        top = values[:, -1]
        lost = ((values > 0) & (values < FLOAT32_ZERO * top.unsqueeze(-1))).sum(-1)
        low = ~(law.xmin >= FLOAT32_FLOOR * top)
        totals = _host([block.shape[1] for block in blocks for _ in range(len(block))])
        doubt = failed | ((low | (lost > ZERO_SHARE * counts)) & (top > 0))
        columns = {
            _ALPHA: law.alpha,
            _D: law.d,
            _XMIN: law.xmin,
            _TAIL: law.n_tail,
            _COUNT: counts,
            _TOTAL: totals.to(top.device),
            _TOP: top,
            _SUM: values.sum(-1),
            _DOUBT: doubt,
            _FAILED: failed,
            _SCALE: torch.zeros_like(top),
        }
        return torch.stack([columns[c].double() for c in range(_COLUMNS)], dim=-1)

    def _read(
        self, table: Tensor, eigenvalues: list[Tensor]
    ) -> tuple[npt.NDArray[np.float64], list[npt.NDArray[np.float64] | None]]:
        """The one transfer to the host."""
        flat = [table.reshape(-1)]
        if self.keep_spectra:
            flat += [e.reshape(-1).double() for e in eigenvalues]
        host = torch.cat(flat).cpu().numpy()
        stats = host[: table.numel()].reshape(len(eigenvalues), _COLUMNS).copy()
        if not self.keep_spectra:
            return stats, [None] * len(eigenvalues)
        ends = np.cumsum([table.numel()] + [e.numel() for e in eigenvalues])
        kept: list[npt.NDArray[np.float64] | None] = []
        for start, stop, row in zip(ends, ends[1:], stats, strict=False):
            part = host[start:stop]
            scale = row[_SCALE]
            kept.append(_unscaled(np.sort(part[part > 0]), scale) if scale else None)
        return stats, kept


def _ascending(values: Tensor) -> Tensor:
    """Sorted along the last dimension. numpy sorts values alone, many times faster on a CPU."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return values.sort(-1).values


def _by_device(batch: dict[int, Tensor]) -> list[list[int]]:
    by_device: dict[torch.device, list[int]] = {}
    for i, slices in batch.items():
        by_device.setdefault(slices.device, []).append(i)
    return list(by_device.values())


def _host(values: list[int]) -> Tensor:
    """On the CPU whatever the user's default device is."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")


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


def _pool(table: Tensor, n_rows: Tensor, scales: Tensor) -> Tensor:
    """(L, positions, columns) and how many rows count -> (L, columns): means and totals.

    A position whose spectrum has no power law (a dead block) does not enter the means.
    """
    present = torch.arange(table.shape[1], device=table.device) < n_rows.unsqueeze(-1)
    alpha = table[..., _ALPHA]
    fitted = present & torch.isfinite(alpha) & (alpha <= _LARGEST_ALPHA)
    used = torch.where(fitted.any(-1, keepdim=True), fitted, present).double()  # (L, P)
    out = table.sum(1)
    for column in (_ALPHA, _D, _XMIN):
        values = torch.where(used > 0, table[..., column], torch.zeros_like(used))
        out[:, column] = values.sum(-1) / used.sum(-1)
    out[:, _TOP] = table[..., _TOP].amax(-1)
    out[:, _SCALE] = scales
    return out


def _record(
    layer: Layer,
    row: npt.NDArray[np.float64],
    eigenvalues: npt.NDArray[np.float64] | None,
    min_eigs: int,
) -> LayerRecord:
    outcome = _outcome(layer, row, min_eigs)
    base = LayerRecord(
        layer.name, layer.kind, layer.shape, layer.numel, outcome, outcome.message(layer, min_eigs)
    )
    if outcome in (Outcome.NON_FINITE, Outcome.ALL_ZERO, Outcome.NOT_CONVERGED):
        return base
    scale = float(row[_SCALE])
    top, total = row[_TOP], row[_SUM]
    numbers: dict[str, float | int | None] = {
        "n_eigs": int(row[_COUNT]),
        "lambda_max": float(_unscaled(top, scale)),
        "spectral_norm": math.sqrt(top) / scale,
        "frobenius_norm": math.sqrt(total) / scale,
        "stable_rank": float(total / top),
        "log_norm": math.log10(total) - 2 * math.log10(scale),
    }
    if outcome.measured:
        alpha = float(row[_ALPHA])
        numbers |= {
            "alpha": alpha,
            "D": float(row[_D]),
            "xmin": float(_unscaled(row[_XMIN], scale)),
            "n_tail": int(row[_TAIL]),
            "alpha_hat": alpha * (math.log10(top) - 2 * math.log10(scale)),
        }
    return LayerRecord(**{**_fields(base), **numbers, "eigenvalues": eigenvalues})  # type: ignore


def _unscaled(eigenvalues: npt.NDArray[np.float64], scale: float) -> npt.NDArray[np.float64]:
    """Eigenvalues of the weight itself, where float64 holds them: never infinite."""
    with np.errstate(over="ignore"):
        return np.minimum(eigenvalues / scale / scale, np.finfo(np.float64).max)


def _fields(record: LayerRecord) -> dict[str, object]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def _outcome(layer: Layer, row: npt.NDArray[np.float64], min_eigs: int) -> Outcome:
    if not row[_SCALE]:
        return Outcome.NON_FINITE
    if row[_FAILED]:
        return Outcome.NOT_CONVERGED
    if row[_TOP] <= 0:
        return Outcome.ALL_ZERO
    if layer.eigenvalues < min_eigs:
        return Outcome.TOO_SMALL
    # Windows repeat parts of a spectrum: what counts is the share that is not zero.
    share = row[_COUNT] / row[_TOTAL]
    if round(share * layer.eigenvalues) < min_eigs:
        return Outcome.TOO_FEW_EIGENVALUES
    if not (math.isfinite(row[_ALPHA]) and row[_ALPHA] <= _LARGEST_ALPHA):
        return Outcome.NO_SPREAD
    return Outcome.RANK_DEFICIENT if share < 1 else Outcome.OK


# --- many devices and ranks -----------------------------------------------------------------------


def _device_type(layers: Sequence[Layer]) -> str:
    for layer in layers:
        for tensor in layer.tensors():
            return tensor.device.type
    return "cpu"


def cost(layer: Layer, windows: Windows) -> float:
    """Floating-point operations of measuring a layer, to a constant factor."""
    grid: Grid = windows.grid(*layer.shape[1:])
    k, n = grid.eigenvalues, max(grid.height, grid.width)
    return layer.shape[0] * grid.positions * float(k * k * n + 4 / 3 * k**3)


def _share(layers: Sequence[Layer], windows: Windows, group: dist.ProcessGroup | None) -> list[int]:
    """The rank that measures each layer: the costliest first, to the rank with least to do."""
    ranks = dist.get_world_size(group) if group is not None else 1
    load = [0.0] * ranks
    owners = [0] * len(layers)
    costs = [cost(layer, windows) for layer in layers]
    for i in sorted(range(len(layers)), key=lambda i: (-costs[i], i)):
        owners[i] = load.index(min(load))
        load[owners[i]] += costs[i]
    return owners


def _exchange(
    stats: npt.NDArray[np.float64], device_type: str, group: dist.ProcessGroup
) -> npt.NDArray[np.float64]:
    """Every rank's rows: a sum with zeros, which is exact. One small all-reduce."""
    backend = dist.get_backend(group)
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend else "cpu"
    flat = torch.as_tensor(stats).to(device)
    dist.all_reduce(flat, group=group)
    return flat.cpu().numpy()
