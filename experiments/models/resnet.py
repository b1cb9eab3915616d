"""ResNet for small images: torchvision's network with the CIFAR stem."""

from typing import Any

from torch import nn

from experiments.models.initial import he_normal, torch_defaults

_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


def cifar_resnet(
    depth: int,
    num_classes: int,
    in_channels: int = 3,
    width: int = 64,
    torch_init: bool = False,
) -> nn.Module:
    """ResNet with a 3x3 stride-1 stem and no max-pool: (B, in_channels, H, W) -> (B, num_classes).

    `depth` is 18 or 34; `width` (default 64) is the number of channels of the stem, later stages
    have 2, 4 and 8 times as many. At 64 and 100 classes: 11.22 M and 21.33 M parameters.
    `torch_init` (default False) leaves the weights at PyTorch's defaults, as the released codes of
    TempBalance and FARMS do; otherwise He's, of which torchvision's network begins.

    Raises: ValueError for another depth or a width under 1.
    Source: He et al. 2016; the stem that CIFAR trainings use (TempBalance, FARMS).
    """
    if depth not in _BLOCKS:
        raise ValueError(f"cifar_resnet: depth must be one of {sorted(_BLOCKS)}, not {depth}")
    if width < 1 or in_channels < 1:
        raise ValueError(
            f"cifar_resnet: width and in_channels must be at least 1, not {width} and {in_channels}"
        )
    from torchvision.models.resnet import BasicBlock, ResNet

    net = ResNet(BasicBlock, list(_BLOCKS[depth]), num_classes=num_classes)
    if width != 64:
        _rebuild_narrow(net, list(_BLOCKS[depth]), num_classes, width)
    net.conv1 = nn.Conv2d(in_channels, width, 3, stride=1, padding=1, bias=False)
    he_normal(net.conv1)
    net.maxpool = nn.Identity()
    if torch_init:
        torch_defaults(net)
    return net


def _rebuild_narrow(net: Any, blocks: list[int], num_classes: int, width: int) -> None:
    """Replace stem norm, stages and head by those of another width.

    torchvision's `width_per_group` is refused by its BasicBlock, so the stages are built again
    through the same method that its constructor uses.
    """
    from torchvision.models.resnet import BasicBlock

    net.inplanes = width
    net.bn1 = nn.BatchNorm2d(width)
    for stage, count in enumerate(blocks):
        layer = net._make_layer(BasicBlock, width * 2**stage, count, stride=1 if stage == 0 else 2)
        setattr(net, f"layer{stage + 1}", layer)
        he_normal(layer)
    net.fc = nn.Linear(width * 8, num_classes)
