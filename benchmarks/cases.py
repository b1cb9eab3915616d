"""Trainings to set a measurement against: a ResNet, a stack of transformer blocks, an FNO.

All need torch alone, but for the ResNet, which is torchvision's. Batches are random and lie on
the device, so that no data loading hides what a measurement costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """One training: network, batch, loss, optimizer, and the steps that make an epoch."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[nn.Module], Optimizer]
    samples: int  # a step
    epoch: int  # steps
    note: str
    bf16: bool = False  # autocast, and channels_last for images


class _SpectralConv(nn.Module):
    """The two corners of low frequencies of a real 2-D field, each with a matrix a mode."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        for name in ("low", "high"):
            weight = torch.randn(width, width, modes, modes, dtype=torch.complex64) / width
            setattr(self, name, nn.Parameter(weight))

    def forward(self, x: Tensor) -> Tensor:
        m = self.modes
        spectrum = torch.fft.rfft2(x)
        out = torch.zeros_like(spectrum)
        out[..., :m, :m] = torch.einsum("bixy,ioxy->boxy", spectrum[..., :m, :m], self.low)
        out[..., -m:, :m] = torch.einsum("bixy,ioxy->boxy", spectrum[..., -m:, :m], self.high)
        return torch.fft.irfft2(out, s=x.shape[-2:])


class Fno(nn.Module):
    """A 2-D Fourier neural operator of plain complex weights: (B, 3, H, W) -> (B, 1, H, W).

    Source: Li et al. 2021 (arXiv 2010.08895): four layers, a spectral and a pointwise part each.
    """

    def __init__(self, width: int, modes: int = 12) -> None:
        super().__init__()
        self.lift = nn.Conv2d(3, width, 1)
        self.spectral = nn.ModuleList(_SpectralConv(width, modes) for _ in range(4))
        self.pointwise = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(4))
        self.project = nn.Sequential(nn.Conv2d(width, 128, 1), nn.GELU(), nn.Conv2d(128, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        for spectral, pointwise in zip(self.spectral, self.pointwise, strict=True):
            x = F.gelu(spectral(x) + pointwise(x))
        return self.project(x)


def _blocks(blocks: int, width: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        width, width // 64, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False)


def _resnet18() -> nn.Module:
    """Raises ImportError without torchvision."""
    from experiments.models.resnet import cifar_resnet

    return cifar_resnet(18, 100)


def _sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def _adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=1e-4)


def _adam(model: nn.Module) -> Optimizer:
    return Adam(model.parameters(), lr=1e-3)


def _images(count: int) -> Callable[[], Batch]:
    return lambda: (torch.randn(count, 3, 32, 32), torch.randint(100, (count,)))


def _tokens(count: int, length: int, width: int) -> Callable[[], Batch]:
    return lambda: (torch.randn(count, length, width), torch.randn(count, length, width))


def _fields(count: int, side: int) -> Callable[[], Batch]:
    return lambda: (torch.randn(count, 3, side, side), torch.randn(count, 1, side, side))


def _fno(width: int, side: int) -> Case:
    return Case("fno", lambda: Fno(width), _fields(20, side), F.mse_loss, _adam, 20, 50,
                f"2-D FNO, 12 x 12 modes, width {width}, batch 20 of {side} x {side} in float32; "
                "1,000 samples an epoch")  # fmt: skip


# On a CPU the published batches would take minutes: smaller ones, as the notes say.
CPU = (
    Case("resnet18", _resnet18, _images(16), F.cross_entropy, _sgd, 16, 3125,
         "CIFAR ResNet-18, batch 16 in float32 (on GPUs 128 in bf16)"),
    Case("gpt2_like", lambda: _blocks(4, 256), _tokens(4, 128, 256), F.mse_loss, _adamw, 4, 1000,
         "4 transformer blocks of width 256, 4 x 128 tokens in float32, no head; "
         "an epoch is taken as 1,000 steps"),
    _fno(20, 32),
)  # fmt: skip
CUDA = (
    Case("resnet18", _resnet18, _images(128), F.cross_entropy, _sgd, 128, 391,
         "CIFAR ResNet-18, batch 128, bf16 autocast, channels_last", True),
    Case("gpt2_like", lambda: _blocks(12, 768), _tokens(8, 1024, 768), F.mse_loss, _adamw, 8, 1000,
         "12 transformer blocks of width 768 (GPT-2 small), 8 x 1,024 tokens, bf16 autocast, no "
         "head; an epoch is taken as 1,000 steps", True),
    _fno(64, 64),
)  # fmt: skip
# For tests: seconds on one core.
TINY = (
    Case("tiny", lambda: nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16)),
         lambda: (torch.randn(8, 32), torch.randn(8, 16)), F.mse_loss, _sgd, 8, 20, "two layers"),
)  # fmt: skip
