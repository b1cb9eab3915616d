"""Chain: blocks of which each takes what the one before gave, run one at a time.

A block's other arguments (masks, position embeddings) are kept from one pass through the whole
model, whatever the installed version of transformers calls them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class _From:
    """Stands for output ``index`` of the block before."""

    index: int


@dataclass(frozen=True)
class _Call:
    """The arguments of one block for one batch, with places for what changes."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def filled(self, outputs: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args = tuple(outputs[a.index] if isinstance(a, _From) else a for a in self.args)
        kwargs = {
            name: outputs[a.index] if isinstance(a, _From) else a for name, a in self.kwargs.items()
        }
        return args, kwargs

    @property
    def form(self) -> Any:
        """Names, kinds and shapes of the arguments."""
        return [_form(a) for a in self.args], {name: _form(a) for name, a in self.kwargs.items()}

    def others_as(self, first: _Call) -> bool:
        """Whether all but the outputs of the block before is what the first block got."""
        return (
            len(self.args) == len(first.args)
            and self.kwargs.keys() == first.kwargs.keys()
            and all(
                isinstance(mine, _From) or mine is its
                for mine, its in (
                    *zip(self.args, first.args, strict=True),
                    *((mine, first.kwargs[name]) for name, mine in self.kwargs.items()),
                )
            )
        )

    def with_others_of(self, first: _Call) -> _Call:
        """This call for another batch, of which only the first block's call is known."""
        args = (
            mine if isinstance(mine, _From) else its
            for mine, its in zip(self.args, first.args, strict=True)
        )
        kwargs = {
            name: mine if isinstance(mine, _From) else first.kwargs[name]
            for name, mine in self.kwargs.items()
        }
        return _Call(tuple(args), kwargs)


def _form(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, tuple | list):
        return [_form(one) for one in value]
    return value if isinstance(value, bool | int | float | str | None) else type(value)


_DONE = _Call((), {})


class PassEndedError(Exception):
    """Raised in a hook to leave a forward pass: what was wanted has been seen."""


class Chain:
    """Some blocks in order, the calls of each batch, and the outputs of the block run last."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.blocks = list(blocks)
        self._calls: list[list[_Call]] = []  # by batch, by block
        self._outputs: list[Sequence[Any]] = []  # by batch

    def record(self, run: Callable[[int], None], batches: int) -> bool:
        """Pass every batch through the model once; False where the blocks form no chain.

        Where a batch shows that all blocks get the same objects beside the outputs of the one
        before, others of the same form go no further than the first block.
        """
        alike: list[list[_Call]] = []  # of batches of several forms
        for i in range(batches):
            calls = self._seen(run, i, first_only=True) if alike else None
            first = calls[0] if calls else None
            known = next((each for each in alike if first and each[0].form == first.form), None)
            if first is not None and known is not None:
                calls = [first, *(call.with_others_of(first) for call in known[1:])]
            else:
                calls = self._seen(run, i, first_only=False)
                if calls is None:
                    return False
                if all(call.others_as(calls[0]) for call in calls[1:]):
                    alike.append(calls)
            self._calls.append(calls)
        self._outputs = [()] * batches
        return True

    def _seen(self, run: Callable[[int], None], i: int, first_only: bool) -> list[_Call] | None:
        recorder = _Recorder(self.blocks, whole=not i, first_only=first_only)
        return recorder.calls if recorder.run(lambda: run(i)) else None

    def run(self, block: int, keep: bool) -> None:
        """A block on all batches; with ``keep`` its outputs become the inputs of the next."""
        for i, calls in enumerate(self._calls):
            args, kwargs = calls[block].filled(self._outputs[i])
            outputs = self.blocks[block](*args, **kwargs)
            if keep:
                self._outputs[i] = _parts(outputs)
                calls[block] = _DONE  # so that the input of the first block is given up


class _Recorder:
    """Hooks that write down how a model calls its blocks.

    The first pass is a whole one: a model may call a block again after the last one.
    """

    def __init__(self, blocks: Sequence[nn.Module], whole: bool, first_only: bool = False) -> None:
        self.calls: list[_Call] = []
        self._blocks, self._whole, self._first_only = list(blocks), whole, first_only
        self._outputs: tuple[Any, ...] = ()
        self._earlier: list[weakref.ref[Tensor]] = []  # outputs of the blocks before the last
        self._broken = False

    def run(self, work: Callable[[], None]) -> bool:
        """Whether each block was called once, in order, with outputs of the one before."""
        handles = []
        for i, block in enumerate(self._blocks):
            handles += [
                block.register_forward_pre_hook(self._before(i), with_kwargs=True),
                block.register_forward_hook(self._after(i)),
            ]
        try:
            work()
        finally:
            for handle in handles:
                handle.remove()
        wanted = 1 if self._first_only else len(self._blocks)
        return not self._broken and len(self.calls) == wanted

    def _before(self, i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = _Call(tuple(map(self._place, args)),
                         {name: self._place(value) for name, value in kwargs.items()})  # fmt: skip
            linked = any(isinstance(a, _From) for a in (*call.args, *call.kwargs.values()))
            if i != len(self.calls) or (i > 0 and not linked):
                self._broken = True
                raise PassEndedError
            self.calls.append(call)
            if self._first_only:
                raise PassEndedError

        return hook

    def _after(self, i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, outputs: Any) -> None:
            self._earlier += [weakref.ref(o) for o in self._outputs if isinstance(o, Tensor)]
            self._outputs = _parts(outputs)
            if i == len(self._blocks) - 1 and not self._whole:
                raise PassEndedError

        return hook

    def _place(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        for index, output in enumerate(self._outputs):
            if output is value:
                return _From(index)
        # From further back (a U-shaped network): it would go stale as the blocks are pruned.
        self._broken |= any(earlier() is value for earlier in self._earlier)
        return value


def _parts(outputs: Any) -> tuple[Any, ...]:
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


def find_chain(model: nn.Module, wanted: Sequence[nn.Module]) -> Chain | None:
    """The outermost ``ModuleList`` that holds all wanted modules, if any."""
    for module in model.modules():  # from the outside inwards
        if isinstance(module, nn.ModuleList) and set(wanted) <= set(module.modules()):
            return Chain(list(module))
    return None
