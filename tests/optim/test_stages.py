"""One training after another: rates that were scaled once are never taken for the user's own."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from schedules import net, rates, train_step
from torch import nn
from torch.nn.utils import prune
from torch.optim import lr_scheduler as lrs

import tempbalance as tb
from tempbalance import BalanceWarning, StepHooks, TempBalanceLR

NAMES = ["0", "3", "8", "10"]
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def factors(scheduler: TempBalanceLR) -> list[float]:
    return [scheduler.multipliers[name] for name in NAMES]


# --- another scheduler on the same optimizer -----------------------------------------------------


@pytest.mark.parametrize("tensor", [False, True])
def test_stages_in_functions_do_not_compound(tensor: bool) -> None:
    """Each stage's scheduler is gone when the next one is built."""
    model = net()
    rate: Any = torch.tensor(0.1) if tensor else 0.1
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, foreach=False)

    def stage() -> None:
        scheduler = TempBalanceLR(optimizer, model, lrs.StepLR(optimizer, 100))
        optimizer.step()
        scheduler.step()
        assert [float(r) for r in scheduler.get_base_lr()] == pytest.approx([0.1] * 4)
        wanted = [0.1 * f for f in factors(scheduler)]
        assert [float(r) for r in scheduler.get_last_lr()] == pytest.approx(wanted)
        assert max(wanted) > 2 * min(wanted)

    for _ in range(3):
        stage()
        gc.collect()


def test_a_rate_set_by_hand_between_stages_holds() -> None:
    model = net()
    optimizer = sgd(model)
    TempBalanceLR(optimizer, model)
    gc.collect()
    for group in optimizer.param_groups:
        group["lr"] = 0.02
    assert TempBalanceLR(optimizer, model).get_base_lr() == [0.02] * 4


def test_groups_that_came_between_stages() -> None:
    model = net()
    optimizer = torch.optim.SGD(model[:9].parameters(), lr=0.1)
    TempBalanceLR(optimizer, model)
    gc.collect()
    optimizer.add_param_group({"params": model[10].parameters(), "lr": 0.03})
    assert TempBalanceLR(optimizer, model).get_base_lr() == [0.1] * 3 + [0.03]


def test_a_schedule_built_on_scaled_rates_is_refused_and_made_good() -> None:
    model = net()
    optimizer = sgd(model)
    first = TempBalanceLR(optimizer, model)
    assert rates(optimizer) != [0.1] * 4
    with (
        pytest.warns(BalanceWarning, match="balanced already"),
        pytest.raises(ValueError, match="StepLR.*build the schedule anew"),
    ):
        TempBalanceLR(optimizer, model, lrs.StepLR(optimizer, 2))
    assert rates(optimizer) == [0.1] * 4 and first.multipliers == {}
    second = TempBalanceLR(optimizer, model, lrs.StepLR(optimizer, 2))
    assert second.get_base_lr() == second.base_lrs == [0.1] * 4


def test_a_schedule_built_after_detach_is_welcome() -> None:
    model = net()
    optimizer = sgd(model)
    first = TempBalanceLR(optimizer, model, lrs.StepLR(optimizer, 2))
    first.detach()
    second = TempBalanceLR(optimizer, model, lrs.ExponentialLR(optimizer, 0.5))
    second.step()
    assert second.get_base_lr() == [0.05] * 4


def test_who_was_there_first_says_that_it_is_detached() -> None:
    encoder, decoder = net(), net()
    optimizer = torch.optim.SGD([*encoder.parameters(), *decoder.parameters()], lr=0.1)
    first = TempBalanceLR(optimizer, encoder)
    with pytest.warns(BalanceWarning, match=r"balanced already.*ModuleList"):
        TempBalanceLR(optimizer, decoder)
    assert first.multipliers == {} and first.alphas
    for line in first.summary().splitlines()[1:]:
        _, alpha, multiplier, rate, *_ = line.split()
        assert (float(multiplier), float(rate)) == (1.0, 0.1) or alpha == "-"


def test_options_that_are_refused_leave_the_first_in_place() -> None:
    model = net()
    optimizer = sgd(model)
    first = TempBalanceLR(optimizer, model)
    before = rates(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BalanceWarning)
        for kind in (TempBalanceLR, StepHooks):
            with pytest.raises(ValueError, match="every"):
                kind(optimizer, model, every=0)
    optimizer.step()
    first.step()
    assert rates(optimizer) == before and set(first.multipliers) == set(NAMES)


def test_detached_nothing_of_it_is_left() -> None:
    model = net()
    optimizer = sgd(model)
    before = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    scheduler = TempBalanceLR(optimizer, model)
    scheduler.detach()
    scheduler.step()
    for group, name in zip(optimizer.param_groups, NAMES, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {**before, "name": name}
    hooks = StepHooks(optimizer, model)
    assert set(hooks.multipliers) == set(NAMES)
    hooks.detach()
    assert hooks.multipliers == {}


# --- states without the scheduler's --------------------------------------------------------------


def adam(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def test_model_and_optimizer_alone_into_a_new_schedule() -> None:
    """The second stage of a training: weights and moments of the first, a fresh schedule."""

    def build(seed: int) -> tuple[Any, Any, TempBalanceLR]:
        torch.manual_seed(seed)
        model = net()
        optimizer = adam(model)
        base = lrs.CosineAnnealingLR(optimizer, 100)
        return model, optimizer, TempBalanceLR(optimizer, model, base, every=50)

    model, optimizer, scheduler = build(0)
    for i in range(5):
        train_step(model, optimizer, i)
        scheduler.step()
    states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model, optimizer, scheduler = build(1)
    model.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    (base,) = set(scheduler.get_base_lr())
    assert rates(optimizer) == [base * f for f in factors(scheduler)]
    for i in range(60):
        train_step(model, optimizer, i)
        scheduler.step()
        assert len({round(r, 12) for r in scheduler.get_base_lr()}) == 1
        assert rates(optimizer) == [
            r * f for r, f in zip(scheduler.get_base_lr(), factors(scheduler), strict=True)
        ]


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("detached", [False, True])
def test_an_unbalanced_state_of_groups_that_are_layers_already(
    scheduled: bool, detached: bool
) -> None:
    """Named groups of one layer each, with rates of their own: the state looks like a split one."""

    def build(balanced: bool) -> tuple[Any, Any, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(24, 24) for _ in range(4)))
        groups = [
            {"params": layer.parameters(), "lr": 0.1 * 0.5**i, "name": f"depth{i}"}
            for i, layer in enumerate(model)
        ]
        optimizer = torch.optim.AdamW(groups)
        base = lrs.ExponentialLR(optimizer, 0.9) if scheduled else None
        return model, optimizer, TempBalanceLR(optimizer, model, base) if balanced else base

    _, optimizer, base = build(detached)
    if detached:
        base.detach()
    for _ in range(5):
        optimizer.step()
        if base is not None:
            base.step()
        if not scheduled:
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
    saved, at_rest = copy.deepcopy(optimizer.state_dict()), rates(optimizer)
    _, optimizer, scheduler = build(True)
    optimizer.load_state_dict(saved)
    if scheduled:
        scheduler.load_state_dict(base.state_dict())
    assert scheduler.get_base_lr() == pytest.approx(at_rest)
    wanted = [r * scheduler.multipliers[str(i)] for i, r in enumerate(at_rest)]
    if not (scheduled and detached):  # its state says that nothing is balanced
        assert rates(optimizer) == pytest.approx(wanted)
    optimizer.step()
    scheduler.step()
    assert scheduler.get_base_lr() == pytest.approx(
        [0.9 * r for r in at_rest] if scheduled else at_rest
    )


# --- rates by hand -------------------------------------------------------------------------------


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": [*model[:9].parameters()], "lr": 0.1},
        {"params": [*model[10].parameters()], "lr": 0.01},
    ]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("tensor", [False, True])
def test_a_warm_up_by_hand_of_two_groups(first: int, tensor: bool) -> None:
    """From zero too, where all groups have one number for a step."""
    model = net()
    optimizer = torch.optim.SGD(two_groups(model), lr=0.1, foreach=False)
    if tensor:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    scheduler = TempBalanceLR(optimizer, model, lrs.CosineAnnealingLR(optimizer, 100))
    full = [float(r) for r in scheduler.get_base_lr()]
    used: list[list[float]] = []
    optimizer.register_step_post_hook(lambda *_: used.append(rates(optimizer)))
    for i in range(first, 11):
        for group, base in zip(optimizer.param_groups, full, strict=True):
            group["lr"] = torch.tensor(base * i / 10) if tensor else base * i / 10
        train_step(model, optimizer, i)
        wanted = [b * i / 10 * f for b, f in zip(full, factors(scheduler), strict=True)]
        assert [float(r) for r in used[-1]] == pytest.approx(wanted, rel=1e-6)
    scheduler.step()
    assert [float(r) for r in scheduler.get_base_lr()] == pytest.approx(full, rel=1e-3)


@pytest.mark.parametrize("optimizer_first", [False, True])
def test_a_rate_by_hand_that_is_saved_before_the_next_step(optimizer_first: bool) -> None:
    def build() -> tuple[Any, Any, TempBalanceLR]:
        torch.manual_seed(0)
        model = net()
        optimizer = sgd(model)
        return model, optimizer, TempBalanceLR(optimizer, model)

    model, optimizer, scheduler = build()
    train_step(model, optimizer, 0)
    scheduler.step()
    for group in optimizer.param_groups:
        group["lr"] *= 0.1
    weights = copy.deepcopy(model.state_dict())
    things = [optimizer, scheduler] if optimizer_first else [scheduler, optimizer]
    states = [copy.deepcopy(thing.state_dict()) for thing in things]
    other, optimizer2, scheduler2 = build()
    other.load_state_dict(weights)
    for thing, state in zip(
        [optimizer2, scheduler2] if optimizer_first else [scheduler2, optimizer2],
        states, strict=True,
    ):  # fmt: skip
        thing.load_state_dict(state)
    train_step(model, optimizer, 1)
    train_step(other, optimizer2, 1)
    assert rates(optimizer2) == rates(optimizer)
    assert rates(optimizer) == pytest.approx([0.01 * f for f in factors(scheduler)])


def test_a_rate_that_becomes_a_tensor() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    scheduler = TempBalanceLR(optimizer, model)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    train_step(model, optimizer, 0)
    scheduler.step()
    assert [float(r) for r in scheduler.get_base_lr()] == pytest.approx([0.1] * 4)
    with torch.no_grad():
        optimizer.param_groups[0]["lr"].mul_(0.5)
    train_step(model, optimizer, 1)
    assert [float(r) for r in scheduler.get_base_lr()] == pytest.approx([0.05] + [0.1] * 3)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("steps", [0, 3])
def test_distributed_checkpoints_that_make_a_step_at_rate_zero(kind: Any, steps: int) -> None:
    from torch.distributed.checkpoint import state_dict as dcp

    model = net()
    optimizer = kind(model.parameters(), lr=0.1)
    scheduler = TempBalanceLR(optimizer, model, lrs.CosineAnnealingLR(optimizer, 100))
    for i in range(steps):
        train_step(model, optimizer, i)
        scheduler.step()
    optimizer.zero_grad()
    before, base = rates(optimizer), scheduler.get_base_lr()
    saved = dcp.get_optimizer_state_dict(model, optimizer)
    assert scheduler.state_dict()["bases"]["lr"] == base == scheduler.get_base_lr()
    assert rates(optimizer) == before
    assert {group["tempbalance_base_lr"] for group in saved["param_groups"]} == {base[0]}


def test_a_copied_optimizer_is_not_scaled_twice() -> None:
    model = net()
    optimizer = sgd(model)
    TempBalanceLR(optimizer, model, lrs.StepLR(optimizer, 5))
    model2, optimizer2 = copy.deepcopy((model, optimizer))
    assert TempBalanceLR(optimizer2, model2).get_base_lr() == [0.1] * 4


def test_an_added_group_has_its_own_base_rate_in_its_state() -> None:
    def build() -> tuple[Any, Any, Any]:
        model = net()
        optimizer = torch.optim.SGD(model[:9].parameters(), lr=0.1)
        cosine = lrs.CosineAnnealingLR(optimizer, 100)
        return model, optimizer, TempBalanceLR(optimizer, model, cosine)

    model, optimizer, scheduler = build()
    optimizer.step()
    scheduler.step()
    optimizer.add_param_group({"params": model[10].parameters(), "lr": 0.01})
    states = copy.deepcopy((scheduler.state_dict(), optimizer.state_dict()))
    model2, optimizer2, scheduler2 = build()
    optimizer2.add_param_group({"params": model2[10].parameters(), "lr": 0.01})
    scheduler2.load_state_dict(states[0])
    optimizer2.load_state_dict(states[1])
    assert rates(optimizer2) == rates(optimizer) and rates(optimizer)[-1] == 0.01


def test_the_optimizer_is_freed_with_its_last_name() -> None:
    model = net()
    optimizer = sgd(model)
    scheduler = TempBalanceLR(optimizer, model)
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del scheduler, optimizer
        assert gone() is None
    finally:
        gc.enable()


# --- other options from a checkpoint on ----------------------------------------------------------


def build_with(kind: str, **options: Any) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    model = net()
    optimizer = sgd(model)
    if kind == "hooks":
        return model, optimizer, StepHooks(optimizer, model, **{"every": 7, **options})
    base = lrs.LambdaLR(optimizer, lambda e: 1.0)
    return model, optimizer, TempBalanceLR(optimizer, model, base, **{"every": 7, **options})


@pytest.mark.parametrize("kind", ["scheduler", "hooks"])
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"stop": 9}, (1.0, 1.0)),
        ({"stop": 10}, (1.0, 1.0)),
        ({"start": 100}, (1.0, 1.0)),
        ({"assign": tb.Constant(1.0), "every": 200}, (1.0, 1.0)),
        ({"assign": tb.LinearMap(0.9, 1.1), "every": 200}, (0.9, 1.1)),
        ({"every": 200}, (0.5, 1.5)),
    ],
)
def test_other_options_hold_from_the_resume_on(
    kind: str, options: dict[str, Any], wanted: tuple[float, float]
) -> None:
    _, optimizer, first = build_with(kind)
    for _ in range(10):
        optimizer.step()
        if kind == "scheduler":
            first.step()
    state = first.state_dict()
    assert (min(first.multipliers.values()), max(first.multipliers.values())) == (0.5, 1.5)
    _, optimizer, second = build_with(kind, **options)
    second.load_state_dict(state)
    for _ in range(2):
        found = second.multipliers.values()
        assert (min(found), max(found)) == pytest.approx(wanted)
        optimizer.step()
        if kind == "scheduler":
            second.step()


def test_a_resume_in_the_ramp_after_stop_goes_on() -> None:
    options: dict[str, Any] = {"stop": 3, "ramp": 6, "every": 1}
    _, optimizer, whole = build_with("scheduler", **options)
    state: dict[str, Any] = {}
    seen = []
    for i in range(9):
        optimizer.step()
        whole.step()
        seen.append(rates(optimizer))
        if i == 4:
            state = copy.deepcopy(whole.state_dict())
    _, optimizer, rest = build_with("scheduler", **options)
    rest.load_state_dict(state)
    again = []
    for _ in range(5, 9):
        optimizer.step()
        rest.step()
        again.append(rates(optimizer))
    assert again == seen[5:] and len({tuple(r) for r in seen[3:]}) == 6


# --- layers that go ------------------------------------------------------------------------------


def test_layers_that_can_no_longer_be_measured_are_named_once() -> None:
    model = net()
    optimizer = sgd(model)
    scheduler = TempBalanceLR(optimizer, model)
    for i in (3, 8):
        prune.l1_unstructured(model[i], "weight", 0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BalanceWarning)
        for _ in range(3):
            optimizer.step()
            scheduler.step()
    texts = [str(w.message) for w in caught]
    assert len(texts) == 2 and all("can no longer be measured: " in text for text in texts)
    assert "layer '3'" in texts[0] and "prune" in texts[0] and "layer '8'" in texts[1]
    assert scheduler.layer_rates["3"] == 0.1


def test_a_module_that_was_exchanged_is_measured_in_place_of_the_old_one() -> None:
    model = net()
    optimizer = sgd(model)
    scheduler = TempBalanceLR(optimizer, model)
    torch.manual_seed(3)
    old, model[8] = model[8], nn.Linear(24, 20)
    with torch.no_grad():
        model[8].weight.mul_(torch.logspace(-2, 0, 24))
    optimizer.param_groups[2]["params"] = list(model[8].parameters())
    optimizer.step()
    scheduler.step()
    assert scheduler.alphas["8"] == tb.analyze(model)["8"].alpha
    assert scheduler.alphas["8"] != tb.analyze(nn.Sequential(old))["0"].alpha


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 24), nn.Linear(24, 16)

    def wrap(self) -> None:
        """The same parameters under another name, as an adapter library does it."""
        inner = nn.Linear(32, 24)
        inner.weight, inner.bias = self.b.weight, self.b.bias
        self.b = nn.Sequential(inner, nn.Identity())  # type: ignore[assignment]


@pytest.mark.parametrize("options", [{}, {"every": 4, "delay": 2}])
@pytest.mark.parametrize("kind", [StepHooks, TempBalanceLR])
def test_a_module_that_goes_into_another_keeps_its_rate(kind: Any, options: dict[str, Any]) -> None:
    model = Named()
    optimizer = sgd(model)
    balanced = kind(optimizer, model, **{"every": 1, **options})
    used: list[list[float]] = []
    optimizer.register_step_pre_hook(lambda *_: used.append(rates(optimizer)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", BalanceWarning)
        for i in range(10):
            if i == 5:
                model.wrap()
            optimizer.step()
            if kind is TempBalanceLR:
                balanced.step()
    assert set(balanced.multipliers) == {"a", "b.0", "c"}
    optimizer.step()
    assert used[-1] == pytest.approx([0.1 * m for m in balanced.multipliers.values()])


def test_other_options_with_a_layer_that_has_no_alpha_yet() -> None:
    def build(**options: Any) -> Any:
        model = Named()
        optimizer = torch.optim.SGD([*model.a.parameters(), *model.b.parameters()], lr=0.1)
        return model, optimizer, TempBalanceLR(optimizer, model, every=10, **options)

    model, optimizer, scheduler = build()
    optimizer.add_param_group({"params": [*model.c.parameters()]})
    scheduler.step()
    state = scheduler.state_dict()
    model, optimizer, scheduler = build(assign=tb.RankMap())
    optimizer.add_param_group({"params": [*model.c.parameters()]})
    scheduler.load_state_dict(state)
    assert set(scheduler.multipliers) == {"a", "b"}


def test_what_a_resume_with_the_same_options_keeps() -> None:
    """An update before `start`, and an assignment of one's own without a name."""

    class Own:
        uses_alphas, once = True, False

        def __call__(self, alphas: Any, kinds: Any) -> torch.Tensor:
            return torch.linspace(0.5, 1.5, len(alphas))

    for options in ({"start": 50}, {"assign": Own()}):
        model, _, first = build_with("scheduler", **options)
        first.balancer.update()
        wanted = first.multipliers
        assert len(set(wanted.values())) > 2
        if "assign" in options:
            options["assign"] = Own()
            model[0].requires_grad_(False)
        other, _, second = build_with("scheduler", **options)
        other[0].requires_grad_("assign" not in options)
        second.load_state_dict(first.state_dict())
        assert second.multipliers == wanted


def test_an_assignment_with_alphas_after_one_without_measures() -> None:
    _, optimizer, first = build_with("scheduler", assign=tb.Constant(0.7), every=1)
    optimizer.step()
    first.step()
    _, optimizer, second = build_with("scheduler", assign=tb.Frozen(tb.LinearMap()), every=1)
    second.load_state_dict(first.state_dict())
    optimizer.step()
    second.step()
    assert all(alpha is not None for alpha in second.alphas.values())
    assert max(second.multipliers.values()) == 1.5


def test_parameters_in_a_module() -> None:
    model = net()
    some = nn.ParameterList([model[0].weight, model[3].weight])
    assert [layer.name for layer in tb.Balancer(model, some).layers] == ["0", "3"]


# --- optimizers around optimizers ----------------------------------------------------------------


class SharpnessAware(torch.optim.Optimizer):
    """As such optimizers are written: one list of groups, shared with the one inside."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.inside = torch.optim.SGD(self.param_groups, lr=lr)
        self.param_groups = self.inside.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inside.step()


@pytest.mark.parametrize("kind", [StepHooks, TempBalanceLR])
def test_an_optimizer_that_shares_its_groups(kind: Any) -> None:
    def lengths(kind: Any) -> tuple[list[float], Any]:
        torch.manual_seed(0)
        model = net()
        optimizer = SharpnessAware(model.parameters(), lr=0.1)
        balanced = kind(optimizer, model) if kind else None
        before = [model[int(name)].weight.detach().clone() for name in NAMES]
        torch.manual_seed(1)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        after = [model[int(name)].weight.detach() for name in NAMES]
        return [float((a - b).norm()) for a, b in zip(after, before, strict=True)], balanced

    plain, _ = lengths(None)
    balanced, by = lengths(kind)
    ratios = [a / b for a, b in zip(balanced, plain, strict=True)]
    assert ratios == pytest.approx([by.multipliers[name] for name in NAMES], rel=1e-4)


@pytest.mark.parametrize("kind", [StepHooks, TempBalanceLR])
def test_an_optimizer_without_a_rate_is_refused_as_it_is(kind: Any) -> None:
    model = net()
    optimizer = sgd(model)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match="SGD has the learning rate None.*relative_step=False"):
        kind(optimizer, model)
    assert len(optimizer.param_groups) == 1 and not optimizer._optimizer_step_pre_hooks


def test_adapters_without_a_matrix_are_named_as_the_reason() -> None:
    model = net().requires_grad_(False)
    model.register_parameter("scale", nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match=r"can be measured are frozen \(0 .*LoRA and DoRA"):
        TempBalanceLR(torch.optim.SGD([model.scale], lr=0.1), model)


def test_nothing_is_said_where_nothing_is_wrong() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", BalanceWarning)
        model = net()
        optimizer = sgd(model)
        scheduler = TempBalanceLR(optimizer, model)
        prune.identity(nn.Linear(3, 3), "weight")
        for i in range(3):
            train_step(model, optimizer, i)
            scheduler.step()
        del scheduler
        gc.collect()
        TempBalanceLR(optimizer, model).detach()
        TempBalanceLR(optimizer, model)
