"""Readers of torch's own modules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

from torch import Tensor, nn

from tempbalance.readers.matrix import Matrix, kernel_slices, split
from tempbalance.readers.registry import register

_RECURRENT = re.compile(r"weight_(ih|hh|hr)(_l\d+(_reverse)?)?")


@register(nn.Linear)
def _linear(module: nn.Module) -> Iterator[Matrix]:
    yield Matrix("weight")


@register(nn.Bilinear)
def _bilinear(module: nn.Module) -> Iterator[Matrix]:
    """Outputs x (in1, in2): a form of two vectors for each output."""
    yield Matrix("weight")


@register(
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
)
def _conv(module: nn.Module) -> Iterator[Matrix]:
    """Kernel positions x (out, in) for each channel group; the two swapped when transposed."""
    groups = int(module.groups)  # type: ignore[arg-type]
    narrow = min(int(module.in_channels), int(module.out_channels)) // groups == 1  # type: ignore
    depthwise = groups > 1 and narrow
    reason = "depthwise convolution: each channel group is a vector, which has no spectrum"
    yield Matrix("weight", partial(kernel_slices, groups=groups), reason=reason * depthwise)


@register(nn.RNNBase, nn.RNNCellBase)
def _recurrent(module: nn.Module) -> Iterator[Matrix]:
    """Gates x (hidden, in), one stack a weight: 4 gates of an LSTM, 3 of a GRU, 1 of an RNN.

    The projection of an LSTM (``weight_hr_l0``) is one matrix.
    """
    hidden = int(module.hidden_size)  # type: ignore[arg-type]

    def gates(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (-1, hidden))

    computed = getattr(module, "parametrizations", {})
    for name in [*module._parameters, *computed]:
        if (match := _RECURRENT.fullmatch(name)) is not None:
            yield Matrix(name, gates) if match[1] != "hr" else Matrix(name)


@register(nn.MultiheadAttention)
def _attention(module: nn.Module) -> Iterator[Matrix]:
    """Query, key and value apart; ``out_proj`` is a Linear of its own."""
    if module.in_proj_weight is not None:
        yield from split(Matrix("in_proj_weight"), 3)
        return
    for part in "qkv":
        yield Matrix(f"{part}_proj_weight", part=part)


@register(nn.Embedding, nn.EmbeddingBag)
def _embedding(module: nn.Module) -> Iterator[Matrix]:
    yield Matrix("weight", reason="an embedding is a table of vectors, not a matrix")
