"""Wrapped: the optimizer whose step changes the weights, inside of what stands around it.

SAM, Lookahead, accelerate's and many others hold an optimizer and share its param groups; hooks
belong on that one, for its step is called where the weights change.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def innermost(optimizer: Any) -> Optimizer:
    """The torch optimizer inside of wrappers, whatever they call it.

    Raises:
        TypeError: if there is none.
        ValueError: if there are several.
    """
    if isinstance(optimizer, LRScheduler):
        raise TypeError(
            "the optimizer comes first, then the model, then the schedule; the first argument is "
            f"a {type(optimizer).__name__}"
        )
    while (inner := _inner(optimizer)) is not None:
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch Optimizer, got {type(optimizer).__name__}")
    return optimizer


def reads_the_rate(optimizer: Any) -> str | None:
    """The class of a wrapper that uses the rate outside of the inner optimizer's step, if any."""
    while (inner := _inner(optimizer)) is not None:
        if any("lr" in _constants(code) for code in _methods(type(optimizer))):
            return type(optimizer).__name__
        optimizer = inner
    return None


def _inner(wrapper: Any) -> Optimizer | None:
    """The one optimizer that an object holds in its attributes, under whatever name."""
    held = list(_held(getattr(wrapper, "__dict__", {}).values()))
    found = {id(one): one for one in held if one is not wrapper}
    if len(found) > 1 and "param_groups" in vars(wrapper):
        return None  # it has groups of its own, and hands them on
    if len(found) > 1:
        names = " and ".join(type(one).__name__ for one in found.values())
        raise ValueError(
            f"{type(wrapper).__name__} holds {len(found)} optimizers ({names}): balance each of "
            "them, with an object of its own"
        )
    return next(iter(found.values()), None)


def _held(values: Iterable[Any]) -> Iterable[Optimizer]:
    for value in values:
        if isinstance(value, Optimizer):
            yield value
        elif isinstance(value, dict):
            yield from (one for one in value.values() if isinstance(one, Optimizer))
        elif isinstance(value, list | tuple):
            yield from (one for one in value if isinstance(one, Optimizer))


def _methods(cls: type) -> Iterable[types.CodeType]:
    """The code of a class's own methods, but for that which builds, prints, saves and loads.

    Its own are those down to the class that wrote its step; hooked or not, a step bears that name.
    """
    writer = getattr(getattr(cls, "step", cls), "__qualname__", "").rpartition(".")[0]
    for each in cls.__mro__:
        if each is Optimizer:
            return
        for name, value in vars(each).items():
            saves = name.endswith("state_dict") or name in ("__setstate__", "__getstate__")
            while hasattr(value, "__wrapped__"):
                value = value.__wrapped__
            if isinstance(value, types.FunctionType) and name != "__init__" and not saves:
                yield value.__code__
        if each.__qualname__ == writer or not hasattr(cls, "step"):
            return


def _constants(code: types.CodeType) -> Iterator[Any]:
    """Those of the code, and of functions and comprehensions inside of it."""
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            yield from _constants(value)
        else:
            yield value
