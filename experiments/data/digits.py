"""scikit-learn's handwritten digits: real data that needs no download."""

import torch

from experiments.data.image_module import ImageDataModule, LabelledImages
from experiments.data.splits import train_val_split


class Digits(ImageDataModule):
    """1,797 digits of 8x8 pixels and one channel, 10 classes: stratified train, val and test.

    `test_fraction` (default 0.25) is held back by a split that does not depend on `seed`, so
    that runs of all seeds are measured on the same images; `val_fraction` (default 0.1) of the
    rest by one that does. `augment` (default off) shifts by up to one pixel; no flip.
    `root` is not used: the data comes with scikit-learn.

    Raises: ImportError without scikit-learn.
    Source: Alpaydin and Kaynak 1998, UCI, as `sklearn.datasets.load_digits` brings it.
    """

    num_classes = 10
    in_channels = 1
    image_size = 8

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 64,
        share: float = 1.0,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        augment: bool = False,
        test_fraction: float = 0.25,
    ) -> None:
        # Pixels count 0..16.
        super().__init__(
            batch_size=batch_size, share=share, val_fraction=val_fraction, seed=seed,
            num_workers=num_workers, augment=augment, pad=1, flip=False, scale=16.0,
        )  # fmt: skip
        self.mean = self.std = None
        self.test_fraction = test_fraction

    def load(self) -> tuple[LabelledImages, LabelledImages]:
        """Training and test digits."""
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError(
                "Digits needs scikit-learn: pip install scikit-learn "
                "(or pip install 'tempbalance[experiments]')"
            ) from error
        data = load_digits()
        images = torch.from_numpy(data.images).to(torch.uint8).unsqueeze(1)
        labels = torch.from_numpy(data.target).long()
        train, test = train_val_split(len(labels), self.test_fraction, seed=0, labels=labels)
        return (
            LabelledImages(images[train], labels[train]),
            LabelledImages(images[test], labels[test]),
        )
