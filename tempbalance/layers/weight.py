"""Weight: a matrix that a reader named, in its module: its parameters, its shape, its values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tempbalance.layers.walk import (
    is_parametrized,
    is_sharded,
    owner_of,
    whole,
    without_side_effects,
)
from tempbalance.readers import Matrix, is_materialized


@dataclass(frozen=True, eq=False)
class Form:
    """A weight as a stack of matrices, or why it is none."""

    shape: tuple[int, int, int] = (0, 0, 0)  # (slices, rows, cols)
    copies: bool = False  # reading makes a tensor of its own
    reason: str = ""

    @property
    def numel(self) -> int:
        slices, rows, cols = self.shape
        return slices * rows * cols


@dataclass(frozen=True, eq=False)
class Weight:
    """One weight of a module."""

    module: nn.Module
    matrix: Matrix

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Path and parameter of all that the weight is made of, parametrizations resolved."""
        paths: list[str] = []
        for path in (self.matrix.parameter, *self.matrix.uses):
            if is_parametrized(self.module, path):
                inner: nn.Module = self.module.parametrizations[path]  # type: ignore
                paths += [f"parametrizations.{path}.{n}" for n, _ in inner.named_parameters()]
            else:
                paths.append(path)
        found = []
        for path in paths:
            owner, local = owner_of(self.module, path)
            parameters = owner._parameters  # has no .get in a ScriptModule
            parameter = parameters[local] if local in parameters else None  # noqa: SIM401
            if parameter is not None:
                found.append((path, parameter))
        return found

    def form(self) -> Form:
        """The shape that :meth:`read` will give, without touching the values.

        Raises:
            ValueError: where the reader gives no stack of matrices.
        """
        parameter = self.parameters()[0][1]
        if reason := self.matrix.reason or is_materialized(parameter):
            return Form(reason=reason)
        computed = self.matrix.weight is not None or is_parametrized(
            self.module, self.matrix.parameter
        )
        weight: Tensor = parameter
        if computed:
            with torch.no_grad():
                weight = self._whole()
        empty = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        slices = self.matrix.slices(empty)
        if slices.ndim != 3:
            raise ValueError(
                f"the reader of {type(self.module).__name__} gave a tensor of shape "
                f"{tuple(slices.shape)} for {self.matrix.parameter!r}; it must be "
                "(slices, rows, cols)"
            )
        count, rows, cols = slices.shape
        if min(rows, cols) < 2 or not count:
            reason = f"slices of {rows} x {cols} are vectors, which have no spectrum"
            return Form((count, rows, cols), reason=reason)
        view = slices.untyped_storage()._cdata == empty.untyped_storage()._cdata
        return Form((count, rows, cols), computed or is_sharded(parameter) or not view)

    def read(self) -> Tensor:
        """The weight as (slices, rows, cols), gathered where it is sharded."""
        return self.matrix.slices(whole(self._whole()))

    def _whole(self) -> Tensor:
        if self.matrix.weight is not None:
            return self.matrix.weight()
        if is_parametrized(self.module, self.matrix.parameter):
            return without_side_effects(self.module, self.matrix.parameter)
        owner, local = owner_of(self.module, self.matrix.parameter)
        weight = owner._parameters[local]
        assert weight is not None
        return weight
