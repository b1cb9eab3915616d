"""PDEBench's HDF5 files: which layout a file has, and reading parts of it lazily."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

_FLOW = ("density", "pressure", "Vx", "Vy", "Vz")
_HELP = (
    "PDEBench files come from DaRUS, doi:10.18419/darus-2986 (list with addresses: "
    "pdebench_data_urls.csv in the PDEBench repository)"
)


@dataclass(frozen=True)
class Layout:
    """What a file holds.

    `names` are its data sets in the order of the channels, `steady` says that there is no time
    (Darcy: nu in, tensor out), `samples`, `frames` and `grid` the size of each as stored.
    """

    names: tuple[str, ...]
    steady: bool
    samples: int
    frames: int
    grid: tuple[int, ...]


def open_file(path: Path) -> Any:
    """Open an HDF5 file for reading.

    Raises: ImportError without h5py; FileNotFoundError and ValueError (truncated, no HDF5) that
    say what to fetch and where to put it.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            "PDEBench files need h5py: pip install h5py (or pip install 'tempbalance[experiments]')"
        ) from error
    if not path.exists():
        raise FileNotFoundError(
            f"no file {path}: fetch {path.name} and put it in {path.parent}. {_HELP}"
        )
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(
            f"{path} is truncated or no HDF5 file ({error}): fetch {path.name} again. {_HELP}"
        ) from error


def read_layout(path: Path) -> Layout:
    """Recognize the layout of a file.

    Flow: density, pressure, Vx[, Vy[, Vz]], each (N, T, X[, Y[, Z]]). Darcy: tensor (N, 1, X, Y)
    and nu (N, X, Y). Scalar in one dimension: tensor (N, T, X).

    Raises: ValueError for another layout, naming what the file holds.
    """
    import h5py

    with open_file(path) as file:
        found = {n: d.shape for n, d in file.items() if isinstance(d, h5py.Dataset)}
    if "density" in found:
        shape = found["density"]
        dim = len(shape) - 2
        names = ("density", "pressure", *_FLOW[2 : 2 + dim])
        if 1 <= dim <= 3 and all(found.get(name) == shape for name in names):
            return Layout(names, False, shape[0], shape[1], tuple(shape[2:]))
    elif "nu" in found and "tensor" in found:
        nu, tensor = found["nu"], found["tensor"]
        if len(nu) == 3 and tensor == (nu[0], 1, *nu[1:]):
            return Layout(("nu", "tensor"), True, nu[0], 1, tuple(nu[1:]))
    elif "tensor" in found and len(found["tensor"]) == 3:
        shape = found["tensor"]
        return Layout(("tensor",), False, shape[0], shape[1], tuple(shape[2:]))
    held = ", ".join(f"{name} {shape}" for name, shape in sorted(found.items())) or "nothing"
    raise ValueError(
        f"{path} has none of the layouts read here: density, pressure, Vx[, Vy] (N, T, X[, Y]); "
        f"tensor (N, 1, X, Y) with nu (N, X, Y); tensor (N, T, X). It holds {held}"
    )


class Reader:
    """Samples of one file, subsampled, opened anew in every process that reads.

    `frames` are taken from time 0 on, every `every_t`-th; the grid every `every`-th point.
    """

    def __init__(self, path: Path, layout: Layout, frames: int, every_t: int, every: int) -> None:
        self.path, self.layout = path, layout
        self.frames, self.every_t, self.every = frames, every_t, every
        self._open: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # An h5py file cannot be pickled, nor be shared over a fork.
        return {**self.__dict__, "_open": None}

    def _file(self) -> Any:
        if self._open is None or self._open[0] != os.getpid():
            self._open = (os.getpid(), open_file(self.path))
        return self._open[1]

    def read(self, row: int) -> torch.Tensor:
        """One sample, (T, C, *grid) or, without time, (C, *grid); float32.

        Raises: ValueError where the file ends before the sample does.
        """
        spatial = (slice(None, None, self.every),) * len(self.layout.grid)
        stop = (self.frames - 1) * self.every_t + 1
        channels = []
        for name in self.layout.names:
            data = self._file()[name]
            try:
                # A contiguous read and a stride in memory: HDF5's own strided reads are slow.
                if self.layout.steady:
                    values = (data[row] if data.ndim == 3 else data[row, 0])[spatial]
                else:
                    values = data[row, :stop][(slice(None, None, self.every_t), *spatial)]
            except OSError as error:
                raise ValueError(
                    f"{self.path}: sample {row} of {name} cannot be read ({error}): the file is "
                    f"truncated, fetch it again. {_HELP}"
                ) from error
            channels.append(np.asarray(values, dtype=np.float32))
        return torch.from_numpy(np.stack(channels, axis=0 if self.layout.steady else 1))
