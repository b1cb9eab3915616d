"""Readers: which matrices a module holds, chosen by module type and open to registration.

To measure a layer type that is not known here, register a reader for it, anywhere:

    from tempbalance.readers import Matrix, register

    @register(MyBilinear)
    def read(module):
        yield Matrix("kernel", slices=lambda w: w.permute(2, 0, 1))  # -> (slices, rows, cols)

A reader says where a weight is and how it becomes a stack of matrices, without touching its values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_RESULT = "the base learning rate"


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
    """

    parameter: str
    slices: Callable[[Tensor], Tensor] = _as_matrix
    part: str = ""
    weight: Callable[[], Tensor] | None = None
    uses: tuple[str, ...] = ()
    reason: str = ""


Reader = Callable[[nn.Module], Iterable[Matrix]]
_READERS: dict[type | str, Reader] = {}


def register(*module_types: type | str) -> Callable[[Reader], Reader]:
    """Register a reader for module types, and for their subclasses without one of their own.

    A type that should not be imported is named: ``"package.module.Class"``. A later registration
    replaces an earlier one.
    """

    def add(reader: Reader) -> Reader:
        for module_type in module_types:
            _READERS[module_type] = reader
        return reader

    return add


def matrices(module: nn.Module) -> list[Matrix]:
    """The weights of a module itself (not of its children), by the reader of its type."""
    for cls in type(module).__mro__:
        reader = _READERS.get(cls) or _READERS.get(f"{cls.__module__}.{cls.__qualname__}")
        if reader is not None:
            return list(reader(module))
    return list(_unknown(module))


# --- torch ---------------------------------------------------------------------------------------


@register(nn.Linear)
def _linear(module: nn.Module) -> Iterator[Matrix]:
    yield Matrix("weight")


@register(
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
)
def _conv(module: nn.Module) -> Iterator[Matrix]:
    """Kernel positions x (out, in) for each channel group; the two swapped when transposed."""
    groups = int(module.groups)  # type: ignore[arg-type]

    def slices(weight: Tensor) -> Tensor:
        flat = weight.flatten(2)  # (a, b, K)
        if groups == 1:
            return flat.permute(2, 0, 1)
        grouped = flat.unflatten(0, (groups, -1))  # both kinds keep their groups in dimension 0
        return grouped.permute(0, 3, 1, 2).flatten(0, 1)

    narrow = min(int(module.in_channels), int(module.out_channels)) // groups == 1  # type: ignore
    depthwise = groups > 1 and narrow
    reason = "depthwise convolution: each channel group is a vector, which has no spectrum"
    yield Matrix("weight", slices, reason=reason if depthwise else "")


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
    yield Matrix("weight", reason=f"an embedding is a table of vectors and keeps {_RESULT}")


def split(matrix: Matrix, parts: int | tuple[int, ...]) -> Iterator[Matrix]:
    """A fused weight as its parts along the outputs: so many equal ones, or of the given sizes."""
    count = parts if isinstance(parts, int) else len(parts)
    names = "qkv" if count == 3 else [str(i) for i in range(count)]
    for i, name in enumerate(names):

        def slices(weight: Tensor, i: int = i) -> Tensor:
            whole = matrix.slices(weight)  # (S, rows, cols)
            outputs = whole.shape[1]
            sizes = [outputs // parts] * parts if isinstance(parts, int) else list(parts)
            if sum(sizes) != outputs:
                raise ValueError(f"{outputs} outputs cannot be split into {parts} parts")
            return whole.split(sizes, dim=1)[i]

        yield Matrix(matrix.parameter, slices, name, matrix.weight, matrix.uses, matrix.reason)


# --- other libraries, by name ---------------------------------------------------------------------


@register("transformers.pytorch_utils.Conv1D")
def _gpt2_conv1d(module: nn.Module) -> Iterator[Matrix]:
    """GPT-2's Conv1D is a Linear with the weight stored as (in, out)."""
    yield Matrix("weight", lambda w: w.mT.unsqueeze(0))


def spectral_slices(weight: Tensor) -> Tensor:
    """A spectral weight (in, out, modes...) as modes x (in, out)."""
    return weight.flatten(2).permute(2, 0, 1) if weight.ndim > 2 else weight.unsqueeze(0)


@register("neuralop.layers.spectral_convolution.SpectralConv")
def _spectral_conv(module: nn.Module) -> Iterator[Matrix]:
    """Modes x (in, out), complex; a factorized weight (Tucker, CP, TT) is multiplied out."""
    weight = module.weight
    if isinstance(weight, Tensor):
        paths = ["weight"]
    else:
        paths = [f"weight.{name}" for name, _ in weight.named_parameters()]  # type: ignore
    if not paths:
        return
    reason = ""
    if getattr(module, "separable", False):
        reason = "separable spectral convolution: one number a channel and mode, not a matrix"
    dense = isinstance(weight, Tensor) or paths == ["weight.tensor"]
    yield Matrix(
        paths[0],
        spectral_slices,
        weight=None if dense else lambda: module.weight.to_tensor(),  # type: ignore
        uses=tuple(paths[1:]),
        reason=reason,
    )


@register("peft.tuners.lora.layer.LoraLayer")
def _lora(module: nn.Module) -> Iterator[Matrix]:
    """The weight in use, W + scale * B A; its rate goes to A and B (W is frozen).

    DoRA (arXiv 2402.09353, equation 5) also gives every output of it a length of its own.
    """
    base = module.get_base_layer()  # type: ignore[operator]
    adapters = [name for name in module.active_adapters if name in module.lora_A]  # type: ignore
    own = tuple(n for n, _ in module.named_parameters() if n.startswith("lora_"))
    prefix = "base_layer." + "base_layer." * _depth(module)
    for matrix in matrices(base):

        def weight(matrix: Matrix = matrix) -> Tensor:
            total = alone = base.get_parameter(matrix.parameter).float()
            for name in [] if module.merged else adapters:
                delta = module.get_delta_weight(name).to(total)  # type: ignore[operator]
                total = total + delta
                if (lengths := _lengths(module, name, alone, delta)) is not None:
                    total = total * lengths
            return total

        yield Matrix(prefix + matrix.parameter, matrix.slices, matrix.part, weight, own,
                     matrix.reason)  # fmt: skip


def _lengths(module: nn.Module, name: str, alone: Tensor, delta: Tensor) -> Tensor | None:
    """What DoRA multiplies a weight by for one adapter; None for plain LoRA."""
    if not getattr(module, "use_dora", {}).get(name, False):
        return None
    entry: Any = module.lora_magnitude_vector[name]  # type: ignore[index]
    outputs = delta.ndim - 1 if getattr(module, "fan_in_fan_out", False) else 0
    lengths = (alone + delta).movedim(outputs, 0).flatten(1).norm(dim=1)
    scale = getattr(entry, "weight", entry).to(lengths).flatten() / lengths
    return scale.view([-1 if i == outputs else 1 for i in range(delta.ndim)])


def _depth(module: nn.Module) -> int:
    """How many further wrappers lie between a LoRA layer and its innermost base layer."""
    depth, inner = 0, module.base_layer
    while hasattr(inner, "base_layer"):
        depth, inner = depth + 1, inner.base_layer
    return depth


# --- everything else -----------------------------------------------------------------------------


def _unknown(module: nn.Module) -> Iterator[Matrix]:
    """A module without a reader: complex weights of two or more dimensions are spectral ones."""
    kind = type(module).__name__
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if parameter.is_complex() and parameter.ndim >= 2:
            yield Matrix(name, spectral_slices)
        elif parameter.ndim >= 2:
            yield Matrix(
                name,
                reason=f"no reader for {kind}.{name}: register one with "
                "tempbalance.readers.register if it is a weight matrix",
            )


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization layer: named so, with parameters that are vectors."""
    named = "norm" in type(module).__name__.lower()
    return named and all(p.ndim <= 1 for p in module.parameters())


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
