"""Groups: what is changed. An optimizer's param groups, split so that each layer has its own.

A layer's group holds its weight, its bias, and the normalization that follows it. The optimizer
is changed in place: options, state and the objects it holds stay as they were.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from tempbalance.layers import Host

Group = dict[str, Any]


class Grouping:
    """An optimizer split by the hosts of a model, kept in step with it.

    Args:
        optimizer: split in place, at once; splitting again changes nothing.
        hosts: what gets a group of its own.

    Raises:
        ValueError: if the optimizer holds none of the hosts' parameters.
    """

    def __init__(self, optimizer: Optimizer, hosts: Sequence[Host]) -> None:
        self.optimizer = optimizer
        self.original: list[list[nn.Parameter]] = []
        self.original_names: list[str | None] = []
        self.layers: list[tuple[str, ...]] = []
        self.hosts: list[Host] = []
        self.source: list[int] = []  # for each group the index in ``original`` it came from
        self.split(hosts)

    def split(self, hosts: Sequence[Host], start: int = 0) -> list[int]:
        """Split the groups from ``start`` on; for every group the index of the one it came from."""
        host_of = by_parameter(hosts)
        groups = self.optimizer.param_groups
        known = len(self.original)
        self.original += [list(group["params"]) for group in groups[start:]]
        self.original_names += [group.get("name") for group in groups[start:]]
        if not any(id(p) in host_of for group in groups for p in group["params"]):
            raise ValueError(
                "the optimizer holds no parameter of the model's layers: build it from this "
                "model's parameters (after wrapping or sharding the model, if you do)"
            )
        split: list[Group] = []
        source: list[int] = []
        taken: set[str] = set()
        for index, group in enumerate(groups):
            # A group that has been split, or holds no layer's weight alone, stays as it is.
            parts = partition(group, host_of) if index >= start else _undivided(group)
            keep = index < start or (len(parts) == 1 and "name" in group)
            for host, members in parts:
                new = group if len(parts) == 1 else part_of(group, members)
                if not keep or group.get("name") in taken:
                    new["name"] = _unique(_label(host, index, groups), taken)
                taken.add(new.get("name", ""))
                split.append(new)
                source.append(index)
        self.source += [known + index - start for index in source if index >= start]
        groups[:] = split
        _unshare(self.optimizer)
        self.locate(hosts)
        return source

    def locate(self, hosts: Sequence[Host]) -> None:
        """Look up again which layers each group holds; one that holds several hosts has none."""
        self.hosts = list(hosts)
        host_of = by_parameter(hosts)
        self.layers = []
        self._first = [id(group["params"][0]) for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            # A weight that is no layer's (pruned, say) stands for itself: its norm follows another.
            held = {host_of.get(id(p)) for p in group["params"] if id(p) in host_of or p.ndim > 1}
            host = held.pop() if len(held) == 1 else None
            self.layers.append(() if host is None else host.layers)

    def refine(self, source: Sequence[int]) -> None:
        """Another object has split the groups further; ``source`` is where each came from."""
        self.source = [self.source[i] for i in source]
        self.locate(self.hosts)

    def inherit(self, other: Grouping) -> None:
        """The groups were split by another object before: what they were before that."""
        self.original, self.original_names = list(other.original), list(other.original_names)
        self.source = list(other.source)

    def left(self) -> list[int]:
        """Which of the groups known so far are still in the optimizer, by their old places.

        Raises:
            RuntimeError: if groups are missing and the others cannot be told apart.
        """
        now = [id(p) for group in self.optimizer.param_groups for p in group["params"][:1]]
        left = [i for i, first in enumerate(self._first) if first in now]
        if [self._first[i] for i in left] == now[: len(left)]:
            return left
        if len(now) < len(self._first):
            raise RuntimeError(
                "param groups were removed from the optimizer and the others reordered; build the "
                "schedule and a new TempBalanceLR after that"
            )
        return list(range(len(self._first)))  # the parameters inside of groups were exchanged

    def forget(self, left: Sequence[int]) -> None:
        """The user has removed all groups but those of these places."""
        self._first = [self._first[i] for i in left]
        self.layers = [self.layers[i] for i in left]
        self.source = [self.source[i] for i in left]

    @property
    def names(self) -> list[str]:
        return [str(group.get("name", i)) for i, group in enumerate(self.optimizer.param_groups)]

    def describe(
        self,
        alphas: Mapping[str, float | None],
        factors: Sequence[float],
        values: Sequence[float],
        column: str = "rate",
    ) -> str:
        """A line a param group: its layers' alpha, its multiplier and value, the norms it holds."""
        norms = {host.layers: host.norms for host in self.hosts}
        width = max(5, *(len(name) for name in self.names))
        lines = [f"{'group':<{width}}  {'alpha':>7}  {'multiplier':>10}  {column:>10}  norms"]
        rows = zip(self.names, self.layers, factors, values, strict=True)
        for name, layers, factor, value in rows:
            known = [a for layer in layers if (a := alphas.get(layer)) is not None]
            alpha = f"{sum(known) / len(known):.3f}" if known else "-"
            follow = ", ".join(norms.get(layers, ()))
            line = f"{name:<{width}}  {alpha:>7}  {factor:>10.3f}  {value:>10.3e}  {follow}"
            lines.append(line.rstrip())
        return "\n".join(lines)

    def factors(self, multipliers: Mapping[str, float]) -> list[float]:
        """A multiplier for every group: the mean over its layers, 1 where it has none."""
        return [mean_multiplier(layers, multipliers) for layers in self.layers]


def mean_multiplier(layers: Sequence[str], multipliers: Mapping[str, float]) -> float:
    """The multiplier of layers that share a group: their mean, 1 where there is none."""
    known = [multipliers.get(name, 1.0) for name in layers]
    return sum(known) / len(known) if len(known) > 1 else known[0] if known else 1.0


def by_parameter(hosts: Iterable[Host]) -> dict[int, Host]:
    """The host of every parameter, by its id; of several that hold it the last one."""
    return {id(p): host for host in hosts for p in host.parameters}


def common(first: Sequence[Host], second: Sequence[Host]) -> tuple[Host, ...]:
    """Hosts of the parameters that share one of the first and one of the second, or lack one."""
    of_first, of_second = by_parameter(first), by_parameter(second)
    parts: dict[str, list[nn.Parameter]] = {}
    for p in dict.fromkeys(p for host in (*first, *second) for p in host.parameters):
        a, b = of_first.get(id(p)), of_second.get(id(p))
        same = a is not None and b is not None and a.name == b.name
        names = (a.name if a else "", b.name if b else "")
        parts.setdefault(names[0] if same else "|".join(names), []).append(p)
    return tuple(Host(name, (), tuple(held)) for name, held in parts.items())


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """All parameters of an optimizer, group by group."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _undivided(group: Group) -> list[tuple[Host | None, list[int]]]:
    return [(None, list(range(len(group["params"]))))]


def _unshare(optimizer: Optimizer) -> None:
    """Give every group tensors of its own: one in two groups would be scaled twice.

    torch puts the same ``lr`` tensor into all groups, and into those added later.
    """
    seen = {id(value) for value in optimizer.defaults.values() if isinstance(value, Tensor)}
    for group in optimizer.param_groups:
        for key, value in group.items():
            if isinstance(value, Tensor):
                if id(value) in seen:
                    group[key] = value.clone()
                seen.add(id(value))


def partition(group: Group, host_of: Mapping[int, Host]) -> list[tuple[Host | None, list[int]]]:
    """A group's parameters by host, in the order of first appearance; none for an empty group."""
    parts: dict[int, tuple[Host | None, list[int]]] = {}
    for i, p in enumerate(group["params"]):
        host = host_of.get(id(p))
        parts.setdefault(id(host), (host, []))[1].append(i)
    return list(parts.values())


def part_of(group: Group, members: Sequence[int]) -> Group:
    """A group of some of another's parameters, with its options; rate tensors are not shared."""
    new = copied(group)
    new["params"] = [group["params"][i] for i in members]
    if "param_names" in group:
        new["param_names"] = [group["param_names"][i] for i in members]
    return new


def copied(group: Mapping[str, Any]) -> Group:
    """A copy in which nothing that is written in place is shared."""
    return {key: v.clone() if isinstance(v, Tensor) else v for key, v in group.items()}


def _label(host: Host | None, index: int, groups: Sequence[Group]) -> list[str]:
    """The name for a part of a user's group, and the same with the group's own name added."""
    base = host.name if host is not None else "other"
    own = groups[index].get("name")
    if own is None:
        decays = [group.get("weight_decay", 0) for group in groups]
        own = "no_decay" if not decays[index] and any(decays) else f"group{index}"
    return [base, f"{base}|{own}"]


def _unique(candidates: Sequence[str], taken: set[str]) -> str:
    for name in candidates:
        if name not in taken:
            return name
    last = candidates[-1]
    return next(name for i in itertools.count(2) if (name := f"{last}|{i}") not in taken)
