"""Parts: an optimizer's groups split by layer while it steps, and whole again after it.

Optimizers may count in their groups (a ``step``, a sum of weights). Each part keeps what the
optimizer wrote into it, as a group of its own would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tempbalance.layers import Host
from tempbalance.optim.groups import Group, by_parameter, part_of, partition

Scale = Callable[[Group, Host | None], None]
_Key = tuple[int, str]  # the place of the user's group, the host's name


class Parts:
    """The parts of an optimizer's groups.

    Args:
        scale: puts a host's factors into a part, which is a group of the optimizer's.
        fields: the entries that it writes.
    """

    def __init__(self, scale: Scale, fields: Sequence[str]) -> None:
        self._scale = scale
        # What an optimizer's writing is not kept of.
        self._fixed = {*fields, "params", "param_names"}
        self._hosts: dict[int, Host] = {}
        self._own: dict[_Key, dict[str, Any]] = {}  # what the optimizer wrote, by part
        self._left: dict[int, dict[str, Any]] = {}  # and what of it was left in the user's group
        self._whole: list[Group] | None = None  # the user's groups, while a step runs
        self._open: list[tuple[_Key, Group, dict[str, Any]]] = []

    @property
    def open(self) -> bool:
        """Whether the parts are in the place of the groups."""
        return self._whole is not None

    def locate(self, hosts: Sequence[Host]) -> None:
        """What parts there are."""
        self._hosts = by_parameter(hosts)

    def split(self, optimizer: Optimizer) -> None:
        """Put the parts in the place of the groups, each scaled by the factors of its host."""
        groups = optimizer.param_groups
        self._open = []
        for i, group in enumerate(groups):
            self._forget_what_was_written(i, group)
            for host, members in partition(group, self._hosts):
                key = (i, "" if host is None else host.name)
                part = part_of({**group, **self._own.get(key, {})}, members)
                self._scale(part, host)
                given = {k: _mark(v) for k, v in part.items() if k not in self._fixed}
                self._open.append((key, part, given))
        # The list stays the same object: wrappers (SAM) share it with the optimizer inside.
        self._whole = list(groups)
        groups[:] = [part for _, part, _ in self._open]

    def keep(self) -> None:
        """After a step: what the optimizer wrote into each part is the part's own from now on."""
        assert self._whole is not None
        self._left = {}
        for key, part, given in self._open:
            own = self._own.setdefault(key, {})
            for name, value in part.items():
                if name not in self._fixed and (name in own or not _same(value, given.get(name))):
                    own[name] = value
            left = self._left.setdefault(key[0], {})
            for name, value in own.items():
                if name not in left:  # the group shows what its first part has
                    left[name] = value.clone() if isinstance(value, Tensor) else value
        for i, left in self._left.items():
            self._whole[i].update(left)
            self._left[i] = {name: _mark(value) for name, value in left.items()}

    def restore(self, optimizer: Optimizer) -> None:
        """Put the user's groups back."""
        if self._whole is not None:
            optimizer.param_groups[:] = self._whole
        self._whole, self._open = None, []

    def _forget_what_was_written(self, i: int, group: Group) -> None:
        """Entries that the user, or a schedule, has written since hold for all parts."""
        for name, mark in self._left.get(i, {}).items():
            if not _same(group.get(name), mark):
                for (place, _), own in self._own.items():
                    if place == i:
                        own.pop(name, None)

    # --- state ---------------------------------------------------------------------------------

    def state_dict(self) -> list[dict[str, Any]]:
        """Plain values, a row a part that has entries of its own."""
        return [
            {"group": place, "host": host, "own": {k: _plain(v) for k, v in own.items()}}
            for (place, host), own in self._own.items()
            if own
        ]

    def load_state_dict(self, rows: Sequence[Mapping[str, Any]], optimizer: Optimizer) -> None:
        """As they were; the optimizer's own state is loaded by whoever loads it."""
        self._left = {}
        self._own = {
            (int(row["group"]), row["host"]): {
                k: _from_plain(v, optimizer.param_groups[int(row["group"])])
                for k, v in row["own"].items()
            }
            for row in rows
        }


def _mark(value: Any) -> tuple[Any, int]:
    """An object, and how often it was written in place."""
    if isinstance(value, Tensor) and not value.is_inference():
        return value, value._version
    return value, 0


def _same(value: Any, mark: tuple[Any, int] | None) -> bool:
    if mark is None:
        return False
    held, version = mark
    if isinstance(value, Tensor) or isinstance(held, Tensor):
        return value is held and _mark(value)[1] == version
    return value is held or bool(value == held)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    return value


def _from_plain(value: Any, group: Group) -> Any:
    if isinstance(value, Mapping) and set(value) == {"tensor", "dtype"}:
        dtype = getattr(torch, value["dtype"])
        devices = [v.device for v in group.values() if isinstance(v, Tensor)]
        return torch.tensor(value["tensor"], dtype=dtype, device=devices[0] if devices else "cpu")
    return value
