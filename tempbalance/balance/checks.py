"""Checks: options that are out of range and states that do not fit, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tempbalance.balance.units import Unit
from tempbalance.layers.find import Layer, Layers
from tempbalance.words import some


def check_options(
    every: int, start: int, stop: int | None, ramp: int, min_eigs: int, unit: Unit, delay: int
) -> None:
    """Raises ValueError for an option of a balancer that is out of range, naming it."""
    for name, value, least in (
        ("every", every, 1),
        ("start", start, 0),
        ("ramp", ramp, 0),
        ("min_eigs", min_eigs, 2),
        ("delay", delay, 0),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if stop is not None and not (isinstance(stop, int) and stop > start):
        raise ValueError(
            f"stop must be an integer after start={start}, got {stop!r}; None never stops"
        )
    if delay > every:
        raise ValueError(
            f"delay={delay} is longer than every={every}: a measurement would begin before the "
            f"last one takes effect. Use a delay of at most {every}, or a larger every"
        )
    if not callable(unit) and unit not in ("layer", "block", "type"):
        raise ValueError(f"unit must be 'layer', 'block', 'type' or a function, got {unit!r}")


def checked_patterns(exclude: Any) -> tuple[str, ...]:
    """Patterns of layers; raises ValueError for a lone one, TypeError for what is none."""
    if isinstance(exclude, str):
        raise ValueError(f"exclude takes a list of patterns: exclude=[{exclude!r}]")
    patterns = tuple(exclude) if isinstance(exclude, Iterable) else (exclude,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"exclude takes a list of patterns (text) of layers, got {exclude!r}")
    return patterns


def check_flags(**flags: Any) -> None:
    """Raises TypeError for what is neither True nor False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def check_version(state: Mapping[str, Any], version: int) -> None:
    """Raises ValueError for the state of another release."""
    if state.get("version") != version:
        raise ValueError(
            f"this balancer state has version {state.get('version')!r}; this release of "
            f"tempbalance reads version {version}"
        )


def check_layers(saved: Mapping[str, Any], layers: Sequence[Layer]) -> None:
    """Raises ValueError if the saved layers (shapes by name) are not these, naming them."""
    here = {layer.name: list(layer.shape) for layer in layers}
    gone = [name for name in saved if name not in here]
    new = [name for name in here if name not in saved]
    changed = [
        f"{n} ({saved[n]} in the checkpoint, {here[n]} here)"
        for n in here
        if n in saved and list(saved[n]) != here[n]
    ]
    differences = [
        f"{what}: {some(names)}"
        for what, names in (
            ("only in the checkpoint", gone),
            ("only in this model", new),
            ("of another shape", changed),
        )
        if names
    ]
    if differences:
        raise ValueError(
            "the checkpoint balances other layers than this model. "
            + "; ".join(differences)
            + ". Build the same model, with the same skip_first, skip_last, min_eigs, exclude and "
            "fused, and put the same parameters into the optimizer."
        )


def nothing_to_balance(
    found: Layers, min_eigs: int, skip_first: bool, skip_last: bool, exclude: Sequence[str] = ()
) -> str:
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
            "no layer to balance: of the layers that can be measured none is left by the "
            f"options (min_eigs={min_eigs}, skip_first={skip_first}, "
            f"skip_last={skip_last}, exclude={list(exclude)}) or has parameters in the "
            f"optimizer. Measurable layers and their numbers of eigenvalues: {small}; "
            "lower min_eigs to let small ones in"
        )
    reasons = "; ".join(f"{s.name}: {s.reason}" for s in found.skipped[:5])
    return f"no layer to balance: the model has no weight matrix ({reasons or 'no parameter'})"
