"""The contract: with every optimizer a layer's multiplier is a param group's rate, bit for bit.

Held against param groups written by hand, the plain run, and a run that was saved halfway. What
cannot keep it is refused at construction, before anything is touched.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from optimizers import LIBRARIES, Kind, classes, kind_of, net, quiet, weights
from torch import nn
from torch.optim import Optimizer

import tempbalance as tb
from tempbalance import StepHooks, TempBalanceLR

FACTORS = {"0": 0.5, "2": 1.5}
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
# A training that needs more than the small network.
ELSEWHERE = {
    "AdaLOMO": "is built from a model, and steps while the gradients come",
    "AdamMini": "is built from a model, and makes groups of its own",
    "AliG": "has no rate",
    "DeMo": "needs several processes",
    "DistributedMuon": "needs several processes",
    "LOMO": "is built from a model, and steps while the gradients come",
    "SaRA": "trains the small weights of a trained network alone",
    "SparseAdam": "is for sparse gradients: test_misuse.py",
}
# Around other optimizers: below.
AROUND = {
    *("BSAM", "FriendlySAM", "GSAM", "Lookahead", "LookSAM", "OrthoGrad", "PCGrad"),
    *("SAM", "SafeFP16Optimizer", "ScheduleFreeWrapper", "TRAC", "WSAM"),
}
REFUSED = {
    "A2Grad": "nothing to multiply",
    "ASGD": "writes the learning rate",
    "AdaBound": "its step raises",
    "AdaFactor": "does not use the learning rate",
    "ApolloDQN": "does not use the learning rate",
    "AvaGrad": "over a whole param group",
    "DAdaptSGD": "does not use the learning rate",
    "GrokFastAdamW": "two base rates",
    "LBFGS": "cannot have a learning rate per layer",
}


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
    def build() -> Any:
        model, optimizer = kind.build(split=True)
        for group, factor in zip(optimizer.param_groups, FACTORS.values(), strict=True):
            group["lr"] = group["lr"] * factor
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


def plain(value: Any) -> Any:
    """Param groups with parameters by identity, to compare."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return id(value) if isinstance(value, nn.Parameter) else repr(value)


@pytest.mark.parametrize(
    "library",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == "pytorch_optimizer" else [])
        for name in LIBRARIES
    ],
)
def test_every_optimizer_keeps_the_contract_or_is_refused(library: str) -> None:
    if not classes(library):
        pytest.skip(f"{library} is not installed")
    wrong = []
    for name, cls in classes(library).items():
        if name in AROUND or name in ELSEWHERE:
            continue
        kind = kind_of(cls)
        if kind is None:
            wrong.append(f"{name}: the small network cannot be trained with it")
            continue
        if refused(kind):
            wrong += [] if name in REFUSED else [f"{name}: refused"]
            continue
        groups = by_hand(kind)
        untouched = trained(kind, None)
        for how in (TempBalanceLR, StepHooks):
            label = f"{name}, {how.__name__}"
            if not trained(kind, how, fixed=FACTORS).equal(groups):
                wrong.append(f"{label}: not as groups by hand")
            if not trained(kind, how, assign=tb.Constant(1.0)).equal(untouched):
                wrong.append(f"{label}: Constant(1.0) is not the plain run")
            resumed = trained(kind, how, save=True, fixed=FACTORS)
            # Some are not resumed exactly by themselves.
            if not resumed.equal(groups) and not resumed.equal(by_hand(kind, save=True)):
                wrong.append(f"{label}: resumed not as groups by hand are")
        if untouched.equal(groups):
            wrong.append(f"{name}: its rate has no effect")
    assert not wrong, "\n".join(wrong)


def refused(kind: Kind) -> bool:
    """Whether both ways refuse it, with all as it was."""
    answers = []
    for how in (TempBalanceLR, StepHooks):
        model, optimizer = kind.build()
        groups, random = plain(optimizer.param_groups), torch.get_rng_state()
        said = ""
        try:
            balanced(how, model, optimizer, assign=tb.Constant(1.0))
        except ValueError as error:
            said = str(error)
        answers.append(bool(said))
        if said:
            name = type(optimizer).__name__
            assert REFUSED.get(name, "") in said and name in said
            assert plain(optimizer.param_groups) == groups
            assert torch.get_rng_state().equal(random)
            assert not optimizer._optimizer_step_pre_hooks
    assert len(set(answers)) == 1
    return answers[0]


# --- optimizers that are in no library -----------------------------------------------------------


class Mean(Optimizer):
    """Takes the mean size of a group's gradients: a number over a whole group."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            grads = [p.grad for p in group["params"] if p.grad is not None]
            size = torch.stack([g.abs().mean() for g in grads]).mean()
            for p in group["params"]:
                p.data.sub_(p.grad / size, alpha=group["lr"])


class OneRate(Optimizer):
    """Refuses groups of different rates, as Prodigy does."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        if len({group["lr"] for group in self.param_groups}) > 1:
            raise RuntimeError("different rates are not supported")
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad, alpha=group["lr"])


class Warming(torch.optim.SGD):
    """Writes its own rate."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["lr"] *= 1.1
        super().step(closure)


class Nested(torch.optim.AdamW):
    """Its step calls its parent's, which is hooked too; it counts in its groups."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(1 - 0.01 * group["lr"] * group["count"])


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (Mean, "over a whole param group"),
        (OneRate, "different rates are not supported"),
        (Warming, "writes the learning rate"),
    ],
)
def test_what_a_split_would_change_is_found_by_what_it_does(cls: Any, why: str) -> None:
    kind = Kind(cls, options=(("lr", 0.01),))
    for how in (TempBalanceLR, StepHooks, tb.AlphaDecay):
        model, optimizer = kind.build()
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.1
        with pytest.raises(ValueError, match=why):
            how(optimizer, model)
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("how", [TempBalanceLR, StepHooks])
def test_a_step_that_calls_its_parents(how: Any) -> None:
    Kind(torch.optim.AdamW).build()  # from now on its step is hooked
    kind = Kind(Nested)
    assert trained(kind, how, fixed=FACTORS).equal(by_hand(kind))
    assert trained(kind, how, save=True, fixed=FACTORS).equal(by_hand(kind, save=True))


def test_a_step_that_raises_inside_of_its_parents() -> None:
    Kind(torch.optim.AdamW).build()
    model, optimizer = Kind(Nested).build()
    hooks = StepHooks(optimizer, model, fixed=FACTORS)
    nn.functional.mse_loss(model(torch.randn(4, 12)), torch.zeros(4, 10)).backward()

    def out_of_memory() -> float:
        raise MemoryError

    for _ in range(3):
        with pytest.raises(MemoryError):
            optimizer.step(out_of_memory)
    optimizer.step()
    assert len(optimizer.param_groups) == 1 and hooks.balancer.tick == 1


def test_no_gpu_is_seeded_for_a_network_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is first used later would begin with the seed of the trial, not with the user's."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    model, optimizer = Kind(Nested).build()
    TempBalanceLR(optimizer, model)
    assert not seeds
    torch.manual_seed(0)
    assert seeds  # the call that is watched


# --- optimizers around others --------------------------------------------------------------------


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


def sam(groups: Any) -> Optimizer:
    return SAM(groups, torch.optim.AdamW, lr=0.01)


def timm_lookahead(groups: Any) -> Any:
    return pytest.importorskip("timm.optim").Lookahead(torch.optim.AdamW(groups, lr=0.01), k=3)


def their_sam(groups: Any) -> Any:
    library = pytest.importorskip("pytorch_optimizer")
    return library.SAM(groups, torch.optim.AdamW, lr=0.01)


def their_lookahead(groups: Any) -> Any:
    library = pytest.importorskip("pytorch_optimizer")
    return library.Lookahead(torch.optim.AdamW(groups, lr=0.01), k=3)


def schedule_free(groups: Any) -> Any:
    library = pytest.importorskip("schedulefree")
    return library.ScheduleFreeWrapper(torch.optim.SGD(groups, lr=0.1), weight_decay_at_y=0.1)


WRAPPERS = {
    "sam": Kind(sam, closure=True),
    "their_sam": Kind(their_sam, closure=True),
    "timm_lookahead": Kind(timm_lookahead),
    "their_lookahead": Kind(their_lookahead),
    "schedule_free": Kind(schedule_free),
}


@pytest.mark.parametrize("how", [TempBalanceLR, StepHooks])
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_optimizers_are_hooked_where_the_weights_change(name: str, how: Any) -> None:
    kind = WRAPPERS[name]
    if name == "schedule_free" and how is StepHooks:
        model, optimizer = kind.build()
        with pytest.raises(ValueError, match=r"ScheduleFreeWrapper uses.*TempBalanceLR"):
            StepHooks(optimizer, model)
        return
    groups = by_hand(kind)
    assert trained(kind, how, fixed=FACTORS).equal(groups)
    assert trained(kind, how, assign=tb.Constant(1.0)).equal(trained(kind, None))
    assert not trained(kind, None).equal(groups)


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
