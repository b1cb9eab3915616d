"""Trial: a few steps of an optimizer's twin on small tensors, whole and split.

Whether an optimizer can have a group a layer is a matter of what its step does. Some compute a
number over a group, and a split changes it; some keep a list with an entry a group; some refuse
groups of different rates; some write the rate themselves. No list of names can be complete.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import random
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tempbalance.layers import Host
from tempbalance.optim.groups import by_parameter, partition

# Some wait for their statistics: RAdam for 5 steps, AdaShift for 10.
STEPS = 12
# Side of the small tensors; how many there are of a part, parts of a group, and groups.
_SIDE, _MEMBERS, _PARTS, _GROUPS = 4, 4, 2, 4
# Differences of rounding (matrices multiplied in batches) are far below this share of the way.
_TOLERANCE = 1e-3
# A rate for groups that have none yet, in a warm-up.
_RATE = 1e-3

Sizes = list[list[list[nn.Parameter]]]  # by group and part
Toys = list[list[list[Tensor]]]  # by group and part

# What no trial tells.
_REASONS = {
    "GrokFastAdamW": (
        "it divides the rate that it is given, but not the rates of groups, so that there are two "
        "base rates",
        "Use AdamW, with the filter on the gradients before the step",
    ),
}


def check_split(optimizer: Optimizer, hosts: Sequence[Host]) -> None:
    """Refuse an optimizer that a group a layer would change by itself.

    torch's own are held to the same by tests. Where no twin can be made or stepped nothing is
    said: the trial is no proof.

    Args:
        hosts: what gets a group of its own.

    Raises:
        ValueError: with the reason and the cure.
    """
    name = type(optimizer).__name__
    if name in _REASONS:
        _refuse(name, *_REASONS[name])
    if type(optimizer).__module__.startswith("torch.optim"):
        return
    with _aside(optimizer):
        try:
            sizes = _sizes(optimizer, hosts)
            whole, closure = _whole(optimizer, sizes)
        except NotImplementedError as error:
            if error.args:  # something that the step has no way to do here
                return
            _refuse(
                name,
                "it has no step: the weights change elsewhere (LOMO's during the backward pass), "
                "at a rate that is not that of a param group",
                "Use an optimizer whose step changes the weights, such as AdamW",
            )
        except Exception:
            return
        _compare(optimizer, sizes, whole, closure)


def _compare(optimizer: Optimizer, sizes: Sizes, whole: _Run, closure: bool) -> None:
    name = type(optimizer).__name__
    if whole.wrote_rate:
        _refuse(name, "its step writes the learning rate itself", "Use one with a rate of yours")
    cure = "Use AdamW, SGD or another optimizer that treats every parameter by itself"
    try:
        unequal = _Run(optimizer, sizes, True, closure, factor=2.0)
        split = _Run(optimizer, sizes, True, closure)
    except Exception as error:
        _refuse(name, f"with a group a layer its step raises {error!r}", cure)
    if all(x.equal(y) for x, y in zip(split.weights, unequal.weights, strict=True)):
        why = "its step does not use the learning rate of a param group"
        _refuse(name, why, "Give it a rate that it uses (for Adafactor relative_step=False)")
    if not _same(whole, split):
        _refuse(
            name,
            "it computes something over a whole param group, which a group a layer changes even "
            "with equal rates",
            cure,
        )


def _whole(optimizer: Optimizer, sizes: Sizes) -> tuple[_Run, bool]:
    try:
        return _Run(optimizer, sizes, False, closure=False), False
    except Exception:
        return _Run(optimizer, sizes, False, closure=True), True


class _Run:
    """A twin's weights after some steps."""

    def __init__(
        self, optimizer: Optimizer, sizes: Sizes, split: bool, closure: bool, factor: float = 1.0
    ) -> None:
        toys = _toys(sizes)
        twin = _twin(optimizer, toys, split)
        _seed({p.device.type for parts in toys for part in parts for p in part})
        for group in twin.param_groups[::2]:
            group["lr"] = group["lr"] * factor
        rates = [float(group["lr"]) for group in twin.param_groups]
        self.weights = [p for parts in toys for part in parts for p in part]
        self.before = [p.detach().clone() for p in self.weights]
        generator = torch.Generator().manual_seed(0)
        for _ in range(STEPS):
            for p in self.weights:
                p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
            arguments = [lambda: torch.ones((), requires_grad=True)] if closure else []
            type(twin).step(twin, *arguments)  # type: ignore[arg-type]
        self.wrote_rate = rates != [float(group["lr"]) for group in twin.param_groups]


def _twin(optimizer: Optimizer, toys: Toys, split: bool) -> Optimizer:
    """An optimizer of the same class and options, without state, on other tensors."""
    twin: Optimizer = object.__new__(type(optimizer))
    instead = {id(p): toys[0][0][0] for group in optimizer.param_groups for p in group["params"]}
    left = ("step", "param_groups", "state", "_tempbalance")
    for key, value in vars(optimizer).items():
        # ``step`` may be an attribute, of a schedule's: it steps what it was taken from.
        if key not in left and not _reaches_out(value):
            hooks = key.endswith("_hooks")
            twin.__dict__[key] = OrderedDict() if hooks else _copied(value, instead)
    groups = []
    for group, parts in zip(optimizer.param_groups, toys, strict=False):
        named = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        options = {k: _copied(v, instead) for k, v in named.items()}
        options["lr"] = options["lr"] if float(options["lr"]) else _RATE
        members = parts if split else [[p for part in parts for p in part]]
        groups += [{**copy.deepcopy(options), "params": list(part)} for part in members]
    twin.__dict__.update(param_groups=groups, state=defaultdict(dict))
    return twin


def _sizes(optimizer: Optimizer, hosts: Sequence[Host]) -> Sizes:
    """What the small tensors are like: parameters by group and part."""
    host_of = by_parameter(hosts)
    out = []
    for group in optimizer.param_groups[:_GROUPS]:
        if not group["params"]:
            raise ValueError("nothing to try it on")
        parts = [members for _, members in partition(group, host_of)][:_PARTS]
        out.append([[group["params"][i] for i in part[:_MEMBERS]] for part in parts])
    return out


def _toys(sizes: Sizes) -> Toys:
    generator = torch.Generator().manual_seed(1)

    def toy(like: Tensor) -> Tensor:
        small = torch.randn(
            [min(side, _SIDE) for side in like.shape], generator=generator, device="cpu"
        )
        return small.to(like.device, like.dtype).requires_grad_()

    return [[[toy(p) for p in part] for part in parts] for parts in sizes]


def _reaches_out(value: Any) -> bool:
    """Whether it leads to the weights that are trained, of which the twin must know nothing.

    A step that needs it fails then, and tells nothing.
    """
    if inspect.isfunction(value):
        return any(isinstance(held, nn.Module | Tensor | Optimizer) for held in _closed_over(value))
    return isinstance(value, nn.Module) or inspect.ismethod(value)


def _closed_over(function: Any) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a name that has no value yet
            yield cell.cell_contents


def _copied(value: Any, instead: Mapping[int, Tensor]) -> Any:
    """A copy of an option, in which a parameter is a small tensor; not of what is large."""
    large = isinstance(value, Tensor) and value.numel() > 1
    if large or isinstance(value, nn.Module | Optimizer):
        raise TypeError("not copied")
    return copy.deepcopy(value, dict(instead))


def _same(a: _Run, b: _Run) -> bool:
    for start, x, y in zip(a.before, a.weights, b.weights, strict=True):
        way = (x.detach() - start).abs().max()
        rounding = 4 * torch.finfo(x.dtype).eps * start.abs().max()
        apart = (x.detach() - y.detach()).abs().max()
        if not bool(apart <= _TOLERANCE * way + rounding):
            return False
    return True


@contextlib.contextmanager
def _aside(optimizer: Optimizer) -> Iterator[None]:
    """Without a trace: no words of others, no random numbers drawn, nothing compiled."""
    used = {p.device for group in optimizer.param_groups for p in group["params"]}
    devices: Sequence[Any] = [d for d in used if d.type == "cuda"]
    states = random.getstate(), np.random.get_state()
    stance: Callable[[str], Any] | None = getattr(torch.compiler, "set_stance", None)
    with (
        torch.random.fork_rng(devices),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.nullcontext() if stance is None else stance("force_eager"),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _seed(types: set[str]) -> None:
    # torch.manual_seed also seeds a GPU that is first used later, whose state nothing restores.
    seed = torch.default_generator.manual_seed if types == {"cpu"} else torch.manual_seed
    seed(0)
    random.seed(0)
    np.random.seed(0)


def _refuse(name: str, why: str, cure: str) -> None:
    raise ValueError(f"{name} cannot have a learning rate per layer: {why}. {cure}")
