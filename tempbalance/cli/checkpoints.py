"""Checkpoints: weights from a file into a model made by the user's factory.

Nothing in a file is ever executed. What runs is the model factory, which the user names.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tempbalance.analysis.files import read_state as read_state
from tempbalance.analysis.formats import CONTAINERS, CheckpointError, one_line, tensors_of, told
from tempbalance.words import some

_COMPILED = "_orig_mod."


@dataclass(frozen=True)
class Loaded:
    """What :func:`load_into` did."""

    prefix: str  # taken off the checkpoint's keys ("model." of a Lightning module)
    ignored: tuple[str, ...]  # keys outside of the prefix


# --- models --------------------------------------------------------------------------------------


def build_model(spec: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Call the factory ``package.module:name`` with the arguments, for a model in eval mode.

    The current folder is searched too, as ``python -m`` does.

    Raises:
        CheckpointError: naming what could not be imported, found or called.
    """
    module_name, colon, attribute = spec.partition(":")
    if not (module_name and colon and attribute):
        raise CheckpointError(
            f"--model {spec!r} is not of the form package.module:factory, such as "
            "torchvision.models:resnet18"
        )
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        target: Any = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything
        raise CheckpointError(
            f"--model: importing {module_name!r} failed: {told(error)} (searched: the current "
            "folder and the installed packages)"
        ) from error
    for part in attribute.split("."):
        if not hasattr(target, part):
            raise CheckpointError(f"--model: {module_name!r} has no {attribute!r}")
        target = getattr(target, part)
    if not isinstance(target, nn.Module):
        try:
            target = target(**arguments)
        except Exception as error:  # likewise
            raise CheckpointError(
                f"--model: {spec}({_call(arguments)}) failed: {told(error)}; its arguments are "
                "given with --model-arg NAME=VALUE"
            ) from error
    if not isinstance(target, nn.Module):
        raise CheckpointError(
            f"--model: {spec} gave a {type(target).__name__}, not a torch.nn.Module"
        )
    return target.eval()


def load_into(model: nn.Module, state: Mapping[str, Tensor], source: str) -> Loaded:
    """Copy a state dict into a model, whichever wrapper the keys were saved under.

    Keys match as they are, without ``_orig_mod.`` and ``module.``, or without the prefix (such as
    ``model.`` or ``net.``) that makes all the model's keys match; what lies outside of that prefix
    is ignored. Buffers (running statistics, counters of integers) do not matter to a spectrum,
    missing or not.

    Raises:
        CheckpointError: for missing or unexpected weights, or other shapes, listing some.
    """
    wanted = {_clean(k): k for k in tensors_of(model.state_dict())}
    cleaned = {_clean(k): v for k, v in state.items()}
    prefix = _best_prefix(wanted, cleaned)
    inside = {k[len(prefix) :]: v for k, v in cleaned.items() if k.startswith(prefix)}
    held = {_clean(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    inside = {k: v for k, v in inside.items() if k in held or _matters(v)}
    ignored = tuple(k for k in cleaned if not k.startswith(prefix))
    _check_shapes(model, {wanted[k]: v for k, v in inside.items() if k in wanted}, source)
    meta = any(p.is_meta for p in model.parameters())
    try:
        # The class's own method: overriding ones (neuraloperator's) ask for more than tensors.
        result = nn.Module.load_state_dict(
            model, {wanted.get(k, k): v for k, v in inside.items()}, strict=False, assign=meta
        )
    except RuntimeError as error:
        raise CheckpointError(f"{source} does not fit the model: {one_line(error)}") from error
    missing = _missing_weights(model, result.missing_keys)
    unexpected = [
        k for k in result.unexpected_keys if (v := inside.get(_clean(k))) is None or v.ndim
    ]
    if missing or unexpected:
        lists = []
        if missing:
            lists.append(f"{len(missing)} missing ({some(missing)})")
        if unexpected:
            lists.append(f"{len(unexpected)} unexpected ({some(unexpected)})")
        raise CheckpointError(
            f"{source} does not fit the model: of its {len(inside)} keys, {' and '.join(lists)}; "
            "build the model that was saved (--model, --model-arg), or name other weights in the "
            "file with --key"
        )
    return Loaded(prefix, ignored)


def _clean(key: str) -> str:
    return key.replace(_COMPILED, "")


def _best_prefix(wanted: Mapping[str, str], have: Mapping[str, Tensor]) -> str:
    """The beginning of the checkpoint's keys without which most of the model's keys are there."""
    prefixes = {""}
    for key in have:
        parts = key.split(".")
        prefixes |= {".".join(parts[:n]) + "." for n in range(1, min(len(parts), 4))}

    def fit(prefix: str) -> tuple[int, bool, int]:
        usual = prefix in ("", *(f"{name}." for name in CONTAINERS))  # rather than "ema."
        return sum(prefix + key in have for key in wanted), usual, -len(prefix)

    return max(sorted(prefixes), key=fit)


def _check_shapes(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    wrong = []
    for key, target in tensors_of(model.state_dict(keep_vars=True)).items():
        lazy = isinstance(
            target, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer
        )
        if key in state and not lazy and state[key].shape != target.shape:
            wrong.append(f"{key} is {_size(state[key])} there and {_size(target)} in the model")
    if wrong:
        more = f", and {len(wrong) - 2} more" if len(wrong) > 2 else ""
        raise CheckpointError(
            f"{source} does not fit the model: {', '.join(wrong[:2])}{more}; build the model that "
            "was saved (--model-arg num_classes=..., width=...)"
        )


def _matters(tensor: Tensor) -> bool:
    """Whether a tensor may be a weight: counters and positions (integers) are buffers."""
    return tensor.is_floating_point() or tensor.is_complex()


def _missing_weights(model: nn.Module, missing: list[str]) -> list[str]:
    """Missing parameters that no other key fills: shared ones are often saved once."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    filled = {id(p) for name, p in parameters.items() if name not in missing}
    return [k for k in missing if k in parameters and id(parameters[k]) not in filled]


# --- words ---------------------------------------------------------------------------------------


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _call(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v!r}" for k, v in arguments.items())
