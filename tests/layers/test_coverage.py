"""Coverage: of every family of models nearly all parameters but the embeddings are measured."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tempbalance.layers import find_layers

TEXT = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# hidden size, layers and heads, under the names that the configurations have for them
SIZES = [
    {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    {"d_model": 64, "num_layers": 2, "num_heads": 4},
    {"n_embd": 64, "n_layer": 2, "n_head": 4},
    {"intermediate_size": 96, "d_ff": 96, "ffn_dim": 96, "d_kv": 16, "num_key_value_heads": 2},
    {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96},
    {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 16},
    {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_intermediate_size": 48},
    {"n_group": 1, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "head_dim": 16},
    {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "num_experts_per_tok": 2},
    {"intermediate_size_mlp": 96, "shared_expert_intermediate_size": 48, "state_size": 4},
    {"max_position_embeddings": 64, "first_k_dense_replace": 1, "mamba_d_state": 4},
]
IMAGE = {"image_size": 32, "patch_size": 8}
WINDOWS = {"image_size": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}

TRANSFORMERS: dict[str, dict[str, Any]] = {
    # mixtures of experts
    "Mixtral": {},
    "GptOss": {},
    "Qwen3Moe": {},
    "Llama4Text": {},
    "DeepseekV3": {"num_key_value_heads": 4},
    "Olmoe": {},
    "GraniteMoe": {},
    "JetMoe": {},
    "Jamba": {},
    # attention, states and gates
    "Llama": {},
    "T5": {},
    "Phi3": {},
    "GPTNeoX": {},
    "Falcon": {},
    "GPT2": {},
    "Bert": {},
    "XLNet": {"d_inner": 96},
    "Mamba": {},
    "Mamba2": {"num_heads": 8, "head_dim": 16},
    "Rwkv": {},
    "RecurrentGemma": {"lru_width": 64},
    # sight and sound
    "Whisper": {},
    "ViT": IMAGE,
    "Dinov2": IMAGE,
    "Swin": {**WINDOWS, "embed_dim": 32},
    "Swinv2": {**WINDOWS, "embed_dim": 32},
    "Wav2Vec2Conformer": {"conv_dim": [32] * 7, "num_conv_pos_embeddings": 8},
    "Perceiver": {"d_latents": 64, "num_latents": 8, "num_self_attends_per_block": 2},
}


def transformer(family: str, given: dict[str, Any]) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config_type = getattr(transformers, f"{family}Config", None)
    model_type = next(
        (
            found
            for end in ("Model", "ForConditionalGeneration", "TextModel", "ForCausalLM")
            if (found := getattr(transformers, family.removesuffix("Text") + end, None))
            and found.config_class is config_type
        ),
        getattr(transformers, f"{family}Model", None),
    )
    if config_type is None or model_type is None:
        pytest.skip(f"this version of transformers has no {family}")
    known = set(config_type().to_dict())
    sizes = {key: value for some in SIZES for key, value in some.items() if key in known}
    if "vocab_size" in known:
        sizes |= TEXT
    model = model_type(config_type(**{**sizes, **given}))
    assert isinstance(model, nn.Module)
    return model


def neural_operator(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        models = pytest.importorskip("neuralop.models")
        if name == "SFNO":
            pytest.importorskip("torch_harmonics")
        sizes = {"n_modes": (8, 8), "in_channels": 2, "out_channels": 2, "hidden_channels": 16}
        model = getattr(models, name)(**sizes, n_layers=2, **options)
        assert isinstance(model, nn.Module)
        return model

    return build


def image_model(library: str, name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        pytest.importorskip(library)
        if library == "timm":
            model = importlib.import_module("timm").create_model(name, pretrained=False)
        else:
            model = importlib.import_module("torchvision.models").get_model(name, weights=None)
        assert isinstance(model, nn.Module)
        return model

    return build


OTHERS = {
    "FNO": neural_operator("FNO"),
    "TFNO": neural_operator("TFNO", factorization="tucker", rank=0.5),
    "SFNO": neural_operator("SFNO"),
    **{
        f"torchvision {name}": image_model("torchvision", name)
        for name in ("resnet18", "mobilenet_v3_small", "swin_t", "shufflenet_v2_x0_5")
    },
    **{
        f"timm {name}": image_model("timm", name)
        for name in (
            *(
                "vit_tiny_patch16_224",
                "convnext_atto",
                "mobilenetv3_small_050",
                "xcit_nano_12_p8_224",
            ),
            *("maxvit_rmlp_pico_rw_256", "tiny_vit_5m_224", "efficientvit_b0", "sequencer2d_s"),
        )
    },
    "Transformer": lambda: nn.Transformer(64, 4, 1, 1, 96, batch_first=True),
    "LSTM": lambda: nn.LSTM(64, 64, 2, bidirectional=True),
    "GRU": lambda: nn.GRU(64, 64),
    "Bilinear": lambda: nn.Bilinear(16, 16, 16),
}


def share(model: nn.Module) -> tuple[float, dict[str, int]]:
    """Share of the parameters, embeddings apart, that are measured; the numbers that are not."""
    found = find_layers(model)
    rest: dict[str, int] = {}
    for skipped in found.skipped:
        rest[skipped.reason] = rest.get(skipped.reason, 0) + skipped.numel
    embeddings = sum(numel for reason, numel in rest.items() if "embedding" in reason)
    measured = sum(layer.numel for layer in found.layers)
    return measured / (found.numel - embeddings), rest


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_families_of_transformers(family: str) -> None:
    torch.manual_seed(0)
    covered, rest = share(transformer(family, TRANSFORMERS[family]))
    assert covered > 0.9, rest
    assert not [reason for reason in rest if "register" in reason]


@pytest.mark.parametrize("name", OTHERS)
def test_other_families(name: str) -> None:
    covered, rest = share(OTHERS[name]())
    assert covered > 0.9, rest
    assert not [reason for reason in rest if "register" in reason]
