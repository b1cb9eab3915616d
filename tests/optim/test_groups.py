"""Groups: every parameter in one group, options kept, norms with their layer; state taken over."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from releases import NAMES, needs_names
from torch import nn
from torch.optim import lr_scheduler as lrs

from tempbalance import TempBalanceLR
from tempbalance.layers.find import find_layers
from tempbalance.optim.group_state import expand_state, is_unsplit, refuse_others
from tempbalance.optim.groups import Grouping
from tempbalance.optim.schedules import expand_scheduler, extend_scheduler


def split(optimizer: torch.optim.Optimizer, model: nn.Module) -> Grouping:
    return Grouping(optimizer, find_layers(model).hosts)


def norms(model: nn.Module) -> dict[str, str]:
    """Normalization -> the name of its host."""
    return {norm: host.name for host in find_layers(model).hosts for norm in host.norms}


# --- any model, any groups of the user's ---------------------------------------------------------


@st.composite
def models(draw: Any) -> nn.Sequential:
    """A stack of layers, norms, embeddings and nested blocks, with tied weights now and then."""
    kinds = st.sampled_from(
        ["linear", "bias", "conv", "norm", "batch", "embedding", "block", "relu"]
    )
    modules: list[nn.Module] = [nn.Linear(4, 4)]
    for kind in draw(st.lists(kinds, max_size=7)):
        modules.append(
            {
                "linear": lambda: nn.Linear(4, 4, bias=False),
                "bias": lambda: nn.Linear(4, 4),
                "conv": lambda: nn.Conv2d(4, 4, 3),
                "norm": lambda: nn.LayerNorm(4),
                "batch": lambda: nn.BatchNorm2d(4),
                "embedding": lambda: nn.Embedding(3, 4),
                "block": lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)),
                "relu": nn.ReLU,
            }[kind]()
        )
    linears = [m for m in modules if isinstance(m, nn.Linear)]
    if len(linears) > 1 and draw(st.booleans()):
        linears[-1].weight = linears[0].weight
    return nn.Sequential(*modules)


@given(st.data())
def test_splitting_is_a_partition_that_keeps_everything(data: st.DataObject) -> None:
    model = data.draw(models())
    parameters = list(model.parameters())
    count = data.draw(st.integers(1, 4))
    where = [data.draw(st.integers(-1, count - 1)) for _ in parameters]  # -1: not in the optimizer
    where[0] = 0  # at least one layer's weight
    users = [[p for p, w in zip(parameters, where, strict=True) if w == i] for i in range(count)]
    # torch has no names for an empty group, and before 2.6 none at all
    named = NAMES and all(users) and data.draw(st.booleans())
    groups: list[dict[str, Any]] = []
    for i, params in enumerate(users):
        group: dict[str, Any] = {"params": params, "lr": 0.1 / (i + 1), "weight_decay": 0.01 * i}
        if named:
            names = {id(p): n for n, p in model.named_parameters()}
            group["params"] = [(names[id(p)], p) for p in params]
        if data.draw(st.booleans()):
            group["name"] = data.draw(st.sampled_from(["0", "a", "b"]))
        groups.append(group)
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    before = [dict(g) for g in optimizer.param_groups]

    grouping = split(optimizer, model)
    after = optimizer.param_groups
    assert all(g["params"] for g in after)
    flat = [id(p) for g in after for p in g["params"]]
    assert sorted(flat) == sorted(id(p) for params in users for p in params)  # none lost or twice
    for group, source in zip(after, grouping.source, strict=True):
        old = before[source]
        assert {id(p) for p in group["params"]} <= {id(p) for p in users[source]}
        ids = [id(p) for p in users[source]]
        places = [ids.index(id(p)) for p in group["params"]]
        assert places == sorted(places)  # the user's order within a group
        for key in set(old) - {"params", "param_names", "name"}:
            assert group[key] == old[key]
        if named:
            names = [model.get_parameter(n) for n in group["param_names"]]
            assert [id(p) for p in names] == [id(p) for p in group["params"]]
    assert grouping.source == sorted(grouping.source)  # the user's order of groups
    assert len(set(grouping.names)) == len(after)
    host_of = {id(p): h.name for h in grouping.hosts for p in h.parameters}
    for group in after:
        assert len({host_of.get(id(p)) for p in group["params"]}) == 1

    again = [dict(g) for g in after]
    assert split(optimizer, model).source == list(range(len(after)))
    assert [dict(g) for g in optimizer.param_groups] == again


@given(st.data())
def test_unsplit_state_is_taken_over_by_parameter(data: st.DataObject) -> None:
    """Ids in the state follow their parameters, whatever the groups."""
    model = data.draw(models())
    parameters = list(model.parameters())
    cut = data.draw(st.integers(1, len(parameters)))
    layout = [parameters[:cut], parameters[cut:]] if cut < len(parameters) else [parameters]

    def build() -> torch.optim.Optimizer:
        groups = [{"params": p, "lr": 0.1 * (i + 1)} for i, p in enumerate(layout)]
        return torch.optim.SGD(groups, lr=1.0, momentum=0.9)

    old, new = build(), build()
    for i, p in enumerate(parameters):
        old.state[p] = {"momentum_buffer": torch.full_like(p, float(i))}
    state = old.state_dict()
    untouched = copy.deepcopy(state)
    grouping = split(new, model)
    if is_unsplit(grouping, state):
        state = expand_state(grouping, state)
    assert is_unsplit(grouping, untouched) or len(new.param_groups) == len(layout)
    refuse_others(grouping, state)
    new.load_state_dict(state)
    for i, p in enumerate(parameters):
        assert (new.state[p]["momentum_buffer"] == i).all()
    rates = [0.1 * (i + 1) for i in grouping.source]
    assert [g["lr"] for g in new.param_groups] == rates
    assert all(g["name"] for g in new.param_groups)
    assert old.state_dict()["param_groups"] == untouched["param_groups"]


@needs_names
def test_unsplit_state_with_names_of_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    old, new = (torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9) for _ in range(2))
    grouping = split(new, model)
    new.load_state_dict(expand_state(grouping, old.state_dict()))
    assert [g["param_names"] for g in new.param_groups] == [
        ["0.weight", "0.bias"],
        ["1.weight", "1.bias"],
    ]


def test_tensors_of_a_group_are_its_own() -> None:
    """torch puts one lr tensor into all groups: scaled in place, it would be scaled twice."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    rate = torch.tensor(0.1)
    optimizer = torch.optim.Adam([{"params": m.parameters()} for m in model], lr=rate)
    assert optimizer.param_groups[0]["lr"] is optimizer.param_groups[1]["lr"]
    split(optimizer, model)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    pointers = {g["lr"].data_ptr() for g in optimizer.param_groups[:2]} | {rate.data_ptr()}
    assert len(pointers) == 3


# --- which norm goes with which layer ------------------------------------------------------------


def test_norms_of_a_resnet() -> None:
    torchvision = pytest.importorskip("torchvision")
    found = norms(torchvision.models.resnet50(num_classes=10))
    assert found["bn1"] == "conv1"
    for block in ("layer1.0", "layer2.1", "layer4.2"):
        for i in (1, 2, 3):
            assert found[f"{block}.bn{i}"] == f"{block}.conv{i}"
    for i in (1, 2, 3, 4):  # before it in the parent, though bn3 and conv3 are nearer by name
        assert found[f"layer{i}.0.downsample.1"] == f"layer{i}.0.downsample.0"
    assert len(found) == 53


def test_norms_of_a_vgg() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.vgg11_bn(num_classes=10)
    found = norms(model)
    for name, host in found.items():
        assert int(name.split(".")[1]) == int(host.split(".")[1]) + 1
        assert isinstance(model.get_submodule(host), nn.Conv2d)
    assert len(found) == 8


def test_norms_before_their_layers() -> None:
    """A pre-norm block: norm1 has nothing before it, and follows what comes next."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm_a = nn.LayerNorm(8)
            self.attn = nn.Linear(8, 8)
            self.norm_b = nn.LayerNorm(8)
            self.mlp = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))

    model = nn.Sequential(Block(), nn.LayerNorm(8), nn.Linear(8, 4))
    found = norms(model)
    assert found["0.norm_a"] == "0.attn"
    assert found["0.norm_b"] == "0.attn"
    assert found["1"] == "0.mlp.1"
    # torch's own block defines its norms behind its layers; they are numbered as linear1, linear2.
    found = norms(nn.TransformerEncoderLayer(8, 2, 16, norm_first=True))
    assert found == {"norm1": "linear1", "norm2": "linear2"}


def test_a_norm_without_a_layer_keeps_the_base_rate() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"norm": nn.LayerNorm(8)}), "b": nn.Linear(8, 8)})
    assert norms(model) == {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert split(optimizer, model).names == ["other", "b"]


def test_hosts_of_tied_and_fused_weights() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    by_name = {host.name: host for host in find_layers(model).hosts}
    assert by_name["self_attn"].layers == ("self_attn.q", "self_attn.k", "self_attn.v")
    own = {id(p) for p in by_name["self_attn"].parameters}
    assert own == {id(model.self_attn.in_proj_weight), id(model.self_attn.in_proj_bias)}
    tied = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    tied[1].weight = tied[0].weight
    assert [h.layers for h in find_layers(tied).hosts] == [("0",)]
    model = nn.ModuleDict({"x": nn.Linear(8, 24), "y": nn.Linear(8, 8)})
    hosts = find_layers(model, {"x": 3}).hosts
    assert [len(h.layers) for h in hosts] == [3, 1] and hosts[0].name == "x"


# --- refusals ------------------------------------------------------------------------------------


def test_state_of_other_groups_is_refused_with_the_cure() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4, bias=False))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    saved = torch.optim.SGD([{"params": matrices}, {"params": rest}], lr=0.1).state_dict()
    optimizer = torch.optim.SGD([{"params": rest}, {"params": matrices}], lr=0.1)
    grouping = split(optimizer, model)
    assert not is_unsplit(grouping, saved)
    with pytest.raises(
        ValueError, match=r"groups of \[2, 3\].*before it was split.*\[3, 2\].*same"
    ):
        refuse_others(grouping, saved)
    state = optimizer.state_dict()
    names = [g["name"] for g in state["param_groups"]]
    state["param_groups"] = state["param_groups"][::-1]
    assert len(names) > 1
    with pytest.raises(ValueError, match="the same groups in another order"):
        refuse_others(grouping, state)
    del state["param_groups"][0]
    with pytest.raises(ValueError, match=r"only here: \[.*add_param_group before loading"):
        refuse_others(grouping, state)


def test_optimizers_without_groups_of_their_own_are_refused() -> None:
    class Own(torch.optim.LBFGS):
        pass

    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="Own cannot have a learning rate per layer; use SGD"):
        TempBalanceLR(Own(model.parameters()), model)
    with pytest.raises(ValueError, match="holds no parameter of the model's layers"):
        split(torch.optim.SGD([model.bias], lr=0.1), nn.Linear(4, 4))


# --- schedulers ----------------------------------------------------------------------------------


def test_lists_of_schedulers_grow_without_touching_the_old_ones() -> None:
    p = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [q], "lr": 0.1 * (i + 1)} for i, q in enumerate(p)])
    inner = lrs.ChainedScheduler([lrs.ExponentialLR(optimizer, 0.9), lrs.StepLR(optimizer, 2)])
    one = lrs.LambdaLR(optimizer, [lambda e: 1.0, lambda e: 2.0])
    chained = lrs.ChainedScheduler([inner, one])
    state = one.state_dict()
    held = state["base_lrs"]
    expand_scheduler(chained, [0, 0, 1], 2)
    assert one.base_lrs == [0.1, 0.1, 0.2] and [f(0) for f in one.lr_lambdas] == [1.0, 1.0, 2.0]
    assert all(s.base_lrs == [0.1, 0.1, 0.2] for s in inner._schedulers)
    assert held == [0.1, 0.2]  # a state in somebody's hands is left alone
    groups = [*optimizer.param_groups, {"lr": 0.7}, {"lr": 0.8}]
    before = one.base_lrs
    extend_scheduler(chained, groups, 3)
    assert one.base_lrs == [0.1, 0.1, 0.2, 0.8] and before == [0.1, 0.1, 0.2]
