"""Layers: which parameters of a model are measured, under which name, and why others are not.

Names are those of ``model.named_modules()`` without the wrappers' own (``_orig_mod.`` of
``torch.compile``, ``module.`` of DDP), so that they are the same in every setting.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tempbalance.readers import Matrix, is_materialized, is_norm, matrices, split

Fused = Mapping[str, int | tuple[int, ...]]
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_WRAPPERS = (
    nn.parallel.DistributedDataParallel,
    nn.DataParallel,
    torch.optim.swa_utils.AveragedModel,
)


@dataclass(frozen=True, eq=False)
class Layer:
    """One measured weight: where it is, its shape as a stack of matrices, and how to read it.

    ``parameters`` are the names of the parameters that take its learning rate: its weight and,
    for the first weight of a module, the module's other direct parameters (its bias).
    """

    name: str
    kind: str
    shape: tuple[int, int, int]  # (slices, rows, cols)
    parameters: tuple[str, ...]
    numel: int  # real numbers; a complex entry counts twice
    module: nn.Module
    _owners: tuple[tuple[nn.Module, str], ...]
    _read: Callable[[], Tensor]
    copies: bool  # reading makes a tensor of its own (sharded, parametrized, LoRA, grouped)

    @property
    def eigenvalues(self) -> int:
        """Eigenvalues of all slices: what ``min_eigs`` is compared with."""
        return self.shape[0] * min(self.shape[1:])

    def tensors(self) -> list[nn.Parameter]:
        """The parameters named in ``parameters``, as they are now."""
        return [p for m, n in self._owners if (p := m._parameters[n]) is not None]

    def is_own_memory(self, weight: Tensor) -> bool:
        """Whether what :meth:`read` gave shares its memory with the model, and changes with it.

        Looked at anew each time: reading a sharded, grouped or parametrized weight makes a tensor
        of its own in most cases, and not in all.
        """
        held = [*self.tensors(), *self.module.parameters(), *self.module.buffers()]
        storages = {_local(tensor).untyped_storage()._cdata for tensor in held}
        return weight.untyped_storage()._cdata in storages

    @property
    def trainable(self) -> bool:
        return any(p.requires_grad for p in self.tensors())

    def read(self) -> Tensor:
        """The weight as (slices, rows, cols), detached, on its device and in its dtype.

        A sharded weight is gathered: under FSDP2 every rank must call this, in the same order.
        """
        with torch.no_grad():
            return self._read().detach()


@dataclass(frozen=True)
class Skipped:
    """A parameter that is not measured, and why."""

    name: str
    shape: tuple[int, ...]
    numel: int
    reason: str


@dataclass(frozen=True)
class Layers:
    """What :func:`find_layers` found, in definition order."""

    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...]
    numel: int  # real numbers of the whole model, shared ones once


def named_modules(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` in definition order, wrappers left out of the names."""
    yield from _walk(model, name, set())


def _walk(module: nn.Module, name: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    module = unwrap(module)
    if id(module) in seen:
        return
    seen.add(id(module))
    yield name, module
    for child_name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, join(name, child_name), seen)


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``, DDP, checkpoint and averaging wrappers."""
    while True:
        inner = next((module._modules[w] for w in _WRAPPED if w in module._modules), None)
        if inner is None and isinstance(module, _WRAPPERS):
            inner = module.module
        if inner is None:
            return module
        module = inner


def join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters under clean names, shared ones under their first name alone."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, module in named_modules(model):
        for local, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), (join(name, local), parameter))
    return dict(found.values())


def real_numel(tensor: Tensor) -> int:
    """Number of real numbers: a complex entry is two. 0 for an uninitialized parameter."""
    if isinstance(tensor, nn.parameter.UninitializedParameter):
        return 0
    return tensor.numel() * (2 if tensor.is_complex() else 1)


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
        return Layers(tuple(self.layers), tuple(self.skipped), numel)

    def _module(self, name: str, module: nn.Module, embeddings: dict[int, str]) -> None:
        own = dict(_own_parameters(module))
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
                if not _is_inside(name, other[0]):
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
        parametrized = _parametrized(module, matrix.parameter)

        def read() -> Tensor:
            return matrix.slices(_whole(_weight(module, matrix)))

        copies = (
            parametrized
            or matrix.weight is not None
            or _is_sharded(used[0][1])
            or getattr(module, "groups", 1) != 1
        )
        label = matrix.part or ("" if alone else matrix.parameter)
        self.layers.append(
            Layer(
                name=self._unique(join(name, label) or matrix.parameter),
                kind=_kind(module),
                shape=shape,
                parameters=tuple(join(name, path) for path in paths),
                numel=numel,
                module=module,
                _owners=tuple(_owner(module, path) for path in paths),
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
            if _parametrized(module, path):
                inner: nn.Module = module.parametrizations[path]  # type: ignore
                paths += [f"parametrizations.{path}.{n}" for n, _ in inner.named_parameters()]
            else:
                paths.append(path)
        found = []
        for path in paths:
            owner, local = _owner(module, path)
            parameters = owner._parameters  # has no .get in a ScriptModule
            parameter = parameters[local] if local in parameters else None  # noqa: SIM401
            if parameter is not None:
                found.append((path, parameter))
        return found

    def _shape(
        self, module: nn.Module, matrix: Matrix, parameter: nn.Parameter
    ) -> tuple[int, int, int]:
        if matrix.weight is not None or _parametrized(module, matrix.parameter):
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
    return f"no weight that the reader of {_kind(module)} names; register another to measure it"


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Direct parameters, those behind a parametrization of the module included."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter
    if parametrize.is_parametrized(module):
        for name, parameter in module.parametrizations.named_parameters():  # type: ignore
            yield f"parametrizations.{name}", parameter


def _parametrized(module: nn.Module, path: str) -> bool:
    return "." not in path and parametrize.is_parametrized(module, path)


def _weight(module: nn.Module, matrix: Matrix) -> Tensor:
    if matrix.weight is not None:
        return matrix.weight()
    if _parametrized(module, matrix.parameter):
        return _without_side_effects(module, matrix.parameter)
    owner, local = _owner(module, matrix.parameter)
    weight = owner._parameters[local]
    assert weight is not None
    return weight


def _without_side_effects(module: nn.Module, name: str) -> Tensor:
    """A parametrized weight, computed in eval mode.

    Spectral normalization steps its power iteration whenever the weight is read in training mode;
    measuring must not change a run.
    """
    inner = [m for m in module.parametrizations[name].modules() if m.training]  # type: ignore
    for m in inner:
        m.training = False
    try:
        weight: Tensor = getattr(module, name)
    finally:
        for m in inner:
            m.training = True
    return weight


def _owner(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, local = path.rpartition(".")
    return unwrap(module.get_submodule(parent)) if parent else module, local


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, any other as it is."""
    return tensor.to_local() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _whole(tensor: Tensor) -> Tensor:
    """A sharded tensor (DTensor) gathered from all ranks, any other as it is."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _is_inside(name: str, ancestor: str) -> bool:
    return ancestor == "" or name.startswith(ancestor + ".")


def _is_quantized_module(module: nn.Module) -> bool:
    """Modules of ``torch.ao.nn.quantized`` keep packed weights that are no parameters."""
    return ".quantized" in type(module).__module__ and callable(getattr(module, "weight", None))


def _kind(module: nn.Module) -> str:
    """The type's name, without what parametrizing and FSDP2 add to it."""
    name = type(module).__name__
    return name.removeprefix("Parametrized").removeprefix("FSDP")
