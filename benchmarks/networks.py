"""Networks of the benchmarks, in the shapes of the published experiments, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from tempbalance import Farms
from tempbalance.farms import Windows


@dataclass(frozen=True)
class Network:
    """How to build a network, its windows as published, and the ratio to reach."""

    name: str
    build: Callable[[], nn.Module]
    windows: Windows
    target: float | None  # least ratio to a plain loop of svdvals, two CPU cores
    note: str = ""


class _Shapes(nn.ModuleList):
    """Layers alone: the measurement never runs a network forward."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__(layers)


def _conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, bias=False)


def resnet(depth: int) -> nn.Module:
    """A CIFAR ResNet (3x3 stem) of basic blocks: 18 or 34."""
    blocks = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}[depth]
    layers: list[nn.Module] = [_conv(3, 64)]
    width = 64
    for stage, count in enumerate(blocks):
        wide = 64 * 2**stage
        for _ in range(count):
            layers += [_conv(width, wide), _conv(wide, wide)]
            if width != wide:
                layers.append(_conv(width, wide, 1))
            width = wide
    return _Shapes([*layers, nn.Linear(512, 100)])


def vgg16() -> nn.Module:
    """The CIFAR VGG-16: thirteen convolutions and one linear layer."""
    widths = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    inputs = (3, *widths[:-1])
    layers = [_conv(i, o) for i, o in zip(inputs, widths, strict=True)]
    return _Shapes([*layers, nn.Linear(512, 100)])


def wide_resnet_28_10() -> nn.Module:
    """The convolutions of WRN-28-10."""
    layers: list[nn.Module] = [_conv(3, 16)]
    width = 16
    for wide in (160, 320, 640):
        for _ in range(4):
            layers += [_conv(width, wide), _conv(wide, wide)]
            if width != wide:
                layers.append(_conv(width, wide, 1))
            width = wide
    return _Shapes(layers)


def gpt2_blocks(blocks: int) -> nn.Module:
    """The linear layers of GPT-2 small's blocks: 12 windows of 768 x 768 in each."""
    shapes = ((2304, 768), (768, 768), (3072, 768), (768, 3072))
    return _Shapes(nn.Linear(i, o) for _ in range(blocks) for o, i in shapes)


class _Spectral(nn.Module):
    """A spectral weight (in, out, modes, modes), complex."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        weight = torch.randn(width, width, modes, modes, dtype=torch.complex64) / width
        self.weight = nn.Parameter(weight)


def fno_weights() -> nn.Module:
    """The eight spectral weights of the published 2-D FNO: width 20, 12 x 12 modes."""
    return _Shapes(_Spectral(20, 12) for _ in range(8))


def neuraloperator_fno() -> nn.Module:
    """neuraloperator's 2-D FNO: width 64, 16 x 16 modes, four layers.

    Raises:
        ImportError: without neuraloperator.
    """
    from neuralop.models import FNO

    return FNO(n_modes=(16, 16), in_channels=1, out_channels=1, hidden_channels=64, n_layers=4)


# Square row blocks down every slice with a fit each; squares side by side in one fit.
_BLOCKS = Farms.released_conv(1.0)
_SQUARES = Farms.released_linear(768, 1.0, stride=768)

NETWORKS: dict[str, Network] = {
    n.name: n
    for n in (
        Network("resnet18", lambda: resnet(18), _BLOCKS, 3.0),
        Network("resnet34", lambda: resnet(34), _BLOCKS, 3.0),
        Network("vgg16", vgg16, _BLOCKS, 3.0),
        Network("wrn28_10", wide_resnet_28_10, _BLOCKS, 3.2, "convolutions"),
        Network("gpt2", lambda: gpt2_blocks(2), _SQUARES, 2.3, "two of GPT-2 small's 12 blocks"),
        Network("gpt2_full", lambda: gpt2_blocks(12), _SQUARES, 2.3, "all 12 blocks"),
        Network("fno", fno_weights, _BLOCKS, 2.5, "8 weights 20x20x12x12"),
        Network("neuralop_fno", neuraloperator_fno, _BLOCKS, None, "width 64, 16x16 modes"),
    )
}


def trained_like(model: nn.Module, seed: int = 0) -> nn.Module:
    """Scale the rows of every weight by log-normal factors, for spectra with heavy tails."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2:
                shape = (p.shape[0], *[1] * (p.ndim - 1))
                p.mul_(torch.exp(0.7 * torch.randn(shape, generator=generator)))
    return model
