"""VGG with batch norm for 32x32 images: conv-bn-relu blocks and one linear layer."""

import torch
from torch import nn

from experiments.models.initial import he_normal, torch_defaults

# Channels of the 3x3 convolutions by stage; every stage ends with a 2x2 max-pool
# (configurations D and E of Simonyan and Zisserman 2015).
_STAGES = {
    16: ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
}


class CifarVGG(nn.Module):
    """VGG for (B, 3, H, W) with H and W of at least 32, giving (B, num_classes) logits."""

    def __init__(self, depth: int, num_classes: int, torch_init: bool = False) -> None:
        super().__init__()
        if depth not in _STAGES:
            raise ValueError(f"cifar_vgg: depth must be one of {sorted(_STAGES)}, not {depth}")
        layers: list[nn.Module] = []
        channels = 3
        for stage in _STAGES[depth]:
            for width in stage:
                layers += [
                    nn.Conv2d(channels, width, 3, padding=1),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        (torch_defaults if torch_init else he_normal)(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, num_classes)."""
        return self.classifier(self.pool(self.features(x)).flatten(1))


def cifar_vgg(depth: int, num_classes: int, torch_init: bool = False) -> nn.Module:
    """VGG-16 or VGG-19 with batch norm for CIFAR: 14.77 M and 20.09 M parameters at 100 classes.

    `torch_init` (default False) leaves the weights at PyTorch's defaults, as the released codes of
    TempBalance and FARMS do; otherwise He's.

    Raises: ValueError for another depth.
    Source: Simonyan and Zisserman 2015, with batch norm; one linear layer as CIFAR trainings use.
    """
    return CifarVGG(depth, num_classes, torch_init)
