"""Crop and flip of whole batches, decided by a hash of (seed, epoch, image)."""

import torch

_MASK = 0xFFFFFFFF


def _mix(value: torch.Tensor) -> torch.Tensor:
    """Hash of 32-bit integers held in int64: every bit of the input moves half of the output's.

    Two multiply-xorshift rounds with the constants of C. Wellons' `lowbias32` (public domain).
    """
    value = value ^ (value >> 16)
    value = (value * 0x7FEB352D) & _MASK
    value = value ^ (value >> 15)
    value = (value * 0x846CA68B) & _MASK
    return value ^ (value >> 16)


def hashed_integers(index: torch.Tensor, seed: int, epoch: int, stream: int) -> torch.Tensor:
    """Uniform integers in [0, 2**32) as int64 (n,), a function of the four arguments alone.

    No generator state: the same on every device, for every batch size and number of processes,
    and after a resume.
    """
    value = _mix(index & _MASK)
    for part in (seed, epoch, stream):
        # The odd constant (golden ratio) keeps small arguments apart; the offset keeps 0 from 0.
        value = _mix(value ^ ((part * 0x9E3779B9 + 0x7F4A7C15) & _MASK))
    return value


def crop_flip(
    images: torch.Tensor,
    index: torch.Tensor,
    seed: int,
    epoch: int,
    pad: int = 4,
    flip: bool = True,
) -> torch.Tensor:
    """Random crop after zero padding and random horizontal flip of images (B, C, H, W), any type.

    `index` (B,) identifies each image in the data set. One gather for the whole batch.
    """
    size, channels, height, width = images.shape
    span = 2 * pad + 1
    top = hashed_integers(index, seed, epoch, 0) * span >> 32
    left = hashed_integers(index, seed, epoch, 1) * span >> 32
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(size, width)
    if flip:
        mirrored = (hashed_integers(index, seed, epoch, 2) & 1).bool()
        columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
    columns = left[:, None] + columns
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad)) if pad else images
    flat = (rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]).reshape(size, 1, -1)
    taken = padded.flatten(2).gather(2, flat.expand(size, channels, height * width))
    return taken.reshape(images.shape)
