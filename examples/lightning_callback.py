"""PyTorch Lightning: one callback, and the pictures of a run.

    python examples/lightning_callback.py --out outputs/lightning

What to see: the module, its optimizer and its schedule are as Lightning wants them. The run's
folder has tempbalance.csv, and plots/ shows alpha and rates of every layer over the epochs.
"""

import argparse

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tempbalance.integrations.lightning import TempBalanceCallback
from tempbalance.runs.plot import plot_run


class Classifier(pl.LightningModule):
    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.epochs = epochs
        self.net = nn.Sequential(
            nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)
        )

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)]


def main(epochs: int, out: str) -> None:
    pl.seed_everything(0)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=CSVLogger(out), log_every_n_steps=10,
        enable_progress_bar=False, callbacks=[TempBalanceCallback()],
    )  # fmt: skip
    trainer.fit(Classifier(epochs), DataLoader(data, batch_size=64, shuffle=True))
    for path in plot_run(trainer.log_dir or out):
        print("drawn:", path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", default="outputs/lightning")
    chosen = parser.parse_args()
    main(chosen.epochs, chosen.out)
