"""Hosts: which parameters share a layer's learning rate, the norms that follow it among them."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from tempbalance.layers.layer import Host as Host
from tempbalance.layers.layer import Layer
from tempbalance.layers.walk import join
from tempbalance.readers import Role, is_norm, role

_NUMBERED = re.compile(r"\D+(\d+)")  # bn3, conv3, shortcut.conv3


def find_hosts(
    modules: Sequence[tuple[str, nn.Module]], layers: Sequence[Layer]
) -> tuple[Host, ...]:
    """The hosts of a model, in definition order, each normalization bound to one.

    A normalization follows, within its parent module: the layer of the same number (``bn3`` and
    ``conv3``), else the nearest layer before it, else the nearest after it. One without any keeps
    the base rate.

    Args:
        modules: as from :func:`~tempbalance.layers.walk.named_modules`.
        layers: of that model, in the order of its modules.
    """
    merged: list[tuple[list[str], list[nn.Parameter]]] = []
    where: dict[int, int] = {}
    host_of_layer: dict[str, int] = {}
    for layer in layers:
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
    for norm_name, norm, layer_name in _bindings(modules, layers):
        index = host_of_layer[layer_name]
        own = [p for p in norm.parameters() if id(p) not in where]
        where.update((id(p), index) for p in own)
        merged[index][1].extend(own)
        if own:
            norms.setdefault(index, []).append(norm_name)
    return tuple(
        Host(_common(names), tuple(names), tuple(parameters), tuple(norms.get(i, ())))
        for i, (names, parameters) in enumerate(merged)
    )


def without_norms(hosts: Sequence[Host], model: nn.Module) -> tuple[Host, ...]:
    """The same hosts, without the normalizations that follow them: those are then nobody's."""
    own = {id(p) for module in model.modules() if is_norm(module) for p in module.parameters()}
    return tuple(
        replace(host, parameters=tuple(p for p in host.parameters if id(p) not in own), norms=())
        if host.norms
        else host
        for host in hosts
    )


def _bindings(
    modules: Sequence[tuple[str, nn.Module]], layers: Sequence[Layer]
) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, module, layer) for every normalization that has a host."""
    position = {id(module): i for i, (_, module) in enumerate(modules)}
    # Below every module: the places of its layers in order, their names, and the first of a number.
    places: dict[str, list[int]] = {}
    names: dict[str, list[str]] = {}
    numbered: dict[tuple[str, str], str] = {}
    for layer in layers:
        place = position[id(layer.module)]
        path = modules[place][0]
        for parent in _ancestors(path):
            places.setdefault(parent, []).append(place)
            names.setdefault(parent, []).append(layer.name)
            if number := _NUMBERED.fullmatch(path[len(parent) :].lstrip(".")):
                numbered.setdefault((parent, number[1]), layer.name)
    for i, (name, module) in enumerate(modules):
        if not is_norm(module):
            continue
        parent, _, local = name.rpartition(".")
        if not (family := names.get(parent)):
            continue
        number = _NUMBERED.fullmatch(local)
        same = numbered.get((parent, number[1])) if number else None
        before = bisect.bisect_left(places[parent], i)
        yield name, module, same or family[max(before - 1, 0)]


def _ancestors(path: str) -> Iterator[str]:
    """The modules that a module lies in, the root ("") first."""
    yield ""
    for i, letter in enumerate(path):
        if letter == ".":
            yield path[:i]


def followers(
    module: nn.Module, rest: Sequence[str], weights: Sequence[str], measured: Sequence[int]
) -> dict[int, list[str]]:
    """Which of a module's other parameters take the rate of which of its weights, by place.

    A bias goes with the weight that is named as it is, measured or not; any other parameter with
    the first weight that is measured. Tokens and tables keep the base rate.

    Args:
        module: the module that holds them.
        rest: names of the parameters that are no weight.
        weights: names of the weights; several where one is cut into parts.
        measured: places of those that are measured.
    """
    if not measured:
        return {}
    known, first = set(weights), dict[str, int]()
    for i in measured:
        first.setdefault(weights[i], i)
    found: dict[int, list[str]] = {}
    for path in rest:
        if role(module, path.rpartition(".")[2]) in (Role.TOKEN, Role.POSITION, Role.TABLE):
            continue
        weight = next((name for name in _weights_of_bias(path) if name in known), None)
        place = first.get(weight) if weight else measured[0]
        if place is not None:
            found.setdefault(place, []).append(path)
    return found


def _weights_of_bias(path: str) -> Iterator[str]:
    """Names that the weight of a bias may have: weight_ih_l0, gate_up_proj, w1."""
    if "bias" in path:
        yield path.replace("bias", "weight")
        yield path.removesuffix("_bias")
    elif re.fullmatch(r"b\d*", path):
        yield path.replace("b", "w")


def _common(names: Sequence[str]) -> str:
    """The name of a host: its only layer's, or the part that all its layers' names begin with."""
    if len(names) == 1:
        return names[0]
    columns = zip(*(name.split(".") for name in names), strict=False)
    same = itertools.takewhile(lambda column: len(set(column)) == 1, columns)
    return join(*(column[0] for column in same)) or "+".join(names)
