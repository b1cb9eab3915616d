"""Texts: a part of a file as windows of tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# How WikiText was cut into words, undone: ` @-@ `, spaces before and after punctuation.
_JOINED = (
    (r" @(.)@ ", r"\1"),
    (r" ([.,;:!?%)\]}])", r"\1"),
    (r"([(\[{$]) ", r"\1"),
    (r" (n't|'s|'re|'ve|'m|'d|'ll)\b", r"\1"),
    (r'" ([^"\n]*?) "', r'"\1"'),
    (r" +\n", "\n"),
)


def read(path: str | Path, part: Sequence[float] = (0.0, 1.0)) -> str:
    """The text between two places of a file (shares of its characters), WikiText's cuts undone.

    Raises:
        FileNotFoundError: naming the file, and where the experiments look for it.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such text; set data_root or TEMPBALANCE_DATA")
    text = file.read_text(encoding="utf-8")
    start, stop = (round(share * len(text)) for share in part)
    text = text[start:stop]
    if " @-@ " in text or "<unk>" in text:
        for pattern, joined in _JOINED:
            text = re.sub(pattern, joined, text)
    return text


def tokens(text: str, tokenizer: Any) -> Tensor:
    """Ids (n,) of a whole text, nothing added to it."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def windows(ids: Tensor, length: int, stride: int | None = None, most: int | None = None) -> Tensor:
    """Windows (w, length) every ``stride`` tokens (default: their length), the first ``most``.

    What is left at the end is not used.

    Raises:
        ValueError: if the text is shorter than a window.
    """
    if len(ids) < length:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than a window of {length}")
    found = ids.unfold(0, length, stride or length)
    return found[:most]


def drawn(ids: Tensor, length: int, count: int, seed: int) -> Tensor:
    """``count`` windows (count, length) at random places.

    Raises:
        ValueError: if the text is shorter than a window.
    """
    if len(ids) < length:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than a window of {length}")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - length + 1, (count,), generator=generator)
    return torch.stack([ids[start : start + length] for start in starts.tolist()])
