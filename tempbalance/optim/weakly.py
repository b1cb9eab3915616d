"""Weakly: hooks on an optimizer that do not keep their owner alive."""

from __future__ import annotations

import weakref
from typing import Any

import torch


def calling(owner: Any, method: str) -> Any:
    """A hook that calls a method of an object for as long as it lives.

    The method gets what the hook gets; what it returns is the hook's.
    """
    reference = weakref.ref(owner)

    def hook(*arguments: Any) -> Any:
        alive = reference()
        return None if alive is None else getattr(alive, method)(*arguments)

    return torch.compiler.disable(hook)  # a compiled step must not trace a measurement
