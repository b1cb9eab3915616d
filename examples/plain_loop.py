"""A plain PyTorch loop: one line more, and every layer has its own learning rate.

    python examples/plain_loop.py

What to see: the loop is the one you know. The table at the end has alpha, multiplier and rate of
each layer: the larger its alpha, the faster it learns.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tempbalance as tb


def main(epochs: int) -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    train = TensorDataset(images[:1400], labels[:1400])

    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    scheduler = tb.TempBalanceLR(optimizer, model, cosine)  # the one line

    for epoch in range(epochs):
        for x, y in DataLoader(train, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        if epoch == epochs // 2:
            halfway = scheduler.summary()
        scheduler.step()  # in the cosine's place: it steps that too

    with torch.no_grad():
        right = (model(images[1400:]).argmax(1) == labels[1400:]).float().mean()
    print(f"The rates after {epochs // 2} of {epochs} epochs:\n{halfway}")
    print(f"\ntest accuracy after the last: {right:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    main(parser.parse_args().epochs)
