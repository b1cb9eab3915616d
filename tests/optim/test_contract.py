"""The contract: with every optimizer a layer's multiplier is a param group's rate, bit for bit.

Held against param groups written by hand, the plain run, and a run that was saved halfway. What
cannot keep it is refused at construction, before anything is touched.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimizers import FACTORS, LIBRARIES, Kind, balanced, by_hand, classes, kind_of, trained
from torch import nn
from torch.optim import Optimizer

import tempbalance as tb
from tempbalance import StepHooks, TempBalanceLR

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
# Needs more than the small network and its gradients, or stands around others: test_wrapped.py, and
# for sparse gradients test_misuse.py.
ELSEWHERE = {
    *("AdaLOMO", "AdamMini", "AliG", "DeMo", "DistributedMuon", "LOMO", "SaRA", "SparseAdam"),
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
        pytest.param(name, marks=[pytest.mark.ci] if name == "pytorch_optimizer" else [])
        for name in LIBRARIES
    ],
)
def test_every_optimizer_keeps_the_contract_or_is_refused(library: str) -> None:
    if not classes(library):
        pytest.skip(f"{library} is not installed")
    wrong = []
    for name, cls in classes(library).items():
        if name in ELSEWHERE:
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


class MeanByFunction(Mean):
    """The same through a function that it holds, which leads to no weight."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, lr)
        self.size = lambda grads: torch.stack([g.abs().mean() for g in grads]).mean()

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            size = self.size([p.grad for p in group["params"] if p.grad is not None])
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
        (MeanByFunction, "over a whole param group"),
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
