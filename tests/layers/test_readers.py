"""Readers: each kind of weight is the matrix that its module multiplies by."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tempbalance import analyze
from tempbalance.layers import Layer, find_layers
from tempbalance.readers import Matrix, split


def by_name(model: nn.Module, **kwargs: Any) -> dict[str, Layer]:
    return {layer.name: layer for layer in find_layers(model, **kwargs).layers}


def reasons(model: nn.Module) -> dict[str, str]:
    return {skipped.name: skipped.reason for skipped in find_layers(model).skipped}


def stand_in(path: str, base: type[nn.Module] = nn.Module, **parameters: Tensor) -> nn.Module:
    """A module of a class that another library defines, with these parameters."""
    home, _, name = path.rpartition(".")
    module: nn.Module = type(name, (base,), {"__module__": home})()
    for key, value in parameters.items():
        module.register_parameter(key, nn.Parameter(value))
    return module


# --- recurrent nets, bilinear forms ---------------------------------------------------------------


def test_gates_of_a_cell_are_matrices_of_their_own() -> None:
    """The cell's own output, from the four matrices of each weight."""
    cell = nn.LSTMCell(5, 6)
    layers = by_name(cell)
    x, h, c = torch.randn(5), torch.randn(6), torch.randn(6)
    gates = layers["weight_ih"].read() @ x + layers["weight_hh"].read() @ h
    i, f, g, o = gates + (cell.bias_ih + cell.bias_hh).view(4, 6)
    new = f.sigmoid() * c + i.sigmoid() * g.tanh()
    assert torch.allclose(cell(x, (h, c))[0], o.sigmoid() * new.tanh(), atol=1e-6)


@pytest.mark.parametrize(
    ("module", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1), (nn.GRUCell, 3), (nn.RNNCell, 1)]
)
def test_one_layer_a_recurrent_weight(module: type[nn.Module], gates: int) -> None:
    rnn = module(5, 6)
    layers = by_name(nn.ModuleDict({"rnn": rnn}))
    end = "" if isinstance(rnn, nn.RNNCellBase) else "_l0"
    assert {name: layer.shape for name, layer in layers.items()} == {
        f"rnn.weight_ih{end}": (gates, 6, 5),
        f"rnn.weight_hh{end}": (gates, 6, 6),
    }
    hidden = layers[f"rnn.weight_hh{end}"]
    assert hidden.parameters == (f"rnn.weight_hh{end}", f"rnn.bias_hh{end}")
    assert torch.equal(hidden.read().flatten(0, 1), rnn.get_parameter(f"weight_hh{end}"))
    assert not hidden.copies


def test_a_deep_lstm_with_projections_both_ways() -> None:
    layers = by_name(nn.LSTM(5, 6, 2, proj_size=3, bidirectional=True))
    assert len(layers) == 12
    assert layers["weight_ih_l1_reverse"].shape == (4, 6, 6)
    assert layers["weight_hh_l0"].shape == (4, 6, 3)
    assert layers["weight_hr_l1"].shape == (1, 3, 6)
    assert layers["weight_ih_l1_reverse"].parameters[1] == "bias_ih_l1_reverse"


def test_a_recurrent_weight_behind_a_parametrization() -> None:
    lstm = nn.utils.parametrizations.weight_norm(nn.LSTM(5, 6), "weight_hh_l0")
    layers = by_name(lstm)
    assert layers["weight_hh_l0"].shape == (4, 6, 6) and layers["weight_hh_l0"].copies
    assert torch.equal(layers["weight_hh_l0"].read().flatten(0, 1), lstm.weight_hh_l0)


def test_a_bias_whose_weight_is_not_measured_keeps_the_base_rate() -> None:
    layers = by_name(nn.GRU(1, 6))  # weight_ih has one column
    assert [layer.parameters for layer in layers.values()] == [("weight_hh_l0", "bias_hh_l0")]


def test_a_bilinear_form_is_a_matrix_an_output() -> None:
    form = nn.Bilinear(4, 5, 6)
    (layer,) = find_layers(form).layers
    x, y = torch.randn(4), torch.randn(5)
    expected = torch.stack([x @ matrix @ y for matrix in layer.read()]) + form.bias
    assert torch.allclose(form(x, y), expected, atol=1e-6)
    assert layer.parameters == ("weight", "bias")


# --- mixtures of experts --------------------------------------------------------------------------

SMALL = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 5},
    "GptOss": {"num_local_experts": 5},
    "Qwen3Moe": {"num_experts": 5, "moe_intermediate_size": 32},
    "Llama4Text": {"num_local_experts": 5, "intermediate_size_mlp": 64},
    "DeepseekV3": {
        "n_routed_experts": 5,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 6,
        "qk_nope_head_dim": 6,
        "v_head_dim": 12,
        "num_key_value_heads": 2,
    },
}


def mixture(family: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **EXPERTS[family]})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config)
    assert isinstance(model, nn.Module)
    return model


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_stacks_of_outputs_by_inputs(family: str) -> None:
    found = find_layers(mixture(family))
    stacks = {x.name.rpartition(".")[2]: x for x in found.layers if ".experts." in x.name}
    if "gate_up_proj" not in stacks:
        pytest.skip("an older layout, with a module an expert")
    assert stacks["gate_up_proj"].shape == (5, 64, 24)  # gate and up of 32 each
    assert stacks["down_proj"].shape == (5, 24, 32)
    for layer in stacks.values():
        parameter = layer.tensors()[0]
        assert layer.read().data_ptr() == parameter.data_ptr() and not layer.copies
        assert not layer.guessed
    routers = [x for x in found.layers if x.shape == (1, 5, 24)]
    assert routers and not any(x.guessed for x in routers)
    measured = sum(layer.numel for layer in found.layers)
    embeddings = sum(s.numel for s in found.skipped if "embedding" in s.reason)
    assert measured / (found.numel - embeddings) > 0.95


def test_biases_of_experts_follow_the_weight_that_they_are_named_after() -> None:
    model = mixture("GptOss")
    hosts = {host.name: host for host in find_layers(model).hosts}
    parameters = dict(model.named_parameters())
    for name in ("gate_up_proj", "down_proj"):
        full = f"model.layers.0.mlp.experts.{name}"
        if full not in parameters:
            pytest.skip("an older layout")
        assert [id(p) for p in hosts[full].parameters][:2] == [
            id(parameters[full]),
            id(parameters[f"{full}_bias"]),
        ]


def test_gate_and_up_of_experts_are_cut_on_request() -> None:
    model = mixture("Qwen3Moe")
    layers = by_name(model, fused={"*.experts.gate_up_proj": 2})
    prefix = "model.layers.0.mlp.experts"
    if f"{prefix}.down_proj" not in layers:
        pytest.skip("an older layout")
    weight = model.get_parameter(f"{prefix}.gate_up_proj")
    parts = [layers[name].read() for name in layers if name.startswith(prefix)][:2]
    assert [tuple(part.shape) for part in parts] == [(5, 32, 24)] * 2
    assert torch.equal(torch.cat(parts, dim=1), weight)


def test_experts_stored_expert_below_expert() -> None:
    """DBRX's layout, by what its forward pass computes: down = (silu(x w1') * x v1') w2."""

    class ExpertGLU(nn.Module):
        moe_num_experts = 3

        def __init__(self) -> None:
            super().__init__()
            for name in ("w1", "v1", "w2"):
                self.register_parameter(name, nn.Parameter(torch.randn(3 * 8, 6)))

        def expert(self, e: int, x: Tensor) -> Tensor:
            w1, v1, w2 = (p.view(3, 8, 6)[e] for p in self.parameters())
            return (F.silu(x @ w1.t()) * (x @ v1.t())) @ w2

    module = ExpertGLU()
    w1, v1, w2 = (layer.read()[1] for layer in find_layers(module).layers)
    x = torch.randn(6)
    assert torch.allclose(w2 @ (F.silu(w1 @ x) * (v1 @ x)), module.expert(1, x), atol=1e-5)


def test_experts_and_routers_with_names_of_their_own() -> None:
    """What has the module's number of experts is a stack or a router, whatever its name."""
    module = stand_in(
        "own.Sparse", up=torch.randn(4, 8, 6), router=torch.randn(6, 4), mixing=torch.randn(6, 6)
    )
    module.num_experts = 4  # type: ignore[assignment]
    layers = by_name(module)
    assert {name: layer.shape for name, layer in layers.items()} == {
        "up": (4, 8, 6),
        "router": (1, 6, 4),
    }
    assert not any(layer.guessed for layer in layers.values())
    assert "register" in reasons(module)["mixing"]


@pytest.mark.parametrize("targets", [["gate_up_proj"], ["gate_up_proj", "down_proj"]])
def test_lora_on_expert_stacks_is_the_weight_in_use(targets: list[str]) -> None:
    peft = pytest.importorskip("peft")
    model = mixture("Qwen3Moe")
    prefix = "model.layers.1.mlp.experts"
    if f"{prefix}.down_proj" not in dict(model.named_parameters()):
        pytest.skip("an older layout")
    paths = [f"mlp.experts.{name}" for name in targets]
    config = peft.LoraConfig(
        r=3, target_modules=[], target_parameters=paths, init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, config)
    found = find_layers(adapted)
    stacks = [x for x in found.layers if x.shape[0] == 5 and "layers.1" in x.name]
    assert sorted(x.shape for x in stacks) == [(5, 24, 32), (5, 64, 24)]
    got = {x.shape: x.read().clone() for x in stacks}
    for layer in stacks:
        assert layer.trainable == (layer.shape == (5, 64, 24) or len(targets) == 2)
    merged = adapted.merge_and_unload()
    for name in ("gate_up_proj", "down_proj"):
        weight = merged.get_parameter(f"{prefix}.{name}")
        assert torch.allclose(got[tuple(weight.shape)], weight, atol=1e-5)


# --- query, key and value in one ------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, head_first: bool = False) -> None:
        super().__init__()
        self.head_first, self.num_heads = head_first, 2
        self.qkv = nn.Linear(8, 24)


def test_a_qkv_is_three_without_being_told_and_one_on_request() -> None:
    model = nn.ModuleDict({"attn": Attention()})
    layers = by_name(model)
    assert list(layers) == ["attn.qkv.q", "attn.qkv.k", "attn.qkv.v"]
    assert layers["attn.qkv.q"].parameters == ("attn.qkv.weight", "attn.qkv.bias")
    assert [host.name for host in find_layers(model).hosts] == ["attn.qkv"]
    for fused in (False, {"*.qkv": 1}):
        (layer,) = find_layers(model, fused).layers  # type: ignore[arg-type]
        assert (layer.name, layer.shape) == ("attn.qkv", (1, 24, 8))
    for other in (nn.Linear(8, 20), nn.Conv2d(8, 24, 1), nn.Linear(8, 24, device="meta")):
        assert len(by_name(nn.ModuleDict({"qkv": other}))) <= 1
    assert list(by_name(nn.ModuleDict({"proj": nn.Linear(8, 24)}))) == ["proj"]


def test_heads_that_keep_their_q_k_and_v_together() -> None:
    """As timm's attention with ``head_first`` computes them: (heads, 3, width) outputs."""
    model = nn.ModuleDict({"attn": Attention(head_first=True)})
    x = torch.randn(8)
    outputs = F.linear(x, model["attn"].qkv.weight).view(2, 12).chunk(3, dim=1)
    for layer, expected in zip(find_layers(model).layers, outputs, strict=True):
        assert torch.allclose(layer.read()[0] @ x, expected.flatten(), atol=1e-6)


def test_one_part_is_the_weight_itself() -> None:
    matrix = Matrix("weight")
    assert list(split(matrix, 1)) == [matrix]


# --- other libraries ------------------------------------------------------------------------------


def test_graph_convolutions_by_name() -> None:
    linear = stand_in("torch_geometric.nn.dense.linear.Linear", weight=torch.randn(5, 4))
    (layer,) = find_layers(linear).layers
    assert layer.shape == (1, 5, 4) and not layer.guessed
    base = type("MessagePassing", (nn.Module,), {})
    base.__module__ = "torch_geometric.nn.conv.message_passing"
    conv = stand_in(
        "torch_geometric.nn.RGCNConv",
        base,
        weight=torch.randn(3, 4, 5),  # relations, in, out
        root=torch.randn(4, 5),
        comp=torch.randn(7, 3),
        att_src=torch.randn(1, 2, 5),
        bias=torch.randn(5),
    )
    layers = by_name(conv)
    assert {name: layer.shape for name, layer in layers.items()} == {
        "weight": (3, 5, 4),
        "root": (1, 5, 4),
    }
    assert torch.equal(layers["weight"].read(), conv.get_parameter("weight").mT)
    assert "attention" in reasons(conv)["att_src"]


def test_torch_geometric_itself() -> None:
    graph = pytest.importorskip("torch_geometric.nn")
    layers = by_name(graph.GATConv(16, 8, heads=2))
    assert layers["lin"].shape == (1, 16, 16)
    assert by_name(graph.RGCNConv(16, 8, 4, num_blocks=2))["weight"].shape == (8, 4, 8)


@pytest.mark.parametrize("factorization", ["Dense", "Tucker", "CP", "TT"])
def test_spherical_convolutions(factorization: str) -> None:
    """SFNO's convolution keeps complex weights as pairs of real numbers."""
    tltorch = pytest.importorskip("tltorch")
    torch.manual_seed(0)
    conv = stand_in("neuralop.layers.spherical_convolution.SphericalConv")
    weight = tltorch.FactorizedTensor.new(
        (6, 5, 4), rank=0.8, factorization=f"Complex{factorization}"
    )
    conv.weight = weight.normal_(0, 1)
    (layer,) = find_layers(conv).layers
    assert layer.shape == (4, 6, 5)  # degrees x (in, out)
    got, dense = layer.read(), weight.to_tensor().detach()
    assert got.is_complex() and torch.allclose(got[2], dense[:, :, 2], atol=1e-6)
    assert layer.copies == (factorization != "Dense")


def test_spectral_weights_in_pairs_of_real_numbers() -> None:
    conv = stand_in("own.SpectralConv2d", weights1=torch.randn(4, 5, 3, 2, 2))
    (layer,) = find_layers(conv).layers
    assert layer.shape == (6, 4, 5) and layer.guessed
    pair = conv.get_parameter("weights1").detach()[:, :, 1, 0]
    assert torch.equal(layer.read()[2], torch.view_as_complex(pair.contiguous()))


# --- by name and shape ----------------------------------------------------------------------------


class Own(nn.Module):
    """A block as people write them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(20, 30))
        self.bias = nn.Parameter(torch.randn(20))
        self.cls_token = nn.Parameter(torch.randn(1, 1, 30))
        self.pos_embed = nn.Parameter(torch.randn(1, 9, 30))
        self.layer_scale = nn.Parameter(torch.randn(20))
        self.temperature = nn.Parameter(torch.randn(4, 1, 1))
        self.register_tokens = nn.Parameter(torch.randn(1, 4, 30))
        self.A_log = nn.Parameter(torch.randn(20, 4))


def test_a_weight_of_an_unknown_module_is_measured_and_said_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="tempbalance"):
        report = analyze(nn.ModuleDict({"own": Own(), "known": nn.Linear(20, 30)}))
    assert [record.name for record in report.measured] == ["own", "known"]
    assert report["own"].note is not None and "guessed" in report["own"].note
    assert report["known"].note is None
    assert "guessed" in str(report) and report.to_dict()["layers"][0]["note"]
    told = [r for r in caplog.records if "by name and shape" in r.getMessage()]
    assert len(told) == 1 and told[0].levelno == logging.INFO


def test_tokens_scales_and_temperatures_are_named_for_what_they_are() -> None:
    found = reasons(Own())
    for name, word in {
        "cls_token": "token",
        "pos_embed": "position",
        "layer_scale": "scale",
        "temperature": "temperature",
        "register_tokens": "token",
        "A_log": "recurrence",
        "bias": "bias",
    }.items():
        assert word in found[name] and "a reader" not in found[name]


def test_tokens_and_positions_do_not_follow_a_weight() -> None:
    (layer,) = find_layers(Own()).layers
    assert "bias" in layer.parameters and "layer_scale" in layer.parameters
    assert not {"cls_token", "pos_embed", "register_tokens"} & set(layer.parameters)


def test_unknown_stacks_kernels_and_tables() -> None:
    stack = stand_in("own.Ensemble", weight=torch.randn(3, 4, 5))
    assert by_name(stack)["weight"].shape == (3, 4, 5)
    conv = stand_in("own.Conv", weight=torch.randn(6, 2, 3, 3))
    conv.kernel_size, conv.groups = (3, 3), 2  # type: ignore[assignment]
    assert by_name(conv)["weight"].shape == (18, 3, 2)
    for kind, name, shape in [
        ("own.Thing", "weight", (2, 3, 4, 5)),  # which of them are slices?
        ("own.Thing", "kernel", (5, 6, 3)),  # positions last, or first?
        ("own.Thing", "mixing", (5, 6)),
    ]:
        module = stand_in(kind, **{name: torch.randn(shape)})
        assert "register" in reasons(module)[name] and not by_name(module)
    assert not by_name(stand_in("own.TokenEmbedding", weight=torch.randn(9, 8)))
    assert not by_name(nn.LayerNorm((4, 5)))
