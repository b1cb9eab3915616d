"""Matrix: where a weight is in a module, and how it becomes a stack of matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


def _as_matrix(weight: Tensor) -> Tensor:
    """A weight of two dimensions is one matrix; one of three is a stack already."""
    return weight if weight.ndim == 3 else weight.unsqueeze(0)


@dataclass(frozen=True)
class Matrix:
    """One weight of a module, as a stack of matrices, or the reason why it is none.

    Args:
        parameter: path of the weight below the module, such as ``"weight"``.
        slices: turns the weight into (slices, rows, cols), as a view where it can; rows are the
            outputs where there is a choice (a fused projection is cut along them). By default a
            weight of two dimensions is one matrix, one of three a stack.
        part: name of a part of a shared parameter (``"q"``); it is appended to the layer's name.
        weight: computes the weight where it is not the parameter itself (LoRA's W + BA).
        uses: further parameter paths that the weight is made of.
        reason: why the weight is not measured; empty for one that is.
        guessed: whether the weight is taken for a matrix by its name and shape alone.
    """

    parameter: str
    slices: Callable[[Tensor], Tensor] = _as_matrix
    part: str = ""
    weight: Callable[[], Tensor] | None = None
    uses: tuple[str, ...] = ()
    reason: str = ""
    guessed: bool = False


def split(
    matrix: Matrix, parts: int | tuple[int, ...], heads: int | None = None
) -> Iterator[Matrix]:
    """A fused weight as its parts along the outputs: so many equal ones, or of the given sizes.

    Args:
        matrix: the whole weight.
        parts: how many equal ones, or their sizes; 1 leaves the weight whole.
        heads: where every attention head holds its part of each in turn (``(heads, parts, width)``
            outputs, in that order), how many there are; by default each part is one block.
    """
    if parts == 1:
        yield matrix
        return
    count = parts if isinstance(parts, int) else len(parts)
    names = "qkv" if count == 3 else [str(i) for i in range(count)]
    for i, name in enumerate(names):

        def slices(weight: Tensor, i: int = i) -> Tensor:
            whole = matrix.slices(weight)  # (S, rows, cols)
            outputs = whole.shape[1]
            if heads is not None:
                return whole.unflatten(1, (heads, count, -1))[:, :, i].flatten(1, 2)
            sizes = [outputs // parts] * parts if isinstance(parts, int) else list(parts)
            if sum(sizes) != outputs:
                raise ValueError(f"{outputs} outputs cannot be split into {parts} parts")
            return whole.split(sizes, dim=1)[i]

        yield replace(matrix, slices=slices, part=name)


def spectral_slices(weight: Tensor) -> Tensor:
    """A spectral weight (in, out, modes...) as modes x (in, out)."""
    return weight.flatten(2).permute(2, 0, 1) if weight.ndim > 2 else weight.unsqueeze(0)


def kernel_slices(weight: Tensor, groups: int = 1) -> Tensor:
    """A kernel (a, b, positions...) as positions x (a, b), for each channel group."""
    flat = weight.flatten(2)  # (a, b, K)
    if groups == 1:
        return flat.permute(2, 0, 1)
    grouped = flat.unflatten(0, (groups, -1))  # both kinds keep their groups in dimension 0
    return grouped.permute(0, 3, 1, 2).flatten(0, 1)


def transposed_stack(weight: Tensor) -> Tensor:
    """A weight (..., in, out) as a stack of (out, in)."""
    stack = weight.flatten(0, -3) if weight.ndim > 2 else weight.unsqueeze(0)
    return stack.mT


def real_shape(parameter: Tensor) -> tuple[int, ...]:
    """The sizes of a parameter that are not 1; none where it is not initialized yet."""
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        return ()
    return tuple(size for size in parameter.shape if size > 1)


def is_materialized(weight: Tensor) -> str:
    """Why a tensor holds no numbers to measure, or an empty string."""
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "not initialized yet: run a forward pass first"
    if weight.is_meta:
        return "a meta tensor holds no values: load the weights first"
    if weight.is_quantized or not (weight.is_floating_point() or weight.is_complex()):
        return f"quantized ({weight.dtype}): analyze the float model it was made from"
    if weight.layout is not torch.strided:
        return f"stored as {weight.layout}: convert it with to_dense()"
    return ""
