"""Small LightningModules for the tests, importable by the processes that they start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from schedules import net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

try:
    import lightning.pytorch as pl
except ImportError:  # the other package holds the same, under its own name
    pl = pytest.importorskip("pytorch_lightning")


def loader(batches: int = 4) -> DataLoader:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(8 * batches, 3, 8, 8, generator=generator)
    y = torch.randint(0, 10, (8 * batches,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)


class Plain(pl.LightningModule):
    """A small convolutional classifier with whatever optimizer and schedule it is given."""

    def __init__(self, make_schedule: Any = None, interval: str = "epoch", adam: bool = False):
        super().__init__()
        self.net = net()
        self.make_schedule, self.interval, self.adam = make_schedule, interval, adam

    def configure_optimizers(self) -> Any:
        if self.adam:
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        else:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = self.make_schedule(optimizer) if self.make_schedule else None
        if schedule is None:
            return optimizer
        config = {"scheduler": schedule, "interval": self.interval, "monitor": "loss"}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self.net(x), y))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)


class Manual(pl.LightningModule):
    """Two optimizers, stepped by hand, as a GAN does; the first ones have schedules."""

    def __init__(self, schedules: int = 1) -> None:
        super().__init__()
        self.schedules = schedules
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24))
        self.critic = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 12))

    def configure_optimizers(self) -> Any:
        a = torch.optim.Adam(self.generator.parameters(), lr=1e-3)
        b = torch.optim.Adam(self.critic.parameters(), lr=1e-3)
        make = torch.optim.lr_scheduler.ExponentialLR
        return [a, b], [make(optimizer, 0.5) for optimizer in (a, b)[: self.schedules]]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            z = torch.ones(4, 16) * (batch_idx + 1)
            loss = self.critic(self.generator(z)).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        if self.trainer.is_last_batch and self.schedules:
            schedules = self.lr_schedulers()
            for schedule in schedules if isinstance(schedules, list) else [schedules]:
                schedule.step()
