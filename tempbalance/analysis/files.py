"""Files: the named tensors of a checkpoint in one file, many, a folder or a pattern.

What is in a file says :mod:`tempbalance.analysis.formats`. A tensor is read when it is asked for,
and its memory is given back when the caller lets go of it.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tempbalance.analysis.formats import (
    Checkpoint,
    CheckpointError,
    Opened,
    Stored,
    open_file,
    told,
)
from tempbalance.words import some

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_SHARD = re.compile(r"-\d+-of-\d+\.\w+$")


def open_checkpoint(path: str | os.PathLike[str], key: str | None = None) -> Checkpoint:
    """The tensors in a file, a folder or the files of a pattern, none of them read yet.

    Args:
        path: a state dict or a checkpoint that holds one (Lightning's, timm's), a safetensors file,
            the index of a sharded one, a GGUF file; a folder that save_pretrained wrote; or a
            pattern (``"model-*.safetensors"``) of the files that make one model.
        key: where in a checkpoint the weights are, if not in a usual place.

    Raises:
        CheckpointError: if a file cannot be read safely, or holds no weights.
    """
    return _merged(_files(Path(path)), key)


def read_state(path: str | os.PathLike[str], key: str | None = None) -> dict[str, Tensor]:
    """All tensors of :func:`open_checkpoint`, read; mapped, where the format can be.

    Raises:
        CheckpointError: as there.
    """
    return {name: stored.read() for name, stored in open_checkpoint(path, key).tensors.items()}


# --- which files ----------------------------------------------------------------------------------


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return _weights_in(path)
    if not path.exists():
        if glob.has_magic(str(path)):
            found = sorted(Path(name) for name in glob.glob(str(path)))
            if found:
                return [file for each in found for file in _files(each)]
            raise CheckpointError(f"no file matches {path}")
        raise CheckpointError(f"no such file: {path}")
    return _shards(path) if path.suffix == ".json" else [path]


def _weights_in(folder: Path) -> list[Path]:
    """The files of a folder that Hugging Face's save_pretrained wrote, or its only ones."""
    for name in _INDEXES:
        if (folder / name).is_file():
            return _shards(folder / name)
    for name in _SINGLE:
        if (folder / name).is_file():
            return [folder / name]
    for suffix in (".safetensors", ".bin", ".gguf"):
        found = sorted(folder.glob(f"*{suffix}"))
        if len(found) == 1 or (found and all(_SHARD.search(file.name) for file in found)):
            return found
        if found and suffix != ".bin":  # training_args.bin and its like lie beside weights
            raise CheckpointError(
                f"{folder} is a folder: name one of {some([f.name for f in found])}, or a pattern "
                "of the files that make one model"
            )
    cure = "name the file with the weights in it"
    if (folder / ".metadata").is_file():
        cure = (
            "a distributed checkpoint becomes a file with python -m "
            "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
        )
    raise CheckpointError(f"{folder} is a folder: {cure}")


def _shards(index: Path) -> list[Path]:
    """The files that an index names, as Hugging Face writes it."""
    weights = _weight_map(index)
    return [index, *(index.parent / name for name in sorted(set(weights.values())))]


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        content = json.loads(index.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index} is no readable JSON: {told(error)}") from error
    files = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(files, Mapping):
        raise CheckpointError(
            f"{index} holds no weights: it is JSON without the weight_map of an index; name the "
            "file with the weights"
        )
    return files


def _merged(files: list[Path], key: str | None) -> Checkpoint:
    """The tensors of several files as those of one model."""
    opened = Opened()
    tensors: dict[str, Stored] = {}
    origin: dict[str, Path] = {}
    notes: list[str] = []
    wanted: dict[str, Path] = {}
    for file in files:
        if file.suffix == ".json":
            wanted |= dict.fromkeys(_weight_map(file), file)
            continue
        part = open_file(file, key, opened)
        for name in part.tensors.keys() & tensors.keys():
            raise CheckpointError(
                f"{name} is in {origin[name]} and in {file}: these are several models; measure "
                "them one by one, or with tempbalance compare or rank"
            )
        tensors |= part.tensors
        origin |= dict.fromkeys(part.tensors, file)
        notes += [note for note in part.notes if note not in notes]
    lost = [name for name in wanted if name not in tensors]
    if lost:
        raise CheckpointError(f"{wanted[lost[0]]} names weights that its files lack: {some(lost)}")
    return Checkpoint(tensors, tuple(notes))
