"""Words: what messages of all rooms share."""

from __future__ import annotations

from collections.abc import Sequence


def some(names: Sequence[str], shown: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def check_kind(name: str, value: object, able: bool, wanted: str) -> None:
    """Refuse an option that must be an object and is a name, a number or a class.

    Raises:
        TypeError: unless ``value`` is an object that is ``able``, saying what is wanted.
    """
    if isinstance(value, type):
        raise TypeError(f"{name} must be an object, got the class {value.__name__}: call it")
    if not able:
        raise TypeError(f"{name} must be {wanted}, got {value!r}")
