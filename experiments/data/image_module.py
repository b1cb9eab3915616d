"""What the image data modules share: tensors in memory, splits, loaders, work on the device."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from experiments.data.augment import crop_flip
from experiments.data.loaders import TensorRows, make_loader, single, world_of
from experiments.data.normalizer import Normalizer
from experiments.data.splits import take_share, train_val_split

Batch = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class LabelledImages:
    """Images (N, C, H, W) uint8 and labels (N,) int64."""

    images: torch.Tensor
    labels: torch.Tensor


class ImageDataModule(pl.LightningDataModule):
    """Images held as one uint8 tensor, sliced in batches, augmented and normalised on the device.

    `share` of the training part (seeded, balanced over the classes, nested), `val_fraction` of
    the training set held back (0: no validation). Loaders yield (images uint8, labels, index);
    `on_after_batch_transfer` makes of it what a LightningModule sees: (x float32 (B, C, H, W)
    normalised, y int64 (B,)). Outside a Trainer `prepare(batch, train, epoch)` does the same.
    Shuffle and augmentation of epoch e are functions of (seed, e): a resumed run sees the same.

    Attributes: num_classes, in_channels, image_size, mean, std (per channel, of pixels in 0..1),
    and after `setup` normalizer.
    """

    num_classes: int
    in_channels: int
    image_size: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    test_names = ("test",)

    def __init__(
        self,
        *,
        batch_size: int,
        share: float,
        val_fraction: float,
        seed: int,
        num_workers: int,
        augment: bool,
        pad: int = 4,
        flip: bool = True,
        scale: float = 255.0,
    ) -> None:
        super().__init__()
        self.batch_size, self.num_workers = batch_size, num_workers
        self.share, self.val_fraction, self.seed = share, val_fraction, seed
        self.augment, self.pad, self.flip = augment, pad, flip
        self._scale = scale
        self._parts: dict[str, TensorRows] = {}
        self._affine: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    @abstractmethod
    def load(self) -> tuple[LabelledImages, LabelledImages]:
        """The whole training set and the test set."""

    def setup(self, stage: str | None = None) -> None:
        """Load once, split, and compute normalisation constants where none were given."""
        if self._parts:
            return
        train, test = self.load()
        rows, val = train_val_split(len(train.labels), self.val_fraction, self.seed, train.labels)
        rows = take_share(rows, self.share, self.seed, train.labels[rows])
        if self.mean is None or self.std is None:
            self.mean, self.std = _channel_statistics(train.images, rows, self._scale)
        self._parts = {
            "train": TensorRows(train.images, train.labels, rows=rows, with_index=True),
            "test": TensorRows(test.images, test.labels, with_index=True),
        }
        if len(val):
            self._parts["val"] = TensorRows(train.images, train.labels, rows=val, with_index=True)

    @property
    def normalizer(self) -> Normalizer:
        """Map between pixels in 0..1 and what the network sees."""
        if self.mean is None or self.std is None:
            raise RuntimeError("the normalisation is computed from the data: call setup() first")
        shape = (-1, 1, 1)
        return Normalizer.of(
            torch.tensor(self.mean).reshape(shape), torch.tensor(self.std).reshape(shape)
        )

    def size_of(self, part: str) -> int:
        """Number of samples in "train", "val" or "test"; 0 for a part that there is not."""
        return len(self._parts[part]) if part in self._parts else 0

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of the training part."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> Any:
        """Batches of the validation part; an empty list where there is none."""
        return single(self._loader("val")) if "val" in self._parts else []

    def test_dataloader(self) -> Any:
        """Batches of the test set."""
        return single(self._loader("test"))

    def _loader(self, part: str, shuffle: bool = False) -> DataLoader[Any]:
        if not self._parts:
            raise RuntimeError(f"{type(self).__name__}: call setup() first (a Trainer does)")
        return make_loader(
            self._parts[part],
            self.batch_size,
            shuffle_seed=self.seed if shuffle else None,
            num_workers=self.num_workers,
            world=world_of(self.trainer),
        )

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment (in training only) and normalise on the device; called by Lightning."""
        trainer = self.trainer
        if trainer is None:
            return self.prepare(batch)
        return self.prepare(batch, trainer.training, trainer.current_epoch)

    def prepare(self, batch: Batch, train: bool = False, epoch: int = 0) -> Batch:
        """(images uint8, labels, index) -> (x float32 normalised, y), augmented if `train`."""
        images, labels, index = batch
        if train and self.augment:
            images = crop_flip(images, index, self.seed, epoch, self.pad, self.flip)
        factor, offset = self._affine_on(images.device)
        return images.to(torch.float32).mul_(factor).sub_(offset), labels

    def _affine_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Factor 1 / (scale std) and offset mean / std of the map from bytes, on a device."""
        if device not in self._affine:
            stats = self.normalizer
            factor, offset = 1.0 / (self._scale * stats.std), stats.mean / stats.std
            self._affine[device] = (factor.to(device), offset.to(device))
        return self._affine[device]


def _channel_statistics(
    images: torch.Tensor, rows: torch.Tensor, scale: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over the given rows, exact, in chunks."""
    channels = images.shape[1]
    total, squares = torch.zeros(channels).double(), torch.zeros(channels).double()
    for chunk in rows.split(4096):
        pixels = images[chunk].to(torch.int64)
        total += pixels.sum((0, 2, 3))
        squares += (pixels * pixels).sum((0, 2, 3))
    count = len(rows) * images[0, 0].numel()
    mean = total / count
    std = (squares / count - mean**2).clamp_min(0).sqrt()
    return tuple((mean / scale).tolist()), tuple((std / scale).tolist())
