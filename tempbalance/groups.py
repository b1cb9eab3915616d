"""Groups: what is changed. An optimizer's param groups, split so that each layer has its own.

A layer's group holds its weight, its bias, and the normalization that follows it. The optimizer
is changed in place: options, state and the objects it holds stay as they were.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tempbalance.layers import Layers, join, named_modules
from tempbalance.readers import is_norm

Group = dict[str, Any]


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


def find_hosts(model: nn.Module, found: Layers) -> list[Host]:
    """The hosts of a model, in definition order, each normalization bound to one.

    A normalization follows, within its parent module: the layer of the same number (``bn3`` and
    ``conv3``), else the nearest layer before it, else the nearest after it. One without any keeps
    the base rate.
    """
    merged: list[tuple[list[str], list[nn.Parameter]]] = []
    where: dict[int, int] = {}
    host_of_layer: dict[str, int] = {}
    for layer in found.layers:
        parameters = layer.tensors()
        index = next((where[id(p)] for p in parameters if id(p) in where), len(merged))
        if index == len(merged):
            merged.append(([], []))
        merged[index][0].append(layer.name)
        host_of_layer[layer.name] = index
        for p in parameters:
            if id(p) not in where:
                where[id(p)] = index
                merged[index][1].append(p)
    norms: dict[int, list[str]] = {}
    for norm_name, norm, layer_name in _bindings(model, found):
        index = host_of_layer[layer_name]
        own = [p for p in norm.parameters() if id(p) not in where]
        where.update((id(p), index) for p in own)
        merged[index][1].extend(own)
        if own:
            norms.setdefault(index, []).append(norm_name)
    return [
        Host(_common(names), tuple(names), tuple(parameters), tuple(norms.get(i, ())))
        for i, (names, parameters) in enumerate(merged)
    ]


def _bindings(model: nn.Module, found: Layers) -> Iterable[tuple[str, nn.Module, str]]:
    """(name, module, layer) for every normalization that has a host."""
    modules = list(named_modules(model))
    position = {id(module): i for i, (_, module) in enumerate(modules)}
    places = [(position[id(layer.module)], layer.name) for layer in found.layers]
    layers = [(place, modules[place][0], name) for place, name in places]
    for i, (name, module) in enumerate(modules):
        if not is_norm(module):
            continue
        parent, _, local = name.rpartition(".")
        family = [
            (place, layer_name, module_name)
            for place, module_name, layer_name in layers
            if not parent or module_name.startswith(parent + ".")
        ]
        number = re.fullmatch(r"\D+(\d+)", local)
        same = [
            layer_name
            for _, layer_name, module_name in family
            if number
            and (m := re.fullmatch(r"\D+(\d+)", module_name[len(parent) :].lstrip(".")))
            and m[1] == number[1]
        ]
        before = [layer_name for place, layer_name, _ in family if place < i]
        after = [layer_name for place, layer_name, _ in family if place > i]
        host = same[:1] or before[-1:] or after[:1]
        if host:
            yield name, module, host[0]


def _common(names: Sequence[str]) -> str:
    """The name of a host: its only layer's, or the part that all its layers' names begin with."""
    if len(names) == 1:
        return names[0]
    columns = zip(*(name.split(".") for name in names), strict=False)
    same = itertools.takewhile(lambda column: len(set(column)) == 1, columns)
    return join(*(column[0] for column in same)) or "+".join(names)


class Grouping:
    """An optimizer split by the hosts of a model, kept in step with it.

    Args:
        optimizer: split in place, at once; splitting again changes nothing.
        model: the model whose layers get groups of their own.
        found: its layers.

    Raises:
        ValueError: if the optimizer holds none of the layers' parameters, or is of a kind that
            cannot have several groups.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, found: Layers) -> None:
        if type(optimizer).__name__ in ("LBFGS", "ZeroRedundancyOptimizer"):
            raise ValueError(
                f"{type(optimizer).__name__} cannot have a learning rate per layer; use SGD, "
                "AdamW or another optimizer with param groups of its own"
            )
        self.optimizer = optimizer
        self.original = [list(group["params"]) for group in optimizer.param_groups]
        self.original_sizes = [len(params) for params in self.original]
        self.layers: list[tuple[str, ...]] = []
        self.hosts: list[Host] = []
        self.source = self.split(model, found)

    def split(self, model: nn.Module, found: Layers, start: int = 0) -> list[int]:
        """Split the groups from ``start`` on; for every group the index of the one it came from."""
        self.hosts = find_hosts(model, found)
        host_of = {id(p): host for host in self.hosts for p in host.parameters}
        groups = self.optimizer.param_groups
        if not any(id(p) in host_of for group in groups for p in group["params"]):
            raise ValueError(
                "the optimizer holds no parameter of the model's layers: build it from this "
                "model's parameters (after wrapping or sharding the model, if you do)"
            )
        split: list[Group] = []
        source: list[int] = []
        taken: set[str] = set()
        for index, group in enumerate(groups):
            parts = partition(group, host_of)
            keep = index < start or (len(parts) == 1 and "name" in group)
            for host, members in parts:
                new = group if len(parts) == 1 else _part_of(group, members)
                if not keep or group.get("name") in taken:
                    new["name"] = _unique(_label(host, index, groups), taken)
                taken.add(new.get("name", ""))
                split.append(new)
                source.append(index)
        groups[:] = split
        self.locate(model, found)
        return source

    def locate(self, model: nn.Module, found: Layers) -> None:
        """Look up again which layers each group holds; one that holds several hosts has none."""
        self.hosts = find_hosts(model, found)
        host_of = {id(p): host for host in self.hosts for p in host.parameters}
        self.layers = []
        for group in self.optimizer.param_groups:
            hosts = {host_of[id(p)].layers for p in group["params"] if id(p) in host_of}
            self.layers.append(hosts.pop() if len(hosts) == 1 else ())

    @property
    def names(self) -> list[str]:
        return [str(group.get("name", i)) for i, group in enumerate(self.optimizer.param_groups)]

    def factors(self, multipliers: Mapping[str, float]) -> list[float]:
        """A multiplier for every group: the mean over its layers, 1 where it has none."""
        out = []
        for layers in self.layers:
            known = [multipliers.get(name, 1.0) for name in layers]
            out.append(sum(known) / len(known) if len(known) > 1 else known[0] if known else 1.0)
        return out

    def is_unsplit(self, state: Mapping[str, Any]) -> bool:
        """Whether an optimizer's state dict is of the groups as they were before the split."""
        sizes = [len(group["params"]) for group in state["param_groups"]]
        now = [len(group["params"]) for group in self.optimizer.param_groups]
        return sizes == self.original_sizes and sizes != now

    def expand(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """An optimizer's state dict from before the split, as one of the split groups."""
        saved_id = {
            id(p): key
            for params, group in zip(self.original, state["param_groups"], strict=True)
            for p, key in zip(params, group["params"], strict=True)
        }
        of_group = {id(p): i for i, params in enumerate(self.original) for p in params}
        groups = []
        for group in self.optimizer.param_groups:
            saved = state["param_groups"][of_group[id(group["params"][0])]]
            own = {"name": group["name"]} if "name" in group else {}
            keys = [saved_id[id(p)] for p in group["params"]]
            new = {**_copied(saved), **own, "params": keys}
            if "param_names" in group:
                new["param_names"] = list(group["param_names"])
            groups.append(new)
        return {**state, "param_groups": groups}


def partition(group: Group, host_of: Mapping[int, Host]) -> list[tuple[Host | None, list[int]]]:
    """A group's parameters by host, in the order of first appearance; none for an empty group."""
    parts: dict[int, tuple[Host | None, list[int]]] = {}
    for i, p in enumerate(group["params"]):
        host = host_of.get(id(p))
        parts.setdefault(id(host), (host, []))[1].append(i)
    return list(parts.values())


def _part_of(group: Group, members: Sequence[int]) -> Group:
    """A group of some of another's parameters, with its options; rate tensors are not shared."""
    new = _copied(group)
    new["params"] = [group["params"][i] for i in members]
    if "param_names" in group:
        new["param_names"] = [group["param_names"][i] for i in members]
    return new


def _copied(group: Mapping[str, Any]) -> Group:
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


# --- schedulers ----------------------------------------------------------------------------------

# Lists with an entry a param group, in torch's schedulers.
_PER_GROUP = (
    "base_lrs",
    "_last_lr",
    "lr_lambdas",
    "min_lrs",
    "max_lrs",
    "base_momentums",
    "max_momentums",
)


def expand_scheduler(scheduler: Any, source: Sequence[int], before: int) -> None:
    """Grow a scheduler's per-group lists, and those of the schedulers it holds, with the split.

    Args:
        scheduler: any object that holds such lists; those of another length are left alone.
        source: for each group the index of the group that it came from.
        before: the number of groups before the split.

    Raises:
        ValueError: if a per-group list is closed (a tuple, or in an attribute not known here).
    """
    for child in _children(scheduler):
        expand_scheduler(child, source, before)
    if list(source) == list(range(before)):
        return
    for name in _PER_GROUP:
        values = scheduler.__dict__.get(name)
        if isinstance(values, list) and len(values) == before:
            values[:] = [_clone(values[i]) for i in source]


def extend_scheduler(scheduler: Any, groups: Sequence[Group], known: int) -> None:
    """Give param groups added behind the first ``known`` the schedule of the first group.

    Their own rate is where they start: what a scheduler keeps in a group (``max_lr`` and the like)
    or in a list of its own is copied from the first.
    """
    for group in groups[known:]:
        group.setdefault("initial_lr", _clone(group["lr"]))
        for key, value in groups[0].items():
            if key not in ("params", "name", "param_names"):
                group.setdefault(key, _clone(value))
    for child in _children(scheduler):
        extend_scheduler(child, groups, known)
    for name in _PER_GROUP:
        values = scheduler.__dict__.get(name)
        if isinstance(values, list) and len(values) == known:
            own = {"base_lrs": "initial_lr", "_last_lr": "lr"}.get(name)
            values += [_clone(g[own] if own else values[0]) for g in groups[known:]]


def check_scheduler(scheduler: Any, groups: int) -> None:
    """Refuse a scheduler that cannot serve so many groups.

    Raises:
        ValueError: naming the scheduler, the attribute and the cure.
    """
    for child in _children(scheduler):
        check_scheduler(child, groups)
    for name in _PER_GROUP:
        values = scheduler.__dict__.get(name)
        if isinstance(values, list | tuple) and len(values) != groups:
            _refuse(scheduler, f"its {name!r} has {len(values)} entries")
    compute = getattr(scheduler, "get_lr", None)
    if _children(scheduler) or compute is None:
        return
    saved = [dict(group) for group in scheduler.optimizer.param_groups]
    flags = dict(scheduler.__dict__)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rates = compute()
    except NotImplementedError:
        return
    except (ValueError, IndexError, TypeError, KeyError) as error:
        _refuse(scheduler, f"its get_lr fails with {error!r}")
    finally:
        for group, before in zip(scheduler.optimizer.param_groups, saved, strict=True):
            group.update(before)
        scheduler.__dict__.update(flags)
    if len(rates) != groups:
        _refuse(scheduler, f"its get_lr gives {len(rates)} rates")


def _refuse(scheduler: Any, what: str) -> None:
    raise ValueError(
        f"{type(scheduler).__name__} cannot follow the split into a param group per layer: {what}. "
        "Keep its per-group values in lists named as torch's schedulers name them (base_lrs, "
        "lr_lambdas, ...), or build it after tempbalance.TempBalanceLR(optimizer, model) and use "
        "tempbalance.StepHooks, which needs no per-group list."
    )


def _children(scheduler: Any) -> list[Any]:
    """Schedulers that a scheduler holds (SequentialLR, ChainedScheduler, warm-up wrappers)."""
    found: list[Any] = []
    for value in scheduler.__dict__.values():
        items = value if isinstance(value, list | tuple) else [value]
        found += [item for item in items if isinstance(item, torch.optim.lr_scheduler.LRScheduler)]
    return found


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
