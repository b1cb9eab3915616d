"""Derived: stored tensors as the weights they stand for, by their names.

What wraps a weight (weight and spectral normalization, pruning, FSDP's and the compiler's prefixes)
stores it in parts or under another name, and some codes store complex weights as real ones. Buffers
are left out: a checkpoint does not tell them from parameters, their names do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tempbalance.analysis.formats import Stored

_BUFFERS = re.compile(
    r"(^|\.)(running_mean|running_var|num_batches_tracked|inv_freq|original_inv_freq|masked_bias"
    r"|freqs_cis|cos_cached|sin_cached|relative_coords_table|weight_[uv]_?|_[uv])$|mask$"
)
_SPECTRAL = re.compile(r"spectral|fourier|(^|[._])fno", re.I)
_OLD, _NEW = ".weight_v", ".parametrizations.weight.original1"


def derived(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The parameters among the stored tensors, under the names that their module gives them."""
    named = {_clean(name, tensors): stored for name, stored in tensors.items()}
    parts: set[str] = set()
    found: dict[str, Stored] = {}
    for name, stored in named.items():
        if name in parts:
            continue
        whole, used, weight = _whole(name, stored, named)
        parts |= used
        if not _is_buffer(whole, weight):
            found[whole] = replace(weight, name=whole)
    return {name: stored for name, stored in found.items() if name not in parts}


def _clean(name: str, tensors: Mapping[str, Stored]) -> str:
    """Without the names of wrappers around the whole model, and of holders of one tensor."""
    name = name.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "")
    if all(key.startswith("module.") for key in tensors):
        name = name.removeprefix("module.")
    return name.removesuffix(".tensor") if name.endswith(".weight.tensor") else name


def _whole(name: str, stored: Stored, named: Mapping[str, Stored]) -> tuple[str, set[str], Stored]:
    """The weight that a tensor stands for: its name, the tensors it is made of, and how."""
    for ending, size in ((_OLD, ".weight_g"), (_NEW, ".parametrizations.weight.original0")):
        length = named.get(name.removesuffix(ending) + size)
        if name.endswith(ending) and length is not None:
            used = {name.removesuffix(ending) + size}
            return _base(name, ending), used, _made(stored, length, _of_length)
    if name.endswith(".weight_orig"):
        base = name.removesuffix(".weight_orig")
        mask = named.get(f"{base}.weight_mask")
        weight = stored if mask is None else _made(stored, mask, torch.mul)
        return f"{base}.weight", {f"{base}.weight_mask"}, weight
    if name.endswith(".parametrizations.weight.original"):
        return _base(name, ".parametrizations.weight.original"), set(), stored
    real = stored.dtype is torch.float32 and stored.shape[-1:] == (2,) and len(stored.shape) > 3
    if real and _SPECTRAL.search(name) and not name.endswith(".bias"):
        return name, set(), _complex(stored)
    return name, set(), stored


def _base(name: str, ending: str) -> str:
    return name.removesuffix(ending) + ".weight"


def _made(a: Stored, b: Stored, how: Callable[[Tensor, Tensor], Tensor]) -> Stored:
    return replace(a, read=lambda: how(a.read(), b.read()), tensor=None, same=None)


def _of_length(direction: Tensor, length: Tensor) -> Tensor:
    """Weight normalization: every slice of ``direction`` with the length given for it."""
    if length.ndim != direction.ndim:  # one length for all
        return direction * (length / direction.norm())
    dims = [i for i, size in enumerate(length.shape) if size == 1]
    return direction * (length / direction.pow(2).sum(dims, keepdim=True).sqrt())


def _complex(stored: Stored) -> Stored:
    return replace(
        stored,
        shape=stored.shape[:-1],
        dtype=torch.complex64,
        read=lambda: torch.view_as_complex(stored.read().contiguous()),
        tensor=None,
        same=None,
    )


def _is_buffer(name: str, stored: Stored) -> bool:
    if not (stored.dtype.is_floating_point or stored.dtype.is_complex):
        # Integers are counters and positions, but for a weight that was quantized.
        return len(stored.shape) < 2 or "weight" not in name.rpartition(".")[2]
    causal = len(stored.shape) == 4 and stored.shape[:2] == (1, 1) and name.endswith(".bias")
    return causal or _BUFFERS.search(name) is not None
