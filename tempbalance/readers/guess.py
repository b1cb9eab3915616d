"""Guess: what a module without a reader holds, by the names and shapes of its parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from tempbalance.readers.matrix import Matrix, kernel_slices, real_shape, spectral_slices
from tempbalance.readers.names import is_weight, role

_SPECTRAL = re.compile(r"spectral|fourier|harmonic|spherical", re.IGNORECASE)


def guess(module: nn.Module) -> Iterator[Matrix]:
    """A weight of two dimensions is a matrix, one of three a stack, a complex one spectral.

    What is named for a token, a table or a scale is left out here, and listed for what it is; a
    parameter of several dimensions with any other name is refused with the cure.
    """
    for name, parameter in module._parameters.items():
        if parameter is None or len(real_shape(parameter)) < 2 or role(module, name):
            continue
        if parameter.is_complex():
            yield Matrix(name, spectral_slices)
        elif is_weight(name) and (slices := _slices(module, name, parameter)) is not None:
            yield Matrix(name, slices, guessed=True)
        else:
            yield Matrix(
                name,
                reason=f"no reader for {type(module).__name__}.{name}: register one with "
                "tempbalance.readers.register if it is a weight matrix",
            )


def _slices(module: nn.Module, name: str, weight: Tensor) -> Callable[[Tensor], Tensor] | None:
    """How a real weight becomes a stack of matrices; None where its shape does not tell."""
    sizes = real_shape(weight)
    if hasattr(module, "kernel_size") and weight.ndim > 2:  # a convolution: (out, in, positions)
        groups = getattr(module, "groups", 1)
        return partial(kernel_slices, groups=groups if isinstance(groups, int) else 1)
    if weight.ndim > 3 and weight.shape[-1] == 2 and _SPECTRAL.search(type(module).__name__):
        return lambda w: spectral_slices(torch.view_as_complex(w))
    if len(sizes) == 2:
        return lambda w: w.reshape(1, *sizes)
    if len(sizes) == 3 and "kernel" not in name:  # a kernel may have its positions anywhere
        return lambda w: w.reshape(sizes)
    return None
