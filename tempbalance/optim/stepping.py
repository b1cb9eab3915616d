"""Stepping: whether a hooked step is running, and whether what should be stepped ever is."""

from __future__ import annotations

import sys
import weakref
from types import FrameType

import torch
from torch import Tensor
from torch.optim import Optimizer

from tempbalance.balance.messages import warn
from tempbalance.optim.groups import parameters_of

# Backward passes after which weights that move without a step are looked for, and then at twice
# as many each time.
_FIRST = 16
# Steps of the optimizer in which a schedule that is stepped once an epoch may well not be.
_EPOCH = 10_000
# The code of what torch puts around ``step``, which runs the hooks.
_WRAPPER = Optimizer.profile_hook_step(lambda self: None).__code__  # type: ignore[arg-type]


def stepping(optimizer: Optimizer) -> int:
    """How many steps of this optimizer are running, one inside of the other."""
    count, frame = 0, sys._getframe()
    above: FrameType | None = frame
    while above is not None:
        if above.f_code is _WRAPPER and above.f_locals.get("self") is optimizer:
            count += 1
        above = above.f_back
    return count


class Unseen:
    """Says so, once, where weights move and no step of the optimizer is seen.

    Some wrappers change the weights themselves. Backward passes are counted until the first step;
    then nothing is left of it.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._name = type(optimizer).__name__
        self._count, self._next = 0, _FIRST
        trained = [p for p in parameters_of(optimizer) if p.requires_grad and p.is_leaf]
        self._handle = None
        if not trained or not trained[0].numel():
            return
        watched = min(trained, key=lambda p: p.numel())
        self._before = _numbers(watched)
        this = weakref.ref(self)

        def count(parameter: Tensor) -> None:
            if (alive := this()) is not None:
                alive._seen(parameter)

        hook = torch.compiler.disable(count)
        self._handle = watched.register_post_accumulate_grad_hook(hook)

    def end(self) -> None:
        """A step was seen."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _seen(self, parameter: Tensor) -> None:
        self._count += 1
        if self._count < self._next:
            return
        self._next *= 2
        if self._before.shape == (now := _numbers(parameter)).shape and not now.equal(self._before):
            self.end()
            warn(
                f"weights have changed over {self._count} backward passes, and no step of the "
                f"{self._name} that was passed was seen: no multiplier has had an effect. Pass "
                "the optimizer whose step changes the weights, or use tempbalance.TempBalanceLR"
            )


def _numbers(parameter: Tensor) -> Tensor:
    """A few of a parameter's numbers; of a sharded one, of this rank's."""
    local = getattr(parameter, "to_local", lambda: parameter)()
    return local.detach().flatten()[:8].clone()


class Stillness:
    """Says so, once, where the optimizer steps and the TempBalanceLR does not.

    Args:
        matters: whether a step would do anything.
    """

    def __init__(self, matters: bool) -> None:
        self._steps = 0
        self._watching = matters

    def stepped(self) -> None:
        """All is well."""
        self._watching = False

    def optimized(self) -> None:
        """The optimizer has made a step."""
        self._steps += 1
        if self._watching and self._steps >= _EPOCH:
            self.stepped()
            warn(
                f"the optimizer has made {self._steps:,} steps and TempBalanceLR.step() was not "
                "called yet: until it is, multipliers are those of the start, and no base "
                "schedule moves. (Where it is called once an epoch, and epochs are longer than "
                "that, all is well.)"
            )

    def ends(self) -> None:
        """The schedule is gone, or the process ends."""
        if self._watching and self._steps:
            self.stepped()
            warn(
                f"a TempBalanceLR was never stepped, in {self._steps:,} steps of the optimizer: "
                "multipliers were those of the start, and no base schedule moved. Call its step() "
                "once an epoch, or after every step of the optimizer"
            )
