"""Measure: layers in, one record a layer out, with a single read back to the host.

The pipeline of the package: layers -> windows -> spectrum -> power law. Nothing is kept between
measurements.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from tempbalance.layers.find import Layer
from tempbalance.measure.records import (
    LayerRecord,
    MeasurementError,
    Outcome,
    record_of,
    unscaled,
)
from tempbalance.measure.sharing import cost, exchange, owners
from tempbalance.spectra.cuda_graphs import only_replayed
from tempbalance.spectra.powerlaw import Fit, Hill
from tempbalance.spectra.spectrum import (
    Task,
    full_precision,
    needs_float64,
    on_pool,
    pinned,
    reduced,
    spectra,
    spectra_float64,
    unit_scales,
)
from tempbalance.spectra.table import COLUMNS, DOUBT, SCALE, TOTAL, lowest_read, table
from tempbalance.spectra.windows import Farms, Windows

__all__ = [
    "DEFAULT_BUDGET",
    "LayerRecord",
    "Measurement",
    "MeasurementError",
    "Outcome",
    "measure",
]

# Extra memory of a measurement, in bytes, unless a single window needs more. A window of 8192 x
# 8192, the largest of a layer of 8192 x 28672, needs 544 MiB.
DEFAULT_BUDGET = 2**30

_Values = npt.NDArray[np.float64]


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
    """Measure layers on the devices where their weights are; one read back for each device.

    Where float32 is not enough for a layer (a second look that a healthy network rarely needs),
    its windows are redone in float64 and read once more.

    Args:
        layers: as from :func:`tempbalance.layers.find.find_layers`.
        windows: which submatrices.
        fit: the power-law fit.
        min_eigs: a layer with fewer eigenvalues gets no alpha.
        budget: extra memory in bytes. What a single window cannot do without (twice its Gram
            matrix, for the solver) is taken all the same, with a message in the log.
        keep_spectra: read the eigenvalues back too, and keep them in the records.
        group: share the work among the ranks of this process group, all of which must call;
            every rank gets the same records, bit for bit.
        progress: called with the share of the work that was just done.
    """
    whole = Measurement(
        layers,
        windows=windows,
        fit=fit,
        min_eigs=min_eigs,
        budget=budget,
        keep_spectra=keep_spectra,
        group=group,
        progress=progress,
    )
    whole.compute()
    return whole.finish()


class Measurement:
    """One measurement of some layers in three phases, so that the middle one can be elsewhere.

    Construct it in the training thread, call :meth:`compute` in any thread, then :meth:`finish` in
    the training thread. Arguments as for :func:`measure`, and

    Args:
        snapshot: copy the weights that this rank measures now, so that training may go on while
            they are measured: one copy of them, on their device. On CUDA the whole computation is
            enqueued now, on a stream of its own, and :meth:`compute` only waits for it; windows
            of up to 1024 eigenvalues go to our eigensolver, since the library's waits itself.
        beside: the snapshot is itself made in a thread beside the training, of weights on the CPU
            that are at hand: no setting of torch's is touched.
    """

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
        beside: bool = False,
    ) -> None:
        self._layers, self._min_eigs, self._group = list(layers), min_eigs, group
        self._owners = owners(layers, windows, group)
        rank = dist.get_rank(group) if group is not None else 0
        self._mine = [owner == rank for owner in self._owners]
        # Told by the model, which may have changed when the ranks meet.
        self._near = [x for layer in layers for x in layer.tensors()] if group is not None else []
        self._engine = _Engine(layers, self._mine, windows, fit, budget, keep_spectra, progress)
        self._rows = np.zeros((len(layers), COLUMNS))
        self._values: list[_Values | None] = [None] * len(layers)
        self._error: BaseException | None = None
        self._taken: list[_Part] | None = [] if snapshot else None
        if snapshot:
            self._try(self._take, beside)

    def compute(self) -> None:
        """Measure this rank's layers; without a snapshot, weights are read as it goes.

        With a group, what goes wrong is raised by :meth:`finish`, on every rank.
        """
        if self._error is None:
            self._try(self._compute)

    def finish(self) -> list[LayerRecord]:
        """Exchange the results among the ranks; the record of every layer.

        Raises:
            RuntimeError: if another rank of the group failed to measure its layers.
        """
        rows = self._rows
        if self._group is not None:
            if self._error is not None:
                rows = np.full_like(rows, np.nan)  # the others must not wait for this rank
            rows = exchange(rows, self._owners, self._group, self._near)
            if self._error is not None:
                raise self._error
            if np.isnan(rows[:, TOTAL]).any():
                raise RuntimeError("measuring the weights failed on another rank; see its error")
        return [
            record_of(layer, row, kept, self._min_eigs)
            for layer, row, kept in zip(self._layers, rows, self._values, strict=True)
        ]

    def _try(self, work: Callable[..., None], *arguments: object) -> None:
        """Alone, what goes wrong is raised here; in a group, where all ranks meet."""
        try:
            work(*arguments)
        except BaseException as error:
            # A user's interrupt is not to wait for the others; in the background there is none.
            if self._group is None or not (self._taken is not None or isinstance(error, Exception)):
                raise
            self._error = error

    def _compute(self) -> None:
        with torch.no_grad():  # per thread
            if self._taken is not None:
                # In a thread beside the training no setting of torch's may be touched.
                with only_replayed():
                    for part in self._taken:
                        self._keep(part, self._engine.finish(part))
                self._taken = []
                return
            with full_precision(*_device_types(self._layers)):
                for slices in self._engine.batches():
                    for some in _by_device(slices):
                        part = _Part({i: slices[i] for i in some})
                        self._keep(part, self._engine.finish(part))

    def _take(self, beside: bool) -> None:
        """Copies of the weights, those on CUDA with all work on them enqueued."""
        self._engine.wide = reduced()  # decided now: what comes later must not depend on settings
        settings = (
            contextlib.nullcontext() if beside else full_precision(*_device_types(self._layers))
        )
        with torch.no_grad(), settings:
            slices = self._engine.snapshot()
            parts = [_Part({i: slices[i] for i in some}) for some in _by_device(slices)]
            for part in parts:
                if part.device.type == "cuda":
                    part.stream = torch.cuda.Stream(part.device)
                    part.stream.wait_stream(torch.cuda.current_stream(part.device))
                    with part.on_stream():
                        self._engine.enqueue(part, wait=False)
            self._taken = parts

    def _keep(self, part: _Part, found: tuple[_Values, list[_Values | None]]) -> None:
        for i, row, kept in zip(part.slices, *found, strict=True):
            self._rows[i], self._values[i] = row, kept


@dataclass
class _Part:
    """Layers of one device, by place, and what has been enqueued for them."""

    slices: dict[int, Tensor]
    stream: torch.cuda.Stream | None = None
    tasks: list[Task] = field(default_factory=list)
    eigenvalues: list[Tensor] = field(default_factory=list)
    table: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return next(iter(self.slices.values())).device

    def on_stream(self) -> contextlib.AbstractContextManager[object]:
        """With a stream of its own, work goes there, in whatever thread."""
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)


class _Engine:
    def __init__(
        self,
        layers: Sequence[Layer],
        mine: Sequence[bool],
        windows: Windows,
        fit: Fit,
        budget: int,
        keep_spectra: bool,
        progress: Callable[[float], None] | None,
    ) -> None:
        self.layers, self.mine, self.windows, self.fit = layers, mine, windows, fit
        self.budget, self.keep_spectra, self.progress = budget, keep_spectra, progress
        self.pooled = windows.pool == "spectrum"
        self.workers = torch.get_num_threads()  # of the constructing thread: the user's
        self.wide = False
        self.costs = {i: cost(x, windows) for i, x in enumerate(layers) if mine[i]}

    # --- reading weights -----------------------------------------------------------------------

    def batches(self) -> Iterator[dict[int, Tensor]]:
        """Weights to compute together: all, unless reading them makes tensors of their own."""
        batch: dict[int, Tensor] = {}
        copied = 0
        for i, slices in self._read():
            batch[i] = slices
            if self.layers[i].copies:
                copied += slices.numel() * slices.element_size()
            if copied > self.budget // 2:
                yield batch
                batch, copied = {}, 0
        if batch:
            yield batch

    def snapshot(self) -> dict[int, Tensor]:
        """All weights of this rank, copied."""
        return {i: s.clone() if self.layers[i].is_own_memory(s) else s for i, s in self._read()}

    def _read(self) -> Iterator[tuple[int, Tensor]]:
        for i, layer in enumerate(self.layers):
            if not self.mine[i] and not layer.copies:
                continue
            slices = layer.read()  # a collective where the weight is sharded: on every rank
            if not self.mine[i]:
                continue
            if slices.device.type not in ("cpu", "cuda"):
                slices = slices.cpu()  # no eigensolver, or no float64, on the others
            if slices.element_size() == 1:
                slices = slices.float()  # float8 has no arithmetic
            yield i, slices

    # --- computing -----------------------------------------------------------------------------

    def finish(self, part: _Part) -> tuple[_Values, list[_Values | None]]:
        """The rows (L, COLUMNS) of a part's layers, and their eigenvalues where they are kept."""
        if not on_pool(part.device):
            with part.on_stream():
                return self._rows(part)
        return pinned(functools.partial(self._rows, part))

    @torch.no_grad()  # per thread
    def _rows(self, part: _Part) -> tuple[_Values, list[_Values | None]]:
        if part.table is None:
            self.enqueue(part, wait=True)
        assert part.table is not None
        rows, kept = self._to_host(part.table, part.eigenvalues)
        self._second_look(part, rows, kept)
        return rows, kept

    def enqueue(self, part: _Part, wait: bool) -> None:
        """All work on a part up to its table, which stays on the device.

        Nothing waits for the device, but for the library's eigensolver with ``wait``.
        """
        scales = unit_scales(list(part.slices.values()), self.workers)
        part.tasks = [
            Task(
                slices,
                self.windows.grid(*layer.shape[1:]),
                scale,
                layer.name,
                self.wide and on_pool(slices.device),
            )
            for (layer, slices), scale in zip(
                ((self.layers[i], s) for i, s in part.slices.items()), scales, strict=True
            )
        ]
        share = sum(self.costs[i] for i in part.slices) / sum(self.costs.values())
        progress = (
            None if self.progress is None else functools.partial(_scaled, self.progress, share)
        )
        part.eigenvalues = spectra(part.tasks, self.budget, progress, self.workers, wait)
        part.table = self._table(part.tasks, part.eigenvalues)

    def _second_look(self, part: _Part, rows: _Values, kept: list[_Values | None]) -> None:
        """Redo in float64 the windows that need it, of the layers where the table has a doubt."""
        doubtful = [i for i, row in enumerate(rows) if row[DOUBT] and row[SCALE]]
        if not doubtful:
            return
        masks = [
            needs_float64(e.double(), lowest_read(e, task.scale, self.fit, self.pooled))
            for e, task in ((part.eigenvalues[i], part.tasks[i]) for i in doubtful)
        ]
        # One transfer for all of them: which windows they are decides what is computed.
        flat = torch.cat([mask.flatten() for mask in masks]).cpu()
        on_host = flat.split([mask.numel() for mask in masks])
        redo = [
            (i, host.view(mask.shape))
            for i, mask, host in zip(doubtful, masks, on_host, strict=True)
            if host.any()
        ]
        if not redo:
            return
        tasks = [part.tasks[i] for i, _ in redo]
        before = [(part.tasks[i], part.eigenvalues[i], mask) for i, mask in redo]
        better = spectra_float64(before, self.budget, self.workers)
        again, kept_again = self._to_host(self._table(tasks, better), better)
        for (i, _), row, keep in zip(redo, again, kept_again, strict=True):
            rows[i], kept[i] = row, keep

    def _table(self, tasks: list[Task], eigenvalues: list[Tensor]) -> Tensor:
        scales = torch.stack([task.scale for task in tasks])
        return table(eigenvalues, scales, self.fit, self.pooled, self.budget)

    def _to_host(
        self, on_device: Tensor, eigenvalues: list[Tensor]
    ) -> tuple[_Values, list[_Values | None]]:
        """The one transfer to the host: the table, completed, and the eigenvalues if wanted."""
        flat = [on_device.reshape(-1)]
        if self.keep_spectra:
            flat += [e.reshape(-1).double() for e in eigenvalues]
        host = read_back(torch.cat(flat))
        rows = np.zeros((len(eigenvalues), COLUMNS))
        rows[:, :TOTAL] = host[: on_device.numel()].reshape(on_device.shape)
        rows[:, TOTAL] = [e.numel() for e in eigenvalues]
        if not self.keep_spectra:
            return rows, [None] * len(eigenvalues)
        ends = np.cumsum([on_device.numel()] + [e.numel() for e in eigenvalues])
        kept: list[_Values | None] = []
        for start, stop, row in zip(ends, ends[1:], rows, strict=False):
            part, scale = host[start:stop], row[SCALE]
            kept.append(unscaled(np.sort(part[part > 0]), scale) if scale else None)
        return rows, kept


def read_back(values: Tensor) -> _Values:
    """To the host: where a measurement waits for the device."""
    return values.cpu().numpy()


def _scaled(report: Callable[[float], None], share: float, done: float) -> None:
    report(done * share)


def _by_device(slices: dict[int, Tensor]) -> list[list[int]]:
    by_device: dict[torch.device, list[int]] = {}
    for i, each in slices.items():
        by_device.setdefault(each.device, []).append(i)
    return list(by_device.values())


def _device_types(layers: Sequence[Layer]) -> set[str]:
    return {tensor.device.type for layer in layers for tensor in layer.tensors()} or {"cpu"}
