"""CIFAR-10 and CIFAR-100 through torchvision, and any image-folder tree."""

from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.data.image_module import ImageDataModule, LabelledImages
from experiments.data.image_tree import class_names, list_images, load_images

# Mean and standard deviation of each channel over the training set, pixels in 0..1.
STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_ARCHIVES = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}
_CLASSES = {"cifar10": 10, "cifar100": 100}


class CIFAR(ImageDataModule):
    """CIFAR-10 or CIFAR-100 in torchvision's files under `root`, fetched where they are missing.

    Defaults: batch 128, crop with padding 4 and flip, a tenth of the training set held back for
    validation (0 for the published settings, which train on all 50,000).

    Raises: ValueError for another name; at `prepare_data`, RuntimeError saying what to fetch and
    where to put it where there is no network.
    Source: Krizhevsky 2009.
    """

    def __init__(
        self,
        name: str,
        root: str,
        batch_size: int = 128,
        share: float = 1.0,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        augment: bool = True,
        download: bool = True,
    ) -> None:
        if name not in _CLASSES:
            raise ValueError(f"CIFAR: name must be one of {sorted(_CLASSES)}, not {name!r}")
        super().__init__(
            batch_size=batch_size, share=share, val_fraction=val_fraction, seed=seed,
            num_workers=num_workers, augment=augment,
        )  # fmt: skip
        self.dataset, self.root, self.download = name, Path(root), download
        self.num_classes, self.in_channels, self.image_size = _CLASSES[name], 3, 32
        self.mean, self.std = STATISTICS[name]

    def prepare_data(self) -> None:
        """Fetch the archive if it is not there; Lightning calls this in one process of a node."""
        self._read(train=True, download=self.download)

    def load(self) -> tuple[LabelledImages, LabelledImages]:
        """50,000 training and 10,000 test images, 32x32."""
        return self._read(train=True), self._read(train=False)

    def _read(self, train: bool, download: bool = False) -> LabelledImages:
        from torchvision import datasets

        kind = datasets.CIFAR10 if self.dataset == "cifar10" else datasets.CIFAR100
        archive = _ARCHIVES[self.dataset]
        try:
            data = kind(str(self.root), train=train, download=download)
        except (OSError, RuntimeError, EOFError) as error:
            raise RuntimeError(
                f"{self.dataset} is not in {self.root} or damaged, and could not be fetched "
                f"({error}). Fetch https://www.cs.toronto.edu/~kriz/{archive} (md5 {kind.tgz_md5})"
                f" and unpack it there, so that {self.root / kind.base_folder} exists; "
                "or point data=image_folder at a tree of images"
            ) from error
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        return LabelledImages(images, torch.tensor(data.targets))


class ImageFolderData(ImageDataModule):
    """Any tree root/{train,test or val}/CLASS/*.png; TinyImageNet as it is unpacked, too.

    Decoded once into one uint8 tensor, kept in `cache_dir` (default: `root`, or the user's cache
    where that cannot be written) and decoded again when the tree changes. The test part is
    root/test where that has classes, else root/val (TinyImageNet's has labels in
    val_annotations.txt; its test folder has none). `image_size` (default: as the files are)
    resizes; `mean` and `std` (default: computed on the training part) normalise.
    `augment` (default) crops with padding `pad` and flips. `classes` keeps the first so many
    in the order of their names.

    Raises: FileNotFoundError for a missing tree, ValueError for a truncated file, images of
    several sizes, or classes that differ between the parts.
    """

    def __init__(
        self,
        root: str,
        batch_size: int = 128,
        share: float = 1.0,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        augment: bool = True,
        pad: int = 4,
        flip: bool = True,
        image_size: int | None = None,
        classes: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size, share=share, val_fraction=val_fraction, seed=seed,
            num_workers=num_workers, augment=augment, pad=pad, flip=flip,
        )  # fmt: skip
        if (mean is None) != (std is None):
            raise ValueError("ImageFolderData: give both mean and std, or neither")
        self.root = Path(root)
        self.cache_dir = Path(cache_dir) if cache_dir is not None else self.root
        self.in_channels, self._resize, self._classes = 3, image_size, classes
        self.mean = None if mean is None else tuple(mean)
        self.std = None if std is None else tuple(std)
        self._loaded: tuple[LabelledImages, LabelledImages] | None = None

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """Number of class folders of the training part, or of those that are kept."""
        found = len(class_names(self.root / "train"))
        return found if self._classes is None else min(found, self._classes)

    @property
    def image_size(self) -> int:  # type: ignore[override]
        """Pixels a side, after resizing."""
        if self._resize is not None:
            return self._resize
        return int(self.load()[0].images.shape[-1])

    def prepare_data(self) -> None:
        """Decode and cache; Lightning calls this in one process of a node."""
        self.load()

    def load(self) -> tuple[LabelledImages, LabelledImages]:
        """Training and test images, decoded at the first call."""
        if self._loaded is None:
            classes = class_names(self.root / "train")
            parts = [
                load_images(list_images(folder, classes), self._resize, self.cache_dir)
                for folder in (self.root / "train", self._test_folder())
            ]
            self._loaded = (self._kept(parts[0]), self._kept(parts[1]))
        return self._loaded

    def _kept(self, part: LabelledImages) -> LabelledImages:
        rows = part.labels < self.num_classes
        return part if rows.all() else LabelledImages(part.images[rows], part.labels[rows])

    def _test_folder(self) -> Path:
        """root/test, unless it is missing or unlabelled (TinyImageNet) and root/val is there."""
        test, val = self.root / "test", self.root / "val"
        if (val / "val_annotations.txt").exists():
            return val
        if not test.is_dir() and not val.is_dir():
            raise FileNotFoundError(f"{self.root} has neither a folder test nor a folder val")
        return test if test.is_dir() else val
