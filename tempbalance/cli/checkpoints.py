"""Checkpoints: weights from a file into a model made by the user's factory.

Nothing in a file is ever executed: pickles are read with ``weights_only=True``, safetensors hold no
code. What runs is the model factory, which the user names.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tempbalance.words import some

# Where frameworks put the weights in a checkpoint, the usual first.
_CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "network", "module")
_COMPILED = "_orig_mod."
_SHOWN = 4  # names of keys in a message


class CheckpointError(ValueError):
    """A checkpoint or a model factory that cannot be used; one line with the cure."""


@dataclass(frozen=True)
class Loaded:
    """What :func:`load_into` did."""

    prefix: str  # taken off the checkpoint's keys ("model." of a Lightning module)
    ignored: tuple[str, ...]  # keys outside of the prefix


# --- files ---------------------------------------------------------------------------------------


def read_state(path: str | os.PathLike[str], key: str | None = None) -> dict[str, Tensor]:
    """The state dict in a file: plain, under one of the usual keys or ``key``, or safetensors.

    Raises:
        CheckpointError: if the file cannot be read safely, or holds no weights.
    """
    file = Path(path)
    if file.is_dir():
        file = _weights_in(file)
    if not file.exists():
        raise CheckpointError(f"no such file: {file}")
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    if file.suffix == ".json":
        return _read_shards(file)
    content = _read_pickle(file)
    if key is not None:
        if not isinstance(content, Mapping) or key not in content:
            raise CheckpointError(f"{file} has no key {key!r}; {_inside(content)}")
        content = content[key]
    state = _find_state(content)
    if not state:
        cure = "name the right key with --key" if content else "save model.state_dict()"
        raise CheckpointError(f"{file} holds no state dict; {_inside(content)}; {cure}")
    return state


def _weights_in(folder: Path) -> Path:
    """The file of a folder that Hugging Face's save_pretrained wrote."""
    names = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json",
             "pytorch_model.bin")  # fmt: skip
    for name in names:
        if (folder / name).is_file():
            return folder / name
    cure = "name the file with the weights in it"
    if (folder / ".metadata").is_file():
        cure = (
            "a distributed checkpoint becomes a file with python -m "
            "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
        )
    raise CheckpointError(f"{folder} is a folder: {cure}")


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The weights that an index of several files names, as Hugging Face writes it."""
    try:
        content = json.loads(index.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index} is no readable JSON: {_told(error)}") from error
    files = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(files, Mapping):
        raise CheckpointError(
            f"{index} holds no weights: it is JSON without the weight_map of an index; name the "
            "file with the weights"
        )
    state: dict[str, Tensor] = {}
    for name in sorted(set(files.values())):
        state |= read_state(index.parent / name)
    lost = [key for key in files if key not in state]
    if lost:
        raise CheckpointError(f"{index} names weights that its files lack: {some(lost)}")
    return state


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(
            f"reading {file} needs safetensors: pip install 'tempbalance[cli]'"
        ) from error
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is no readable safetensors file: {error}") from error


def _read_pickle(file: Path) -> Any:
    try:
        # A mapped file is read as its tensors are copied, and never held in memory as a whole.
        return torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except pickle.UnpicklingError as error:
        with file.open("rb") as start:
            if start.read(1) not in (b"\x80", b"P"):  # a pickle's, or a zip file's
                raise CheckpointError(f"{file} is no checkpoint that torch.save wrote") from error
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"a Python object ({named[1]})" if named else "more than tensors"
        raise CheckpointError(
            f"{file} holds {what} and was not opened, since unpickling it could run code; if you "
            "trust it, load it yourself with torch.load(FILE, weights_only=False), torch.save the "
            "state dict alone, and give that file"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"{file} is no checkpoint that torch.load can read (truncated, or another format?): "
            f"{_told(error)}"
        ) from error


def _find_state(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    for container in _CONTAINERS:
        state = _tensors(content.get(container))
        if state:
            return state
        nested = content.get(container)
        if isinstance(nested, Mapping) and (state := _find_state(nested)):
            return state
    return _tensors(content)


def _tensors(content: Any) -> dict[str, Tensor]:
    """The tensors alone: some models keep metadata in their state dict."""
    if not isinstance(content, Mapping):
        return {}
    return {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}


def _inside(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"it is a {type(content).__name__}"
    if not content:
        return "it has no keys"
    return f"it has the keys {some([str(k) for k in content])}"


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
            f"--model: importing {module_name!r} failed: {_told(error)} (searched: the current "
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
                f"--model: {spec}({_call(arguments)}) failed: {_told(error)}; its arguments are "
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
    is ignored. Missing buffers (running statistics) do not matter to a spectrum.

    Raises:
        CheckpointError: for missing or unexpected weights, or other shapes, listing some.
    """
    wanted = {_clean(k): k for k in _tensors(model.state_dict())}
    cleaned = {_clean(k): v for k, v in state.items()}
    prefix = _best_prefix(wanted, cleaned)
    inside = {k[len(prefix) :]: v for k, v in cleaned.items() if k.startswith(prefix)}
    ignored = tuple(k for k in cleaned if not k.startswith(prefix))
    _check_shapes(model, {wanted[k]: v for k, v in inside.items() if k in wanted}, source)
    meta = any(p.is_meta for p in model.parameters())
    try:
        # The class's own method: overriding ones (neuraloperator's) ask for more than tensors.
        result = nn.Module.load_state_dict(
            model, {wanted.get(k, k): v for k, v in inside.items()}, strict=False, assign=meta
        )
    except RuntimeError as error:
        raise CheckpointError(f"{source} does not fit the model: {_one_line(error)}") from error
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
        usual = prefix in ("", *(f"{name}." for name in _CONTAINERS))  # rather than "ema."
        return sum(prefix + key in have for key in wanted), usual, -len(prefix)

    return max(sorted(prefixes), key=fit)


def _check_shapes(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    wrong = []
    for key, target in _tensors(model.state_dict(keep_vars=True)).items():
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


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
