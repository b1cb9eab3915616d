"""WideResNet: pre-activation residual blocks, few layers and many channels."""

import torch
from torch import nn
from torch.nn import functional as F

from experiments.models.initial import he_normal, torch_defaults


class _Block(nn.Module):
    """bn-relu-conv twice plus a shortcut; the first activation is shared where shapes change."""

    def __init__(self, channels: int, width: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        same = channels == width and stride == 1
        self.shortcut = None if same else nn.Conv2d(channels, width, 1, stride=stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(active)
        out = self.dropout(F.relu(self.bn2(self.conv1(active))))
        return self.conv2(out) + skip


class WideResNet(nn.Module):
    """WRN-depth-widen: (B, 3, H, W) -> (B, num_classes).

    `depth` is 6 n + 4 (16 for WRN-16-8, 28 for WRN-28-10), `widen` multiplies 16, 32 and 64
    channels, `dropout` (default 0) acts inside a block. `stem_stride` (default None) is 1 for
    images of an `image_size` (default 32) under 64 pixels and 2 from 64 on, so that TinyImageNet
    costs no more than CIFAR does; TempBalance trains with 1. The head averages over what is left.
    `torch_init` (default False) leaves the weights at PyTorch's defaults, as its code does;
    otherwise He's.

    Raises: ValueError for a depth of another form or an image under 8 pixels.
    Source: Zagoruyko and Komodakis 2016. WRN-28-10 with 10 classes has 36.5 M parameters.
    """

    def __init__(
        self,
        depth: int,
        widen: int,
        num_classes: int,
        dropout: float = 0.0,
        image_size: int = 32,
        stem_stride: int | None = None,
        torch_init: bool = False,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(
                f"WideResNet: depth must be 6 n + 4 with n >= 1 (10, 16, 22, 28, ...), not {depth}"
            )
        if image_size < 8:
            raise ValueError(f"WideResNet: images must have at least 8 pixels, not {image_size}")
        blocks = (depth - 4) // 6
        stride = stem_stride or (2 if image_size >= 64 else 1)
        self.conv1 = nn.Conv2d(3, 16, 3, stride=stride, padding=1, bias=False)
        channels = 16
        stages: list[nn.Module] = []
        for stage, base in enumerate((16, 32, 64)):
            width = base * widen
            layers: list[nn.Module] = []
            for index in range(blocks):
                stride = 2 if stage and not index else 1
                layers.append(_Block(channels, width, stride, dropout))
                channels = width
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        if torch_init:
            torch_defaults(self)
        else:
            he_normal(self)
            nn.init.zeros_(self.fc.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, num_classes)."""
        out = F.relu(self.bn(self.stages(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))
