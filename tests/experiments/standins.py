"""Small random data in the place of real sets, and helpers that several test files share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from experiments import sweep


class Identity:
    """A normalizer that changes nothing."""

    def decode(self, y: Tensor) -> Tensor:
        return y


class Doubled:
    """A normalizer of which the decoded field is 2 y + 1."""

    def decode(self, y: Tensor) -> Tensor:
        return 2 * y + 1


class RandomData(pl.LightningDataModule):
    """`n` seeded samples of the given shapes; labels of `classes` where there are any."""

    def __init__(
        self,
        x: Sequence[int],
        y: Sequence[int] = (),
        classes: int = 0,
        n: int = 8,
        batch_size: int = 4,
        tests: int = 1,
        normalizer: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        images = torch.randn(n, *x, generator=draw)
        if classes:
            target = torch.randint(classes, (n,), generator=draw)
        else:
            target = torch.randn(n, *y, generator=draw)
        self.data = TensorDataset(images, target)
        self.batch_size = batch_size
        self.normalizer = normalizer
        self.test_names = tuple(f"test_{16 * 2**i}" for i in range(tests))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, self.batch_size)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return [DataLoader(self.data, self.batch_size) for _ in self.test_names]


def substitute(cfg: DictConfig) -> DictConfig:
    """Put random data of the right shapes in the place of the data module of a configuration."""
    problem = cfg.problem
    share = {"share": cfg.data.share, "val_fraction": cfg.data.val_fraction}
    if "num_classes" in problem:
        x = [problem.in_channels, problem.image_size, problem.image_size]
        shapes: dict[str, Any] = {"x": x, "classes": problem.num_classes}
    else:
        grid = [32] * problem.dim
        y = [problem.out_channels, *grid]
        if cfg.task.rollout:
            y = [2, *y]
        shapes = {"x": [problem.in_channels, *grid], "y": y}
    cfg.data = {"_target_": "standins.RandomData", "n": 2, "batch_size": 2, **shapes, **share}
    return cfg


def composed(tmp_path: Path, *overrides: str) -> DictConfig:
    """A configuration that writes under `tmp_path`, quietly, on the CPU."""
    quiet = ("trainer.enable_progress_bar=false", "trainer.accelerator=cpu")
    return sweep.compose([f"outputs={tmp_path}", *quiet, *overrides])


def close(a: float, b: float, tolerance: float = 1e-6) -> bool:
    """Equal to a relative tolerance."""
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
