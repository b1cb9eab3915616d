"""State: saved states that do not fit, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tempbalance.layers import Layer
from tempbalance.words import some

# Of the states that are saved now.
VERSION = 2


def check_version(state: Mapping[str, Any]) -> None:
    """Raises ValueError for the state of another release, with the cure."""
    if state.get("version") != VERSION:
        raise ValueError(
            f"this balancer state has version {state.get('version')!r}; this release of "
            f"tempbalance reads version {VERSION}. Go on with the release that saved it, or load "
            "the states of model, optimizer and schedule alone: the model is then measured anew"
        )


def check_layers(saved: Mapping[str, Any], layers: Sequence[Layer]) -> None:
    """Raises ValueError if the saved layers (shapes by name) are not these, naming them."""
    here = {layer.name: list(layer.shape) for layer in layers}
    changed = [
        f"{n} ({saved[n]} in the checkpoint, {here[n]} here)"
        for n in here
        if n in saved and list(saved[n]) != here[n]
    ]
    differences = [
        f"{what}: {some(names)}"
        for what, names in (
            ("only in the checkpoint", [name for name in saved if name not in here]),
            ("only in this model", [name for name in here if name not in saved]),
            ("of another shape", changed),
        )
        if names
    ]
    if differences:
        raise ValueError(
            "the checkpoint balances other layers than this model. "
            + "; ".join(differences)
            + ". Build the same model, with the same skip_first, skip_last, min_eigs, exclude, "
            "fixed and fused, and put the same parameters into the optimizer."
        )
