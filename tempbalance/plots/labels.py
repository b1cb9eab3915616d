"""Labels: names of layers cut to fit a picture, keeping what tells them apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def labels(names: Sequence[str], most: int) -> list[str]:
    """Names of at most ``most`` letters where that keeps them different, numbers never lost.

    What all names begin with goes first; then parts without a number are cut to their first
    letter, from the left and in all names alike, until they fit; the last part stays:
    ``encoder.layer.11.attention.self.query`` becomes ``e.l.11.a.self.query``.
    """
    parts = [name.split(".") for name in names]
    if len(names) > 1:
        shared = _shared(parts)
        parts = [each[shared:] for each in parts]
    for i in range(max(map(len, parts), default=1) - 1):
        if max(len(".".join(each)) for each in parts) > most:
            parts = [_abbreviated(each, i) for each in parts]
    cut = [_cut(each, most) for each in parts]
    count = Counter(cut)
    return [name if count[c] > 1 else c for name, c in zip(names, cut, strict=True)]


def _shared(parts: Sequence[Sequence[str]]) -> int:
    """How many parts at the beginning all names have in common, their last parts left out."""
    shortest = min(len(each) for each in parts) - 1
    for i in range(shortest):
        if len({each[i] for each in parts}) > 1:
            return i
    return max(shortest, 0)


def _abbreviated(parts: Sequence[str], i: int) -> list[str]:
    """With part ``i`` as its first letter, unless it is the last or holds a number."""
    keep = i >= len(parts) - 1 or any(letter.isdigit() for letter in parts[i])
    return (
        [*parts[:i], parts[i] if keep else parts[i][:1], *parts[i + 1 :]] if parts[i:] else [*parts]
    )


def _cut(parts: Sequence[str], most: int) -> str:
    """The beginning and the end of the last part, where the whole is still too long."""
    *above, last = parts
    over = len(".".join(parts)) - most
    if over > 0 and len(last) > over + 3:
        keep = len(last) - over - 1
        last = f"{last[: keep // 2]}…{last[len(last) - (keep - keep // 2) :]}"
    return ".".join([*above, last])
