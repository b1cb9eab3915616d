"""Prune: whole models, block by block, as a user calls it."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from tempbalance.pruning import Magnitude, SparseGPT, Wanda, by_depth, linear_layers, prune, uniform

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 50,
}


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    ).eval()


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=50)
    config.loss_type = "ForCausalLM"
    return transformers.GPT2LMHeadModel(config).eval()


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SIZES)).eval()


def albert() -> nn.Module:
    """One block, called again and again."""
    return transformers.AlbertModel(transformers.AlbertConfig(**SIZES, embedding_size=16)).eval()


def t5() -> nn.Module:
    """Two lists of blocks."""
    config = transformers.T5Config(
        d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8, vocab_size=50
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def batches(count: int = 3, length: int = 12) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for i in range(count):
        ids = torch.randint(1, 50, (2, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :i] = 0  # masks that differ
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def calls(model: nn.Module) -> list[dict[str, Tensor]]:
    if "T5" in type(model).__name__:
        return [{**b, "decoder_input_ids": b["input_ids"]} for b in batches()]
    return batches()


def one_at_a_time(model: nn.Module, method: Any, ratio: float, given: list[Any]) -> nn.Module:
    """The plain form: the whole model runs for every block, whose layers are then pruned."""
    model = copy.deepcopy(model)
    blocks: dict[str, list[str]] = {}
    for layer in linear_layers(model):
        parts = layer.name.split(".")
        number = next(i for i, part in enumerate(parts) if part.isdigit())
        blocks.setdefault(".".join(parts[: number + 1]), []).append(layer.name)
    for names in blocks.values():
        seen: dict[str, list[Tensor]] = {name: [] for name in names}
        handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, kept=seen[name]: kept.append(args[0])
            )
            for name in names
        ]
        with torch.no_grad():
            for batch in given:
                model(**batch)
        for handle in handles:
            handle.remove()
        for name in names:
            module = model.get_submodule(name)
            turned = not isinstance(module, nn.Linear)
            weight = module.weight.detach().mT if turned else module.weight.detach()
            statistic = method.statistic(weight)
            for inputs in seen[name]:
                statistic.add(inputs)
            changed = method(weight, ratio, statistic)
            module.weight.data = changed.mT.contiguous() if turned else changed
    return model


@pytest.mark.parametrize("method", [Wanda(), SparseGPT()])
@pytest.mark.parametrize("make", [llama, gpt2, bert, albert, t5])
def test_each_block_is_fed_by_pruned_ones(make: Callable[[], nn.Module], method: Any) -> None:
    model = make()
    wanted = one_at_a_time(model, method, 0.6, calls(model)).state_dict()
    prune(model, uniform(model, 0.6), method, iter(calls(model)))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-6)


def test_one_batch_of_each_form_runs_through_all_blocks_to_see_how_they_are_called() -> None:
    model = llama()
    calls: list[int] = []
    last = model.model.layers[-1]  # type: ignore[union-attr, index]
    last.register_forward_hook(lambda *_: calls.append(1))
    prune(model, uniform(model, 0.5), Wanda(), batches(5))
    assert len(calls) == 2 + 5  # with a mask and without one; then the statistics


@pytest.mark.parametrize("method", [Magnitude(), Wanda(), SparseGPT()])
def test_a_pruned_model_is_saved_loaded_and_run(method: Any, tmp_path: Path) -> None:
    model = llama().train()
    before = copy.deepcopy(model.state_dict())
    ratios = by_depth(model, 0.6, spread=0.4)
    shares: list[float] = []
    report = prune(model, ratios, method, batches(), progress=shares.append)
    assert sum(shares) == pytest.approx(1)
    assert model.training and model.config.use_cache
    assert report.sparsity == pytest.approx(0.6, abs=0.02)
    for layer in report.layers:
        zeros = int((model.get_submodule(layer.name).weight == 0).sum())
        assert (layer.zeros, layer.zeros_before) == (zeros, 0)
        assert layer.sparsity == pytest.approx(ratios[layer.name], abs=0.05)
    for name, value in model.state_dict().items():
        if name.removesuffix(".weight") not in ratios:
            assert torch.equal(value, before[name])
    model.eval().save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = batches()[0]["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
    assert f"{report.sparsity:.4f} of {report.numel:,} weights are zero" in str(report)


def test_the_same_batches_give_the_same_weights_and_the_order_of_ratios_does_not_matter() -> None:
    first, second = llama(), None
    second = copy.deepcopy(first)
    ratios = by_depth(first, 0.5)
    prune(first, ratios, SparseGPT(), batches())
    torch.manual_seed(1)
    prune(second, dict(sorted(ratios.items(), key=lambda x: -x[1])), SparseGPT(), batches())
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_zeros_that_were_there_are_counted_apart() -> None:
    model = nn.Sequential(nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, 10))
    with torch.no_grad():
        model[0].weight[:, :10] = 0
    report = prune(model, {"0": 0.5, "2": 0.0}, Wanda(), [torch.randn(30, 50)])
    assert (report["0"].zeros_before, report["0"].zeros) == (400, 1000)
    assert report["2"].zeros == 0
    assert (report.sparsity_before, report.sparsity) == (400 / 2400, 1000 / 2400)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_masks_hold_the_zeros_down_while_the_model_is_fine_tuned(
    make: Callable[[], nn.Module],
) -> None:
    model = make()
    ratios = uniform(model, 0.5)
    plain = copy.deepcopy(model)
    prune(plain, ratios, SparseGPT(), batches())
    prune(model, ratios, SparseGPT(), batches(), keep_masks=True)
    modules = {name: model.get_submodule(name) for name in ratios}
    for name, module in modules.items():
        assert torch_prune.is_pruned(module)
        assert torch.equal(module.weight, plain.get_submodule(name).weight)
    removed = {name: module.weight == 0 for name, module in modules.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in batches():
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # Pruned further, masks that are there stay.
    with pytest.raises(ValueError, match="make it permanent"):
        uniform(model, 0.6)
    prune(model, dict.fromkeys(ratios, 0.6), Wanda(), batches())
    for name, module in modules.items():
        assert torch_prune.is_pruned(module)
        torch_prune.remove(module, "weight")
        assert (module.weight[removed[name]] == 0).all()
        assert not torch.equal(module.weight, plain.get_submodule(name).weight)
        assert (module.weight == 0).float().mean().item() > 0.58


def test_two_of_four_at_a_uniform_ratio_alone() -> None:
    model = llama()
    method = Wanda(pattern=(2, 4))
    with pytest.raises(ValueError, match=r"2:4 removes 0\.5 of every layer: use uniform"):
        prune(model, by_depth(model, 0.5), method, batches())
    ratios = uniform(model, 0.5)
    assert prune(model, ratios, method, batches()).sparsity == 0.5
    for name in ratios:
        groups = (model.get_submodule(name).weight != 0).unflatten(-1, (-1, 4))
        assert (groups.sum(-1) == 2).all()
    with pytest.raises(ValueError, match="30 inputs, no multiple of 4"):
        prune(nn.Sequential(nn.Linear(30, 8)), {"0": 0.5}, method, [torch.randn(2, 30)])


class Tall(nn.Module):
    """Eight blocks, called by keyword, that tell how many of their outputs are held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(16, 16)}) for _ in range(8))
        self.outputs: list[weakref.ref[Tensor]] = []
        self.most = 0
        for block in self.blocks:
            block.forward = functools.partial(self._block, block)

    def _block(self, block: nn.Module, hidden: Tensor) -> Tensor:
        found = block["up"](input=hidden).relu()  # type: ignore[index]
        self.outputs.append(weakref.ref(found))
        self.most = max(self.most, sum(output() is not None for output in self.outputs))
        return found

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(hidden=x)
        return x


def test_the_activations_of_one_block_are_held_however_many_blocks_there_are() -> None:
    model = Tall()
    given = [torch.randn(3, 16) for _ in range(5)]
    prune(model, uniform(model, 0.5), SparseGPT(), given)
    # One for each batch, and those of the calls just made and being made; not 5 x 8.
    assert model.most <= 5 + 2
    # Two passes a block and batch, one to write the calls down, and one to see who is called.
    assert len(model.outputs) <= 5 * 8 * 3 + 8


class Skipping(nn.Module):
    """Blocks of which the last one takes what the first one gave: no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first = self.blocks[0](x)
        return self.blocks[2](self.blocks[1](first).relu() + first)


def test_blocks_that_form_no_chain_are_fed_by_the_whole_model() -> None:
    model, x = Skipping(), torch.randn(40, 16)
    plain = copy.deepcopy(model)
    prune(model, {f"blocks.{i}": 0.5 for i in range(3)}, Wanda(), [(x,)])
    with torch.no_grad():
        for i in range(3):
            inputs: list[Tensor] = []
            handle = plain.blocks[i].register_forward_pre_hook(
                lambda _, args, inputs=inputs: inputs.append(args[0])
            )
            plain(x)
            handle.remove()
            method, weight = Wanda(), plain.blocks[i].weight
            statistic = method.statistic(weight)
            statistic.add(inputs[0])
            weight.copy_(method(weight, 0.5, statistic))
    assert all(
        torch.equal(a.weight, b.weight) for a, b in zip(model.blocks, plain.blocks, strict=True)
    )


class Hiding(nn.Module):
    """Uses the weight of a layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.hidden = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.seen(x) @ self.hidden.weight.mT


def bad(weight: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight.data[0, 0] = weight
    return model


@pytest.mark.parametrize(
    ("model", "ratios", "method", "given", "said"),
    [
        (bad(0.0), {"0": 0.5, "7": 0.5}, Magnitude(), None, "no layer 7"),
        (bad(0.0), {"0": 0.5, "1": 1.0}, Magnitude(), None, "'1'.*below 1"),
        (bad(float("nan")), {"0": 0.5, "1": 0.5}, Magnitude(), None, "'1' holds NaN"),
        (nn.Sequential(nn.Conv2d(3, 3, 3)), {"0": 0.5}, Magnitude(), None, "Conv2d; only linear"),
        (bad(0.0), {"0": 0.5}, Wanda(), None, "needs batches"),
        (Hiding(), {"seen": 0.5, "hidden": 0.5}, Wanda(), [torch.randn(2, 8)], "1 layers.*hidden"),
        (
            nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
            {"": 0.5}, Magnitude(), None, "remove_parametrizations",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_pruned_is_named_before_anything_is_touched(
    model: nn.Module, ratios: dict[str, float], method: Any, given: Any, said: str
) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=said):
        prune(model, ratios, method, given)
    after = model.state_dict()
    assert all(torch.equal(after[k].nan_to_num(), v.nan_to_num()) for k, v in before.items())


def test_a_method_must_be_an_object() -> None:
    with pytest.raises(TypeError, match="call it"):
        prune(bad(0.0), {"0": 0.5}, Magnitude)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="an object such as Wanda"):
        prune(bad(0.0), {"0": 0.5}, "wanda")  # type: ignore[arg-type]


class Masked(nn.Module):
    """Blocks that share one mask for short inputs, and have one each for long ones."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Scaled() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        one = torch.ones(8)
        for i, block in enumerate(self.blocks):
            x = block(x, one if len(x) <= 4 else one / (i + 1))
        return x


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.linear(x * mask)


def test_batches_of_another_form_are_seen_whole() -> None:
    torch.manual_seed(0)
    model = Masked()
    given = [{"x": torch.randn(2, 8)}, {"x": torch.randn(64, 8)}]
    wanted = one_at_a_time(copy.deepcopy(model), Wanda(), 0.5, given)
    prune(model, uniform(model, 0.5), Wanda(), given)
    for a, b in zip(model.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(a, b)


def test_batches_with_labels_are_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"batches\[0\].*without labels"):
        prune(model, uniform(model, 0.5), Wanda(), [(torch.randn(2, 8), torch.zeros(2))])


def test_a_model_that_is_one_layer_has_the_name_that_its_report_gives() -> None:
    model = nn.Linear(16, 8)
    assert prune(model, uniform(model, 0.5), Magnitude()).sparsity == pytest.approx(0.5, abs=0.02)
