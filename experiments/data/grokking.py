"""Small sets on which grokking is studied: few digits, and sums modulo a prime; made, not loaded.

Both cut an endless shuffled stream into epochs of `steps` batches, since a pass over so little data
is too short to validate and measure after each. Of both every sample that is not trained on is in
the test set.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from experiments.data.digits import Digits
from experiments.data.loaders import TensorRows, make_loader, single, world_of
from experiments.data.splits import train_val_split
from experiments.data.text import StepSampler

_DIGITS = 1797


class FewDigits(Digits):
    """scikit-learn's digits, `count` of them to train on; batches (B, 1, 8, 8) and labels.

    Raises: ValueError for more digits than there are, or `steps` below 1.
    """

    def __init__(self, count: int = 1000, steps: int = 100, **options: Any) -> None:
        if not 0 < count < _DIGITS:
            raise ValueError(f"count must lie between 1 and {_DIGITS - 1}, got {count!r}")
        super().__init__(test_fraction=1 - count / _DIGITS, **options)
        self.steps = _checked(steps)

    def train_dataloader(self) -> DataLoader[Any]:
        """`steps` batches of the stream."""
        world = world_of(self.trainer)
        part, size = self._parts["train"], self.batch_size
        sampler = StepSampler(len(part), size, self.steps, self.seed, world)
        return make_loader(part, size, sampler=sampler, num_workers=self.num_workers)


class ModularAddition(pl.LightningDataModule):
    """All pairs a, b below `modulus`: x = (a, b, =) (B, 3) int64 and y = a + b mod `modulus` (B,).

    `share` (0 to 1) of the pairs, seeded, is trained on; the equals sign is token `modulus`.

    Raises: ValueError for a share that leaves no pair to train on or to test, for `steps` below 1,
    or a `val_fraction`: there is no validation part.
    Source: Power et al. 2022 (arXiv 2201.02177).
    """

    test_names = ("test",)

    def __init__(
        self,
        modulus: int = 59,
        batch_size: int = 512,
        share: float = 0.5,
        steps: int = 50,
        val_fraction: float = 0.0,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if val_fraction:
            raise ValueError("ModularAddition has no validation part: val_fraction must be 0")
        if not 0 < share < 1:
            raise ValueError(f"share must be above 0 and below 1, not {share}")
        self.modulus, self.batch_size, self.share = modulus, batch_size, share
        self.steps, self.seed, self.num_workers = _checked(steps), seed, num_workers
        a, b = torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus)).unbind(1)
        x = torch.stack([a, b, torch.full_like(a, modulus)], dim=1)
        train, test = train_val_split(len(x), 1 - share, seed)
        y = (a + b) % modulus
        self._train = TensorRows(x, y, rows=train)
        self._test = TensorRows(x, y, rows=test)

    def size_of(self, part: str) -> int:
        """Pairs in "train" or "test"; 0 for "val"."""
        return {"train": len(self._train), "test": len(self._test)}.get(part, 0)

    def train_dataloader(self) -> DataLoader[Any]:
        """`steps` batches of the stream."""
        world = world_of(self.trainer)
        sampler = StepSampler(len(self._train), self.batch_size, self.steps, self.seed, world)
        return make_loader(
            self._train, self.batch_size, sampler=sampler, num_workers=self.num_workers
        )

    def test_dataloader(self) -> Any:
        """The pairs that are not trained on."""
        return single(make_loader(self._test, self.batch_size, num_workers=self.num_workers))


def _checked(steps: int) -> int:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps!r}")
    return steps
