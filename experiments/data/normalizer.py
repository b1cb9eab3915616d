"""Mean and spread of a field, taken off before the network and put back after it."""

from dataclasses import dataclass, field

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Normalizer:
    """Affine map of fields (..., C, *grid): encode(x) = (x - mean) / std, decode its inverse.

    `mean` and `std` have the shape (C, 1, ...) for one number a channel, or (C, *grid) for one a
    point; the latter are interpolated where a field comes on another grid. Follows the device of
    its argument.
    """

    mean: torch.Tensor
    std: torch.Tensor
    _copies: dict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @classmethod
    def fit(cls, fields: torch.Tensor, pixelwise: bool = False) -> "Normalizer":
        """Statistics of samples (N, C, *grid): one a channel, or `pixelwise` one a point.

        A spread of zero (a constant channel) counts as 1, so that nothing is divided by zero.

        Raises: ValueError for no samples, or one sample and pixelwise statistics.
        """
        if len(fields) < (2 if pixelwise else 1):
            raise ValueError(
                f"{len(fields)} samples are too few for the normalisation"
                f"{' of each point' if pixelwise else ''}: use a larger share"
            )
        dims = [0] if pixelwise else [0, *range(2, fields.ndim)]
        wide = fields.double()
        mean, std = wide.mean(dims, keepdim=True)[0], wide.std(dims, keepdim=True)[0]
        return cls.of(mean, std)

    @classmethod
    def of(cls, mean: torch.Tensor, std: torch.Tensor) -> "Normalizer":
        """From given statistics; a spread of zero, or one that is no number, counts as 1."""
        usable = torch.isfinite(std) & (std > 0)
        return cls(mean.float(), torch.where(usable, std, torch.ones_like(std)).float())

    @classmethod
    def identity(cls, channels: int, dim: int) -> "Normalizer":
        """The map that changes nothing, for fields (..., channels, *grid) with dim dimensions."""
        shape = (channels, *([1] * dim))
        return cls(torch.zeros(shape), torch.ones(shape))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Physical units to mean 0 and spread 1."""
        mean, std = self._like(x)
        return (x - mean) / std

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Back to physical units."""
        mean, std = self._like(x)
        return x * std + mean

    def _like(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Statistics on the device, of the type and for the grid of x."""
        dim = self.mean.ndim - 1
        grid = tuple(x.shape[-dim:])
        key = (x.device, x.dtype, grid)
        if key not in self._copies:
            pair = []
            for value in (self.mean, self.std):
                if set(value.shape[1:]) != {1} and tuple(value.shape[1:]) != grid:
                    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[dim]
                    value = F.interpolate(value[None], grid, mode=mode)[0]
                pair.append(value.to(x.device, x.dtype))
            self._copies[key] = (pair[0], pair[1])
        return self._copies[key]
