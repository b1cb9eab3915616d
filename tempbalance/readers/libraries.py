"""Readers of other libraries' modules, which are named, so that nothing is imported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tempbalance.readers.matrix import (
    Matrix,
    kernel_slices,
    real_shape,
    spectral_slices,
    transposed_stack,
)
from tempbalance.readers.names import is_weight, role
from tempbalance.readers.registry import matrices, register


@register("transformers.pytorch_utils.Conv1D")
def _gpt2_conv1d(module: nn.Module) -> Iterator[Matrix]:
    """GPT-2's Conv1D is a Linear with the weight stored as (in, out)."""
    yield Matrix("weight", lambda w: w.mT.unsqueeze(0))


@register(
    "transformers.models.xlnet.modeling_xlnet.XLNetRelativeAttention",
    "transformers.models.funnel.modeling_funnel.FunnelRelMultiheadAttention",
)
def _relative_attention(module: nn.Module) -> Iterator[Matrix]:
    """Projections stored as (model, heads, width): one matrix each of (heads * width, model)."""
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.ndim == 3:
            yield Matrix(name, lambda w: w.flatten(1).mT.unsqueeze(0))


@register("timm.layers.cond_conv2d.CondConv2d")
def _conditional_conv(module: nn.Module) -> Iterator[Matrix]:
    """Experts x kernel positions x (out, in), each expert stored as one long row."""
    shape: tuple[int, ...] = tuple(module.weight_shape)  # type: ignore[arg-type]
    groups = int(module.groups)  # type: ignore[arg-type]

    def slices(weight: Tensor) -> Tensor:
        experts = weight.unflatten(1, shape)  # (experts, out, in, height, width)
        return torch.cat([kernel_slices(kernel, groups) for kernel in experts])

    yield Matrix("weight", slices)


@register("torch_geometric.nn.dense.linear.Linear")
def _graph_linear(module: nn.Module) -> Iterator[Matrix]:
    yield Matrix("weight")


@register("torch_geometric.nn.conv.message_passing.MessagePassing",
          "torch_geometric.nn.dense.linear.HeteroLinear")  # fmt: skip
def _graph_conv(module: nn.Module) -> Iterator[Matrix]:
    """Weights stored as (..., in, out), one matrix a relation, hop or block."""
    for name, parameter in module._parameters.items():
        if parameter is None or role(module, name) or len(real_shape(parameter)) < 2:
            continue
        if is_weight(name) or name in ("root", "g", "l2"):
            yield Matrix(name, transposed_stack)


@register("torch_harmonics.spectral_convolution.SpectralConvS2")
def _spherical_spectral_conv(module: nn.Module) -> Iterator[Matrix]:
    """Groups x degrees x (in, out), complex, stored as (groups, in, out, degrees)."""
    yield Matrix("weight", lambda w: w.permute(0, 3, 1, 2).flatten(0, 1))


@register(
    "neuralop.layers.spectral_convolution.SpectralConv",
    "neuralop.layers.spherical_convolution.SphericalConv",
)
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
    # A complex weight of tltorch that is not factorized is kept as pairs of real numbers.
    paired = not isinstance(weight, Tensor) and type(weight).__name__ == "ComplexDenseTensor"
    yield Matrix(
        paths[0],
        _paired_slices if paired else spectral_slices,
        weight=None if dense else lambda: module.weight.to_tensor(),  # type: ignore
        uses=tuple(paths[1:]),
        reason=reason,
    )


def _paired_slices(weight: Tensor) -> Tensor:
    return spectral_slices(torch.view_as_complex(weight))


@register("peft.tuners.lora.layer.LoraLayer")
def _lora(module: nn.Module) -> Iterator[Matrix]:
    """The weight in use, W + scale * B A; its rate goes to A and B (W is frozen).

    DoRA (arXiv 2402.09353, equation 5) also gives every output of it a length of its own.
    """
    base = module.get_base_layer()  # type: ignore[operator]
    # A wrapper of one parameter (an expert stack) leaves the others to those inside of it.
    target = getattr(module, "parameter_name", None)
    adapters = [name for name in module.active_adapters if name in module.lora_A]  # type: ignore
    own = tuple(n for n, _ in module.named_parameters() if n.startswith("lora_"))
    prefix = "base_layer." + "base_layer." * _depth(module)
    for matrix in matrices(base):
        if target is not None and matrix.parameter != target:
            continue

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
