"""What the PDE data modules share: parts, normalisers, loaders."""

from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from experiments.data.loaders import BatchDataset, TensorRows, make_loader, world_of
from experiments.data.normalizer import Normalizer
from experiments.data.splits import take_share, train_val_split


@dataclass(frozen=True)
class FieldParts:
    """Data sets of encoded batches, and the maps back to physical units.

    `train`, `val` (None: no validation), `test` by name; `inputs` and `outputs` are the
    normalisers of x and y.
    """

    train: BatchDataset
    val: BatchDataset | None
    test: dict[str, BatchDataset]
    inputs: Normalizer
    outputs: Normalizer


class FieldDataModule(pl.LightningDataModule):
    """Fields on a grid; a subclass says how to `build` the parts.

    Batches are encoded (x and y normalised); `normalizer.decode` brings predictions and targets
    to physical units, `input_normalizer` does so for x. One-shot: x (B, C, *grid),
    y (B, C', *grid). Autoregressive: x (B, initial_step * C, *grid), time the slower index,
    y (B, t_train - initial_step, C, *grid).

    Attributes: in_channels, out_channels, dim, autoregressive, initial_step and rollout_steps
    (autoregressive only), test_names; after `setup` normalizer and input_normalizer.
    """

    in_channels: int
    out_channels: int
    dim: int
    autoregressive: bool
    test_names: tuple[str, ...] = ("test",)

    def __init__(
        self,
        *,
        batch_size: int,
        share: float,
        val_fraction: float,
        seed: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        self.batch_size, self.num_workers = batch_size, num_workers
        self.share, self.val_fraction, self.seed = share, val_fraction, seed
        self._parts: FieldParts | None = None

    def build(self) -> FieldParts:
        """Read or generate the data."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Build the parts, once."""
        if self._parts is None:
            self._parts = self.build()

    def split(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (train, val) of n training samples: validation apart, then the share."""
        train, val = train_val_split(n, self.val_fraction, self.seed)
        return take_share(train, self.share, self.seed), val

    @property
    def parts(self) -> FieldParts:
        """The built parts. Raises: RuntimeError before setup()."""
        if self._parts is None:
            raise RuntimeError(f"{type(self).__name__}: call setup() first (a Trainer does)")
        return self._parts

    @property
    def normalizer(self) -> Normalizer:
        """Map of the target field between physical units and what the network gives."""
        return self.parts.outputs

    @property
    def input_normalizer(self) -> Normalizer:
        """Map of the input field."""
        return self.parts.inputs

    def size_of(self, part: str) -> int:
        """Number of samples in "train", "val", or a test set by its name; 0 for none."""
        parts: dict[str, BatchDataset | None] = {
            "train": self.parts.train, "val": self.parts.val, **self.parts.test
        }  # fmt: skip
        chosen = parts.get(part)
        return 0 if chosen is None else len(chosen)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of the training part; the order depends on (seed, epoch) alone."""
        return make_loader(
            self.parts.train,
            self.batch_size,
            shuffle_seed=self.seed,
            num_workers=self.num_workers,
            world=world_of(self.trainer),
        )

    def val_dataloader(self) -> Any:
        """Batches of the validation part; an empty list where there is none."""
        return [] if self.parts.val is None else [self._in_order(self.parts.val)]

    def test_dataloader(self) -> Any:
        """A loader for each of `test_names`."""
        return [self._in_order(self.parts.test[name]) for name in self.test_names]

    def _in_order(self, part: BatchDataset) -> DataLoader[Any]:
        return make_loader(part, self.batch_size, num_workers=self.num_workers)


def pairs(
    x: torch.Tensor,
    y: torch.Tensor,
    rows: tuple[torch.Tensor, torch.Tensor],
    tests: dict[str, tuple[torch.Tensor, torch.Tensor]],
    *,
    encode_input: bool,
    encode_output: bool,
    pixelwise: bool,
) -> FieldParts:
    """Parts of fields in memory, x (N, C, *grid) to y (N, C', *grid), normalised on `rows[0]`."""
    train, val = rows
    dim = x.ndim - 2
    inputs, outputs = (
        Normalizer.fit(field[train], pixelwise) if wanted
        else Normalizer.identity(field.shape[1], dim)
        for field, wanted in ((x, encode_input), (y, encode_output))
    )  # fmt: skip

    def rows_of(a: torch.Tensor, b: torch.Tensor) -> BatchDataset:
        return TensorRows(inputs.encode(a), outputs.encode(b))

    return FieldParts(
        train=rows_of(x[train], y[train]),
        val=rows_of(x[val], y[val]) if len(val) else None,
        test={name: rows_of(a, b) for name, (a, b) in tests.items()},
        inputs=inputs,
        outputs=outputs,
    )
