"""The small networks in which grokking is studied: a perceptron, and a transformer for sums."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


def perceptron(
    in_channels: int, image_size: int, num_classes: int, width: int = 200, scale: float = 8.0
) -> nn.Sequential:
    """Three linear layers with ReLU, all initial weights and biases times `scale`.

    From large weights a network fits before it generalizes; weight decay then takes it there.

    Source: Liu et al. 2022, Omnigrok (arXiv 2210.01117).
    """
    sizes = (in_channels * image_size**2, width, width, num_classes)
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    net = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(scale)
    return net


class SumTransformer(nn.Module):
    """Tokens (B, 3) of `a, b, =` to logits (B, num_classes), read off at the equals sign.

    Source: Power et al. 2022 (arXiv 2201.02177), here with attention to all three places.
    """

    def __init__(self, num_classes: int, width: int = 64, heads: int = 4, layers: int = 1) -> None:
        super().__init__()
        self.tokens = nn.Embedding(num_classes + 1, width)
        self.places = nn.Parameter(torch.randn(3, width))
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, layers)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the sum."""
        return self.head(self.blocks(self.tokens(x) + self.places)[:, -1])
