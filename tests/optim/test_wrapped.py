"""Optimizers around others, and those that are built from a model: the contract holds, or refused.

A wrapper's hooks belong on the optimizer whose step changes the weights. What the small network of
test_contract.py cannot train in its plain way is trained here in its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from optimizers import FACTORS, Kind, by_hand, net, trained
from torch import Tensor, nn
from torch.optim import Optimizer

import tempbalance as tb
from tempbalance import StepHooks, TempBalanceLR

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
mse = nn.functional.mse_loss
AdamW = torch.optim.AdamW


class SAM(Optimizer):
    """As it is commonly written: the inner optimizer shares the groups, and has the second step."""

    def __init__(self, params: Any, inner: Any, **options: Any) -> None:
        super().__init__(params, {"rho": 0.05, **options})
        self.base_optimizer = inner(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        grads = [p.grad.norm() for g in self.param_groups for p in g["params"]]
        norm = torch.stack(grads).norm()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.detach().clone()
                p.add_(p.grad, alpha=float(group["rho"] / norm))

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old"])
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> None:
        with torch.enable_grad():
            closure()
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


def library(name: str, attribute: str) -> Any:
    """A class of a library, which is looked for when it is needed."""
    return getattr(pytest.importorskip(name), attribute)


def of(name: str, *arguments: Any, **options: Any) -> Callable[[Any], Any]:
    """A class of pytorch_optimizer that takes groups, then these."""
    options.setdefault("lr", 0.01)
    return lambda groups: library("pytorch_optimizer", name)(groups, *arguments, **options)


def around(name: str, **options: Any) -> Callable[[Any], Any]:
    """A class of pytorch_optimizer that takes an optimizer."""
    return lambda groups: library("pytorch_optimizer", name)(AdamW(groups, lr=0.01), **options)


def first_and_second(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    for step in (optimizer.first_step, optimizer.second_step):
        mse(model(x), y).backward()
        step(zero_grad=True)


def with_projected_gradients(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    out = model(x)
    optimizer.pc_backward([mse(out, y), out.abs().mean()])
    optimizer.step()


def with_its_closure(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    optimizer.set_closure(mse, x, y)
    optimizer.step()


def wsam(model: nn.Module, groups: Any, **options: Any) -> Any:
    return library("pytorch_optimizer", "WSAM")(model, groups, AdamW, lr=0.01, **options)


def gsam(model: nn.Module, groups: Any) -> Any:
    """With a schedule of its radius, which looks at one of the rate."""
    optimizers = pytest.importorskip("pytorch_optimizer")
    base = AdamW(groups, lr=0.01)
    rates = {"max_lr": 0.01, "min_lr": 0.01}
    schedule = optimizers.LinearScheduler(base, t_max=50, **rates)
    radius = optimizers.ProportionScheduler(schedule, max_value=2.0, min_value=2.0, **rates)
    return optimizers.GSAM(groups, base, model, radius)


def muon(groups: Any) -> Any:
    """Matrices by Muon, the rest by the AdamW inside of it."""
    split = [
        {"params": [p for p in group["params"] if (p.ndim > 1) is matrix], "use_muon": matrix}
        for matrix in (True, False)
        for group in groups
    ]
    return library("pytorch_optimizer", "DistributedMuon")(split, lr=0.01)


def sara(model: nn.Module, groups: Any) -> Any:
    """Trains the small weights alone."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1e-3)
    return library("pytorch_optimizer", "SaRA")(groups, lr=0.01)


WRAPPERS = {
    "a common SAM": Kind(lambda groups: SAM(groups, AdamW, lr=0.01), closure=True),
    "timm's Lookahead": Kind(
        lambda groups: library("timm.optim", "Lookahead")(AdamW(groups, lr=0.01), k=3)
    ),
    "schedulefree's wrapper": Kind(
        lambda groups: library("schedulefree", "ScheduleFreeWrapper")(
            torch.optim.SGD(groups, lr=0.1), weight_decay_at_y=0.1
        )
    ),
    "SAM": Kind(of("SAM", AdamW), closure=True),
    "SAM in two steps": Kind(of("SAM", AdamW, use_gc=True), loop=first_and_second),
    "LookSAM": Kind(of("LookSAM", AdamW, k=3), closure=True),
    "LookSAM in two steps": Kind(of("LookSAM", AdamW, k=3), loop=first_and_second),
    "FriendlySAM": Kind(of("FriendlySAM", AdamW), closure=True),
    "FriendlySAM in two steps": Kind(of("FriendlySAM", AdamW), loop=first_and_second),
    "BSAM": Kind(of("BSAM", num_data=100), closure=True),
    "WSAM": Kind(wsam, model=True, closure=True),
    "WSAM in two steps": Kind(wsam, model=True, loop=first_and_second),
    "GSAM": Kind(gsam, model=True, loop=with_its_closure),
    "Lookahead": Kind(around("Lookahead", k=3)),
    "Lookahead with pullback": Kind(around("Lookahead", k=3, pullback_momentum="reset")),
    "OrthoGrad": Kind(around("OrthoGrad")),
    "PCGrad": Kind(around("PCGrad"), loop=with_projected_gradients),
    "TRAC": Kind(around("TRAC")),
    "ScheduleFreeWrapper": Kind(around("ScheduleFreeWrapper", weight_decay=0.1)),
    "OrthoGrad in Lookahead": Kind(
        lambda groups: library("pytorch_optimizer", "Lookahead")(around("OrthoGrad")(groups), k=3)
    ),
}
# They use the rate outside of the inner optimizer's step.
OUTSIDE = {"schedulefree's wrapper", "ScheduleFreeWrapper", "WSAM", "WSAM in two steps"}


@pytest.mark.parametrize("how", [TempBalanceLR, StepHooks])
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_optimizers_are_hooked_where_the_weights_change(name: str, how: Any) -> None:
    kind = WRAPPERS[name]
    if name in OUTSIDE and how is StepHooks:
        model, optimizer = kind.build()
        with pytest.raises(ValueError, match=r"uses the learning rate outside.*TempBalanceLR"):
            StepHooks(optimizer, model)
        assert len(optimizer.param_groups) == 1
        return
    keeps_the_contract(kind, how)


def keeps_the_contract(kind: Kind, how: Any) -> None:
    groups, plain = by_hand(kind), trained(kind, None)
    assert not plain.equal(groups)
    assert trained(kind, how, fixed=FACTORS).equal(groups)
    assert trained(kind, how, assign=tb.Constant(1.0)).equal(plain)
    resumed = by_hand(kind, save=True)  # not exact with some, without us
    assert trained(kind, how, save=True, fixed=FACTORS).equal(resumed)


class Pulled(SAM):
    """Uses the rate after the inner step, in a function inside of a method."""

    def second_step(self) -> None:
        super().second_step()
        for rate in [group["lr"] for group in self.param_groups]:
            for group in self.param_groups:
                torch._foreach_mul_([p.data for p in group["params"]], 1 - 0.01 * rate)

    def step(self, closure: Any = None) -> None:
        super().step(closure)


class Renamed(Pulled):
    """All that it does is its parent's."""


@pytest.mark.parametrize("cls", [Pulled, Renamed])
def test_a_rate_outside_of_the_inner_step_is_found_wherever_it_stands(cls: Any) -> None:
    model = net()
    optimizer = cls(model.parameters(), AdamW, lr=0.01)
    with pytest.raises(ValueError, match=f"{cls.__name__} uses the learning rate outside"):
        StepHooks(optimizer, model)
    assert len(optimizer.param_groups) == 1
    StepHooks(SAM(model.parameters(), AdamW, lr=0.01), model)


ELSEWHERE = {
    "AdamMini": Kind(
        lambda model, groups: library("pytorch_optimizer", "AdamMini")(model, lr=0.01), model=True
    ),
    "DistributedMuon": Kind(muon),
    "DeMo": Kind(of("DeMo")),
    "SaRA": Kind(sara, model=True),
}


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("how", [TempBalanceLR, StepHooks])
@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_takes_a_model_or_a_process_group(name: str, how: Any) -> None:
    if name == "DeMo":
        pytest.importorskip("einops")
    keeps_the_contract(ELSEWHERE[name], how)


def built(name: str, **options: Any) -> Callable[[nn.Module], Any]:
    return lambda model: library("pytorch_optimizer", name)(model, **options)


def in_half_precision(model: nn.Module) -> Any:
    """SafeFP16Optimizer trains copies in single precision."""
    return library("pytorch_optimizer", "SafeFP16Optimizer")(AdamW(model.parameters(), lr=0.01))


class Offloaded:
    """As pytorch_optimizer's and torchao's CPUOffloadOptimizer: it trains copies elsewhere."""

    def __init__(self, model: nn.Module) -> None:
        self.copies = {p: p.detach().clone() for p in model.parameters()}
        self.optimizer = AdamW(list(self.copies.values()), lr=0.01)


class InTheBackwardPass(Optimizer):
    """As LOMO of other releases: weights change while the gradients come, and there is no step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {"lr": 0.01})
        self.model = model


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "LOMO": (built("LOMO"), "LOMO cannot.*it has no step.*Use an optimizer whose step"),
    "AdaLOMO": (built("AdaLOMO"), "AdaLOMO cannot.*it has no step"),
    "another LOMO": (InTheBackwardPass, "InTheBackwardPass cannot.*it has no step"),
    "AliG": (
        lambda model: library("pytorch_optimizer", "AliG")(model.parameters(), max_lr=0.1),
        "AliG has the learning rate None: there is nothing to multiply",
    ),
    "SafeFP16Optimizer": (in_half_precision, "copies of the weights.*torch.autocast"),
    "CPUOffloadOptimizer": (Offloaded, "copies of the weights.*torch.autocast"),
}


@pytest.mark.parametrize("how", [TempBalanceLR, StepHooks])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_keep_it_is_refused_untouched(name: str, how: Any) -> None:
    build, why = REFUSED[name]
    model = net()
    optimizer = build(model)
    stepping = getattr(optimizer, "optimizer", optimizer)
    (before,) = ({**group} for group in stepping.param_groups)
    with pytest.raises(ValueError, match=why):
        how(optimizer, model)
    (after,) = stepping.param_groups
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] for key in before)
    assert not stepping._optimizer_step_pre_hooks


def test_decay_is_refused_for_the_same_reason() -> None:
    model = net()
    optimizer = built("AdaLOMO", weight_decay=0.1)(model)
    with pytest.raises(ValueError, match=r"AdaLOMO cannot.*it has no step"):
        tb.AlphaDecay(optimizer, model)
    assert len(optimizer.param_groups) == 1


def test_several_optimizers_in_one_are_to_be_balanced_one_by_one() -> None:
    class Both:
        def __init__(self, model: Any) -> None:
            self.parts = [torch.optim.SGD(x.parameters(), lr=0.1) for x in (model[0], model[2])]

    model = net()
    for how in (TempBalanceLR, StepHooks, tb.AlphaDecay):
        optimizer: Any = Both(model)
        with pytest.raises(ValueError, match="Both holds 2 optimizers"):
            how(optimizer, model)


def test_a_step_that_is_never_seen_is_reported_once(recwarn: Any) -> None:
    """The optimizer that was passed is not the one that steps."""
    model = net()
    passed = torch.optim.SGD(model.parameters(), lr=0.1)
    stepping = torch.optim.SGD(model.parameters(), lr=0.1)
    hooks = StepHooks(passed, model, fixed=FACTORS)
    for _ in range(100):
        model(torch.randn(4, 12)).square().sum().backward()
        stepping.step()
    said = [w for w in recwarn if "no step of the SGD" in str(w.message)]
    assert len(said) == 1
    assert hooks.balancer.tick == 0


def test_accumulation_and_a_seen_step_are_not_reported(recwarn: Any) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooks = StepHooks(optimizer, model, fixed=FACTORS)
    for _ in range(50):
        model(torch.randn(4, 12)).sum().backward()
    optimizer.step()
    for i in range(50):
        Kind(torch.optim.SGD).step(model, optimizer, i)
    assert hooks.balancer.tick == 51
    assert not recwarn.list
