"""Blocks: which block of a network a layer belongs to, told by its name alone."""

from __future__ import annotations

import re


def group_of(name: str) -> str:
    """What is pruned together: the block of a layer, or a layer that lies in none by itself.

    >>> group_of("model.layers.3.mlp.up_proj"), group_of("lm_head"), group_of("classifier.6")
    ('model.layers.3', 'lm_head', 'classifier.6')
    """
    return _numbered(name) or name


def in_block(name: str) -> bool:
    """Whether a layer lies inside a numbered block: not an embedding, a stem or a head.

    >>> in_block("model.layers.3.mlp.up_proj"), in_block("lm_head"), in_block("classifier.6")
    (True, False, False)
    """
    return _numbered(name) is not None


def list_and_numbers(group: str) -> tuple[str, list[int]]:
    """The list that a block belongs to, and its place in it; files are sorted by the alphabet.

    >>> list_and_numbers("model.layers.10")
    ('model.layers.', [10])
    """
    return re.split(r"\d", group, maxsplit=1)[0], [int(n) for n in re.findall(r"\d+", group)]


def _numbered(name: str) -> str | None:
    """A name up to its first numbered module that holds more than the layer."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if re.fullmatch(r"(.*_)?\d+", part):
            return ".".join(parts[: i + 1])
    return None
