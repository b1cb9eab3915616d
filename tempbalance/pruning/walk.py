"""Walk: the inputs of every layer, with all that comes before it pruned already.

Two walks give the same statistics. Where the layers lie in a chain of blocks (the ``ModuleList`` of
a transformer), each block's outputs are kept and become the next one's inputs: two passes through
the model in all, and the activations of one block in memory. Anywhere else the whole model runs
once for every block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tempbalance.layers.find import named_modules
from tempbalance.pruning.blocks import group_of
from tempbalance.pruning.chain import Chain, PassEndedError, find_chain
from tempbalance.pruning.linears import Linear
from tempbalance.pruning.method import Method, Statistic

Prune = Callable[[Linear, Statistic | None], None]
Done = Callable[[float], None]


def walk(
    model: nn.Module,
    linears: Sequence[Linear],
    batches: Sequence[Any],
    method: Method,
    prune: Prune,
    done: Done,
) -> None:
    """Call ``prune`` for every layer with the statistic of its inputs, blocks in order.

    All layers of a block see the block as it was; later blocks see it pruned.

    Raises:
        ValueError: naming layers that no batch reaches, before anything is pruned.
    """
    _, model = next(named_modules(model))  # without the wrappers of torch.compile and DDP
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    calls = [_on(batch, device) for batch in batches]
    with _at_rest(model):
        order = _reached(model, linears, calls)
        chain = find_chain(model, [linear.module for linear in linears])
        if chain is None or not chain.record(lambda i: run(model, calls[i]), len(calls)):
            _whole_model(model, order, calls, method, prune, done)
        else:
            _by_chain(chain, linears, method, prune, done)


def _by_chain(
    chain: Chain, linears: Sequence[Linear], method: Method, prune: Prune, done: Done
) -> None:
    waiting = len(linears)
    for block in range(len(chain.blocks)):
        inside = set(chain.blocks[block].modules())
        here = [linear for linear in linears if linear.module in inside]
        waiting -= len(here)
        with _watching(here, method) as statistics:
            if here:
                chain.run(block, keep=False)
        for linear in here:
            prune(linear, statistics[linear.name])
            done(1 / len(linears))
        if not waiting:
            return
        chain.run(block, keep=True)


def _whole_model(
    model: nn.Module,
    order: Sequence[Linear],
    calls: Sequence[Any],
    method: Method,
    prune: Prune,
    done: Done,
) -> None:
    blocks: dict[str, list[Linear]] = {}
    for linear in order:
        blocks.setdefault(group_of(linear.name), []).append(linear)
    for here in blocks.values():
        with _watching(here, method) as statistics:
            for call in calls:
                run(model, call)
        for linear in here:
            prune(linear, statistics[linear.name])
            done(1 / len(order))


@contextlib.contextmanager
def _watching(linears: Sequence[Linear], method: Method) -> Iterator[dict[str, Statistic]]:
    """Statistics of the inputs of some layers, by name, while the context is open."""
    statistics: dict[str, Statistic] = {}
    handles = []
    for linear in linears:
        if (statistic := method.statistic(linear.read())) is None:
            continue
        statistics[linear.name] = statistic
        handles.append(
            linear.module.register_forward_pre_hook(_adding(statistic), with_kwargs=True)
        )
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()


def _adding(statistic: Statistic) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
        statistic.add(next(iter((*args, *kwargs.values()))))

    return hook


def _reached(model: nn.Module, linears: Sequence[Linear], calls: Sequence[Any]) -> list[Linear]:
    """The layers in the order in which they are first called; one pass, stopped early."""
    missing = {linear.module: linear for linear in linears}
    order: list[Linear] = []

    def hook(module: nn.Module, args: Any) -> None:
        if (linear := missing.pop(module, None)) is not None:
            order.append(linear)
        if not missing:
            raise PassEndedError

    handles = [linear.module.register_forward_pre_hook(hook) for linear in linears]
    try:
        for i, call in enumerate(calls):
            try:
                run(model, call)
            except Exception as error:
                raise ValueError(
                    f"the model cannot be run on batches[{i}] ({type(error).__name__}: {error}): "
                    "give inputs alone, without labels, as the model takes them"
                ) from error
            if not missing:
                break
    finally:
        for handle in handles:
            handle.remove()
    if missing:
        names = ", ".join(linear.name for linear in list(missing.values())[:5])
        raise ValueError(
            f"no batch reaches the inputs of {len(missing)} layers ({names}): give batches that "
            "do, leave these layers out of ratios, or use Magnitude()"
        )
    return order


def run(model: nn.Module, call: Any) -> None:
    """The model on one batch: a mapping by name, a tuple or list in order, or one argument."""
    with contextlib.suppress(PassEndedError):
        if isinstance(call, Mapping):
            model(**call)
        elif isinstance(call, tuple | list):
            model(*call)
        else:
            model(call)


@contextlib.contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients and no cache of keys and values; all as before afterwards."""
    training = [module for module in model.modules() if module.training]
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    caching = [c for c in configs.values() if getattr(c, "use_cache", False)]
    for config in caching:
        config.use_cache = False
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for config in caching:
            config.use_cache = True


def _on(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device; mappings and sequences one level deep."""
    if isinstance(batch, Mapping):
        return {name: _on(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [_on(value, device) for value in batch]
    return batch.to(device) if isinstance(batch, Tensor) else batch
