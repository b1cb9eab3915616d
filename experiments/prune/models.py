"""Models: a causal language model and its tokenizer from a folder or a GGUF file."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn


class Loaded(NamedTuple):
    """A model in evaluation mode, and what turns text into its tokens."""

    model: nn.Module
    tokenizer: Any


def load(path: str | Path, dtype: str = "float32", device: str = "cpu") -> Loaded:
    """Load with transformers, from local files alone.

    Raises:
        FileNotFoundError: where there is no such file or folder.
        ImportError: where transformers, or gguf for a GGUF file, is missing.
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(
            f"model.path={path}: no such file or folder; give a GGUF file, or a folder that "
            "save_pretrained wrote"
        )
    if find_spec("transformers") is None:
        raise ImportError("loading a model needs transformers: pip install 'tempbalance[hf]'")
    options: dict[str, Any] = {"local_files_only": True}
    if place.suffix == ".gguf":
        if find_spec("gguf") is None:
            raise ImportError(f"loading {place.name} needs gguf: pip install 'tempbalance[gguf]'")
        place, options = place.parent, {**options, "gguf_file": place.name}
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, dtype), **options)
    tokenizer = AutoTokenizer.from_pretrained(place, **options)
    model.to(torch.device(device)).eval()
    return Loaded(model, tokenizer)
