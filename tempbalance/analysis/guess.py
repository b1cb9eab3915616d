"""Guess: the layers of a network from the names and shapes of its stored tensors alone.

A stand-in for the model is built of torch's own module types, with parameters that have a shape
and no memory. The readers of those types then say what is measured and under which name, as they do
for a model, and a weight is read from the file when its turn comes.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from tempbalance.analysis.derived import derived
from tempbalance.analysis.formats import Checkpoint, Stored
from tempbalance.layers import Fused, Layer, Layers, find_layers
from tempbalance.readers import Matrix, register
from tempbalance.words import some

_Own = Mapping[str, Stored]  # the tensors of one module, by their names in it

_TABLE = re.compile(
    r"embed(ding|dings|s|_tokens|_positions)?\d*$|embd$|(^|_)emb$|^w[tp]e$|^shared$|bias_table$"
    r"|relative_attention_bias$"
)
# These are tables whatever their shape; others of such a name only if they are taller than wide.
_SURELY = re.compile(r"tok|wte|wpe|word|pos|type|vocab|shared|relative|table")
_LOOSE_TABLE = re.compile(r"embed|emb$|pos|token|query|queries|table|prompt|codebook|relative")
_LOW_RANK = re.compile(r"(^|[._])lora_|(^|[._])(ada|lo)_[ab]([._]|$)", re.I)
_FUSED = re.compile(r"(^|_)(qkv|c_attn|qkv_proj|proj_qkv|in_proj_qkv)$|Wqkv$")
_INTERLEAVED = re.compile(r"query_key_value$")  # head by head: no three blocks of rows
_EXPERTS = re.compile(r"expert|_exps(\.|$)|(^|[._])moe([._]|$)", re.I)
# Sides of a matrix that is likely one of a stack: few kernels are so long, and hardly any of an
# even length that is longer than there are outputs.
_LONGEST_KERNEL = 16
_NORM = re.compile(r"norm|(^|[._])(ln|bn|gn)(_?\w{0,5})?$", re.I)
_GATES = {4: nn.LSTM, 3: nn.GRU, 1: nn.RNN}
_CONVS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_TRANSPOSED = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}


class Matrices(nn.Module):
    """Stands for a module of an unknown type that holds weights."""

    reasons: Mapping[str, str]


class Experts(Matrices):
    """Stands for the experts of a mixture, stacked in one weight of three dimensions."""


class SpectralConv(Matrices):
    """Stands for a convolution in Fourier space, with complex weights (in, out, modes...)."""


class Conv1D(nn.Module):
    """Stands for a linear layer whose weight is stored as (in, out), as GPT-2's is."""


@register(Matrices)
def _matrices(module: nn.Module) -> Iterator[Matrix]:
    assert isinstance(module, Matrices)
    for local, parameter in module._parameters.items():
        if parameter is None or sum(size > 1 for size in parameter.shape) < 2:
            continue
        stacked = parameter.ndim < 4 and not parameter.is_complex()
        reason = module.reasons.get(local, "")
        yield Matrix(local, reason=reason) if stacked else Matrix(local, _positions, reason=reason)


def _positions(weight: Tensor) -> Tensor:
    """A weight (a, b, positions...) as positions x (a, b)."""
    return weight.flatten(2).permute(2, 0, 1) if weight.ndim > 2 else weight.unsqueeze(0)


@register(Conv1D)
def _conv1d(module: nn.Module) -> Iterator[Matrix]:
    yield Matrix("weight", lambda weight: weight.mT.unsqueeze(0))


@dataclass(frozen=True)
class Guess:
    """The layers of a network, and in words what was guessed to find them."""

    layers: Layers
    notes: tuple[str, ...] = ()


def guess_layers(
    checkpoint: Checkpoint,
    fused: Fused | Literal[False] | None = None,
    device: str | torch.device = "cpu",
) -> Guess:
    """The layers of a checkpoint, told from names and shapes; none of them is read.

    Args:
        fused: as in :func:`~tempbalance.layers.find_layers`; a fused projection that it does not
            name is cut into q, k and v where name and shape say so.
        device: where weights go when they are read.

    Raises:
        ValueError: if a ``fused`` pattern matches nothing.
    """
    return _Guesser(fused, torch.device(device)).guess(checkpoint)


class _Guesser:
    def __init__(self, fused: Fused | Literal[False] | None, device: torch.device) -> None:
        self.cut, self.device = fused is not False, device
        self.fused = dict(fused or {})
        self.sources: dict[int, Stored] = {}  # by the parameter that stands for it
        self.shared: dict[object, nn.Parameter] = {}
        self.guessed: dict[str, list[str]] = {}
        self.channels = 0  # outputs of the convolution before
        self.stacks: dict[str, set[tuple[int, ...]]] = {}  # shapes of three dimensions by parent

    def guess(self, checkpoint: Checkpoint) -> Guess:
        modules: dict[str, dict[str, Stored]] = {}
        for name, stored in derived(checkpoint.tensors).items():
            path, _, local = name.rpartition(".")
            modules.setdefault(path, {})[local] = stored
            if local == "weight" and len(stored.shape) == 3:
                self.stacks.setdefault(path.rpartition(".")[0], set()).add(stored.shape)
        root = nn.Module()
        for path, own in modules.items():
            module = self._module(path, own)
            module._modules.clear()
            for local in module._parameters:
                module._parameters[local] = None
            known = self._is_fused(path, module, own)
            for local, stored in own.items():
                module._parameters[local] = self._parameter(stored)
            root = _placed(root, path, module)
            if known:
                self.fused[path] = known
        found = find_layers(root, self.fused if self.cut else False)
        layers = tuple(self._lazy(layer) for layer in found.layers)
        notes = [f"{what}: {some(names, 3)}" for what, names in self.guessed.items()]
        if notes:
            notes[0] = "told from names and shapes (give the model to be sure): " + notes[0]
        return Guess(
            replace(found, layers=layers), (*checkpoint.notes, *filter(None, ["; ".join(notes)]))
        )

    # --- modules ---------------------------------------------------------------------------------

    def _module(self, path: str, own: _Own) -> nn.Module:
        """What holds these tensors, as one of torch's types where names and shapes tell."""
        last = path.rpartition(".")[2]
        weight = own.get("weight")
        if any(re.fullmatch(r"weight_hh(_l0)?", local) for local in own):
            return _recurrent(own)
        if "in_proj_weight" in own or "q_proj_weight" in own:
            width = own["in_proj_weight" if "in_proj_weight" in own else "q_proj_weight"].shape[-1]
            return nn.MultiheadAttention(width, 1, device="meta")
        if weight is None:
            return self._unknown(path, own)
        shape = weight.shape
        if sum(size > 1 for size in shape) < 2 and len(shape) < 3:
            is_norm = len(shape) == 1 and ("running_mean" in own or _NORM.search(last))
            return nn.LayerNorm(shape, device="meta") if is_norm else self._unknown(path, own)
        if _LOW_RANK.search(path) or weight.dtype.is_complex or _scaled(own):
            return self._unknown(path, own)
        if len(shape) == 2:
            return self._matrix(path, last, shape, own)
        if len(shape) == 3 and self._is_stack(path, own):
            return self._unknown(path, own)
        if len(shape) in _CONVS:
            return self._convolution(path, shape, own)
        return self._unknown(path, own)

    def _matrix(self, path: str, last: str, shape: tuple[int, ...], own: _Own) -> nn.Module:
        rows, cols = shape
        outputs = _length(own.get("bias"))
        if _TABLE.search(last) and not outputs and (rows > cols or _SURELY.search(last)):
            self._note("taken for embeddings, not measured", path)
            return nn.Embedding(rows, cols, device="meta")
        if outputs == cols != rows:
            return Conv1D()
        return nn.Linear(cols, rows, device="meta")

    def _convolution(self, path: str, shape: tuple[int, ...], own: _Own) -> nn.Module:
        outputs, inputs, *kernel = shape
        size = tuple(kernel)
        if _length(own.get("bias")) == inputs != outputs:
            return _TRANSPOSED[len(shape)](outputs, inputs, size, device="meta")  # type: ignore
        groups, before = 1, self.channels
        if inputs == 1 < outputs:  # depthwise, or of one input: a vector a position either way
            groups = outputs
        elif before == outputs and before % inputs == 0 and before // inputs >= 4 and max(size) > 1:
            groups = before // inputs
            self._note("taken for convolutions in groups", path)
        self.channels = outputs
        return _CONVS[len(shape)](inputs * groups, outputs, size, groups=groups, device="meta")  # type: ignore

    def _is_stack(self, path: str, own: _Own) -> bool:
        """Whether (E, out, in) holds a matrix an expert, and is no convolution (out, in, kernel).

        Told by the name; a bias for each expert; a weight beside it that leads back, (E, in, out);
        or by sides that are longer than a kernel, both more than there are experts.
        """
        count, *sides = own["weight"].shape
        bias = own.get("bias")
        if _EXPERTS.search(path):
            return True
        if bias is not None:
            return len(bias.shape) == 2 and bias.shape[0] == count
        beside = self.stacks.get(path.rpartition(".")[0], set())
        if sides[0] != sides[1] and (count, *reversed(sides)) in beside:
            return True
        return 1 < count < min(sides) and min(sides) >= _LONGEST_KERNEL and sides[1] % 2 == 0

    def _unknown(self, path: str, own: _Own) -> nn.Module:
        """A module of no known type, whose weights are measured as their shapes suggest."""
        kind = Matrices
        reasons = {}
        for local, stored in own.items():
            full = f"{path}.{local}"
            wide = sum(size > 1 for size in stored.shape) >= 2
            if _LOW_RANK.search(full):
                reasons[local] = "a low-rank factor: give the model, to measure W + BA"
            elif local == "weight" and _scaled(own):
                reasons[local] = "quantized, with scales beside it: analyze the float model"
            elif wide and local != "weight" and _LOOSE_TABLE.search(local):
                reasons[local] = "a table of vectors, by its name"
            elif wide and local.endswith("bias"):
                reasons[local] = "biases, a vector for each matrix of a stack"
            elif not (stored.dtype.is_floating_point or stored.dtype.is_complex):
                continue  # the reason will be that it is quantized
            elif stored.dtype.is_complex:
                kind = SpectralConv
            elif len(stored.shape) == 3 and (
                _EXPERTS.search(full) or (local == "weight" and self._is_stack(path, own))
            ):
                kind = Experts
                self._note("taken for stacks of experts", full)
            elif wide and local != "weight":
                self._note("taken for weight matrices", full)
        module = kind()
        module.reasons = reasons
        return module

    def _is_fused(self, path: str, module: nn.Module, own: _Own) -> int | tuple[int, ...]:
        """Into what a weight is cut along its outputs, or 0."""
        last = path.rpartition(".")[2]
        names = (path, f"{path}.weight")  # a pattern may name either
        user = any(fnmatch.fnmatchcase(name, p) for name in names for p in self.fused)
        if user or not self.cut or not isinstance(module, nn.Linear | Conv1D):
            return 0
        if own["weight"].same in self.shared:
            return 0
        if _INTERLEAVED.search(last):
            self._note("query, key and value lie head by head and are measured as one", path)
            return 0
        if not _FUSED.search(last):
            return 0
        outputs, inputs = own["weight"].shape[:: -1 if isinstance(module, Conv1D) else 1]
        parts: int | tuple[int, ...] = 3 if outputs % 3 == 0 else 0
        if inputs < outputs < 3 * inputs and (outputs - inputs) % 2 == 0:
            parts = (inputs, (outputs - inputs) // 2, (outputs - inputs) // 2)  # few key heads
        if parts:
            self._note("cut into query, key and value", path)
        return parts

    def _note(self, what: str, name: str) -> None:
        self.guessed.setdefault(what, []).append(name)

    # --- tensors ---------------------------------------------------------------------------------

    def _parameter(self, stored: Stored) -> nn.Parameter:
        """What stands for a stored tensor: itself if it is in memory, else its shape alone."""
        if stored.same is not None and stored.same in self.shared:
            return self.shared[stored.same]
        if stored.tensor is not None:
            parameter = nn.Parameter(stored.tensor.detach(), requires_grad=False)
        else:
            one = torch.zeros((), dtype=stored.dtype, device=self.device)
            parameter = nn.Parameter(one.expand(stored.shape), requires_grad=False)
            self.sources[id(parameter)] = stored
        if stored.same is not None:
            self.shared[stored.same] = parameter
        return parameter

    def _lazy(self, layer: Layer) -> Layer:
        """The layer, whose weight is read from its source for as long as it is needed."""
        places = [
            (module, local, self.sources[id(parameter)])
            for module, local in layer._owners
            if (parameter := module._parameters[local]) is not None
            and id(parameter) in self.sources
        ]
        if not places:
            return layer

        def read() -> Tensor:
            before = [module._parameters[local] for module, local, _ in places]
            try:
                for module, local, stored in places:
                    weight = stored.read().to(self.device)
                    module._parameters[local] = nn.Parameter(weight, requires_grad=False)
                return layer._read()
            finally:
                for (module, local, _), parameter in zip(places, before, strict=True):
                    module._parameters[local] = parameter

        return replace(layer, _read=read, copies=True)


def _recurrent(own: _Own) -> nn.Module:
    """An LSTM, a GRU or a plain one by the number of its gates, or their cells."""
    cell = "weight_hh" in own
    end = "" if cell else "_l0"
    rows, hidden = own[f"weight_hh{end}"].shape
    if (projected := own.get("weight_hr_l0")) is not None:
        hidden = projected.shape[1]
    kind = _GATES.get(rows // hidden, nn.RNN)
    inputs = own[f"weight_ih{end}"].shape[1] if f"weight_ih{end}" in own else hidden
    if cell:
        cells: dict[type[nn.Module], Callable[..., nn.Module]] = {
            nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell, nn.RNN: nn.RNNCell
        }  # fmt: skip
        return cells[kind](inputs, hidden, device="meta")
    depth = sum(bool(re.fullmatch(r"weight_hh_l\d+", local)) for local in own)
    both = "weight_hh_l0_reverse" in own
    return kind(inputs, hidden, depth, bidirectional=both, device="meta")  # type: ignore[abstract]


def _placed(root: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Put a module at its path, with the children that are there already; gives the root."""
    if not path:
        module._modules.update(root._modules)
        return module
    parent = root
    *above, last = path.split(".")
    for name in above:
        parent = parent._modules.setdefault(name, nn.Module())  # type: ignore[assignment]
    there = parent._modules.get(last)
    if there is not None:
        module._modules.update(there._modules)
    parent._modules[last] = module
    return root


def _length(bias: Stored | None) -> int:
    return bias.shape[0] if bias is not None and len(bias.shape) == 1 else 0


def _scaled(own: _Own) -> bool:
    """Whether a weight is stored in few bits with scales beside it."""
    return any(local.startswith("weight_scale") or local == "SCB" for local in own)
