"""Every optimizer class that is installed, and how a small network is trained with it."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tempbalance import TempBalanceLR

LIBRARIES = {
    "torch": "torch.optim",
    "timm": "timm.optim",
    "pytorch_optimizer": "pytorch_optimizer",
    "schedulefree": "schedulefree",
}
# Around another optimizer, or made for a whole model: tests of their own.
_NOT_ALONE = {"Optimizer", "BaseOptimizer"}
# Some wait for their statistics or another's weights: RAdam and Lookahead for 5 or 6 steps.
_STEPS = 7
_LONGER = {"AdaShift": 12}  # it waits for 10


@functools.cache
def classes(library: str) -> dict[str, type[Optimizer]]:
    """The optimizer classes of a library by name, or none where it is not installed."""
    try:
        module = importlib.import_module(LIBRARIES[library])
    except ImportError:
        return {}
    found = {}
    for name, value in sorted(vars(module).items()):
        if inspect.isclass(value) and issubclass(value, Optimizer) and name not in _NOT_ALONE:
            own = value.__module__.split(".")[0] == LIBRARIES[library].split(".")[0]
            if own and value not in found.values():
                found[name] = value
    return found


def net(bias: bool = True) -> nn.Sequential:
    torch.default_generator.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10, bias=bias), nn.Tanh(), nn.Linear(10, 10, bias=bias))


Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """How an optimizer class is built and stepped.

    Args:
        optimizer: the class.
        bias: whether the network has biases (some take matrices alone).
        closure: whether a step needs one.
        graph: whether the backward pass builds a graph (second-order ones).
        entries: what each param group needs beside the parameters.
        options: of the class.
        model: whether the class takes the model, and then the groups.
        loop: a step for a batch, where that is no call of ``step``.
    """

    optimizer: Callable[..., Optimizer]
    bias: bool = True
    closure: bool = False
    graph: bool = False
    entries: tuple[tuple[str, Any], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    model: bool = False
    loop: Callable[[nn.Module, Any, Tensor, Tensor], None] | None = None

    @property
    def steps(self) -> int:
        """After which all that it does has been done."""
        return _LONGER.get(getattr(self.optimizer, "__name__", ""), _STEPS)

    def build(self, split: bool = False) -> tuple[nn.Sequential, Optimizer]:
        """A network and its optimizer, with one group or a group a layer."""
        model = net(self.bias)
        layers = [model[0], model[2]] if split else [model]
        groups = [{"params": list(m.parameters()), **dict(self.entries)} for m in layers]
        with quiet():
            given = (model, groups) if self.model else (groups,)
            optimizer = self.optimizer(*given, **dict(self.options))
        if callable(train := getattr(optimizer, "train", None)):
            train()
        return model, optimizer

    def step(self, model: nn.Module, optimizer: Any, index: int) -> None:
        generator = torch.Generator().manual_seed(index)
        x, y = (torch.randn(8, n, generator=generator) for n in (12, 10))

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            value = nn.functional.mse_loss(model(x), y)
            value.backward(create_graph=self.graph)
            return value

        torch.default_generator.manual_seed(index)  # some draw random numbers
        np.random.seed(index)
        with quiet():
            if self.loop is not None:
                self.loop(model, optimizer, x, y)
                return
            loss()
            optimizer.step(loss) if self.closure else optimizer.step()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the words of other libraries."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@functools.cache
def kind_of(cls: type[Optimizer]) -> Kind | None:
    """The first way in which the class trains the small network; ``None`` if there is none."""
    own = inspect.signature(cls).parameters
    lr = (("lr", 1e-2),) if "lr" in own else ()
    more = {"num_iterations": 20, "num_data": 100}
    options = lr + tuple((k, v) for k, v in more.items() if k in own)
    for bias in (True, False):
        for closure, graph in ((False, False), (True, False), (False, True)):
            for entries in ((), (("use_muon", bias is False),)):
                kind = Kind(cls, bias, closure, graph, entries, options)
                with contextlib.suppress(Exception):
                    model, optimizer = kind.build()
                    before = weights(model)
                    for i in range(kind.steps):
                        kind.step(model, optimizer, i)
                    if weights(model).isfinite().all() and not weights(model).equal(before):
                        return kind
    return None


# Of the two layers of the small network.
FACTORS = {"0": 0.5, "2": 1.5}


def balanced(how: type[Any], model: nn.Module, optimizer: Optimizer, **options: Any) -> Any:
    with quiet():
        return how(optimizer, model, **options)


def trained(kind: Kind, how: type[Any] | None, save: bool = False, **options: Any) -> torch.Tensor:
    """The weights after some steps; with ``save`` all is built anew halfway and loaded."""

    def build() -> Any:
        model, optimizer = kind.build()
        return model, optimizer, None if how is None else balanced(how, model, optimizer, **options)

    model, optimizer, balance = build()
    for i in range(kind.steps):
        if save and i == kind.steps // 2:
            saved = [copy.deepcopy(x.state_dict()) for x in (model, optimizer, balance) if x]
            model, optimizer, balance = build()
            for thing, state in zip((model, optimizer, balance), saved, strict=False):
                thing.load_state_dict(state)
        kind.step(model, optimizer, i)
        if isinstance(balance, TempBalanceLR):
            balance.step()
    return weights(model)


def by_hand(kind: Kind, save: bool = False) -> torch.Tensor:
    """The weights after some steps with a param group a layer, without us."""

    def build() -> Any:
        model, optimizer = kind.build(split=True)
        layer = {id(p): name.split(".")[0] for name, p in model.named_parameters()}
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * FACTORS[layer[id(group["params"][0])]]
        return model, optimizer

    model, optimizer = build()
    for i in range(kind.steps):
        if save and i == kind.steps // 2:
            states = [copy.deepcopy(x.state_dict()) for x in (model, optimizer)]
            model, optimizer = build()
            model.load_state_dict(states[0])
            optimizer.load_state_dict(states[1])
        kind.step(model, optimizer, i)
    return weights(model)
