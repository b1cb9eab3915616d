"""Registry: the reader of a module's type."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from tempbalance.readers.experts import experts, is_mixture
from tempbalance.readers.guess import guess
from tempbalance.readers.matrix import Matrix

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
    return list(experts(module) if is_mixture(module) else guess(module))
