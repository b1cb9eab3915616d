"""Scale: the power of two that brings a weight near 1, so that its squares neither under- nor
overflow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tempbalance.spectra import cpu
from tempbalance.spectra.batches import is_double


def on_pool(device: torch.device) -> bool:
    """Whether windows there are measured one by one in threads, rather than in batches."""
    return device.type == "cpu"


def unit_scale(tensor: Tensor) -> Tensor:
    """The power of two near 1 / max|entry|: float64, shape (), on the tensor's device, no sync.

    1 for an all-zero tensor and 0 for one with a NaN or an infinity.
    """
    return unit_scales([tensor])[0]


def unit_scales(tensors: Sequence[Tensor], workers: int = 1) -> list[Tensor]:
    """:func:`unit_scale` of tensors on one device: one kernel each, and a few for all of them.

    ``workers`` is the number of threads on a CPU.
    """
    extremes = _all_extremes(tensors, workers)
    found: list[Tensor | None] = [None] * len(tensors)
    # The scale must itself be a number in the precision that multiplies by it.
    for double, limit in ((False, 126), (True, 1000)):
        places = [i for i, tensor in enumerate(tensors) if is_double(tensor) == double]
        if not places:
            continue
        ends = [extremes[i] for i in places]
        # Stacking promotes: bf16 beside float32 becomes float32, and each keeps its value.
        low, high = (torch.stack(some).double() for some in zip(*ends, strict=True))
        largest = torch.maximum(-low, high)  # a NaN stays one
        scale = torch.exp2(-torch.floor(torch.log2(largest)).clamp(-limit, limit))
        scale = torch.where(largest == 0, torch.ones_like(scale), scale)
        scale = torch.where(torch.isfinite(largest), scale, torch.zeros_like(scale))
        for i, value in zip(places, scale.unbind(), strict=True):
            found[i] = value
    return [scale for scale in found if scale is not None]


def _all_extremes(tensors: Sequence[Tensor], workers: int) -> dict[int, tuple[Tensor, Tensor]]:
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def find(i: int) -> None:
        found[i] = _extremes(tensors[i])

    places = sorted(range(len(tensors)), key=lambda i: tensors[i].numel(), reverse=True)
    in_pool = bool(tensors) and on_pool(tensors[0].device)
    cpu.in_threads(find, places, workers if in_pool else 1)
    return found


def _extremes(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest entry, a NaN where there is one.

    In memory order, and both at once: several times faster than a norm.
    """
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    dense = tensor.permute(order)
    low, high = torch.aminmax(torch.view_as_real(dense) if tensor.is_complex() else dense)
    return low, high
