"""Find: which parameters of a model are measured, under which name, and why others are not."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Literal

from torch import nn

from tempbalance.layers.fused import Fused as Fused
from tempbalance.layers.fused import Splitter
from tempbalance.layers.hosts import find_hosts, followers
from tempbalance.layers.layer import Layer as Layer
from tempbalance.layers.layer import Layers as Layers
from tempbalance.layers.layer import Skipped as Skipped
from tempbalance.layers.reasons import QUANTIZED, is_quantized, reason_of_rest
from tempbalance.layers.walk import (
    is_inside,
    join,
    kind_of,
    named_modules,
    named_parameters,
    own_parameters,
    owner_of,
    real_numel,
)
from tempbalance.layers.weight import Form, Weight
from tempbalance.readers import matrices
from tempbalance.words import some

logger = logging.getLogger("tempbalance")


def find_layers(model: nn.Module, fused: Fused | Literal[False] | None = None) -> Layers:
    """Every weight of a model that can be measured, and every other parameter with the reason.

    Weights of modules that no reader knows are measured where name and shape say matrix; their
    layers are marked as guessed, and named once at level INFO.

    Args:
        model: any module, compiled, wrapped in DDP or sharded by FSDP2 as it may be.
        fused: weights that are several projections in one, by the name pattern of the module or
            of the weight, and the number of equal parts or their sizes along the outputs:
            ``{"*.kv": 2, "*.experts.gate_up_proj": 2}``. A linear layer named ``qkv`` with three
            times as many outputs as inputs is read as three without being told:
            ``{"*.qkv": 1}`` leaves it whole, ``False`` leaves every weight whole.

    Raises:
        ValueError: if a ``fused`` pattern matches no measured module, or sizes do not fit.
    """
    found = _Finder(Splitter(fused)).find(model)
    if guessed := [layer.name for layer in found.layers if layer.guessed]:
        logger.info(
            "%d weights of modules without a reader are taken for matrices by name and shape "
            "(tempbalance.readers.register tells how to read them): %s",
            *(len(guessed), some(guessed)),
        )
    return found


class _Finder:
    def __init__(self, splitter: Splitter) -> None:
        self.splitter = splitter
        self.embeddings: dict[int, str] = {}  # their weights -> their names
        self.claimed: dict[int, tuple[str, str]] = {}  # parameter -> (module name, its own name)
        self.layers: list[Layer] = []
        self.names: set[str] = set()  # of the layers
        self.skipped: list[Skipped] = []
        self.refused: dict[str, int] = {}  # name of a weight -> its place in ``skipped``

    def find(self, model: nn.Module) -> Layers:
        modules = list(named_modules(model))
        self.embeddings = {
            id(m.weight): join(name, "weight")
            for name, m in modules
            if isinstance(m, nn.Embedding | nn.EmbeddingBag)
        }
        by_name = dict(modules)
        for name, module in modules:
            parent = by_name.get(name.rpartition(".")[0]) if name else None
            self._module(name, module, parent)
        if self.splitter.unmatched:
            raise ValueError(
                f"fused: no measured module matches {sorted(self.splitter.unmatched)}; measured "
                f"are {[layer.name for layer in self.layers][:20]}"
            )
        numel = sum(real_numel(p) for p in named_parameters(model).values())
        hosts = find_hosts(modules, self.layers)
        return Layers(tuple(self.layers), tuple(self.skipped), numel, hosts)

    def _module(self, name: str, module: nn.Module, parent: nn.Module | None) -> None:
        if is_quantized(module):
            self.skipped.append(Skipped(name, (), 0, QUANTIZED))
        tied: set[str] = set()
        found = self._weights(name, module, tied)
        own: set[str] = set()
        for weight in found:
            for path, p in weight.parameters():
                self.claimed.setdefault(id(p), (name, join(name, path)))
                own.add(path)
        rest = [
            (path, p)
            for path, p in own_parameters(module)
            if path not in tied
            and self.claimed.setdefault(id(p), (name, join(name, path)))[0] == name
            and path not in own
        ]
        parts = [part for weight in found for part in self.splitter.parts(name, parent, weight)]
        forms = [_form(name, part) for part in parts]
        numels = _numels(parts, forms)
        measured = [i for i, form in enumerate(forms) if not form.reason]
        order = [part.matrix.parameter for part in parts]
        follow = followers(module, [path for path, _ in rest], order, measured)
        for i, (part, form) in enumerate(zip(parts, forms, strict=True)):
            if form.reason:
                self._refuse(name, part, form.reason, numels[i])
            else:
                alone = len(measured) == 1
                self._add(name, part, form, numels[i], follow.get(i, []), alone)
        for path, p in rest:
            self._skip(name, path, p, reason_of_rest(module, path, p))

    def _weights(self, name: str, module: nn.Module, tied: set[str]) -> list[Weight]:
        """The weights of a module that are listed here and not elsewhere."""
        found = []
        for matrix in matrices(module):
            weight = Weight(module, matrix)
            used = weight.parameters()
            if not used:
                continue
            path, main = used[0]
            other = self.claimed.get(id(main))
            embedding = self.embeddings.get(id(main))
            if other is not None and other[0] != name:
                # A wrapper further up (LoRA, a spectral convolution) has read it already; a
                # weight claimed anywhere else is shared.
                if not is_inside(name, other[0]):
                    self._skip(name, path, main, f"tied to {other[1]!r}, listed there", 0)
            elif embedding is not None and not matrix.reason:  # read as a matrix here
                reason = f"tied to the embedding {embedding!r}, a table of vectors"
                self._skip(name, path, main, reason, 0)
                tied.add(path)
            else:
                found.append(weight)
        return found

    def _refuse(self, name: str, weight: Weight, reason: str, numel: int) -> None:
        """List a weight that cannot be measured, the parts of one under one entry."""
        used = weight.parameters()
        full = join(name, used[0][0])
        if (place := self.refused.get(full)) is not None:
            before = self.skipped[place]
            self.skipped[place] = replace(before, numel=before.numel + numel)
            return
        self.refused[full] = len(self.skipped)
        alone = not weight.matrix.part
        self._skip(name, used[0][0], used[0][1], reason, None if alone else numel)
        others = reason if weight.matrix.reason else f"part of {full}, {reason}"
        for path, p in used[1:]:
            self._skip(name, path, p, others, None if alone else 0)

    def _add(
        self, name: str, weight: Weight, form: Form, numel: int, follow: list[str], alone: bool
    ) -> None:
        module, matrix = weight.module, weight.matrix
        paths = [path for path, _ in weight.parameters()] + follow
        label = matrix.part or ("" if alone else matrix.parameter)
        self.layers.append(
            Layer(
                name=self._unique(join(name, label) or matrix.parameter),
                kind=kind_of(module),
                shape=form.shape,
                parameters=tuple(join(name, path) for path in paths),
                numel=numel,
                module=module,
                _owners=tuple(owner_of(module, path) for path in paths),
                _read=weight.read,
                copies=form.copies,
                guessed=matrix.guessed,
            )
        )

    def _unique(self, name: str) -> str:
        while name in self.names:
            name += "_"
        self.names.add(name)
        return name

    def _skip(
        self, name: str, path: str, p: nn.Parameter, reason: str, numel: int | None = None
    ) -> None:
        numel = real_numel(p) if numel is None else numel
        lazy = isinstance(p, nn.parameter.UninitializedParameter)
        shape = () if lazy else tuple(p.shape)
        self.skipped.append(Skipped(join(name, path), shape, numel, reason))


def _form(name: str, weight: Weight) -> Form:
    try:
        return weight.form()
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error


def _numels(parts: list[Weight], forms: list[Form]) -> list[int]:
    """Real numbers behind each weight; parts of one share its parameters by their size."""
    by_parameter: dict[str, list[int]] = {}
    for i, part in enumerate(parts):
        by_parameter.setdefault(part.matrix.parameter, []).append(i)
    numels = [0] * len(parts)
    for places in by_parameter.values():
        left = sum(real_numel(p) for _, p in parts[places[0]].parameters())
        sizes = [1 if forms[i].reason else forms[i].numel for i in places]
        for k, i in enumerate(places):  # what is left over by rounding goes to the last one
            numels[i] = left * sizes[k] // max(1, sum(sizes[k:]))
            left -= numels[i]
    return numels
