"""Which parameters are measured, under which name, and that every other one is listed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tempbalance import analyze
from tempbalance.layers.find import find_layers
from tempbalance.layers.layer import Layers
from tempbalance.layers.walk import named_parameters
from tempbalance.readers import _READERS, Matrix, register


def check(model: nn.Module, fused: dict[str, Any] | None = None) -> Layers:
    """Every parameter is measured or listed, once, and the numbers add up."""
    found = find_layers(model, fused)
    unique: dict[int, Tensor] = {id(p): p for p in model.parameters()}
    lazy = nn.parameter.UninitializedParameter
    total = sum(
        p.numel() * (2 if p.is_complex() else 1) for p in unique.values() if not isinstance(p, lazy)
    )
    listed = sum(layer.numel for layer in found.layers) + sum(s.numel for s in found.skipped)
    assert found.numel == total
    assert listed == total
    clean = set(named_parameters(model))
    seen = {name for layer in found.layers for name in layer.parameters}
    seen |= {skipped.name for skipped in found.skipped}
    assert clean <= seen
    names = [layer.name for layer in found.layers]
    assert len(names) == len(set(names))
    for layer in found.layers:
        weight = layer.read()
        assert tuple(weight.shape) == layer.shape
        assert not weight.requires_grad
    assert all(skipped.reason for skipped in found.skipped)
    return found


def names(model: nn.Module, **kwargs: Any) -> list[str]:
    return [layer.name for layer in check(model, **kwargs).layers]


# --- the table of readers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Linear(7, 5), (1, 5, 7), lambda w: w[None]),
        (nn.Conv1d(6, 4, 3), (3, 4, 6), lambda w: torch.stack([w[:, :, k] for k in range(3)])),
        (nn.Conv1d(6, 4, 1), (1, 4, 6), lambda w: w[None, :, :, 0]),
        (
            nn.Conv2d(6, 4, (2, 3)),
            (6, 4, 6),
            lambda w: torch.stack([w[:, :, i, j] for i in range(2) for j in range(3)]),
        ),
        (nn.Conv3d(3, 4, 2), (8, 4, 3), lambda w: torch.stack(w.flatten(2).unbind(2))),
        (
            nn.Conv2d(6, 8, (1, 2), groups=2),
            (4, 4, 3),
            lambda w: torch.stack([w[g : g + 4, :, 0, j] for g in (0, 4) for j in range(2)]),
        ),
        (nn.ConvTranspose1d(6, 4, 3), (3, 6, 4), lambda w: torch.stack(w.unbind(2))),
        (
            nn.ConvTranspose2d(6, 8, (1, 2), groups=2),
            (4, 3, 4),
            lambda w: torch.stack([w[g : g + 3, :, 0, j] for g in (0, 3) for j in range(2)]),
        ),
        (nn.ConvTranspose3d(3, 4, 2), (8, 3, 4), lambda w: torch.stack(w.flatten(2).unbind(2))),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_slices(
    module: nn.Module, shape: tuple[int, int, int], expected: Callable[[Tensor], Tensor]
) -> None:
    (layer,) = check(nn.Sequential(module)).layers
    assert layer.name == "0"
    assert layer.shape == shape
    assert layer.parameters == ("0.weight", "0.bias")
    assert layer.numel == module.weight.numel()  # type: ignore[operator, union-attr]
    rows = {tuple(m.flatten().tolist()) for m in layer.read()}
    assert rows == {tuple(m.flatten().tolist()) for m in expected(module.weight.detach())}  # type: ignore[arg-type, operator]


def test_reading_a_plain_weight_copies_nothing() -> None:
    for module in (nn.Linear(8, 6), nn.Conv2d(8, 6, 3), nn.ConvTranspose2d(8, 6, 2)):
        (layer,) = find_layers(module).layers
        assert layer.read().data_ptr() == module.weight.data_ptr()
        assert not layer.copies


def test_depthwise_convolutions_and_single_rows_have_no_matrix() -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 16, 3, groups=8),
        nn.Conv2d(1, 8, 3),
        nn.Linear(9, 1),
        nn.ConvTranspose2d(8, 8, 2, groups=8),
    )
    found = check(model)
    assert not found.layers
    reasons = {s.name: s.reason for s in found.skipped if s.name.endswith("weight")}
    assert [name for name, reason in reasons.items() if "depthwise" in reason] == [
        "0.weight",
        "1.weight",
        "4.weight",
    ]
    assert "vectors" in reasons["2.weight"]
    assert "1 x 9" in reasons["3.weight"]


@pytest.mark.parametrize("separate", [False, True])
def test_attention_is_three_projections(separate: bool) -> None:
    sizes = {"kdim": 12, "vdim": 16} if separate else {}
    attention = nn.MultiheadAttention(8, 2, add_bias_kv=True, **sizes)
    model = nn.ModuleDict({"attn": attention})
    assert names(model) == ["attn.q", "attn.k", "attn.v", "attn.out_proj"]
    q, k, v, _ = find_layers(model).layers
    if separate:
        assert (q.shape, k.shape, v.shape) == ((1, 8, 8), (1, 8, 12), (1, 8, 16))
    else:
        weight = attention.in_proj_weight.detach()
        assert torch.equal(torch.cat([q.read()[0], k.read()[0], v.read()[0]]), weight)
        assert q.parameters[0] == k.parameters[0] == "attn.in_proj_weight"
    assert "attn.in_proj_bias" in q.parameters
    assert "attn.in_proj_bias" not in k.parameters


def test_fused_projections_are_named_by_the_user() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            self.kv = nn.Linear(8, 20)

    model = nn.Sequential(Block(), Block())
    fused: dict[str, int | tuple[int, ...]] = {"*.qkv": 3, "*.kv": (8, 12)}
    assert names(model, fused=fused)[:5] == ["0.qkv.q", "0.qkv.k", "0.qkv.v", "0.kv.0", "0.kv.1"]
    assert [layer.shape for layer in find_layers(model, fused).layers[3:5]] == [
        (1, 8, 8),
        (1, 12, 8),
    ]
    with pytest.raises(ValueError, match="no measured module matches"):
        find_layers(model, {"*.q_k_v": 3})
    with pytest.raises(ValueError, match="'0.qkv'.*24 outputs cannot be split into 5"):
        find_layers(model, {"*.qkv": 5})
    with pytest.raises(ValueError, match="0.kv"):
        find_layers(model, {"*.kv": (8, 11)})


def test_a_part_that_is_a_vector_is_listed_for_itself() -> None:
    found = check(nn.Sequential(nn.Linear(16, 9)), {"0": (8, 1)})
    assert [layer.name for layer in found.layers] == ["0.0"]
    assert found.skipped[0].name == "0.weight"


def test_complex_weights_are_spectral() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Parameter(torch.randn(4, 6, 3, 2, dtype=torch.complex64))
            self.w2 = nn.Parameter(torch.randn(4, 6, dtype=torch.complex64))
            self.phase = nn.Parameter(torch.randn(4, dtype=torch.complex64))

    model = nn.Sequential(Own())
    assert names(model) == ["0.w1", "0.w2"]
    first, second = find_layers(model).layers
    assert (first.shape, second.shape) == ((6, 4, 6), (1, 4, 6))
    assert first.numel == 2 * 4 * 6 * 6
    own = model[0]
    assert torch.equal(first.read()[3], own.w1[:, :, 1, 1])  # type: ignore[index, union-attr]


# --- what is not measured ---------------------------------------------------------------------


def test_other_modules_are_listed_with_the_cure() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))
            self.mixing = nn.Parameter(torch.randn(1, 10, 32))
            self.none = None
            self.register_parameter("missing", None)

    model = nn.ModuleDict(
        {
            "own": Own(),
            "list": nn.ParameterList([torch.randn(4, 5), torch.randn(3)]),
            "dict": nn.ParameterDict({"a": torch.randn(4, 5)}),
            "embedding": nn.Embedding(10, 4),
            "norm": nn.BatchNorm2d(4),
            "wide_norm": nn.LayerNorm((4, 5)),
            "prelu": nn.PReLU(3),
        }
    )
    found = check(model)
    assert not found.layers
    reasons = {s.name: s.reason for s in found.skipped}
    for name in ("own.mixing", "list.0", "dict.a"):
        assert "register" in reasons[name]
    assert "embedding" in reasons["embedding.weight"]
    assert "normalization" in reasons["norm.weight"]


@pytest.mark.parametrize("head_first", [True, False])
def test_a_head_tied_to_an_embedding_keeps_the_base_rate(head_first: bool) -> None:
    head, embedding = nn.Linear(4, 10), nn.Embedding(10, 4)
    head.weight = embedding.weight
    parts = {"head": head, "embedding": embedding}
    model = nn.ModuleDict(parts if head_first else dict(reversed(parts.items())))
    found = check(model)
    assert not found.layers
    reasons = {s.name: (s.reason, s.numel) for s in found.skipped}
    assert "tied" in reasons["head.weight"][0]
    assert reasons["head.weight"][1] == 0
    assert "table of vectors" in reasons["embedding.weight"][0]


def test_tied_and_shared_weights_are_measured_once() -> None:
    shared = nn.Linear(8, 8)
    tied = nn.Linear(8, 8)
    tied.weight = shared.weight
    model = nn.ModuleDict({"a": shared, "b": tied, "c": shared, "d": nn.Sequential(shared)})
    found = check(model)
    assert [layer.name for layer in found.layers] == ["a"]
    assert [s.name for s in found.skipped if "tied to 'a.weight'" in s.reason] == ["b.weight"]


def test_tensors_without_values_are_listed() -> None:
    class Int8(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)

    sparse = nn.Linear(8, 8)
    sparse.weight = nn.Parameter(torch.eye(8).to_sparse())
    model = nn.ModuleDict(
        {
            "meta": nn.Linear(8, 8, device="meta"),
            "lazy": nn.LazyLinear(8),
            "lazy_conv": nn.LazyConv2d(8, 3),
            "int8": Int8(),
            "sparse": sparse,
            "empty": nn.Linear(8, 8),
            "no_input": nn.Linear(8, 8),
        }
    )
    model["empty"].weight = nn.Parameter(torch.empty(0, 8))
    model["no_input"].weight = nn.Parameter(torch.empty(8, 0))
    found = find_layers(model)
    assert not found.layers
    reasons = {s.name: s.reason for s in found.skipped}
    assert "meta tensor" in reasons["meta.weight"]
    assert "forward pass" in reasons["lazy.weight"]
    assert "forward pass" in reasons["lazy_conv.weight"]
    assert "quantized" in reasons["int8.weight"]
    assert "to_dense" in reasons["sparse.weight"]
    assert "0 x 8" in reasons["empty.weight"]
    assert "8 x 0" in reasons["no_input.weight"]
    assert found.numel == sum(s.numel for s in found.skipped)
    assert not analyze(model).layers


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantized_modules_are_listed() -> None:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)))
    found = find_layers(model)
    assert not found.layers
    assert "quantized" in found.skipped[0].reason


def test_frozen_layers_are_found_and_say_so() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    assert [layer.trainable for layer in find_layers(model).layers] == [False, True]


def test_an_empty_model() -> None:
    assert find_layers(nn.Identity()) == Layers((), (), 0)


# --- wrappers and parametrizations --------------------------------------------------------------


def test_wrappers_leave_no_trace_in_names() -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))

    plain = names(net())
    inner = net()
    inner[1] = torch.compile(inner[1])  # type: ignore[assignment]
    wrapped: list[nn.Module] = [
        torch.compile(net()),  # type: ignore[list-item]
        inner,
        torch.compile(inner),  # type: ignore[list-item]
        nn.DataParallel(net()),
        torch.optim.swa_utils.AveragedModel(net()),
    ]
    for model in wrapped:
        assert names(model) == plain
        assert list(named_parameters(model)) == list(dict(net().named_parameters()))


def test_parametrized_weights_are_the_ones_in_use() -> None:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(8, 6)),
        parametrizations.spectral_norm(nn.Conv2d(8, 6, 3)),
        parametrizations.orthogonal(nn.Linear(8, 8)),
    )
    found = check(model.train())
    assert [layer.kind for layer in found.layers] == ["Linear", "Conv2d", "Linear"]
    assert found.layers[0].parameters == (
        "0.parametrizations.weight.original0",
        "0.parametrizations.weight.original1",
        "0.bias",
    )
    model.eval()
    for layer, module in zip(found.layers, model, strict=True):
        expected: Tensor = getattr(module, "weight").detach()  # noqa: B009
        conv = expected.ndim == 4
        expected = expected.flatten(2).permute(2, 0, 1) if conv else expected[None]
        assert torch.equal(layer.read(), expected)


def test_measuring_does_not_step_the_power_iteration_of_spectral_norm() -> None:
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(20, 20))).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    analyze(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_the_old_weight_norm_is_listed_with_the_cure(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(getattr(nn.utils, name)(nn.Linear(8, 8)))
    found = check(model)
    assert not found.layers
    assert any("parametrizations" in s.reason for s in found.skipped)


def test_a_pruned_weight_is_listed_with_the_cure() -> None:
    from torch.nn.utils import prune

    model = nn.Sequential(nn.Linear(20, 20))
    prune.random_unstructured(model[0], "weight", 0.3)
    found = check(model)
    assert not found.layers
    assert any("remove()" in s.reason for s in found.skipped)
    prune.remove(model[0], "weight")
    assert names(model) == ["0"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_modules_are_read_by_name_and_shape() -> None:
    (layer,) = check(torch.jit.script(nn.Sequential(nn.Linear(8, 8)))).layers
    assert layer.guessed and layer.shape == (1, 8, 8)
    assert layer.parameters == ("0.weight", "0.bias")


def test_odd_storage_of_weights() -> None:
    expanded, strided, channels_last = nn.Linear(20, 20), nn.Linear(20, 20), nn.Conv2d(20, 20, 3)
    expanded.weight.data = torch.randn(20, 1).expand(20, 20)
    strided.weight.data = torch.randn(40, 60)[::2, ::3]
    same = nn.Conv2d(20, 20, 3)
    same.load_state_dict(channels_last.state_dict())
    channels_last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    report = analyze(nn.ModuleList([expanded, strided, channels_last, same]))
    check(nn.ModuleList([expanded, strided, channels_last, same]))
    assert report["2"].alpha == pytest.approx(report["3"].alpha, rel=1e-6)
    assert report["0"].n_eigs == 1


# --- registration ---------------------------------------------------------------------------------


@pytest.fixture
def readers() -> Iterator[None]:
    before = dict(_READERS)
    yield
    _READERS.clear()
    _READERS.update(before)


class Kernel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(5, 6, 3))
        self.bias = nn.Parameter(torch.zeros(5))


@pytest.mark.usefixtures("readers")
@pytest.mark.parametrize("key", [Kernel, f"{Kernel.__module__}.{Kernel.__qualname__}"])
def test_a_reader_can_be_registered(key: type | str) -> None:
    assert names(nn.Sequential(Kernel())) == []

    @register(key)
    def read(module: nn.Module) -> Iterator[Matrix]:
        yield Matrix("kernel", lambda w: w.permute(2, 0, 1))

    class Derived(Kernel):
        pass

    found = check(nn.Sequential(Kernel(), Derived()))
    assert [(layer.name, layer.shape) for layer in found.layers] == [
        ("0", (3, 5, 6)),
        ("1", (3, 5, 6)),
    ]
    assert found.layers[0].parameters == ("0.kernel", "0.bias")


@pytest.mark.usefixtures("readers")
def test_a_reader_that_gives_no_stack_of_matrices_is_named() -> None:
    @register(Kernel)
    def read(module: nn.Module) -> Iterator[Matrix]:
        yield Matrix("kernel", lambda w: w[0])

    with pytest.raises(ValueError, match=r"'0'.*Kernel.*\(slices, rows, cols\)"):
        find_layers(nn.Sequential(Kernel()))


def test_subclasses_are_read_as_their_base() -> None:
    class MyLinear(nn.Linear):
        pass

    (layer,) = check(nn.Sequential(MyLinear(8, 6))).layers
    assert (layer.kind, layer.shape) == ("MyLinear", (1, 6, 8))


def test_names_that_collide_stay_unique() -> None:
    class Clash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2)
            self.attn.add_module("q", nn.Linear(8, 8))

    assert len(set(names(Clash()))) == 5


# --- real models ---------------------------------------------------------------------------------


def test_resnet50() -> None:
    models = pytest.importorskip("torchvision.models")
    found = check(models.resnet50())
    assert len(found.layers) == 54
    assert sum(layer.numel for layer in found.layers) / found.numel > 0.99


def test_vit() -> None:
    models = pytest.importorskip("torchvision.models")
    found = check(models.VisionTransformer(32, 8, 3, 4, 64, 128))
    assert [layer.name for layer in found.layers][:6] == [
        "conv_proj",
        *(f"encoder.layers.encoder_layer_0.self_attention.{p}" for p in ("q", "k", "v")),
        "encoder.layers.encoder_layer_0.self_attention.out_proj",
        "encoder.layers.encoder_layer_0.mlp.0",
    ]


def test_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=90, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    found = check(model, {"*.c_attn": 3})
    assert [layer.name.removeprefix("transformer.h.0.") for layer in found.layers[:6]] == [
        "attn.c_attn.q",
        "attn.c_attn.k",
        "attn.c_attn.v",
        "attn.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    ]
    weight = model.transformer.h[0].attn.c_attn.weight.detach()  # (in, out)
    assert torch.equal(found.layers[1].read()[0], weight[:, 32:64].T)
    assert any("tied" in s.reason for s in found.skipped if s.name == "lm_head.weight")


@pytest.mark.parametrize("fused", [None, {"*.c_attn": 3}])
@pytest.mark.parametrize("merged", [False, True])
def test_lora(fused: dict[str, Any] | None, merged: bool) -> None:
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    config = transformers.GPT2Config(
        n_layer=1, n_embd=32, n_head=2, vocab_size=90, bos_token_id=0, eos_token_id=0
    )
    lora = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    wrapped = model.base_model.model.transformer.h[0].mlp.c_proj
    x = torch.randn(6, 128)
    with torch.no_grad():
        expected = wrapped(x) - wrapped.base_layer.bias
    if merged:
        model.merge_adapter()
    found = check(model, fused)
    (layer,) = [x for x in found.layers if x.name.endswith("mlp.c_proj")]
    torch.testing.assert_close(x @ layer.read()[0].T, expected, rtol=1e-4, atol=1e-4)
    assert [n.rpartition("c_proj.")[2] for n in layer.parameters[:3]] == [
        "base_layer.weight",
        "lora_A.default.weight",
        "lora_B.default.weight",
    ]
    assert layer.trainable
    assert not next(x for x in found.layers if x.name.endswith("c_fc")).trainable


@pytest.mark.parametrize("second", [False, True])
def test_dora_is_the_weight_in_use(second: bool) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 12)
            self.turned = transformers.pytorch_utils.Conv1D(12, 16)
            self.conv = nn.Conv2d(16, 12, 3)

    torch.manual_seed(0)
    options = {"r": 2, "use_dora": True, "target_modules": ["linear", "turned", "conv"]}
    model = peft.get_peft_model(Net(), peft.LoraConfig(**options)).eval()
    if second:
        model.add_adapter("other", peft.LoraConfig(**options))
        model.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p)
            if "magnitude" in name:
                p.mul_(torch.rand_like(p) + 0.5)
    layers = {layer.name.rpartition(".")[2]: layer.read() for layer in find_layers(model).layers}
    net = model.base_model.model
    with torch.no_grad():
        for name in ("linear", "turned"):
            module = getattr(net, name)
            used = (module(torch.eye(16)) - module(torch.zeros(1, 16))).T
            torch.testing.assert_close(layers[name][0], used, rtol=1e-4, atol=1e-5)
        dots = torch.zeros(16, 16, 3, 3)
        dots[range(16), range(16), 1, 1] = 1.0
        centre = (net.conv(dots) - net.conv(torch.zeros(1, 16, 3, 3)))[:, :, 0, 0].T
        torch.testing.assert_close(layers["conv"][4], centre, rtol=1e-4, atol=1e-5)


def test_parts_of_a_weight_that_cannot_be_measured_are_told_from_it() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(16, 12)), peft.LoraConfig(r=2, target_modules=["0"])
    )
    module = model.base_model.model[0]
    weight = module.base_layer.weight
    module.base_layer.weight = nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
    reasons = {s.name.partition("model.0.")[2]: s.reason for s in find_layers(model).skipped}
    assert reasons["base_layer.weight"].startswith("quantized (torch.int8)")
    told = reasons["lora_A.default.weight"]
    assert told.startswith("part of base_model.model.0.base_layer.weight, quantized")


def test_lora_on_other_layers() -> None:
    peft = pytest.importorskip("peft")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, 16)
            self.conv = nn.Conv2d(16, 12, 3)
            self.linear = nn.Linear(16, 12)

    targets = ["embedding", "conv", "linear"]
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=targets))
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=targets))
    found = check(model)
    assert [(layer.name, layer.shape) for layer in found.layers] == [
        ("base_model.model.conv", (9, 12, 16)),
        ("base_model.model.linear", (1, 12, 16)),
    ]
    reasons = {s.name: s.reason for s in found.skipped}
    assert "table of vectors" in reasons["base_model.model.embedding.base_layer.weight"]
    assert "tied" not in " ".join(reasons.values())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"factorization": "tucker", "rank": 0.4},
        {"factorization": "tucker", "rank": 0.4, "implementation": "factorized"},
        {"factorization": "cp", "rank": 0.1},
        {"factorization": "tt", "rank": 0.4},
        {"separable": True},
    ],
    ids=lambda o: "-".join(map(str, o.values())) or "dense",
)
def test_fno(options: dict[str, Any]) -> None:
    neuralop = pytest.importorskip("neuralop.models")
    model = neuralop.FNO(
        n_modes=(6, 6), in_channels=1, out_channels=1, hidden_channels=12, n_layers=2, **options
    )
    found = check(model)
    spectral = {layer.name: layer for layer in found.layers if layer.kind == "SpectralConv"}
    if "separable" in options:
        assert not spectral
        assert any("separable" in s.reason for s in found.skipped)
        return
    assert list(spectral) == ["fno_blocks.convs.0", "fno_blocks.convs.1"]
    assert all(layer.shape == (24, 12, 12) for layer in spectral.values())  # 6 x (6 // 2 + 1) modes
    weight = model.fno_blocks.convs[1].weight
    dense = weight.to_tensor() if hasattr(weight, "to_tensor") else weight
    got = spectral["fno_blocks.convs.1"].read()
    assert torch.equal(got[5], dense.detach()[:, :, 1, 1])
    if not options:
        assert sum(layer.numel for layer in spectral.values()) / found.numel > 0.8


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_unet(dim: int) -> None:
    unet = pytest.importorskip("experiments.models.unet")
    found = check(unet.UNet(dim, 2, 2, width=8, depth=2))
    assert {"ConvTranspose" in layer.kind for layer in found.layers} == {True, False}
    assert all("vector" in s.reason for s in found.skipped)
