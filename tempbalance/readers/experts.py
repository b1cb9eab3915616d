"""Experts: mixtures that keep all experts' weights in one parameter, and their routers.

Every library writes its own classes, one a model; they are known by what they have in common:
the number of experts, or a class name with Expert or Router in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn

from tempbalance.readers.guess import guess
from tempbalance.readers.matrix import Matrix, transposed_stack

_NUMBERS = ("num_experts", "n_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_NAMES = re.compile(r"expert|router|moe", re.IGNORECASE)


def is_mixture(module: nn.Module) -> bool:
    """Whether a module holds experts or chooses among them: by an attribute or its class's name."""
    return _count(module) > 0 or _NAMES.search(type(module).__name__) is not None


def experts(module: nn.Module) -> Iterator[Matrix]:
    """Each expert a matrix of (out, in), all of one parameter a stack; a router is one matrix."""
    turned = _is_transposed(module)
    for matrix in guess(module):
        weight = module._parameters[matrix.parameter]
        assert weight is not None
        if weight.is_complex() or (matrix.reason and not _counts(module, weight)):
            yield matrix
        elif weight.ndim == 3:
            yield Matrix(matrix.parameter, transposed_stack if turned else _stack)
        elif (count := getattr(module, "moe_num_experts", 0)) and weight.shape[0] > count:
            # DBRX: (experts * width, hidden); w2 leads back from the width, the others to it.
            yield Matrix(matrix.parameter, _Folded(count, turned=matrix.parameter == "w2"))
        else:
            yield Matrix(matrix.parameter) if weight.ndim == 2 else matrix


def _stack(weight: Tensor) -> Tensor:
    return weight


class _Folded:
    """A stack of experts that is stored as one matrix, expert below expert."""

    def __init__(self, count: int, turned: bool) -> None:
        self.count, self.turned = count, turned

    def __call__(self, weight: Tensor) -> Tensor:
        stack = weight.unflatten(0, (self.count, -1))
        return stack.mT if self.turned else stack


def _count(module: nn.Module) -> int:
    for name in _NUMBERS:
        count = getattr(module, name, None)
        if isinstance(count, int):
            return count
    return 0


def _counts(module: nn.Module, weight: Tensor) -> bool:
    """Whether a stack or a router has the size of the module's number of experts."""
    count = _count(module)
    if weight.ndim == 3:
        return weight.shape[0] == count
    return weight.ndim == 2 and count in weight.shape


def _is_transposed(module: nn.Module) -> bool:
    """Whether experts are stored as (in, out): they say so, or gate, up and down tell by shape."""
    if isinstance(said := getattr(module, "is_transposed", None), bool):
        return said
    up, down = (module._parameters.get(name) for name in ("gate_up_proj", "down_proj"))
    if up is None or down is None or up.ndim != 3 or down.ndim != 3:
        return False
    return up.shape[2] == 2 * down.shape[1]
