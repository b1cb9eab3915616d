"""Kinds: an option that must be an object is not a name, a number or a class."""

from __future__ import annotations


def check_kind(name: str, value: object, able: bool, wanted: str) -> None:
    """Raises TypeError unless ``value`` is an object that is ``able``, saying what is wanted."""
    if isinstance(value, type):
        raise TypeError(f"{name} must be an object, got the class {value.__name__}: call it")
    if not able:
        raise TypeError(f"{name} must be {wanted}, got {value!r}")
