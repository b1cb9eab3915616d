"""Tensors that are costly to make, kept in a file under a key of everything that made them."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)


def fingerprint(parameters: Mapping[str, Any]) -> str:
    """Hash (16 hexadecimal digits) of plain parameters, independent of their order."""
    text = json.dumps(parameters, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def user_cache() -> Path:
    """Folder of the user for files that can be made again: $XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tempbalance"


def writable_folder(folder: Path) -> Path:
    """`folder`, made if it is missing; where it cannot be written, one in the user's cache."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    other = user_cache() / fingerprint({"folder": str(folder.absolute())})
    other.mkdir(parents=True, exist_ok=True)
    logger.info("%s cannot be written: caching in %s", folder, other)
    return other


def cached(
    path: Path, key: str, build: Callable[[], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Tensors stored in `path` under `key`, or built, stored and returned.

    A file with another key, or one that cannot be read (an interrupted write of another program),
    is built again. The file is written beside its place and renamed, so that a crash leaves none
    that is half written. Loaded with weights_only.
    """
    if path.exists():
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
            if stored["key"] == key:
                return stored["tensors"]
            logger.info("%s was made from other data or parameters: making it again", path)
        except Exception as error:
            logger.warning("%s cannot be read (%s): making it again", path, error)
    tensors = build()
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        torch.save({"key": key, "tensors": tensors}, partial)
        partial.replace(path)
    except OSError as error:
        logger.warning("%s cannot be written (%s): it will be made again next time", path, error)
    finally:
        partial.unlink(missing_ok=True)
    return tensors
