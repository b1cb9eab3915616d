"""Names: which block of a network a layer belongs to, told by its name alone."""

from __future__ import annotations

import re


def block_of(name: str) -> str:
    """The block of a layer: its name up to the first numbered module that holds more than it.

    >>> block_of("layer1.0.downsample.0"), block_of("h.3.attn.c_attn"), block_of("conv1")
    ('layer1.0', 'h.3', 'conv1')
    """
    return _numbered(name) or name.rpartition(".")[0] or name


def in_block(name: str) -> bool:
    """Whether a layer lies inside a numbered block: not an embedding, a stem or a head.

    >>> in_block("model.layers.0.mlp.up_proj"), in_block("lm_head"), in_block("classifier.6")
    (True, False, False)
    """
    return _numbered(name) is not None


def _numbered(name: str) -> str | None:
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if re.fullmatch(r"(.*_)?\d+", part):
            return ".".join(parts[: i + 1])
    return None
