"""Formats: the named tensors in one file, whatever wrote it, none of them read yet.

Nothing in a file is ever executed: pickles are read with ``weights_only=True`` (timm's argument
namespace is let through by name, nothing else), safetensors and GGUF hold no code.
"""

from __future__ import annotations

import argparse
import functools
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tempbalance.words import some

# Where frameworks put the weights in a checkpoint, the usual first.
CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "network", "module")
# Pages of a mapped file stay in memory while the mapping lives: it is made anew after so much.
_MAPPED = 2**26
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint or a model factory that cannot be used; one line with the cure."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint; ``read`` brings it into memory."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    tensor: Tensor | None = None  # where it is in memory already
    same: Hashable = None  # equal for tensors that share their memory (tied weights)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint by name, and what a reader of it should be told."""

    tensors: dict[str, Stored]
    notes: tuple[str, ...] = ()


def in_memory(content: Mapping[str, Any]) -> Checkpoint:
    """The tensors of a state dict, or of a checkpoint that was loaded with one in it.

    Raises:
        CheckpointError: if there are none.
    """
    where, state = _find_state(content)
    if not state:
        raise CheckpointError(f"this holds no state dict; {_inside(content)}")
    return Checkpoint({k: _held(k, v) for k, v in state.items()}, _beside(content, where))


def open_file(file: Path, key: str | None, opened: Opened) -> Checkpoint:
    if not file.exists():
        raise CheckpointError(f"no such file: {file}")
    if file.is_file() and not file.stat().st_size:
        raise CheckpointError(f"{file} is empty: 0 bytes; copy or save it again")
    if file.suffix == ".safetensors":
        return _open_safetensors(file, opened)
    with file.open("rb") as start:
        magic = start.read(4)
    if magic == b"GGUF":
        return _open_gguf(file)
    return _open_torch(file, key, opened)


class Opened:
    """The one file that is mapped at a time, and anew once so many bytes of it were read."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._get: Callable[[str], Tensor] | None = None
        self._given = 0

    def read(self, file: Path, open_: Callable[[], Callable[[str], Tensor]], name: str) -> Tensor:
        if self._get is None or self._file != file or self._given > _MAPPED:
            self._get = None  # the old mapping goes first
            self._file, self._get, self._given = file, open_(), 0
        tensor = self._get(name)
        self._given += tensor.nbytes
        return tensor


# --- safetensors ----------------------------------------------------------------------------------


def _open_safetensors(file: Path, opened: Opened) -> Checkpoint:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise CheckpointError(
            f"reading {file} needs safetensors: pip install 'tempbalance[cli]'"
        ) from error

    def get() -> Callable[[str], Tensor]:
        return safe_open(file, framework="pt").get_tensor

    tensors = {}
    try:
        with safe_open(file, framework="pt") as content:
            for name in sorted(content.keys(), key=natural):
                header = content.get_slice(name)
                dtype = _DTYPES.get(header.get_dtype(), torch.uint8)
                read = functools.partial(opened.read, file, get, name)
                tensors[name] = Stored(name, tuple(header.get_shape()), dtype, read)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is no readable safetensors file: {error}") from error
    if not tensors:
        raise CheckpointError(f"{file} holds no tensors")
    return Checkpoint(tensors)


def natural(name: str) -> list[tuple[int, str]]:
    """An order in which layer 10 comes after layer 2: the format keeps none."""
    return [(int(x), "") if x.isdigit() else (0, x) for x in re.split(r"(\d+)", name)]


# --- torch.save -----------------------------------------------------------------------------------


def _open_torch(file: Path, key: str | None, opened: Opened) -> Checkpoint:
    content = _read_pickle(file)
    where, state = _find_state(_under(content, key, file))
    if not state:
        cure = (
            "name the right key with --key (in Python, pass torch.load(FILE)[KEY])"
            if content
            else "save model.state_dict()"
        )
        raise CheckpointError(f"{file} holds no state dict; {_inside(content)}; {cure}")
    notes = () if key else _beside(content, where)
    if not zipfile.is_zipfile(file):  # an old format: all of it is in memory
        return Checkpoint({k: _held(k, v) for k, v in state.items()}, notes)

    def get() -> Callable[[str], Tensor]:
        return _find_state(_under(_read_pickle(file), key, file))[1].__getitem__

    tensors = {}
    for name, tensor in state.items():
        read = functools.partial(opened.read, file, get, name)
        shape = tuple(tensor.shape)
        tensors[name] = Stored(name, shape, tensor.dtype, read, same=_memory(tensor))
    return Checkpoint(tensors, notes)


def _under(content: Any, key: str | None, file: Path) -> Any:
    if key is None:
        return content
    if not isinstance(content, Mapping) or key not in content:
        raise CheckpointError(f"{file} has no key {key!r}; {_inside(content)}")
    return content[key]


def _read_pickle(file: Path) -> Any:
    try:
        # A mapped file is read as its tensors are used, and never held in memory as a whole.
        with (
            torch.serialization.safe_globals([argparse.Namespace]),  # timm keeps its arguments
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # an error will say more
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
            f"{told(error)}"
        ) from error


def _find_state(content: Any, path: str = "") -> tuple[str, dict[str, Tensor]]:
    """Where in a checkpoint the weights are (dotted, empty for the top), and the weights."""
    if not isinstance(content, Mapping):
        return path, {}
    for container in CONTAINERS:
        inner = f"{path}.{container}" if path else container
        nested = content.get(container)
        if state := tensors_of(nested):
            return inner, state
        if isinstance(nested, Mapping) and (found := _find_state(nested, inner))[1]:
            return found
    return path, tensors_of(content)


def tensors_of(content: Any) -> dict[str, Tensor]:
    """The tensors alone: some models keep metadata in their state dict."""
    if not isinstance(content, Mapping):
        return {}
    return {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}


def _held(name: str, tensor: Tensor) -> Stored:
    return Stored(name, tuple(tensor.shape), tensor.dtype, lambda: tensor, tensor, _memory(tensor))


def _memory(tensor: Tensor) -> Hashable:
    try:
        where = tensor.data_ptr()
    except RuntimeError:  # no storage: meta, or a subclass
        return None
    return (where, tuple(tensor.shape), tensor.stride()) if where and tensor.ndim > 1 else None


def _beside(content: Any, where: str) -> tuple[str, ...]:
    """Other weights in the same checkpoint, which the user may have meant."""
    if not where or not isinstance(content, Mapping):
        return ()
    top = where.partition(".")[0]
    others = [k for k, v in content.items() if k != top and _looks_like_weights(v)]
    return (f"measured are the weights under {where!r}; there are more under {some(others)}",) * (
        len(others) > 0
    )


def _looks_like_weights(content: Any) -> bool:
    return any(tensor.ndim > 1 for tensor in tensors_of(content).values())


def _inside(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"it is a {type(content).__name__}"
    if not content:
        return "it has no keys"
    return f"it has the keys {some([str(k) for k in content])}"


# --- GGUF -----------------------------------------------------------------------------------------


def _open_gguf(file: Path) -> Checkpoint:
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise CheckpointError(
            f"reading {file} needs gguf: pip install 'tempbalance[gguf]'"
        ) from error
    try:
        listed: Iterable[Any] = GGUFReader(file).tensors
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise CheckpointError(f"{file} is no readable GGUF file: {told(error)}") from error
    tensors, kinds = {}, set()
    for each in sorted(listed, key=lambda tensor: natural(tensor.name)):
        start, dtype, stored, kind = (
            each.data_offset,
            each.data.dtype,
            each.data.shape,
            each.tensor_type,
        )
        shape = tuple(int(n) for n in reversed(each.shape))  # the format lists columns first

        def read(
            start: int = int(start), dtype: Any = dtype, stored: Any = stored, kind: Any = kind,
            shape: tuple[int, ...] = shape,
        ) -> Tensor:  # fmt: skip
            raw = np.fromfile(file, dtype, int(np.prod(stored)), offset=start).reshape(stored)
            values = np.ascontiguousarray(dequantize(raw, kind), dtype=np.float32)
            return torch.from_numpy(values).view(shape)

        tensors[each.name] = Stored(each.name, shape, torch.float32, read)
        if kind.name not in ("F64", "F32", "F16", "BF16"):
            kinds.add(kind.name)
    if not tensors:
        raise CheckpointError(f"{file} holds no tensors")
    note = (
        f"weights are quantized ({', '.join(sorted(kinds))}); alpha is that of what they stand for"
    )
    return Checkpoint(tensors, (note,) if kinds else ())


# --- words ----------------------------------------------------------------------------------------


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
