"""What a multiplier does to a step: kept decay, fixed multipliers and held ones.

Held against optimizers written by hand, in which the two parts of a step are apart: the gradient's
is multiplied, the decay's is not.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from schedules import ASSIGNMENTS
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

import tempbalance as tb
from tempbalance.assign import Assignment

RATE, DECAY, STEPS = 0.02, 0.1, 8
FIXED = {"head": 5.0, "Embedding": 3.0}
State = dict[str, Any]
ByHand = Callable[[Tensor, Tensor, State, float, float], None]


class Words(nn.Module):
    """Two blocks between an embedding and a head, whose weights have no say."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 16)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(16, 24), "down": nn.Linear(24, 16)}) for _ in range(2)
        )
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x)))
        return self.head(self.norm(x))


def words() -> Words:
    torch.manual_seed(0)
    return Words().double()


def loss_of(model: nn.Module, index: int) -> Tensor:
    x = torch.randint(0, 12, (6, 5), generator=torch.Generator().manual_seed(index))
    return nn.functional.cross_entropy(model(x).flatten(0, 1), x.roll(1, 1).flatten())


def sgd(p: Tensor, g: Tensor, state: State, rate: float, m: float) -> None:
    """Momentum 0.9. A buffer for each part: that of the decay remembers the m it was added at."""
    state["g"] = 0.9 * state.get("g", 0) + g
    state["d"] = 0.9 * state.get("d", 0) + DECAY * p / m
    p.sub_(rate * m * state["g"] + rate * m * state["d"])


def plain_sgd(p: Tensor, g: Tensor, state: State, rate: float, m: float) -> None:
    p.sub_(rate * m * g + rate * DECAY * p)


def adamw(p: Tensor, g: Tensor, state: State, rate: float, m: float) -> None:
    """The decay is apart, and knows no multiplier."""
    decayed = rate * DECAY * p
    p.sub_(decayed + rate * m * normalized(g, state))


def adam(p: Tensor, g: Tensor, state: State, rate: float, m: float) -> None:
    """The decay is a part of the gradient, and is normalized with it."""
    p.sub_(rate * m * normalized(g + DECAY / m * p, state))


def normalized(g: Tensor, state: State) -> Tensor:
    state["n"] = state.get("n", 0) + 1
    state["a"] = 0.9 * state.get("a", 0) + 0.1 * g
    state["b"] = 0.999 * state.get("b", 0) + 0.001 * g**2
    first, second = state["a"] / (1 - 0.9 ** state["n"]), state["b"] / (1 - 0.999 ** state["n"])
    return first / (second.sqrt() + 1e-8)


OPTIMIZERS: dict[str, tuple[Callable[[Any], Optimizer], ByHand]] = {
    "sgd": (lambda p: SGD(p, RATE, weight_decay=DECAY), plain_sgd),
    "momentum": (lambda p: SGD(p, RATE, momentum=0.9, weight_decay=DECAY), sgd),
    "adam": (lambda p: Adam(p, RATE, weight_decay=DECAY), adam),
    "adamw": (lambda p: AdamW(p, RATE, weight_decay=DECAY), adamw),
}
# Every control there is, and those that know more of a layer than its alpha.
CONTROLS: dict[str, Assignment] = {
    **ASSIGNMENTS,
    "within_type": tb.Shuffled(tb.LinearMap(), within_type=True),
    "pertype_measured": tb.PerType.measured(tb.LinearMap()),
    "depth_decay": tb.DepthDecay(0.5),
    "depth_linear": tb.DepthLinear(),
    "per_block": tb.PerBlock(tb.LinearMap(), across=tb.SigmoidMap()),
    "null_score": tb.ByRole(tb.NullScore(0.02)),
    "standard_sigmoid": tb.StandardSigmoid(),
    "clipped_level": tb.Clipped(tb.Averaged(tb.LinearMap())),
}


def build(model: nn.Module, make: Callable[[Any], Optimizer], **options: Any) -> Any:
    optimizer = make(model.parameters())
    return optimizer, tb.TempBalanceLR(optimizer, model, StepLR(optimizer, 3, 0.5), **options)


def host_of(name: str) -> str:
    """The layer or module whose multiplier a parameter has; its norm follows the last layer."""
    return "blocks.1.down" if name.startswith("norm") else name.rpartition(".")[0]


def saved(*parts: Any) -> list[Any]:
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in parts], buffer)
    buffer.seek(0)
    return list(torch.load(buffer, weights_only=True))


def run(
    make: Callable[[Any], Optimizer], by_hand: ByHand, resume_at: int | None = None, **options: Any
) -> tuple[list[dict[str, float]], Any, Optimizer]:
    """Train ours and the loop by hand side by side; multipliers at every step."""
    model, twin = words(), words()
    optimizer, scheduler = build(model, make, **options)
    states: dict[str, State] = {name: {} for name, _ in twin.named_parameters()}
    seen = []
    for index in range(STEPS):
        if index == resume_at:
            states_saved = saved(model, optimizer, scheduler)
            model = words()
            optimizer, scheduler = build(model, make, **options)
            for part, state in zip((model, optimizer, scheduler), states_saved, strict=True):
                part.load_state_dict(state)
        multipliers = scheduler.balancer.multipliers
        seen.append(dict(multipliers))
        rate = RATE * 0.5 ** (index // 3)
        optimizer.zero_grad()
        loss_of(model, index).backward()
        optimizer.step()
        parameters = dict(twin.named_parameters())
        gradients = torch.autograd.grad(loss_of(twin, index), list(parameters.values()))
        with torch.no_grad():
            for (name, p), g in zip(parameters.items(), gradients, strict=True):
                by_hand(p, g, states[name], rate, multipliers.get(host_of(name), 1.0))
        scheduler.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p, twin.get_parameter(name), rtol=1e-10, atol=1e-12)
    return seen, scheduler, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("resume_at", [None, 4])
def test_only_the_gradients_part_is_multiplied(name: str, resume_at: int | None) -> None:
    make, by_hand = OPTIMIZERS[name]
    options = {"keep_decay": True, "fixed": FIXED, "assign": tb.LinearMap(0.2, 1.8)}
    seen, scheduler, optimizer = run(make, by_hand, resume_at, **options)
    assert all(m["head"] == 5.0 and m["table"] == 3.0 for m in seen)
    layers = [m["blocks.0.up"] for m in seen]
    assert len(set(layers)) > 3, "the multipliers move"
    scheduler.detach()
    assert {group["weight_decay"] for group in optimizer.param_groups} == {DECAY}
    assert {group["lr"] for group in optimizer.param_groups} == {RATE * 0.25}


@pytest.mark.parametrize("assign", CONTROLS)
def test_every_control_composes_with_kept_decay_and_fixed_multipliers(assign: str) -> None:
    make, by_hand = OPTIMIZERS["adamw"]
    seen, _, _ = run(
        make, by_hand, 3, keep_decay=True, fixed=FIXED, hold=6, assign=CONTROLS[assign]
    )
    assert all(m["head"] == 5.0 and m["table"] == 3.0 for m in seen)
    assert seen[6] == seen[7]
    assert all(value > 0 for m in seen for value in m.values())


def test_without_it_a_multiplier_multiplies_decay_too() -> None:
    """Of AdamW: a layer at twice the rate decays twice as fast."""
    model = words()
    optimizer, _ = build(model, OPTIMIZERS["adamw"][0], fixed={"head": 2.0})
    before = model.head.weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model.head.weight.detach(), before * (1 - 2 * RATE * DECAY))


@pytest.mark.parametrize("resume_at", [None, 2, 4, 6])
def test_held_multipliers_stay_and_nothing_more_is_measured(resume_at: int | None) -> None:
    make, by_hand = OPTIMIZERS["sgd"]
    options = {"keep_decay": True, "every": 2, "hold": 4, "assign": tb.LinearMap(0.2, 1.8)}
    seen, scheduler, _ = run(make, by_hand, resume_at, **options)
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert all(multipliers == seen[3] for multipliers in seen[4:])
    assert len(set(seen[3].values())) > 2  # held, not back at 1
    assert scheduler.balancer.measurements == 2


def test_a_stop_after_a_hold_returns_to_one() -> None:
    make, by_hand = OPTIMIZERS["adamw"]
    seen, _, _ = run(make, by_hand, 5, keep_decay=True, hold=2, stop=6, fixed=FIXED)
    layers = [{n: m for n, m in each.items() if n.startswith("blocks")} for each in seen]
    assert layers[1] == layers[2] == layers[5] != layers[6]
    assert set(layers[6].values()) == set(layers[7].values()) == {1.0}


def test_fixed_modules_take_no_part_in_the_vote() -> None:
    """The head, which would be the largest of all alphas, leaves the others as they are."""
    models = [words(), words()]
    with torch.no_grad():
        for model in models:
            model.head.weight.copy_(torch.eye(12, 16) + 1e-3 * torch.randn(12, 16))
    make = OPTIMIZERS["sgd"][0]
    _, fixed = build(models[0], make, fixed={"head": 5.0})
    _, without = build(models[1], make, exclude=["head"])
    ours = fixed.balancer.multipliers
    assert ours.pop("head") == 5.0
    assert ours == without.balancer.multipliers
    assert "head" not in fixed.balancer.alphas


def test_a_norm_keeps_the_base_rate_where_it_is_fixed_at_one() -> None:
    model = nn.Sequential(nn.Linear(20, 20), nn.LayerNorm(20), nn.Linear(20, 20), nn.Linear(20, 20))
    optimizer, scheduler = build(model, OPTIMIZERS["sgd"][0], fixed={"LayerNorm": 1.0})
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(model[1].weight)] == rates[id(model[1].bias)] == RATE
    assert rates[id(model[0].weight)] == RATE * scheduler.balancer.multipliers["0"] != RATE
    again = copy.deepcopy(model)
    other, _ = build(again, OPTIMIZERS["sgd"][0])
    norm = next(g for g in other.param_groups if any(p is again[1].weight for p in g["params"]))
    assert norm["lr"] != RATE
