"""Null: alpha of random matrices of a shape, simulated once for each way of measuring it.

The one place that says what a layer without structure reads: scores, reports, comparisons and the
marks of theory stand on it.
"""

from __future__ import annotations

import functools
import math
import statistics
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tempbalance.layers.layer import Layer
from tempbalance.measure.measurement import measured
from tempbalance.measure.method import Method
from tempbalance.measure.records import LayerRecord
from tempbalance.spectra.by_layer import windows_of
from tempbalance.spectra.grid import Windows
from tempbalance.spectra.powerlaw import Fit, Hill
from tempbalance.spectra.windows import Farms

# Draws of a shape: as many as this work allows, in multiplications of the Gram matrices (one to
# three seconds of a core), within these bounds. With 64 the standard deviation is known to 9%, with
# 8 to 27%.
_WORK = 1e10
_TOGETHER = 2  # draws that are measured in one go
_FEWEST, _MOST = 8, 64
# Shapes whose draws are remembered in a process.
_REMEMBERED = 4096

_Shape = tuple[int, int, int]


class NullAlpha(NamedTuple):
    """Alpha of random matrices of one shape."""

    mean: float
    std: float  # over the draws; 0 for a single one
    draws: int


@dataclass(frozen=True)
class _Kind:
    """What is drawn and how it is measured: all that its alphas depend on."""

    shape: _Shape
    is_complex: bool
    windows: Windows
    fit: Fit
    device: str

    @property
    def key(self) -> tuple[_Shape, bool, int, str]:
        """What sets kinds of one method apart, whose windows may be without a hash."""
        return self.shape, self.is_complex, id(self.windows), self.device

    def enough(self, fewest: int = _FEWEST) -> int:
        """Draws for its mean and standard deviation; ``fewest`` for a very large one."""
        slices, rows, cols = self.shape
        grid = self.windows.grid(rows, cols)
        work = slices * grid.positions * grid.height * grid.width * grid.eigenvalues
        return min(_MOST, max(fewest, math.ceil(_WORK / max(1, work))))

    def twin(self, name: str, draw: int) -> Layer:
        """A layer of independent Gaussian entries, from a generator of its own."""
        seed = zlib.crc32(repr((self.shape, self.is_complex, draw)).encode())
        dtype = torch.complex64 if self.is_complex else torch.float32

        def read() -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            # Where the generator is, whatever the default device.
            values = torch.randn(self.shape, generator=generator, dtype=dtype, device="cpu")
            return values.to(self.device)

        numel = math.prod(self.shape) * (2 if self.is_complex else 1)
        return Layer(name, "Random", self.shape, (), numel, nn.Module(), (), read, True)

    def remembered(self) -> list[float | None]:
        """The alphas drawn so far, to be gone on with; ``None`` for a draw without one."""
        try:
            return _memory(self)
        except TypeError:  # windows or a fit without a hash: nothing says that they are the same
            return []


@functools.lru_cache(_REMEMBERED)
def _memory(kind: _Kind) -> list[float | None]:
    return []


def null_alpha(
    shape: Sequence[int],
    windows: Windows | None = None,
    fit: Fit | None = None,
    *,
    is_complex: bool = False,
    draws: int | None = None,
    device: torch.device | str = "cpu",
) -> NullAlpha:
    """Mean and standard deviation of alpha of random matrices of a shape: no structure.

    Entries are independent and standard normal, from a seeded generator of its own: the same
    numbers in every process, and torch's generators are not touched. Simulated once in a process
    for each shape, windows and fit (those without a hash each time anew). Alpha does not depend on
    the scale of the entries, unless the fit does.

    >>> random = null_alpha((20, 20))
    >>> round(random.mean, 1), round(random.std, 1)
    (2.3, 0.2)

    Args:
        shape: of a weight: (out, in) of a linear layer, (out, in, height, width) or (out, in,
            depth, height, width) of a convolution; three numbers are (slices, rows, cols), the
            stack of matrices that a record of :func:`~tempbalance.analyze` shows.
        windows: which submatrices; default ``Farms()``.
        fit: the power-law fit; default ``Hill()``.
        is_complex: complex entries (spectral convolutions).
        draws: random matrices. Default: 8 to 64, as many as two seconds or so allow. Alpha of a
            large matrix hardly varies, so that few give its mean; the standard deviation is known
            to 9% with 64 and to 27% with 8.
        device: where they are measured.

    Raises:
        ValueError: for a shape that is no weight's, draws below 1, or matrices without an alpha.
        TypeError: where ``windows`` or ``fit`` are a name or a class, or windows differ by layer.
    """
    method = Method(Farms() if windows is None else windows, Hill() if fit is None else fit, 2)
    if not isinstance(method.windows, Windows):
        raise TypeError("null_alpha takes the windows of one layer, not those of several by name")
    kind = _Kind(_stack(shape), is_complex, method.windows, method.fit, str(device))
    if draws is not None and draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws!r}")
    (null,) = _simulated([kind], method, [kind.enough() if draws is None else draws])
    if null is None:
        raise ValueError(f"random matrices of shape {tuple(shape)} have no alpha: too small")
    return null


def null_alphas(
    layers: Iterable[Layer | LayerRecord],
    method: Method,
    *,
    fewest: int = _FEWEST,
    complex_: frozenset[str] = frozenset(),
    progress: Callable[[float], None] | None = None,
) -> dict[str, NullAlpha]:
    """:func:`null_alpha` of layers, each with its own windows, by name.

    Layers of a model are simulated where their weights are, those of a report on the CPU.

    Args:
        layers: layers, or the records of those that were measured.
        method: how they are measured.
        fewest: draws of a very large shape; 2 will do for the mean alone.
        complex_: names of the records whose entries are complex.
        progress: called with the share of the simulation that was just done.
    """
    kinds = {layer.name: _kind_of(layer, method, complex_) for layer in layers}
    wanted = {kind.key: kind for kind in kinds.values()}
    counts = [kind.enough(fewest) for kind in wanted.values()]
    nulls = _simulated(list(wanted.values()), method, counts, progress)
    found = dict(zip(wanted, nulls, strict=True))
    by_name = {name: found[kind.key] for name, kind in kinds.items()}
    return {name: null for name, null in by_name.items() if null is not None}


def _simulated(
    kinds: Sequence[_Kind],
    method: Method,
    counts: Sequence[int],
    progress: Callable[[float], None] | None = None,
) -> list[NullAlpha | None]:
    """The null of each kind by so many draws, those that are remembered first.

    Always measured by twos, so that a draw is the same to the last bit whatever was drawn before
    and beside it: the batches of a measurement decide how it is rounded.
    """
    known = [kind.remembered() for kind in kinds]
    wanted = sum(max(0, n - len(alphas)) for alphas, n in zip(known, counts, strict=True))
    nulls = []
    for kind, alphas, count in zip(kinds, known, counts, strict=True):
        plain = replace(method, windows=kind.windows, min_eigs=2, keep_spectra=False)
        while len(alphas) < count:
            first = len(alphas)
            twins = [kind.twin(f"twin.{i}", i) for i in range(first, first + _TOGETHER)]
            alphas.extend(record.alpha for record in measured(twins, method=plain))
            if progress is not None:
                progress(min(_TOGETHER, count - first) / wanted)
        # Where more are known than asked for, the first: what fewer would have given alone.
        nulls.append(_null(alphas[:count]))
    if progress is not None and not wanted:
        progress(1.0)
    return nulls


def _null(drawn: Sequence[float | None]) -> NullAlpha | None:
    alphas = [alpha for alpha in drawn if alpha is not None]
    if not alphas:
        return None
    std = statistics.stdev(alphas) if len(alphas) > 1 else 0.0
    return NullAlpha(statistics.fmean(alphas), std, len(alphas))


def _kind_of(layer: Layer | LayerRecord, method: Method, complex_: frozenset[str]) -> _Kind:
    windows = windows_of(method.windows, layer)
    if isinstance(layer, LayerRecord):
        return _Kind(layer.shape, layer.name in complex_, windows, method.fit, "cpu")
    weight = layer.tensors()[0]
    return _Kind(layer.shape, weight.is_complex(), windows, method.fit, str(weight.device))


def _stack(shape: Any) -> _Shape:
    """A weight's shape as slices, rows and cols."""
    sides = tuple(shape) if isinstance(shape, Sequence) else ()
    if not 2 <= len(sides) <= 5 or not all(
        isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sides
    ):
        raise ValueError(
            "shape must be (out, in), (slices, rows, cols) or that of a convolution's weight, got "
            f"{shape!r}"
        )
    if len(sides) == 3:
        return sides
    return (math.prod(sides[2:]), *sides[:2])
