"""Layer: one measured weight, or why there is none; and what shares a learning rate with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tempbalance.layers.walk import local_part


@dataclass(frozen=True, eq=False)
class Layer:
    """One measured weight: where it is, its shape as a stack of matrices, and how to read it.

    ``parameters`` are the names of the parameters that take its learning rate: its weight, the
    bias that is named as the weight is (``bias_hh_l0``) and, for the first weight of a module,
    the module's other vectors.
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
    guessed: bool = False  # no reader knows the module: a matrix by its name and shape alone

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
        storages = {local_part(tensor).untyped_storage()._cdata for tensor in held}
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
class Host:
    """Parameters that must share a rate: those of one layer, or of layers with a weight in common.

    ``name`` is the layer's, or what the names of several have in common (q, k and v of one
    attention); ``layers`` are the layers' names; ``norms`` the normalizations that follow.
    """

    name: str
    layers: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    norms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layers:
    """What :func:`find_layers` found, in definition order."""

    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...]
    numel: int  # real numbers of the whole model, shared ones once
    hosts: tuple[Host, ...] = ()  # which parameters share a rate, found once with the layers
