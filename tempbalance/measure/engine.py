"""Engine: what one measurement does on each device: read, compute, look again, read back."""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tempbalance.layers.find import Layer
from tempbalance.measure.method import Method
from tempbalance.measure.ranks import cost, sharded
from tempbalance.measure.records import unscaled
from tempbalance.spectra import gpu, scale
from tempbalance.spectra.batches import Task
from tempbalance.spectra.by_layer import windows_of
from tempbalance.spectra.cpu import pinned
from tempbalance.spectra.spectrum import needs_float64, spectra, spectra_float64
from tempbalance.spectra.table import COLUMNS, DOUBT, SCALE, TOTAL, lowest_read, table

Values = npt.NDArray[np.float64]


@dataclass
class Part:
    """Layers of one device, by place, and what has been computed of them."""

    slices: dict[int, Tensor]
    stream: torch.cuda.Stream | None = None
    tasks: list[Task] = field(default_factory=list)
    pooled: list[bool] = field(default_factory=list)  # one fit of all windows of a layer
    eigenvalues: list[Tensor] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return next(iter(self.slices.values())).device

    def on_stream(self) -> contextlib.AbstractContextManager[object]:
        """With a stream of its own, work goes there, in whatever thread."""
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of measurements beside a training: one a device, since torch keeps the memory
    that was used on a stream for that stream alone."""
    return torch.cuda.Stream(device)


class Engine:
    """One measurement's work, a device at a time. Weights are read once, in order.

    ``wide``: products in float64, where no setting of torch's may be touched to make those in
    float32 exact.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        mine: Sequence[bool],
        method: Method,
        progress: Callable[[float], None] | None,
    ) -> None:
        self.layers, self.mine, self.method, self.progress = layers, mine, method, progress
        self.windows = [windows_of(method.windows, layer) for layer in layers]
        self.workers = torch.get_num_threads()  # of the constructing thread: the user's
        self.wide = False
        self.costs = {i: cost(x, method.windows) for i, x in enumerate(layers) if mine[i]}
        self._unread = deque(range(len(layers)))
        self._copied: dict[torch.device, torch.cuda.Event] = {}

    # --- reading weights -----------------------------------------------------------------------

    def parts(self) -> Iterator[Part]:
        """Weights to compute together: all, unless reading them makes tensors of their own."""
        batch: dict[int, Tensor] = {}
        copied = 0
        while self._unread:
            i = self._unread.popleft()
            slices, fresh = self._read(i)
            if slices is None:
                continue
            batch[i] = slices
            copied += slices.numel() * slices.element_size() if fresh else 0
            if copied > self.method.budget // 2:
                yield from _by_device(batch)
                batch, copied = {}, 0
        yield from _by_device(batch)

    def snapshot(self, failures: dict[str, str] | None = None) -> list[Part]:
        """All weights of this rank, copied; those on a GPU to be computed on its side stream.

        With ``failures`` layers that cannot be copied are left out, and noted there.
        """
        copies: dict[int, Tensor] = {}
        while self._unread:
            i = self._unread.popleft()
            layer = self.layers[i]
            try:
                slices, fresh = self._read(i)
                if slices is not None:
                    shared = not fresh or layer.is_own_memory(slices)
                    copies[i] = slices.clone() if shared else slices
            except Exception as error:  # what reads it is the user's, or a parametrization
                if failures is None:
                    raise
                failures[layer.name] = repr(error)
        parts = list(_by_device(copies))
        for part in parts:
            if part.device.type == "cuda":
                part.stream = side_stream(part.device)
                part.stream.wait_stream(torch.cuda.current_stream(part.device))
        return parts

    def read_on(self) -> None:
        """After an error: read what is left of weights that are gathered from several ranks.

        Each such read is a collective, and the other ranks would wait for this one for ever.
        """
        while self._unread:
            layer = self.layers[self._unread.popleft()]
            if sharded([layer]):
                with contextlib.suppress(Exception):  # the first error is the one to raise
                    layer.read()

    def _read(self, i: int) -> tuple[Tensor | None, bool]:
        """A layer's weight where it is computed, and whether that is a tensor made for it.

        None where another rank measures it.
        """
        layer = self.layers[i]
        if not self.mine[i] and not layer.copies:
            return None, False
        slices = layer.read()  # a collective where the weight is sharded: on every rank
        if not self.mine[i]:
            return None, False
        if slices.element_size() == 1:
            slices = slices.float()  # float8 has no arithmetic
        if gpu.computed_on(slices.device):
            return slices, layer.copies
        return self._on_host(slices), True

    def _on_host(self, slices: Tensor) -> Tensor:
        """A copy on the CPU; from CUDA in pinned memory, and not there before :meth:`_arrived`."""
        if slices.device.type != "cuda":
            return slices.cpu()
        host = torch.empty_like(slices, device="cpu", pin_memory=True)
        host.copy_(slices, non_blocking=True)
        event = self._copied.setdefault(slices.device, torch.cuda.Event())
        event.record(torch.cuda.current_stream(slices.device))
        return host

    def _arrived(self) -> None:
        """Wait for the copies from CUDA."""
        for event in self._copied.values():
            event.synchronize()

    # --- computing -----------------------------------------------------------------------------

    def compute(self, part: Part) -> tuple[Values, list[Values | None]]:
        """The rows (L, COLUMNS) of a part's layers, and their eigenvalues where they are kept."""
        if scale.on_pool(part.device):
            self._arrived()
            return pinned(functools.partial(self._rows, part))
        with part.on_stream():
            return self._rows(part)

    @torch.no_grad()  # per thread
    def _rows(self, part: Part) -> tuple[Values, list[Values | None]]:
        method = self.method
        scales = scale.unit_scales(list(part.slices.values()), self.workers)
        part.tasks = [
            Task(
                slices,
                self.windows[i].grid(*slices.shape[1:]),
                unit,
                self.layers[i].name,
                self.wide,
            )
            for (i, slices), unit in zip(part.slices.items(), scales, strict=True)
        ]
        part.pooled = [self.windows[i].pool == "spectrum" for i in part.slices]
        share = sum(self.costs[i] for i in part.slices) / sum(self.costs.values())
        progress = self.progress and functools.partial(_scaled, self.progress, share)
        part.eigenvalues = spectra(part.tasks, method.budget, progress, self.workers)
        statistics = self._table(part.tasks, part.eigenvalues, part.pooled)
        rows, kept = self._to_host(statistics, part.eigenvalues)
        self._second_look(part, rows, kept)
        return rows, kept

    def _second_look(self, part: Part, rows: Values, kept: list[Values | None]) -> None:
        """Redo in float64 the windows that need it, of the layers where the table has a doubt."""
        doubtful = [
            i
            for i, (row, values) in enumerate(zip(rows, part.eigenvalues, strict=True))
            if row[DOUBT] and row[SCALE] and values.dtype != torch.float64
        ]
        if not doubtful:
            return
        masks = [
            needs_float64(
                part.eigenvalues[i].double(),
                lowest_read(
                    part.eigenvalues[i], part.tasks[i].scale, self.method.fit, part.pooled[i]
                ),
            )
            for i in doubtful
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
        better = spectra_float64(before, self.method.budget, self.workers)
        pooled = [part.pooled[i] for i, _ in redo]
        again, kept_again = self._to_host(self._table(tasks, better, pooled), better)
        for (i, _), row, keep in zip(redo, again, kept_again, strict=True):
            rows[i], kept[i] = row, keep

    def _table(self, tasks: list[Task], eigenvalues: list[Tensor], pooled: list[bool]) -> Tensor:
        scales = torch.stack([task.scale for task in tasks])
        return table(eigenvalues, scales, self.method.fit, pooled, self.method.budget)

    def _to_host(
        self, on_device: Tensor, eigenvalues: list[Tensor]
    ) -> tuple[Values, list[Values | None]]:
        """The one transfer to the host: the table, completed, and the eigenvalues if wanted."""
        flat = [on_device.reshape(-1)]
        if self.method.keep_spectra:
            flat += [e.reshape(-1).double() for e in eigenvalues]
        host = read_back(torch.cat(flat))
        rows = np.zeros((len(eigenvalues), COLUMNS))
        rows[:, :TOTAL] = host[: on_device.numel()].reshape(on_device.shape)
        rows[:, TOTAL] = [e.numel() for e in eigenvalues]
        if not self.method.keep_spectra:
            return rows, [None] * len(eigenvalues)
        ends = np.cumsum([on_device.numel()] + [e.numel() for e in eigenvalues])
        kept: list[Values | None] = []
        for start, stop, row in zip(ends, ends[1:], rows, strict=False):
            part, unit = host[start:stop], row[SCALE]
            kept.append(unscaled(np.sort(part[part > 0]), unit) if unit else None)
        return rows, kept


def read_back(values: Tensor) -> Values:
    """To the host: where a measurement waits for the device."""
    return values.cpu().numpy()


def _scaled(report: Callable[[float], None], share: float, done: float) -> None:
    report(done * share)


def _by_device(slices: dict[int, Tensor]) -> Iterator[Part]:
    by_device: dict[torch.device, dict[int, Tensor]] = {}
    for i, each in slices.items():
        by_device.setdefault(each.device, {})[i] = each
    yield from map(Part, by_device.values())
