"""Measurement: layers in, one record a layer out, with a single read back to the host.

The pipeline of the package: layers -> windows -> spectrum -> power law. Nothing is kept between
measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist

from tempbalance.layers.find import Layer
from tempbalance.measure.engine import Engine, Part, Values
from tempbalance.measure.method import DEFAULT_BUDGET, Method
from tempbalance.measure.ranks import exchange, owners
from tempbalance.measure.records import LayerRecord, MeasurementError, Outcome, record_of
from tempbalance.spectra.by_layer import WindowsLike, checked_windows
from tempbalance.spectra.gram import full_precision, reduced
from tempbalance.spectra.powerlaw import Fit, Hill
from tempbalance.spectra.table import COLUMNS, TOTAL
from tempbalance.spectra.windows import Farms

__all__ = [
    "DEFAULT_BUDGET",
    "LayerRecord",
    "Measurement",
    "MeasurementError",
    "Outcome",
    "measure",
    "measured",
]

_DEFAULT = Method()


def measure(
    layers: Sequence[Layer],
    *,
    windows: WindowsLike = Farms(),
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
        windows: which submatrices, for all layers or by patterns of names and types.
        fit: the power-law fit.
        min_eigs: a layer with fewer eigenvalues gets no alpha.
        budget: extra memory in bytes. What a single window cannot do without (twice its Gram
            matrix, for the solver) is taken all the same, with a message in the log.
        keep_spectra: read the eigenvalues back too, and keep them in the records.
        group: share the work among the ranks of this process group, all of which must call;
            every rank gets the same records, bit for bit.
        progress: called with the share of the work that was just done.

    Raises:
        TypeError, ValueError: as :class:`~tempbalance.measure.method.Method`.
        RuntimeError: if another rank of the group failed to measure its layers.
    """
    method = Method(checked_windows(windows), fit, min_eigs, budget, keep_spectra)
    return measured(layers, method=method, group=group, progress=progress)


def measured(
    layers: Sequence[Layer],
    *,
    method: Method,
    group: dist.ProcessGroup | None = None,
    progress: Callable[[float], None] | None = None,
) -> list[LayerRecord]:
    """:func:`measure` by a method."""
    whole = Measurement(layers, method, group=group, progress=progress)
    whole.compute()
    return whole.finish()


class Measurement:
    """One measurement of some layers in three phases, so that the middle one can be elsewhere.

    Construct it in the training thread, call :meth:`compute` in any thread, then :meth:`finish` in
    the training thread. Arguments as for :func:`measure`, and

    Args:
        snapshot: copy the weights that this rank measures now, so that training may go on while
            they are measured: one copy of them, where they are measured. :meth:`compute` then
            touches no setting of torch's, and on CUDA works on a stream of its own.
        leaves_out: a layer that cannot be copied is left out, and named in ``failures`` with what
            went wrong; not in a group, where all ranks read together.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        method: Method = _DEFAULT,
        *,
        group: dist.ProcessGroup | None = None,
        progress: Callable[[float], None] | None = None,
        snapshot: bool = False,
        leaves_out: bool = False,
    ) -> None:
        self._layers, self._method, self._group = list(layers), method, group
        checked_windows(method.windows, layers)
        self._owners = owners(layers, method.windows, group)
        rank = dist.get_rank(group) if group is not None else 0
        mine = [owner == rank for owner in self._owners]
        # Told by the model, which may have changed when the ranks meet.
        self._near = [x for layer in layers for x in layer.tensors()] if group is not None else []
        self._engine = Engine(self._layers, mine, method, progress)
        self._rows = np.zeros((len(layers), COLUMNS))
        self._values: list[Values | None] = [None] * len(layers)
        self.failures: dict[str, str] = {}
        self._error: BaseException | None = None
        self._taken: list[Part] | None = [] if snapshot else None
        if snapshot:
            self._try(self._take, self.failures if leaves_out else None)

    def compute(self) -> None:
        """Measure this rank's layers; without a snapshot, weights are read as it goes.

        With a group, what goes wrong is raised by :meth:`finish`, on every rank.
        """
        if self._error is None:
            self._try(self._compute)

    def compute_each(self) -> None:
        """Measure the copies one by one, after all at once failed; ``failures`` names the rest."""
        while self._taken:
            part = self._taken.pop()
            for i, slices in part.slices.items():
                try:
                    with torch.no_grad():
                        self._keep(Part({i: slices}, part.stream))
                except Exception as error:
                    self.failures[self._layers[i].name] = repr(error)

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
            record_of(layer, row, kept, self._method.min_eigs)
            for layer, row, kept in zip(self._layers, rows, self._values, strict=True)
            if layer.name not in self.failures
        ]

    def _try(self, work: Callable[..., None], *arguments: object) -> None:
        """Alone, what goes wrong is raised here; in a group, where all ranks meet."""
        try:
            work(*arguments)
        except BaseException as error:
            # A user's interrupt is not to wait for the others; in the background there is none.
            if not (self._taken is not None or isinstance(error, Exception)):
                raise
            self._engine.read_on()
            if self._group is None:
                raise
            self._error = error

    def _compute(self) -> None:
        with torch.no_grad():  # per thread
            if self._taken is not None:
                for part in self._taken:
                    self._keep(part)
                self._taken = []
                return
            with full_precision(*_device_types(self._layers)):
                for part in self._engine.parts():
                    self._keep(part)

    def _take(self, failures: dict[str, str] | None) -> None:
        """Copies of the weights. Reading some of them takes products."""
        self._engine.wide = reduced()  # decided now: what comes later must not depend on settings
        with torch.no_grad(), full_precision(*_device_types(self._layers)):
            self._taken = self._engine.snapshot(failures)

    def _keep(self, part: Part) -> None:
        for i, row, kept in zip(part.slices, *self._engine.compute(part), strict=True):
            self._rows[i], self._values[i] = row, kept


def _device_types(layers: Sequence[Layer]) -> set[str]:
    return {tensor.device.type for layer in layers for tensor in layer.tensors()} or {"cpu"}
