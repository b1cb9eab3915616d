"""Find: which parameters of a model are measured, under which name, and why others are not."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from tempbalance.layers.hosts import find_hosts
from tempbalance.layers.layer import Layer as Layer
from tempbalance.layers.layer import Layers as Layers
from tempbalance.layers.layer import Skipped as Skipped
from tempbalance.layers.walk import (
    is_inside,
    is_parametrized,
    is_sharded,
    join,
    kind_of,
    named_modules,
    named_parameters,
    own_parameters,
    owner_of,
    real_numel,
    whole,
    without_side_effects,
)
from tempbalance.readers import Matrix, is_materialized, is_norm, matrices, split

Fused = Mapping[str, int | tuple[int, ...]]


def find_layers(model: nn.Module, fused: Fused | None = None) -> Layers:
    """Every weight of a model that can be measured, and every other parameter with the reason.

    Args:
        model: any module, compiled, wrapped in DDP or sharded by FSDP2 as it may be.
        fused: modules whose weight is several projections in one, by name pattern, and the number
            of equal parts or their sizes along the outputs: ``{"*.qkv": 3}``.

    Raises:
        ValueError: if a ``fused`` pattern matches no measured module, or sizes do not fit.
    """
    return _Finder(fused or {}).find(model)


class _Finder:
    def __init__(self, fused: Fused) -> None:
        self.fused = fused
        self.unmatched = set(fused)
        self.claimed: dict[int, tuple[str, str]] = {}  # parameter -> (module name, its own name)
        self.layers: list[Layer] = []
        self.skipped: list[Skipped] = []

    def find(self, model: nn.Module) -> Layers:
        modules = list(named_modules(model))
        embeddings = {
            id(m.weight): join(name, "weight")
            for name, m in modules
            if isinstance(m, nn.Embedding | nn.EmbeddingBag)
        }
        for name, module in modules:
            self._module(name, module, embeddings)
        if self.unmatched:
            raise ValueError(
                f"fused: no measured module matches {sorted(self.unmatched)}; measured are "
                f"{[layer.name for layer in self.layers][:20]}"
            )
        numel = sum(real_numel(p) for p in named_parameters(model).values())
        hosts = find_hosts(modules, self.layers)
        return Layers(tuple(self.layers), tuple(self.skipped), numel, hosts)

    def _module(self, name: str, module: nn.Module, embeddings: dict[int, str]) -> None:
        own = dict(own_parameters(module))
        if _is_quantized_module(module):
            reason = "a quantized module: analyze the float model it was made from"
            self.skipped.append(Skipped(name, (), 0, reason))
        found: list[Matrix] = []
        tied: set[str] = set()
        for matrix in matrices(module):
            used = self._parameters_of(module, matrix)
            if not used:
                continue
            main = used[0][1]
            other = self.claimed.get(id(main))
            embedding = embeddings.get(id(main))
            if other is not None and other[0] != name:
                # A wrapper further up (LoRA, a spectral convolution) has read it already; a
                # weight claimed anywhere else is shared.
                if not is_inside(name, other[0]):
                    self._skip(name, used[0][0], main, f"tied to {other[1]!r}, listed there", 0)
                continue
            if embedding is not None and not matrix.reason:  # read as a matrix here
                reason = f"tied to the embedding {embedding!r}, which keeps the base rate"
                self._skip(name, used[0][0], main, reason, 0)
                tied.add(used[0][0])
                continue
            found.append(matrix)
        for matrix in found:
            for path, p in self._parameters_of(module, matrix):
                self.claimed.setdefault(id(p), (name, join(name, path)))
        parts = list(self._cut(name, found))
        shapes = [self._shape_or_reason(name, module, matrix) for matrix in parts]
        numels = self._numels(module, parts, shapes)
        measured = [i for i, shape in enumerate(shapes) if not isinstance(shape, str)]
        rest = [
            (path, p)
            for path, p in own.items()
            if path not in tied
            and self.claimed.setdefault(id(p), (name, join(name, path)))[0] == name
            and not any(path in self._paths(module, m) for m in found)
        ]
        for i, (matrix, shape) in enumerate(zip(parts, shapes, strict=True)):
            if isinstance(shape, str):
                self._refuse(name, module, matrix, shape, numels[i])
                continue
            follows = tuple(path for path, _ in rest) if i == measured[0] else ()
            alone = len(measured) == 1
            self._add(name, module, matrix, shape, numels[i], follows, alone)
        for path, p in rest:
            self._skip(name, path, p, _reason_of_rest(module, path, p))

    def _cut(self, name: str, found: list[Matrix]) -> Iterator[Matrix]:
        for matrix in found:
            pattern = next((p for p in self.fused if fnmatch.fnmatchcase(name, p)), None)
            if pattern is None or matrix.part or matrix.reason:
                yield matrix
            else:
                self.unmatched.discard(pattern)
                yield from split(matrix, self.fused[pattern])

    def _shape_or_reason(
        self, name: str, module: nn.Module, matrix: Matrix
    ) -> tuple[int, int, int] | str:
        """The shape as a stack of matrices, or why the weight cannot be measured."""
        weight = self._parameters_of(module, matrix)[0][1]
        reason = matrix.reason or is_materialized(weight)
        if reason:
            return reason
        try:
            shape = self._shape(module, matrix, weight)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        if min(shape[1:]) < 2 or not shape[0]:
            return f"slices of {shape[1]} x {shape[2]} are vectors, which have no spectrum"
        return shape

    def _numels(
        self, module: nn.Module, parts: list[Matrix], shapes: list[tuple[int, int, int] | str]
    ) -> list[int]:
        """Real numbers behind each weight; parts of one share its parameters by their size."""
        by_parameter: dict[str, list[int]] = {}
        for i, matrix in enumerate(parts):
            by_parameter.setdefault(matrix.parameter, []).append(i)
        numels = [0] * len(parts)
        for some in by_parameter.values():
            left = sum(real_numel(p) for _, p in self._parameters_of(module, parts[some[0]]))
            measured = [shapes[i] for i in some]
            sizes = [1 if isinstance(s, str) else s[0] * s[1] * s[2] for s in measured]
            for k, i in enumerate(some):  # what is left over by rounding goes to the last one
                numels[i] = left * sizes[k] // max(1, sum(sizes[k:]))
                left -= numels[i]
        return numels

    def _refuse(
        self, name: str, module: nn.Module, matrix: Matrix, reason: str, numel: int
    ) -> None:
        """List a weight that cannot be measured, the parts of one under one entry."""
        used = self._parameters_of(module, matrix)
        for i, skipped in enumerate(self.skipped):
            if skipped.name == join(name, used[0][0]):
                self.skipped[i] = replace(skipped, numel=skipped.numel + numel)
                return
        alone = not matrix.part
        self._skip(name, used[0][0], used[0][1], reason, None if alone else numel)
        others = reason if matrix.reason else f"part of {join(name, used[0][0])}, {reason}"
        for path, p in used[1:]:
            self._skip(name, path, p, others, None if alone else 0)

    def _add(
        self,
        name: str,
        module: nn.Module,
        matrix: Matrix,
        shape: tuple[int, int, int],
        numel: int,
        follows: tuple[str, ...],
        alone: bool,
    ) -> None:
        used = self._parameters_of(module, matrix)
        paths = [path for path, _ in used] + list(follows)
        parametrized = is_parametrized(module, matrix.parameter)

        def read() -> Tensor:
            return matrix.slices(whole(_weight(module, matrix)))

        copies = (
            parametrized
            or matrix.weight is not None
            or is_sharded(used[0][1])
            or getattr(module, "groups", 1) != 1
        )
        label = matrix.part or ("" if alone else matrix.parameter)
        self.layers.append(
            Layer(
                name=self._unique(join(name, label) or matrix.parameter),
                kind=kind_of(module),
                shape=shape,
                parameters=tuple(join(name, path) for path in paths),
                numel=numel,
                module=module,
                _owners=tuple(owner_of(module, path) for path in paths),
                _read=read,
                copies=copies,
            )
        )

    def _unique(self, name: str) -> str:
        taken = {layer.name for layer in self.layers}
        return name if name not in taken else self._unique(name + "_")

    def _skip(
        self, name: str, path: str, p: nn.Parameter, reason: str, numel: int | None = None
    ) -> None:
        numel = real_numel(p) if numel is None else numel
        lazy = isinstance(p, nn.parameter.UninitializedParameter)
        shape = () if lazy else tuple(p.shape)
        self.skipped.append(Skipped(join(name, path), shape, numel, reason))

    def _paths(self, module: nn.Module, matrix: Matrix) -> list[str]:
        return [path for path, _ in self._parameters_of(module, matrix)]

    def _parameters_of(self, module: nn.Module, matrix: Matrix) -> list[tuple[str, nn.Parameter]]:
        """Path and parameter of all that a weight is made of, parametrizations resolved."""
        paths: list[str] = []
        for path in (matrix.parameter, *matrix.uses):
            if is_parametrized(module, path):
                inner: nn.Module = module.parametrizations[path]  # type: ignore
                paths += [f"parametrizations.{path}.{n}" for n, _ in inner.named_parameters()]
            else:
                paths.append(path)
        found = []
        for path in paths:
            owner, local = owner_of(module, path)
            parameters = owner._parameters  # has no .get in a ScriptModule
            parameter = parameters[local] if local in parameters else None  # noqa: SIM401
            if parameter is not None:
                found.append((path, parameter))
        return found

    def _shape(
        self, module: nn.Module, matrix: Matrix, parameter: nn.Parameter
    ) -> tuple[int, int, int]:
        if matrix.weight is not None or is_parametrized(module, matrix.parameter):
            with torch.no_grad():
                weight: Tensor = _weight(module, matrix)
        else:
            weight = parameter
        empty = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        slices = matrix.slices(empty)
        if slices.ndim != 3:
            raise ValueError(
                f"the reader of {type(module).__name__} gave a tensor of shape "
                f"{tuple(slices.shape)} for {matrix.parameter!r}; it must be (slices, rows, cols)"
            )
        return slices.shape[0], slices.shape[1], slices.shape[2]


def _reason_of_rest(module: nn.Module, path: str, parameter: nn.Parameter) -> str:
    if is_norm(module):
        return "a normalization vector has no spectrum"
    lazy = isinstance(parameter, nn.parameter.UninitializedParameter)
    if lazy or sum(size > 1 for size in parameter.shape) < 2:
        return "a bias or vector has no spectrum"
    local = path.rpartition(".")[2]
    if f"{path}_mask".replace("_orig", "") in module._buffers:
        return "pruned by torch.nn.utils.prune: make it permanent with its remove() to measure it"
    if local in ("weight_v", "weight_orig"):  # the weight itself is a stale tensor between steps
        return (
            "wrapped by torch.nn.utils.weight_norm or spectral_norm in their old form: use those "
            "of torch.nn.utils.parametrizations"
        )
    return f"no weight that the reader of {kind_of(module)} names; register another to measure it"


def _weight(module: nn.Module, matrix: Matrix) -> Tensor:
    if matrix.weight is not None:
        return matrix.weight()
    if is_parametrized(module, matrix.parameter):
        return without_side_effects(module, matrix.parameter)
    owner, local = owner_of(module, matrix.parameter)
    weight = owner._parameters[local]
    assert weight is not None
    return weight


def _is_quantized_module(module: nn.Module) -> bool:
    """Modules of ``torch.ao.nn.quantized`` keep packed weights that are no parameters."""
    return ".quantized" in type(module).__module__ and callable(getattr(module, "weight", None))
