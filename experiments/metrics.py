"""Errors of predicted fields, one number a sample, those of predicted tokens, and their
TorchMetrics accumulators."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, Metric

_TINY = 1e-12


def relative_l2(prediction: Tensor, target: Tensor) -> Tensor:
    """||prediction - target|| / ||target|| of each sample, (B, ...) -> (B,)."""
    error = (prediction - target).flatten(1).norm(dim=1)
    return error / target.flatten(1).norm(dim=1).clamp_min(_TINY)


def nrmse(prediction: Tensor, target: Tensor, fields: int = 2) -> Tensor:
    """Root mean square over the grid, over that of the target, averaged over the fields.

    The first `fields` dimensions after the batch, (B, C, *grid) with 1 or (B, T, C, *grid) with 2,
    are averaged after the division, so that a small field weighs as much as a large one. (B,).
    """
    error = (prediction - target).flatten(fields + 1).square().mean(-1).sqrt()
    scale = target.flatten(fields + 1).square().mean(-1).sqrt().clamp_min(_TINY)
    return (error / scale).flatten(1).mean(1)


class SampleMean(MeanMetric):
    """Mean over all samples seen, whatever the sizes of the batches and the number of ranks."""

    def update(self, value: Tensor) -> None:  # type: ignore[override]
        """Take the values (B,) of a batch."""
        super().update(value.detach().to(torch.float32))


class MeanRelativeL2:
    """Training loss: the mean of `relative_l2` over the batch."""

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """(B, ...) and (B, ...) -> a scalar."""
        return relative_l2(prediction, target).mean()


class Perplexity(MeanMetric):
    """exp of the mean cross entropy, in nats a token, over all tokens seen."""

    def update(self, nats: Tensor, tokens: int) -> None:  # type: ignore[override]
        """Take the mean of a batch and the number of its tokens."""
        super().update(nats.detach().double(), tokens)

    def compute(self) -> Tensor:
        """A perplexity a token: vocabularies do not compare."""
        return super().compute().exp()


class BitsPerByte(Metric):
    """Cross entropy in bits, over the bytes of text that the tokens stand for.

    Unlike perplexity it compares models of different vocabularies.
    """

    full_state_update = False
    nats: Tensor
    bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("nats", zero.clone(), dist_reduce_fx="sum")
        self.add_state("bytes", zero.clone(), dist_reduce_fx="sum")

    def update(self, nats: Tensor, tokens: int, count: Tensor) -> None:
        """Take the mean cross entropy of a batch in nats, its tokens, and their bytes."""
        self.nats += nats.detach().double() * tokens
        self.bytes += count

    def compute(self) -> Tensor:
        """Bits a byte."""
        return self.nats / (math.log(2) * self.bytes)


class OneHotError:
    """Training loss of a classifier: the mean squared error of its outputs from one-hot targets.

    Source: Liu et al. 2022, Omnigrok (arXiv 2210.01117).
    """

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B, classes) and (B,) -> a scalar."""
        return F.mse_loss(logits, F.one_hot(labels, logits.shape[1]).to(logits.dtype))
