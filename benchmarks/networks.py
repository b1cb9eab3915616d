"""Networks of the benchmarks, in the shapes of the published experiments, with random weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from tempbalance import Farms
from tempbalance.layers.find import find_layers
from tempbalance.spectra.windows import Windows


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


def vgg(depth: int) -> nn.Module:
    """The CIFAR VGG-16 or VGG-19: convolutions and one linear layer."""
    deep = {16: 3, 19: 4}[depth]
    widths = (64, 64, 128, 128, *[256] * deep, *[512] * (2 * deep))
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


def fno_weights(width: int) -> nn.Module:
    """The eight spectral weights of a 2-D FNO, 12 x 12 modes; published with width 20."""
    return _Shapes(_Spectral(width, 12) for _ in range(8))


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
        Network("resnet18", lambda: resnet(18), _BLOCKS, 3.3),
        Network("resnet34", lambda: resnet(34), _BLOCKS, 3.3),
        Network("vgg16", lambda: vgg(16), _BLOCKS, 3.3),
        Network("vgg19", lambda: vgg(19), _BLOCKS, 3.3),
        Network("wrn28_10", wide_resnet_28_10, _BLOCKS, 3.6, "convolutions"),
        Network("gpt2", lambda: gpt2_blocks(2), _SQUARES, 2.5, "two of GPT-2 small's 12 blocks"),
        Network("gpt2_full", lambda: gpt2_blocks(12), _SQUARES, 2.5, "all 12 blocks"),
        Network("fno", lambda: fno_weights(20), _BLOCKS, 2.5, "8 weights 20x20x12x12"),
        Network("fno64", lambda: fno_weights(64), _BLOCKS, None, "8 weights 64x64x12x12"),
        Network("neuralop_fno", neuraloperator_fno, _BLOCKS, None, "width 64, 16x16 modes"),
    )
}


@torch.no_grad()
def trained_like(model: nn.Module, seed: int = 0) -> nn.Module:
    """Add to every matrix a low-rank part whose singular values fall by a power law.

    An eighth of the rank; the largest spike is 1 to 5 times the edge of the random part, another
    factor for each layer, so that some spectra reach far enough to need a second look in float64.
    """
    random = torch.Generator().manual_seed(seed)
    for layer in find_layers(model).layers:
        weight = layer.read()  # (S, rows, cols), a view of the parameter
        slices, rows, cols = weight.shape
        rank = max(1, min(rows, cols) // 8)
        edge = float(weight.abs().square().mean().sqrt()) * (math.sqrt(rows) + math.sqrt(cols))
        factor = 5 ** float(torch.rand((), generator=random))
        spikes = factor * edge / torch.arange(1, rank + 1).sqrt()
        left = torch.randn(slices, rows, rank, generator=random) / math.sqrt(rows)
        right = torch.randn(slices, rank, cols, generator=random) / math.sqrt(cols)
        weight += ((left * spikes) @ right).to(weight.dtype)
    return model
