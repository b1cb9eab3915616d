"""PDEBench: compressible Navier-Stokes in one and two dimensions, Darcy flow, scalar equations."""

import math
from pathlib import Path

import torch
from torch.utils.data import Dataset

from experiments.data.field_module import FieldDataModule, FieldParts
from experiments.data.loaders import BatchDataset
from experiments.data.normalizer import Normalizer
from experiments.data.pdebench_file import Layout, Reader, read_layout
from experiments.data.progress import track
from experiments.data.trajectories import check_window, to_window


class _FileRows(Dataset[tuple[torch.Tensor, ...]]):
    """Encoded samples of a file, read when they are asked for, or once (`keep`)."""

    def __init__(
        self, reader: Reader, rows: torch.Tensor, inputs: Normalizer, outputs: Normalizer,
        initial_step: int, keep: bool,
    ) -> None:  # fmt: skip
        self.reader, self.rows = reader, rows.tolist()
        self.inputs, self.outputs = inputs, outputs
        self.initial_step = initial_step
        self._kept: torch.Tensor | None = None
        if keep:
            name = f"reading {reader.path.name}"
            samples = track((reader.read(row) for row in self.rows), name, len(self.rows))
            self._kept = torch.stack(list(samples))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return tuple(part[0] for part in self.__getitems__([index]))

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, ...]:
        if self._kept is not None:
            raw = self._kept[torch.as_tensor(indices)]
        else:
            raw = torch.stack([self.reader.read(self.rows[index]) for index in indices])
        if self.reader.layout.steady:
            return self.inputs.encode(raw[:, :1]), self.outputs.encode(raw[:, 1:])
        return to_window(self.inputs.encode(raw), self.initial_step)


class PDEBench(FieldDataModule):
    """A PDEBench HDF5 file `root`/`file`; its layout is recognized.

    Flow (density, pressure, velocities) and scalar files are autoregressive: `initial_step`
    (default 10) frames in, predicted on to frame `t_train` (default 21), both after every
    `reduced_resolution_t`-th frame is taken. Darcy files are one-shot (nu to tensor). Every
    `reduced_resolution`-th point of the grid is taken. The first `test_fraction` (default 0.1)
    of the samples is the test set, as in PDEBench; `val_fraction` (default 0.1) of the rest is
    for validation, and `share` (0.025: the low-data setting) of what is left for training.
    Normalised by the mean and spread of each channel over the training part (over
    `statistics_samples`, default 500, of it, evenly spaced). Read lazily, each worker with its
    own handle; `in_memory` reads the subsampled data once instead.

    Raises: FileNotFoundError and ValueError (truncated, other layout) that say what to fetch.
    Source: Takamoto et al. 2022 (arXiv 2210.07182); settings of Model Balancing (arXiv
    2410.12178): 2D_CFD_Rand_M0.1_Eta0.01_Zeta0.01_periodic_128_Train.hdf5, 128 -> 64, batch 20.
    """

    def __init__(
        self,
        root: str,
        file: str,
        batch_size: int = 20,
        share: float = 1.0,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        reduced_resolution: int = 1,
        reduced_resolution_t: int = 1,
        initial_step: int = 10,
        t_train: int = 21,
        test_fraction: float = 0.1,
        in_memory: bool = False,
        statistics_samples: int = 500,
    ) -> None:
        super().__init__(
            batch_size=batch_size, share=share, val_fraction=val_fraction, seed=seed,
            num_workers=num_workers,
        )  # fmt: skip
        if reduced_resolution < 1 or reduced_resolution_t < 1:
            raise ValueError(
                f"reduced_resolution={reduced_resolution} and "
                f"reduced_resolution_t={reduced_resolution_t} must be at least 1"
            )
        self.path = Path(root) / file
        self.every, self.every_t = reduced_resolution, reduced_resolution_t
        self.initial_step, self.t_train = initial_step, t_train
        self.rollout_steps = t_train - initial_step
        self.test_fraction, self.in_memory = test_fraction, in_memory
        self.statistics_samples = statistics_samples
        self._layout: Layout | None = None

    @property
    def layout(self) -> Layout:
        """Layout of the file, read at the first use."""
        if self._layout is None:
            self._layout = read_layout(self.path)
        return self._layout

    @property
    def autoregressive(self) -> bool:  # type: ignore[override]
        """Whether there is a time to roll over."""
        return not self.layout.steady

    @property
    def dim(self) -> int:  # type: ignore[override]
        """Dimensions of the grid."""
        return len(self.layout.grid)

    @property
    def in_channels(self) -> int:  # type: ignore[override]
        """Channels of x: 1 (nu), or initial_step frames of all fields."""
        return 1 if self.layout.steady else self.initial_step * len(self.layout.names)

    @property
    def out_channels(self) -> int:  # type: ignore[override]
        """Channels of one predicted frame."""
        return 1 if self.layout.steady else len(self.layout.names)

    def build(self) -> FieldParts:
        """Split, normalise on the training part."""
        layout = self.layout
        if not layout.steady:
            have = math.ceil(layout.frames / self.every_t)
            check_window(self.initial_step, self.t_train, have, str(self.path))
        frames = 1 if layout.steady else self.t_train
        reader = Reader(self.path, layout, frames, self.every_t, self.every)
        n_test = int(layout.samples * self.test_fraction)
        if not 0 < n_test < layout.samples:
            raise ValueError(
                f"test_fraction={self.test_fraction} of {layout.samples} samples in {self.path} "
                "leaves no test set or no training set"
            )
        train, val = (rows + n_test for rows in self.split(layout.samples - n_test))
        inputs, outputs = self._normalizers(reader, train)

        def part(rows: torch.Tensor) -> BatchDataset:
            return _FileRows(reader, rows, inputs, outputs, self.initial_step, self.in_memory)

        return FieldParts(
            train=part(train),
            val=part(val) if len(val) else None,
            test={"test": part(torch.arange(n_test))},
            inputs=inputs,
            outputs=outputs,
        )

    def _normalizers(self, reader: Reader, rows: torch.Tensor) -> tuple[Normalizer, Normalizer]:
        """Channel statistics over the training samples, one sample in memory at a time."""
        channel = 0 if reader.layout.steady else 1
        shape = (-1, *([1] * len(reader.layout.grid)))
        wanted = min(len(rows), max(1, self.statistics_samples))
        chosen = rows[torch.linspace(0, len(rows) - 1, wanted).round().long()]
        count, mean, spread = 0, torch.zeros(()), torch.zeros(())
        name = f"statistics of {reader.path.name}"
        for row in track(chosen.tolist(), name, wanted):
            values = reader.read(row).double().movedim(channel, 0).flatten(1)
            # Means and squared deviations of two parts joined (Chan et al. 1979): summing the
            # squares of a pressure that hardly varies would lose its spread.
            new, add = values.mean(1), values.shape[1]
            shift = new - mean
            spread = spread + ((values - new[:, None]) ** 2).sum(1)
            spread = spread + shift**2 * (count * add / (count + add))
            mean = mean + shift * (add / (count + add))
            count += add
        std = (spread / max(count - 1, 1)).sqrt().reshape(shape)
        mean = mean.reshape(shape)
        if reader.layout.steady:
            return Normalizer.of(mean[:1], std[:1]), Normalizer.of(mean[1:], std[1:])
        both = Normalizer.of(mean, std)
        return both, both
