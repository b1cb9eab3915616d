"""U-Net in one, two or three dimensions."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_UP = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


class _Double(nn.Module):
    """Two 3-wide convolutions, each with batch norm and GELU."""

    def __init__(self, dim: int, channels: int, width: int) -> None:
        super().__init__()
        conv: Any = _CONV[dim]
        self.conv1 = conv(channels, width, 3, padding=1, bias=False)
        self.norm1 = _NORM[dim](width)
        self.conv2 = conv(width, width, 3, padding=1, bias=False)
        self.norm2 = _NORM[dim](width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.norm1(self.conv1(x)))
        return F.gelu(self.norm2(self.conv2(x)))


class UNet(nn.Module):
    """U-Net: (B, in_channels, *grid) -> (B, out_channels, *grid), grid of `dim` dimensions.

    `depth` (default 4) halvings of the grid, `width` (default 32) channels at the top, doubled at
    each level. A grid that is not a multiple of 2**depth is padded with its edge values at the
    far end of each dimension and cut back at the end. 7.76 M parameters in two dimensions.

    Raises: ValueError for another `dim`, a depth under 1, an input of other dimensions or
    channels, or a grid too small to halve `depth` times.
    Source: the layout of Ronneberger et al. 2015.
    """

    def __init__(
        self, dim: int, in_channels: int, out_channels: int, width: int = 32, depth: int = 4
    ) -> None:
        super().__init__()
        if dim not in _CONV:
            raise ValueError(f"UNet: dim must be 1, 2 or 3, not {dim}")
        if depth < 1 or width < 1:
            raise ValueError(f"UNet: depth and width must be at least 1, not {depth} and {width}")
        self.dim, self.depth, self.in_channels = dim, depth, in_channels
        widths = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(
            _Double(dim, channels, out)
            for channels, out in zip([in_channels, *widths[:-2]], widths[:-1], strict=True)
        )
        self.pool = _POOL[dim](2)
        self.bottom = _Double(dim, widths[-2], widths[-1])
        up: Any = _UP[dim]
        self.up = nn.ModuleList(up(2 * out, out, 2, stride=2) for out in reversed(widths[:-1]))
        self.merge = nn.ModuleList(_Double(dim, 2 * out, out) for out in reversed(widths[:-1]))
        last: Any = _CONV[dim]
        self.head = last(width, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Field of the size that came in, with out_channels channels."""
        if x.ndim != self.dim + 2 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"UNet in {self.dim} dimensions needs (batch, {self.in_channels}, "
                f"{'x'.join(['size'] * self.dim)}), not {tuple(x.shape)}"
            )
        grid, unit = x.shape[2:], 2**self.depth
        if min(grid) <= unit // 2:
            raise ValueError(
                f"UNet of depth {self.depth} needs more than {unit // 2} points a dimension, "
                f"not {tuple(grid)}: choose a smaller depth"
            )
        pad = [(-size) % unit for size in grid]
        if any(pad):
            # F.pad lists the last dimension first, (before, after) each.
            x = F.pad(x, [p for size in reversed(pad) for p in (0, size)], mode="replicate")
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = self.pool(x)
        x = self.bottom(x)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skips.pop(), up(x)], dim=1))
        return self.head(x)[(..., *(slice(0, size) for size in grid))]
