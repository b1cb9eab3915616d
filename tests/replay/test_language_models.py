"""The released trajectories of layer-wise rates for language models: looks, ramps, held rates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tempbalance as tb

FOLDER = Path(__file__).parents[1] / "golden/methods"
GOLDEN = json.loads((FOLDER / "training.json").read_text())
ARRAYS = np.load(FOLDER / "training.npz")


def network(weights: bool = False) -> nn.Module:
    """Modules of the released names, as a LLaMA has them; a norm besides, which is not tuned."""
    root = nn.Module()
    for name in GOLDEN["modules"]:
        weight = torch.from_numpy(ARRAYS[f"W/{name}"])
        rows, cols = weight.shape
        table = name.endswith("embed_tokens")
        module = nn.Embedding(rows, cols) if table else nn.Linear(cols, rows, bias=False)
        if weights:
            module.weight.data = weight
        *parents, last = name.split(".")
        node = root
        for parent in parents:
            if parent not in dict(node.named_children()):
                node.add_module(parent, nn.Module())
            node = node.get_submodule(parent)
        node.add_module(last, module)
    root.add_module("norm", nn.LayerNorm(64))
    return root


def fixed(value: float) -> dict[str, float]:
    return {"lm_head": value, "Embedding": value}


@pytest.mark.parametrize("case", GOLDEN["llr_whole"], ids=lambda c: c["pl_fitting"])
def test_rates_of_measured_weights(case: dict[str, Any]) -> None:
    """``fix-finger`` has no lower end where it says one, so that it is compared by its alphas."""
    model = network(weights=True)
    wanted = dict(zip(case["names"], case["lr_by_module"], strict=True))
    measured = dict(zip(case["names"], case["alpha_measured"], strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=case["lr"])
    assign: Any = tb.LinearMap(case["min_ratio"], case["max_ratio"])
    if case["pl_fitting"] != "median":
        names = [n for n in case["names"] if "layers" in n]
        assign = Given([[measured[n] for n in names]], assign, names)
    scheduler = tb.TempBalanceLR(
        optimizer, model, windows=tb.WholeMatrix(), assign=assign, min_eigs=50,
        fixed=fixed(case["max_ratio"]),
    )  # fmt: skip
    rates = {n: scheduler.multipliers[n] * case["lr"] for n in wanted}
    assert rates == pytest.approx(wanted, rel=2e-5)
    if case["pl_fitting"] == "median":
        alphas = scheduler.alphas
        assert alphas == pytest.approx({n: measured[n] for n in alphas}, rel=1e-4)


def llama(dims: dict[str, Any]) -> nn.Module:
    """transformers' own model of the recorded weights, norms included."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=dims["V"], hidden_size=dims["d"], intermediate_size=dims["f"],
        num_hidden_layers=dims["n"], num_attention_heads=1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for name in GOLDEN["modules"]:
        model.get_submodule(name).weight.data = torch.from_numpy(ARRAYS[f"W/{name}"])
    return model


def by_parameter(optimizer: Any, field: str) -> dict[int, float]:
    return {id(p): g[field] for g in optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize("case", GOLDEN["alphadecay_whole"], ids=lambda c: str(c["wd"]))
@pytest.mark.parametrize("hooked", [False, True])
def test_decays_of_measured_weights(case: dict[str, Any], hooked: bool) -> None:
    """Released: without first and last linear layer; these, table and norms keep their decay."""
    model = llama(GOLDEN["dims"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=case["wd"])
    options: Any = {
        "assign": tb.LinearMap(case["min_ratio"], case["max_ratio"]),
        "windows": tb.WholeMatrix(), "min_eigs": 50, "skip_first": True, "skip_last": True,
    }  # fmt: skip
    if hooked:  # the decay of a step, in which the groups are split
        tb.StepHooks(optimizer, model, assign=tb.Constant(1.0), decay=options)
        seen: list[dict[int, float]] = []
        optimizer.register_step_pre_hook(
            lambda *_: seen.append(by_parameter(optimizer, "weight_decay"))
        )
        optimizer.step()
        decays = seen[0]
    else:
        decay = tb.AlphaDecay(optimizer, model, **options)
        decays = by_parameter(optimizer, "weight_decay")
        wanted_alphas = dict(zip(case["names"], case["alpha"], strict=True))
        assert decay.alphas == pytest.approx(wanted_alphas, rel=1e-5)
    wanted = {f"{n}.weight": d for n, d in zip(case["names"], case["wd_by_module"], strict=True)}
    wanted |= dict.fromkeys(case["untuned"], case["wd"])
    assert {n: decays[id(p)] for n, p in model.named_parameters()} == pytest.approx(
        wanted, rel=1e-5
    )


@pytest.mark.parametrize("case", GOLDEN["llr_whole"][:1], ids=lambda c: c["pl_fitting"])
def test_rates_of_all_parameters_as_configured(case: dict[str, Any]) -> None:
    """The options of balance=llr on a whole model: norms have the base rate."""
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    conf = Path(__file__).parents[2] / "conf"
    with initialize_config_dir(str(conf), version_base="1.3"):
        cfg = compose("train", ["experiment=lm_60m", "balance=llr", "data.path=x"])
    callback = instantiate(cfg.balance, hold=None)
    assert callback.by_step and callback.every == 100 and callback.options["ramp"] == 50
    model = llama(GOLDEN["dims"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=case["lr"])
    tb.TempBalanceLR(optimizer, model, **{**callback.options, "ramp": 0})
    rates = by_parameter(optimizer, "lr")
    wanted = {f"{n}.weight": d for n, d in zip(case["names"], case["lr_by_module"], strict=True)}
    wanted |= dict.fromkeys(case["untuned"], case["lr"])
    assert {n: rates[id(p)] for n, p in model.named_parameters()} == pytest.approx(wanted, rel=2e-5)


class Given:
    """A map of alphas that were recorded, one set a look, in place of those that were measured."""

    uses_alphas, once = True, False

    def __init__(
        self, looks: list[list[float]], assign: tb.assign.Assignment, names: list[str]
    ) -> None:
        self.looks, self.assign, self.names, self.count = looks, assign, names, 0

    def __call__(self, alphas: Any, kinds: Sequence[str] | None = None) -> Tensor:
        assert isinstance(kinds, tb.Population) and list(kinds.names or ()) == self.names
        self.count += 1
        return self.assign(self.looks[self.count - 1], kinds)


@pytest.mark.parametrize("index", range(len(GOLDEN["llr_trajectories"])))
def test_looks_and_held_multipliers_of_a_trajectory(index: int) -> None:
    """Where a ramp has ended the multipliers are the released ones, and to the end of the run.

    Each rate is divided by that of what is not tuned at the same step. Left out are the first
    look, which the released loop takes at step 1, and the ramp that the end of its window drops.
    """
    case = GOLDEN["llr_trajectories"][index]
    names = [n for n in GOLDEN["modules"] if "layers" in n]
    sets = [case["look_at_construction"], *case["looks_alpha"][1:]]
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=case["lr"])
    window = round(case["LLR_ratio"] * case["stop_at"])
    # Released, a look whose ramp would end after the window is lost.
    hold = next(look for look in case["looks_at"] if look + case["linear_steps"] > window)
    assign = Given(
        [[look[n] for n in names] for look in sets],
        tb.LinearMap(case["min_ratio"], case["max_ratio"]),
        names,
    )
    scheduler = tb.TempBalanceLR(
        optimizer, model, windows=tb.WholeMatrix(), assign=assign, min_eigs=50,
        every=case["every"], ramp=case["linear_steps"], hold=hold,
        fixed=fixed(case["max_ratio"]),
    )  # fmt: skip
    columns = {name: i for i, name in enumerate(case["group_names"])}
    rows = ARRAYS[f"llr_trajectory/{index}"]
    looks = [0]
    compared = 0
    for step in range(1, case["stop_at"] + 1):
        before = assign.count
        scheduler.step()
        if assign.count > before:
            looks.append(step)
        ramping = step - looks[-1] < case["linear_steps"] or len(looks) == 1
        dropped = hold <= step < window + case["linear_steps"]
        if ramping or dropped:
            continue
        for name, multiplier in scheduler.multipliers.items():
            released = rows[step - 1, columns[name]] / rows[step - 1, -1]
            assert multiplier == pytest.approx(released, rel=1e-9), (step, name)
            compared += 1
    assert looks == [0, *(look for look in case["looks_at"][1:] if look < hold)]
    assert compared > 1000
    assert scheduler.multipliers["lm_head"] == scheduler.multipliers["model.embed_tokens"]
    assert scheduler.multipliers["lm_head"] == case["max_ratio"]
