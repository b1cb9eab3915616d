"""Select: which layers take part, which modules have a fixed multiplier, and why none is left."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Iterable

from torch import nn

from tempbalance.balance.options import Options
from tempbalance.layers import Host, Layer, Layers
from tempbalance.layers.walk import kind_of, named_modules
from tempbalance.spectra.by_layer import AnyWindows, ByLayer
from tempbalance.words import some


def balanced(
    found: Layers, options: Options, among: Collection[int] | None, fixed: Iterable[Host]
) -> tuple[Layer, ...]:
    """The layers that are measured and vote.

    Args:
        among: ids of the parameters to balance; all of them without.
        fixed: hosts that have a multiplier of their own.
    """
    elsewhere = {id(p) for host in fixed for p in host.parameters}

    def able(layer: Layer) -> bool:
        ids = {id(p) for p in layer.tensors()}
        return (
            layer.eigenvalues >= options.min_eigs
            and not any(matches(p, layer.name, layer.kind) for p in options.exclude)
            and (among is None or not ids.isdisjoint(among))
            and ids.isdisjoint(elsewhere)
        )

    if options.ends == "measurable":
        return tuple(layer for layer in _without_ends(found.layers, options) if able(layer))
    return _without_ends(tuple(filter(able, found.layers)), options)


def _without_ends(layers: tuple[Layer, ...], options: Options) -> tuple[Layer, ...]:
    return layers[int(options.skip_first) : len(layers) - int(options.skip_last)]


def fixed_hosts(model: nn.Module, options: Options) -> list[tuple[Host, float]]:
    """The modules with a fixed multiplier, by name, with their parameters.

    Raises:
        ValueError: for a pattern that matches no module with parameters.
    """
    out: list[tuple[Host, float]] = []
    taken: set[int] = set()
    modules = list(named_modules(model)) if options.fixed else []
    for pattern, value in (options.fixed or {}).items():
        before = len(out)
        known = False
        for name, module in modules:
            if not matches(pattern, name, kind_of(module)):
                continue
            parameters = list(dict.fromkeys(module.parameters()))
            known = known or bool(parameters)
            own = tuple(p for p in parameters if id(p) not in taken)
            taken.update(map(id, own))
            if own:
                out.append((Host(name, (name,), own), value))
        if len(out) == before and not known:
            names = some([name for name, module in modules if [*module.parameters(recurse=False)]])
            raise ValueError(
                f"fixed: {pattern!r} matches no module with parameters, by name or type; there are "
                f"{names}"
            )
    return out


def matches(pattern: str, name: str, kind: str) -> bool:
    """Whether a pattern is of this name or type."""
    return any(fnmatch.fnmatchcase(text, pattern) for text in (name, kind))


def unmatched(found: Layers, options: Options) -> list[str]:
    """Patterns of ``exclude`` that match no layer."""
    return [
        pattern
        for pattern in options.exclude
        if not any(matches(pattern, x.name, x.kind) for x in found.layers)
    ]


def idle_windows(found: Layers, windows: AnyWindows) -> list[str]:
    """What to say of patterns of ``windows`` that no layer is measured by, but for ``"*"``."""
    if not isinstance(windows, ByLayer):
        return []
    said = []
    for pattern in windows.idle(found.layers):
        if pattern == "*":  # for all others, of which there may be none
            continue
        if any(matches(pattern, x.name, x.kind) for x in found.layers):
            said.append(
                f"windows: {pattern!r} has no effect: an earlier pattern matches every layer that "
                "it does. Put it first"
            )
            continue
        words = dict.fromkeys(text for x in found.layers for text in (x.name, x.kind))
        near = difflib.get_close_matches(pattern.strip("*"), words, 3, 0.4) or list(words)
        said.append(
            f"windows: {pattern!r} matches no layer, by name or type, and has no effect; the "
            f"nearest are {some(near)}"
        )
    return said


def nothing_to_balance(found: Layers, options: Options) -> str:
    """Why no layer of a model is left to balance."""
    small = ", ".join(f"{x.name} ({x.eigenvalues})" for x in found.layers[:5])
    if found.layers and not any(x.trainable for x in found.layers):
        return (
            f"no layer to balance: the layers that can be measured are frozen ({small}). What "
            "trains beside them has no matrix of its own here; of adapters LoRA and DoRA are "
            "known, for others register a reader (tempbalance.readers.register)"
        )
    if found.layers:
        return (
            "no layer to balance: of the layers that can be measured none is left by the options "
            f"(min_eigs={options.min_eigs}, skip_first={options.skip_first}, "
            f"skip_last={options.skip_last}, exclude={list(options.exclude)}) or has parameters in "
            f"the optimizer. Measurable layers and their numbers of eigenvalues: {small}; lower "
            "min_eigs to let small ones in"
        )
    reasons = "; ".join(f"{s.name}: {s.reason}" for s in found.skipped[:5])
    return f"no layer to balance: the model has no weight matrix ({reasons or 'no parameter'})"
