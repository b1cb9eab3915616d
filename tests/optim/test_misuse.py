"""What people do to a scheduler: it works, or it says what to do; a run never breaks."""

from __future__ import annotations

import copy
import gc
import inspect
import math
import pickle
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from schedules import SCHEDULES, advance, net, rates, train_step, weights
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim import lr_scheduler as lrs

import tempbalance as tb
from tempbalance import BalanceWarning, StepHooks, TempBalanceLR
from tempbalance.measure import attempt

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def matrices_and_rest(model: nn.Module) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": matrices}, {"params": rest, "lr": 0.03}]


# --- schedules -----------------------------------------------------------------------------------


def test_every_schedule_of_this_torch_is_in_the_table() -> None:
    optimizer = sgd(net())
    made = {type(make(optimizer)).__name__ for make in SCHEDULES.values()}
    for cls in [c for c in vars(lrs).values() if inspect.isclass(c)]:
        if issubclass(cls, lrs.LRScheduler) and not cls.__name__.endswith("LRScheduler"):
            assert cls.__name__ in made, f"tests/schedules.py lacks {cls.__name__}"


def _nested(o: torch.optim.Optimizer) -> Any:
    warm = lrs.LinearLR(o, 0.1, total_iters=2)
    inner = lrs.SequentialLR(o, [warm, lrs.CosineAnnealingLR(o, 4)], [2])
    return lrs.ChainedScheduler([inner, lrs.ExponentialLR(o, 0.9)])


def _sequential_in_sequential(o: torch.optim.Optimizer) -> Any:
    parts = [lrs.ConstantLR(o, 0.5, 2), lrs.LambdaLR(o, [lambda e: 0.9**e, lambda e: 0.5**e])]
    inner = lrs.SequentialLR(o, parts, [2])
    return lrs.SequentialLR(o, [inner, lrs.StepLR(o, 2)], [6])


LISTS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "nested": _nested,
    "sequential twice": _sequential_in_sequential,
    "lambda": lambda o: lrs.LambdaLR(o, [lambda e: 0.9**e, lambda e: 1 / (1 + e)]),
    "multiplicative": lambda o: lrs.MultiplicativeLR(o, [lambda e: 0.9, lambda e: 0.5]),
    "onecycle": lambda o: lrs.OneCycleLR(o, [0.3, 0.1], total_steps=30),
    "cyclic": lambda o: lrs.CyclicLR(o, [0.01, 0.02], [0.2, 0.1], step_size_up=3),
    "plateau": lambda o: lrs.ReduceLROnPlateau(o, factor=0.3, patience=1, min_lr=[0.04, 0.001]),
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, [0.01, 0.02], anneal_epochs=4),
}


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("name", LISTS)
def test_values_for_each_of_the_users_groups(name: str, adam: bool) -> None:
    """Group by group against a twin that is not split, past every late failure."""

    def build() -> Any:
        model = net()
        groups = matrices_and_rest(model)
        kind: Any = torch.optim.Adam if adam else torch.optim.SGD
        optimizer = kind(groups, lr=0.1, **({} if adam else {"momentum": 0.9}))
        return model, optimizer, LISTS[name](optimizer)

    model, optimizer, base = build()
    scheduler = TempBalanceLR(optimizer, model, base, every=2)
    twin, plain, alone = build()
    kind = "plateau" if name == "plateau" else name
    for i in range(14):
        source = scheduler.grouping.source
        factors = scheduler.grouping.factors(scheduler.multipliers)
        for group, k, factor in zip(optimizer.param_groups, source, factors, strict=True):
            users = plain.param_groups[k]
            assert group["lr"] == users["lr"] * factor, f"step {i}"
            for key in ("momentum", "betas"):
                assert group.get(key) == users.get(key)
        train_step(model, optimizer, i)
        train_step(twin, plain, i)
        advance(scheduler, kind, i)
        advance(alone, kind, i)


@pytest.mark.parametrize("also", [True, False])
def test_a_base_that_is_stepped_by_itself_is_noticed_once(also: bool) -> None:
    """Whether the user steps both or forgets the scheduler: the rates stay base x multiplier."""
    model, twin = net(), net()
    optimizer, plain = sgd(model), sgd(twin)
    base, alone = lrs.StepLR(optimizer, 3, 0.5), lrs.StepLR(plain, 3, 0.5)
    scheduler = TempBalanceLR(optimizer, model, base, every=100)
    seen = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BalanceWarning)
        for i in range(8):
            train_step(model, optimizer, i)
            for step in [base.step, alone.step] + ([scheduler.step, alone.step] if also else []):
                step()
            optimizer.step()  # the next step sees the right rates
            factors = scheduler.grouping.factors(scheduler.multipliers)
            wanted = [plain.param_groups[0]["lr"] * f for f in factors]
            assert rates(optimizer) == pytest.approx(wanted), i
            seen.append(wanted)
    texts = [str(w.message) for w in caught if w.category is BalanceWarning]
    assert len(texts) == 1 and "Step and load the TempBalanceLR alone" in texts[0]
    assert seen[-1] != seen[0]


def test_it_goes_around_other_schedules() -> None:
    model = net()
    optimizer = sgd(model)
    scheduler = TempBalanceLR(optimizer, model)
    with pytest.raises(TypeError, match="goes around other schedules.*as its base"):
        lrs.SequentialLR(optimizer, [lrs.ConstantLR(optimizer), scheduler], [2])


def test_counting_steps_of_any_schedule() -> None:
    for name, make in SCHEDULES.items():
        model = net()
        optimizer = sgd(model, momentum=0.9)
        scheduler = TempBalanceLR(optimizer, model, make(optimizer))
        for i in range(2):
            advance(scheduler, name, i)
        assert scheduler.last_epoch == 2 and len(scheduler.base_lrs) == 4, name


def test_groups_set_by_hand_to_their_own_rates_are_unscaled() -> None:
    model = net()
    first = [{"params": model[:6].parameters()}, {"params": model[6:].parameters(), "lr": 0.05}]
    optimizer = torch.optim.SGD(first, lr=0.1)
    scheduler = TempBalanceLR(optimizer, model, every=100)
    for group, source in zip(optimizer.param_groups, scheduler.grouping.source, strict=True):
        group["lr"] = (0.02, 0.01)[source]
    scheduler.step()
    assert scheduler.get_base_lr() == [0.02, 0.02, 0.01, 0.01]


# --- optimizers ----------------------------------------------------------------------------------


class CountingSGD(torch.optim.Optimizer):
    """Keeps counters in its groups, as schedule-free optimizers do."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "k": 0, "total": 0.0, "train_mode": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            group["total"] = group["total"] + 1.0 / group["k"]
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"] / group["total"])


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=1e-2, t0=2),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "SGD differentiable": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, differentiable=True),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "counting": CountingSGD,
}
if hasattr(torch.optim, "Adafactor"):  # from torch 2.5 on
    OPTIMIZERS["Adafactor"] = lambda p: torch.optim.Adafactor(p, lr=1e-2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_runs_and_resumes(name: str) -> None:
    def build(seed: int) -> Any:
        model = net(seed)
        optimizer = OPTIMIZERS[name](model.parameters())
        base = lrs.CosineAnnealingLR(optimizer, 9)
        return model, optimizer, TempBalanceLR(optimizer, model, base, every=2)

    def go(things: Any, start: int, stop: int) -> None:
        for i in range(start, stop):
            if name == "SGD differentiable":
                _differentiable_step(*things[:2], i)
            else:
                train_step(*things[:2], i)
            things[2].step()

    whole = build(0)
    go(whole, 0, 3)
    states = [copy.deepcopy(thing.state_dict()) for thing in whole]
    go(whole, 3, 6)
    resumed = build(1)
    for thing, state in zip(resumed, states, strict=True):
        thing.load_state_dict(state)
    go(resumed, 3, 6)
    assert rates(resumed[1]) == rates(whole[1]) and len(set(rates(whole[1]))) > 1
    assert torch.equal(weights(resumed[0]), weights(whole[0]))
    assert torch.isfinite(weights(whole[0])).all()


def _differentiable_step(model: nn.Module, optimizer: torch.optim.Optimizer, index: int) -> None:
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(index))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    with torch.no_grad():
        # The step sets gradient mode to the flag; leaves must not record it.
        for p in model.parameters():
            p.requires_grad_(False)
        optimizer.step()
        for p in model.parameters():
            p.requires_grad_(True)


def test_step_hooks_keep_the_counters_of_an_optimizer() -> None:
    model, twin = net(), net()
    optimizer, plain = CountingSGD(model.parameters()), CountingSGD(twin.parameters())
    StepHooks(optimizer, model, assign=tb.Constant(1.0))
    for i in range(4):
        train_step(model, optimizer, i)
        train_step(twin, plain, i)
    (group,), (wanted,) = optimizer.param_groups, plain.param_groups
    assert group["k"] == 4 and group["total"] == wanted["total"] and group["train_mode"]
    assert torch.equal(weights(model), weights(twin))
    group["train_mode"] = False  # as optimizer.eval() does, between steps
    train_step(model, optimizer, 5)
    assert optimizer.param_groups[0]["train_mode"] is False


def test_muon_for_matrices_and_adamw_for_the_rest() -> None:
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        pytest.skip("this torch has no Muon")
    model = nn.Sequential(nn.Linear(24, 24), nn.LayerNorm(24), nn.Linear(24, 12), nn.Linear(12, 12))
    first = muon([p for p in model.parameters() if p.ndim == 2], lr=0.02)
    second = torch.optim.AdamW([p for p in model.parameters() if p.ndim != 2], lr=1e-3)
    a = TempBalanceLR(first, model, lrs.StepLR(first, 2))
    b = TempBalanceLR(second, model, lrs.StepLR(second, 2))
    for _ in range(3):
        model(torch.randn(4, 24)).square().mean().backward()
        for thing in (first, second, a, b):
            thing.step()
    assert a.multipliers == b.multipliers  # biases and norms follow the weights of the other
    assert len(first.param_groups) == 3 and len(second.param_groups) == 3


def test_sparse_adam_on_embeddings_alone_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(10, 20, sparse=True), nn.Linear(20, 20))
    sparse = torch.optim.SparseAdam(list(model[0].parameters()))
    with pytest.raises(ValueError, match="no layer to balance"):
        TempBalanceLR(sparse, model)


def test_wrapped_optimizers_are_unwrapped() -> None:
    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

        def __getattr__(self, name: str) -> Any:
            return getattr(self.optimizer, name)

    model = net()
    optimizer = sgd(model)
    base = lrs.StepLR(optimizer, 2)
    scheduler = TempBalanceLR(Wrapper(optimizer), model, base)  # type: ignore[arg-type]
    assert scheduler.optimizer is optimizer and len(set(rates(optimizer))) == 4
    StepHooks(Wrapper(optimizer), model)  # type: ignore[arg-type]
    assert len(set(rates(optimizer))) == 1, "one takes over from the other"
    with pytest.raises(TypeError, match="must be a torch Optimizer, got Sequential"):
        StepHooks(model, model)  # type: ignore[arg-type]


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(net(), sgd(net()))
    optimizer = accelerator.prepare(sgd(model))
    scheduler = TempBalanceLR(optimizer, model, lrs.StepLR(optimizer, 2))
    train_step(model, optimizer, 0)
    scheduler.step()
    assert len(set(rates(optimizer))) == 4


def test_optimizers_without_groups_are_refused_by_the_hooks_too() -> None:
    model = net()
    with pytest.raises(ValueError, match="LBFGS cannot have a learning rate per layer"):
        StepHooks(torch.optim.LBFGS(model.parameters()), model)


def test_one_takes_over_from_the_other() -> None:
    """Never both: multipliers would be put on twice."""
    model = net()
    optimizer = sgd(model)
    StepHooks(optimizer, model)
    scheduler = TempBalanceLR(optimizer, model)
    used: list[list[float]] = []
    optimizer.register_step_pre_hook(lambda *_: used.append(rates(optimizer)))
    train_step(model, optimizer, 0)
    assert used[-1] == rates(optimizer) == [0.1 * m for m in scheduler.multipliers.values()]
    StepHooks(optimizer, model)
    assert rates(optimizer) == [0.1] * 4
    scheduler.step()  # detached: the base alone
    assert rates(optimizer) == [0.1] * 4


def test_detached_it_still_steps_its_base() -> None:
    model = net()
    optimizer = sgd(model)
    scheduler = TempBalanceLR(optimizer, model, lrs.StepLR(optimizer, 1, 0.5))
    scheduler.detach()
    scheduler.step()
    assert rates(optimizer) == [0.05] * 4 == scheduler.get_last_lr()


# --- states --------------------------------------------------------------------------------------


def test_resume_with_groups_that_were_added_later() -> None:
    def build() -> Any:
        model = net()
        optimizer = torch.optim.SGD(model[:3].parameters(), lr=0.1, momentum=0.9)
        base = lrs.CosineAnnealingLR(optimizer, 10)
        return model, optimizer, TempBalanceLR(optimizer, model, base)

    def add(model: Any, optimizer: Any) -> None:  # several layers, and a name that is taken
        optimizer.add_param_group({"params": model[3:].parameters(), "lr": 0.02, "name": "0"})

    whole = build()
    train_step(*whole[:2], 0)
    whole[2].step()
    add(*whole[:2])
    for i in range(2):
        train_step(*whole[:2], i)
        whole[2].step()
    names = [g["name"] for g in whole[1].param_groups]
    assert len(set(names)) == 4 and set(whole[2].multipliers) == {"0", "3", "8", "10"}
    states = [copy.deepcopy(thing.state_dict()) for thing in whole]

    resumed = build()
    for thing, state in list(zip(resumed, states, strict=True))[1:]:
        with pytest.raises(ValueError, match=r"only in the checkpoint.*add_param_group"):
            thing.load_state_dict(state)
    add(*resumed[:2])
    for thing, state in zip(resumed, states, strict=True):
        thing.load_state_dict(state)
    for things in (whole, resumed):
        train_step(*things[:2], 7)
        things[2].step()
    assert rates(resumed[1]) == rates(whole[1])
    assert torch.equal(weights(resumed[0]), weights(whole[0]))


@pytest.mark.parametrize("name", ["lambda", "cosine", "onecycle", "cyclic", "sequential"])
def test_groups_that_are_removed(name: str) -> None:
    model, twin = net(), net()
    optimizer, plain = sgd(model, momentum=0.9), sgd(twin, momentum=0.9)
    scheduler = TempBalanceLR(optimizer, model, SCHEDULES[name](optimizer), every=100)
    alone = SCHEDULES[name](plain)
    for i in range(5):
        if i == 1:
            del optimizer.param_groups[2]
        if i == 3:  # one goes and another comes
            del optimizer.param_groups[0]
            optimizer.add_param_group({"params": model[8].parameters()})
        advance(scheduler, name, i)
        advance(alone, name, i)
        names = [g["name"] for g in optimizer.param_groups]
        assert names == (["0", "3", "8", "10"], ["0", "3", "10"], ["3", "10", "8"])[(i + 1) // 2]
        m = scheduler.multipliers
        old = [n for n in names if n != "8" or i < 3]
        wanted = [plain.param_groups[0]["lr"] * m[n] for n in old]
        assert rates(optimizer)[: len(old)] == pytest.approx(wanted, rel=1e-12)
    again = TempBalanceLR(optimizer, model)
    assert set(again.multipliers) == {"3", "8", "10"}


def test_groups_that_are_removed_and_reordered() -> None:
    model = net()
    optimizer = sgd(model)
    scheduler = TempBalanceLR(optimizer, model)
    optimizer.param_groups[:] = optimizer.param_groups[:0:-1]
    with pytest.raises(RuntimeError, match="removed.*reordered; build the schedule and a new"):
        scheduler.step()


def test_optimizer_state_in_another_order_is_refused() -> None:
    model = net()
    saved = torch.optim.SGD(matrices_and_rest(model), lr=0.1, momentum=0.9)
    train_step(model, saved, 0)
    other = torch.optim.SGD(matrices_and_rest(model)[::-1], lr=0.1, momentum=0.9)
    scheduler = TempBalanceLR(other, model)
    with pytest.raises(ValueError, match="in the same order"):
        other.load_state_dict(saved.state_dict())
    assert scheduler.grouping.names


def test_state_of_another_schedule_is_refused() -> None:
    model = net()
    optimizer = sgd(model)
    state = TempBalanceLR(optimizer, model, lrs.StepLR(optimizer, 2)).state_dict()
    scheduler = TempBalanceLR(optimizer, model, lrs.CosineAnnealingLR(optimizer, 9))
    with pytest.raises(ValueError, match="was StepLR.*is CosineAnnealingLR here"):
        scheduler.load_state_dict(state)


def test_unbalanced_state_loaded_before_the_scheduler_is_built() -> None:
    old = sgd(net(), momentum=0.9)
    model = net()
    train_step(model, sgd(model), 0)
    optimizer = sgd(model, momentum=0.9)
    optimizer.load_state_dict(old.state_dict())
    TempBalanceLR(optimizer, model)
    assert len(optimizer.param_groups) == 4


def test_taking_over_counts_the_steps_of_the_run_and_measures_its_weights() -> None:
    def build(**options: Any) -> Any:
        model = net()
        optimizer = sgd(model)
        return model, optimizer, lrs.StepLR(optimizer, 5)

    model, optimizer, base = build()
    for _ in range(8):
        base.step()
    state = base.state_dict()
    held = copy.deepcopy(state)
    for start, active in ((20, False), (8, True), (0, True)):
        model, optimizer, base = build()
        scheduler = TempBalanceLR(
            optimizer, model, base, start=start, assign=tb.Frozen(tb.LinearMap())
        )
        with torch.no_grad():
            model[3].weight.mul_(torch.randn(24, 1, 1, 1).exp())  # the loaded model
        scheduler.load_state_dict(state)
        assert scheduler.balancer.tick == 8 and bool(scheduler.multipliers) == active
        if active:
            assert scheduler.alphas == {r.name: r.alpha for r in tb.analyze(model)}
        assert state == held, "the user's state is left alone"


def test_taking_over_an_optimizer_state_without_any_schedule() -> None:
    old_model = net(3)
    old = sgd(old_model, momentum=0.9)
    train_step(old_model, old, 0)
    old.param_groups[0]["lr"] = 0.07
    model = net()
    optimizer = sgd(model, momentum=0.9)
    scheduler = TempBalanceLR(optimizer, model)
    model.load_state_dict(old_model.state_dict())
    optimizer.load_state_dict(old.state_dict())
    assert scheduler.get_base_lr() == [0.07] * 4
    assert scheduler.alphas == {r.name: r.alpha for r in tb.analyze(model)}


def test_a_plain_state_of_an_optimizer_with_a_group_per_layer_is_taken_over() -> None:
    model = net()
    layers = [{"params": model[i].parameters()} for i in (0, 3, 8, 10)]
    optimizer = torch.optim.SGD(layers, lr=0.1)
    state = optimizer.state_dict()
    state["param_groups"] = [{**g, "lr": 0.3} for g in state["param_groups"]]
    scheduler = TempBalanceLR(optimizer, model)
    optimizer.load_state_dict(state)
    assert scheduler.get_base_lr() == [0.3] * 4 and scheduler.grouping.names == [
        "0",
        "3",
        "8",
        "10",
    ]
    later = copy.deepcopy(optimizer.state_dict())
    scheduler_state = scheduler.state_dict()
    optimizer.load_state_dict(later)
    scheduler.load_state_dict(scheduler_state)
    assert scheduler.get_base_lr() == [0.3] * 4


def test_an_interrupted_step_does_not_reach_a_checkpoint() -> None:
    model = net()
    optimizer = sgd(model)
    StepHooks(optimizer, model)

    def closure() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    state = optimizer.state_dict()
    assert len(state["param_groups"]) == 1
    optimizer.load_state_dict(state)


@pytest.mark.parametrize("do", [copy.deepcopy, copy.copy, pickle.dumps])
def test_copies_are_refused_with_the_cure(do: Callable[[Any], Any]) -> None:
    """A copy would go on to measure the model that it was copied from."""
    model = net()
    optimizer = sgd(model)
    hooks = StepHooks(sgd(model), model)
    for thing in (TempBalanceLR(optimizer, model), hooks, hooks.balancer):
        if do is copy.copy and not isinstance(thing, tb.Balancer):
            continue
        with pytest.raises(TypeError, match=r"cannot be copied or pickled: save state_dict\(\)"):
            do(thing)


# --- models that change or break -----------------------------------------------------------------


@pytest.mark.parametrize("use_hooks", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda m: parametrizations.orthogonal(m[8]),
        lambda m: parametrizations.weight_norm(m[8]),
        lambda m: prune.l1_unstructured(m[8], "weight", 0.5),
        lambda m: m.__setitem__(8, nn.Linear(24, 20)),
        lambda m: m[8].register_parameter("weight", None),
        lambda m: setattr(m[8], "weight", nn.Parameter(torch.randn(3, 3))),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
        lambda m: m[8].requires_grad_(False),
        lambda m: m.requires_grad_(False),
        lambda m: m.eval(),
    ],
)
def test_a_model_that_changes_in_training_never_raises(change: Any, use_hooks: bool) -> None:
    model = net()
    optimizer = sgd(model)
    if use_hooks:
        watched: Any = StepHooks(optimizer, model, every=1)
    else:
        watched = TempBalanceLR(optimizer, model)
    change(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BalanceWarning)
        for _ in range(2):
            optimizer.step()
            if not use_hooks:
                watched.step()
    assert all(math.isfinite(r) and r > 0 for r in rates(optimizer))
    if any(p.requires_grad for p in model.parameters()):
        assert {"0", "3", "10"} <= set(watched.multipliers)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("no room"), torch.linalg.LinAlgError("svd"), KeyError("weight")],
)
def test_a_measurement_that_raises_costs_only_its_layer(error: Any, monkeypatch: Any) -> None:
    model = net()
    optimizer = sgd(model)
    scheduler = TempBalanceLR(optimizer, model)
    whole = attempt.measured

    def failing(layers: Any, **options: Any) -> Any:
        if any(layer.name == "3" for layer in layers):
            raise error
        return whole(layers, **options)

    monkeypatch.setattr(attempt, "measured", failing)
    with pytest.warns(BalanceWarning, match="layer '3' could not be measured.*base learning rate"):
        scheduler.step()
    assert set(scheduler.multipliers) == {"0", "8", "10"} and scheduler.layer_rates["3"] == 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()


def test_everything_explodes_and_recovers() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(8)))
    optimizer = sgd(model)
    scheduler = TempBalanceLR(optimizer, model, lrs.ExponentialLR(optimizer, 0.9))
    good = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("inf"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            scheduler.step()
    texts = [str(w.message) for w in caught if w.category is BalanceWarning]
    assert len(texts) == 1 and texts[0].startswith("8 layers cannot be measured"), texts
    assert "0, 1, 2, 3, 4 and 3 more" in texts[0]
    assert rates(optimizer) == pytest.approx([0.1 * 0.9**3] * 8)
    model.load_state_dict(good)
    scheduler.step()
    assert len(set(rates(optimizer))) == 8


def test_identical_layers_have_the_base_rate() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    for layer in model[1:]:
        layer.load_state_dict(model[0].state_dict())
    optimizer = sgd(model)
    TempBalanceLR(optimizer, model)
    assert rates(optimizer) == [0.1] * 3


def test_fixed_rates_reach_layers_that_come_later() -> None:
    model = net()
    model[8].requires_grad_(False)
    optimizer = torch.optim.SGD(model[:10].parameters(), lr=0.1)
    scheduler = TempBalanceLR(optimizer, model, assign=tb.PerType({"Conv2d": 0.5, "Linear": 1.5}))
    assert rates(optimizer) == pytest.approx([0.05, 0.05, 0.1])
    model[8].requires_grad_(True)
    optimizer.add_param_group({"params": model[10].parameters()})
    scheduler.step()
    assert rates(optimizer) == pytest.approx([0.05, 0.05, 0.15, 0.15])


def test_fixed_rates_are_by_type_whatever_the_unit() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(16, 16, 3), nn.Linear(20, 20)))
    optimizer = sgd(model)
    fixed = tb.PerType({"Conv2d": 0.5, "Linear": 1.5})
    TempBalanceLR(optimizer, model, unit="block", assign=fixed)
    assert rates(optimizer) == pytest.approx([0.05, 0.15])


def test_shuffled_rates_do_not_wander_when_a_layer_is_frozen() -> None:
    model = nn.Sequential(*(nn.Linear(16 + i, 17 + i) for i in range(6)))
    optimizer = sgd(model)
    shuffled = tb.Shuffled(tb.RankMap(0.5, 1.5), seed=1)
    scheduler = TempBalanceLR(optimizer, model, assign=shuffled)
    alphas = {k: a for k, a in scheduler.alphas.items() if a is not None}
    model[2].requires_grad_(False)
    scheduler.step()
    values = [float("nan") if k == "2" else a for k, a in alphas.items()]
    wanted = dict(zip(alphas, shuffled(values).tolist(), strict=True))
    assert scheduler.multipliers == {k: m for k, m in wanted.items() if k != "2"}


def test_a_ramp_longer_than_the_interval_arrives() -> None:
    model = net()
    optimizer = sgd(model)
    scheduler = TempBalanceLR(optimizer, model, assign=tb.Constant(0.5), every=1, ramp=4)
    for _ in range(4):
        scheduler.step()
    assert rates(optimizer) == [0.05] * 4
    with pytest.raises(ValueError, match="stop must be an integer"):
        TempBalanceLR(optimizer, model, stop=2.5)  # type: ignore[arg-type]


def test_another_default_device() -> None:
    """On the meta device no value can be read: whatever is made there fails."""
    model = net()

    def balanced() -> Any:
        balancer = tb.Balancer(model, assign=tb.Shuffled(tb.LinearMap()), normalize=True)
        balancer.update()
        return balancer.multipliers, balancer.theory_marks()

    wanted = balanced()
    with torch.device("meta"):
        assert balanced() == wanted


# --- memory and threads --------------------------------------------------------------------------


def test_the_optimizer_does_not_keep_scheduler_or_model_alive() -> None:
    model = net()
    optimizer = sgd(model)
    scheduler = TempBalanceLR(optimizer, model, lrs.StepLR(optimizer, 2))
    watched = [weakref.ref(scheduler), weakref.ref(model), weakref.ref(scheduler.balancer)]
    del scheduler, model
    gc.collect()
    assert [ref() for ref in watched] == [None] * 3
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())

    model = net()
    optimizer = sgd(model)
    watched = [weakref.ref(StepHooks(optimizer, model)), weakref.ref(model), weakref.ref(optimizer)]
    assert watched[0]() is not None
    del model, optimizer
    gc.collect()
    assert [ref() for ref in watched] == [None] * 3


def test_nothing_grows_with_the_steps() -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 14))
    optimizer = sgd(model)
    scheduler = TempBalanceLR(optimizer, model, lrs.CosineAnnealingLR(optimizer, 50), ramp=3)
    hooked = sgd(model)
    hooks = StepHooks(hooked, model, every=20)

    def go(steps: int) -> tuple[int, int]:
        for _ in range(steps):
            optimizer.step()
            hooked.step()
            scheduler.step()
        gc.collect()
        return len(gc.get_objects()), len(
            pickle.dumps([scheduler.state_dict(), hooks.state_dict()])
        )

    go(50)
    before, after = go(50), go(400)
    assert after[0] - before[0] < 100
    assert abs(after[1] - before[1]) < 50


def test_two_trainings_in_two_threads() -> None:
    def train(out: dict[str, Any], key: str) -> None:
        model = nets[key]
        optimizer = sgd(model)
        scheduler = TempBalanceLR(optimizer, model, lrs.StepLR(optimizer, 2))
        for i in range(5):
            train_step(model, optimizer, i)
            scheduler.step()
        out[key] = rates(optimizer)

    nets = {key: net(i // 2) for i, key in enumerate("abcd")}
    found: dict[str, Any] = {}
    threads = [threading.Thread(target=train, args=(found, k)) for k in "ac"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    train(found, "b")
    train(found, "d")
    assert found["a"] == found["b"] and found["c"] == found["d"] and found["a"] != found["c"]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"windows": "farms"}, TypeError, r"windows must be an object such as Farms\(\).*'farms'"),
        ({"windows": tb.Farms}, TypeError, "windows .* got the class Farms: call it"),
        ({"fit": "hill"}, TypeError, r"fit must be an object such as Hill\(\)"),
        ({"fit": tb.KSFit}, TypeError, "fit .* got the class KSFit: call it"),
        ({"assign": "linear"}, TypeError, r"assign must be an assignment such as LinearMap\(\)"),
        ({"assign": tb.LinearMap}, TypeError, "assign .* got the class LinearMap: call it"),
        ({"exclude": None}, TypeError, "exclude takes a list of patterns"),
        ({"exclude": [nn.Linear]}, TypeError, r"exclude takes a list of patterns \(text\)"),
        ({"budget": 0}, ValueError, "budget must be a number of bytes of at least 1, got 0"),
        ({"every": True}, ValueError, "every must be an integer of at least 1, got True"),
        ({"normalize": "no"}, TypeError, "normalize must be True or False, got 'no'"),
        ({"skip_first": "no"}, TypeError, "skip_first must be True or False"),
    ],
)
def test_options_of_another_kind_are_refused_at_construction(
    options: dict[str, Any], error: type[Exception], said: str
) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(error, match=said):
        TempBalanceLR(optimizer, model, **options)
    assert len(optimizer.param_groups) == 1
    if options.keys() & {"windows", "fit", "budget"}:
        with pytest.raises(error, match=said):
            tb.analyze(model, **options)


def test_assignments_around_others_want_one() -> None:
    wrong: Any = 3
    with pytest.raises(TypeError, match="Shuffled: map must be an assignment .* got 3"):
        tb.Shuffled(wrong)
    with pytest.raises(TypeError, match="PerType takes multipliers by the name .* got 0.5"):
        tb.PerType(wrong / 6)


def test_a_pattern_that_matches_nothing_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = TempBalanceLR(optimizer, model, exclude=["nosuch.*", "Conv2d"])
    scheduler.balancer.refresh()
    said = [r.getMessage() for r in caplog.records if "matches no layer" in r.getMessage()]
    assert said == ["TempBalance: exclude='nosuch.*' matches no layer"]


@pytest.mark.parametrize("how", [TempBalanceLR, StepHooks])
def test_windows_without_a_layer_are_named_once(how: Any) -> None:
    """With the nearest names, and where an earlier pattern takes all; "*" is for what is left."""
    model = nn.Sequential(OrderedDict(first=nn.Linear(12, 12), head=nn.Linear(12, 12)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    whole = tb.WholeMatrix()
    windows = {"heads": whole, "Linear": tb.Farms(), "first": whole, "*": tb.Farms()}
    with pytest.warns(BalanceWarning) as said:
        balance = how(optimizer, model, windows=windows)
    texts = [str(w.message) for w in said if "windows" in str(w.message)]
    assert texts == [
        "windows: 'heads' matches no layer, by name or type, and has no effect; the nearest are "
        "head",
        "windows: 'first' has no effect: an earlier pattern matches every layer that it does. Put "
        "it first",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balance.balancer.refresh()
        how(torch.optim.SGD(model.parameters(), lr=0.1), model, windows={"*": whole})


@pytest.mark.parametrize("stop", [1, 2])
@pytest.mark.parametrize("how", [TempBalanceLR, StepHooks, tb.AlphaDecay])
def test_nothing_is_left_to_hold_from_stop_on(how: Any, stop: int) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=f"hold=2 is not before stop={stop}.*a hold below {stop}"):
        how(optimizer, model, hold=2, stop=stop)
    assert len(optimizer.param_groups) == 1
    how(optimizer, model, hold=stop - 1 or None, stop=stop)


def test_warnings_point_at_the_line_of_the_user() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(tb.BalanceWarning, match="NaN") as caught:
        TempBalanceLR(optimizer, model)
    assert [warning.filename for warning in caught] == [__file__]
