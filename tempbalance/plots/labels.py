"""Labels: names of layers cut to fit a picture, keeping what tells them apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def labels(names: Sequence[str], most: int) -> list[str]:
    """Names of at most ``most`` letters where that keeps them different, numbers never lost.

    What all names begin with goes first; then parts without a number are cut to their first
    letter, from the left, the last part kept longest: ``encoder.layer.11.attention.self.query``
    becomes ``e.l.11.a.self.query``.
    """
    parts = [name.split(".") for name in names]
    if len(names) > 1:
        shared = _shared(parts)
        parts = [each[shared:] for each in parts]
    cut = [_cut(each, most) for each in parts]
    count = Counter(cut)
    return [".".join(p) if count[c] > 1 else c for p, c in zip(parts, cut, strict=True)]


def _shared(parts: Sequence[Sequence[str]]) -> int:
    """How many parts at the beginning all names have in common, their last parts left out."""
    shortest = min(len(each) for each in parts) - 1
    for i in range(shortest):
        if len({each[i] for each in parts}) > 1:
            return i
    return max(shortest, 0)


def _cut(parts: Sequence[str], most: int) -> str:
    short = list(parts)
    for i, part in enumerate(parts[:-1]):
        if len(".".join(short)) <= most:
            break
        if not any(letter.isdigit() for letter in part):
            short[i] = part[:1]
    last, over = short[-1], len(".".join(short)) - most
    if over > 0 and len(last) > over + 3:  # its beginning and its end
        keep = len(last) - over - 1
        short[-1] = f"{last[: keep // 2]}…{last[len(last) - (keep - keep // 2) :]}"
    return ".".join(short)
