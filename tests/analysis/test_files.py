"""Networks known by their file alone: every format reads as the model does, and runs nothing."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tempbalance as tb
from tempbalance.analysis.files import open_checkpoint
from tempbalance.analysis.formats import CheckpointError
from tempbalance.analysis.guess import guess_layers


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.Conv2d(24, 32, 3), nn.Linear(32, 40)
    )


def numbers(report: tb.Report) -> dict[str, tuple[Any, ...]]:
    return {r.name: (r.kind, r.shape, r.alpha, r.spectral_norm, r.numel) for r in report}


Save = Callable[[dict[str, Tensor], Path], Path]


def _safetensors(state: dict[str, Tensor], folder: Path) -> Path:
    files = pytest.importorskip("safetensors.torch")
    files.save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


def _shards(state: dict[str, Tensor], folder: Path) -> Path:
    files = pytest.importorskip("safetensors.torch")
    names = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    index = {key: names[i % 2] for i, key in enumerate(state)}
    for name in names:
        files.save_file({k: v for k, v in state.items() if index[k] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def _pattern(state: dict[str, Tensor], folder: Path) -> Path:
    _shards(state, folder)
    return folder / "model-*.safetensors"


def _torch(content: Callable[[dict[str, Tensor]], Any], **options: Any) -> Save:
    def save(state: dict[str, Tensor], folder: Path) -> Path:
        torch.save(content(state), folder / "model.pt", **options)
        return folder / "model.pt"

    return save


FORMATS: dict[str, Save] = {
    "state dict": _torch(lambda s: s),
    "old format": _torch(lambda s: s, _use_new_zipfile_serialization=False),
    "lightning": _torch(lambda s: {"state_dict": s, "pytorch-lightning_version": "2.6"}),
    "timm": _torch(
        lambda s: {"arch": "net", "state_dict": s, "args": argparse.Namespace(lr=0.1, opt="sgd")}
    ),
    "ddp": _torch(lambda s: {"model": {f"module.{k}": v for k, v in s.items()}}),
    "compiled": _torch(lambda s: {f"_orig_mod.{k}": v for k, v in s.items()}),
    "optimizer beside": _torch(lambda s: {"model": s, "optimizer": {"state": {0: {"m": s}}}}),
    "safetensors": _safetensors,
    "shards": _shards,
    "pattern": _pattern,
}


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_reads_as_its_model(form: str, tmp_path: Path) -> None:
    net = model()
    path = FORMATS[form](dict(net.state_dict()), tmp_path)
    report, whole = tb.analyze(path), tb.analyze(net)
    assert numbers(report) == numbers(whole)
    assert report.numel == whole.numel and report.coverage == whole.coverage
    assert {s.name for s in report.skipped} == {s.name for s in whole.skipped}


def test_a_state_dict_reads_as_its_model() -> None:
    net = model()
    assert numbers(tb.analyze(net.state_dict())) == numbers(tb.analyze(net))
    checkpoint = {"epoch": 3, "state_dict": net.state_dict()}
    assert numbers(tb.analyze(checkpoint)) == numbers(tb.analyze(net))  # type: ignore[arg-type]


def test_gguf(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    weights = {
        "token_embd.weight": torch.randn(300, 64),
        "blk.0.attn_q.weight": torch.randn(96, 64),
        "blk.10.ffn_down.weight": torch.randn(64, 128),
        "blk.2.ffn_down.weight": torch.randn(64, 128),
        "blk.0.ffn_gate_exps.weight": torch.randn(3, 128, 64),
        "output_norm.weight": torch.randn(64),
    }
    writer = gguf.GGUFWriter(tmp_path / "net.gguf", "llama")
    for name, weight in weights.items():
        quantized = name.endswith("down.weight")
        kind = gguf.GGMLQuantizationType.Q8_0 if quantized else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = tb.analyze(tmp_path / "net.gguf")
    layers = {r.name: r for r in report}
    assert list(layers) == [
        *("blk.0.attn_q", "blk.0.ffn_gate_exps", "blk.2.ffn_down", "blk.10.ffn_down")
    ]
    assert layers["blk.0.ffn_gate_exps"].shape == (3, 128, 64)
    exact = torch.linalg.matrix_norm(weights["blk.0.attn_q.weight"], 2)
    assert layers["blk.0.attn_q"].spectral_norm == pytest.approx(float(exact), rel=1e-5)
    near = torch.linalg.matrix_norm(weights["blk.2.ffn_down.weight"], 2)
    assert layers["blk.2.ffn_down"].spectral_norm == pytest.approx(float(near), rel=1e-2)
    assert "Q8_0" in " ".join(report.notes)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def test_no_code_in_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for content in (Evil(), argparse.Namespace(x=Evil())):
        torch.save({"state_dict": model().state_dict(), "args": content}, "evil.pt")
        with pytest.raises(CheckpointError, match="could run code"):
            tb.analyze("evil.pt")
    assert not Path("ran").exists()
    # Let through while a file is read, and no longer.
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_what_is_measured_and_what_else_there_is_is_said(tmp_path: Path) -> None:
    state = dict(model().state_dict())
    torch.save({"state_dict": state, "state_dict_ema": state}, tmp_path / "a.pt")
    assert "there are more under state_dict_ema" in tb.analyze(tmp_path / "a.pt").notes[0]


@pytest.mark.parametrize(
    ("files", "given", "message"),
    [
        ({}, "none.pt", "no such file"),
        ({}, "none-*.pt", "no file matches"),
        ({}, ".", "is a folder: name the file"),
        ({"a.safetensors": 1, "b.safetensors": 1}, ".", "name one of a.safetensors, b.safeten"),
        ({"a.pt": 1, "b.pt": 1}, "*.pt", "is in .*a.pt and in .*b.pt: these are several models"),
    ],
)
def test_errors_have_a_cure(
    files: dict[str, int], given: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in files:
        torch.save({"w.weight": torch.ones(3, 3)}, name)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(given)


def test_tensors_are_read_one_at_a_time(tmp_path: Path) -> None:
    """Memory grows by a few layers, not by the file; in a process of its own, for its peak."""
    pytest.importorskip("safetensors")
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process is read from /proc")
    state = {f"layers.{i}.weight": torch.randn(64, 32768) for i in range(24)}  # 8 MiB each
    path = _shards(state, tmp_path)
    torch.save(state, tmp_path / "model.pt")
    del state
    code = """
import re, sys, torch, tempbalance as tb
tb.analyze({"fc.weight": torch.randn(64, 64)})
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024
before = peak()
tb.analyze(sys.argv[1], windows=tb.WholeMatrix(), budget=2**25)
print(peak() - before)
"""
    for file in (path, tmp_path / "model.pt"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True
        )
        assert float(done.stdout) < 125, "of 192 MiB in the file"


# --- names and shapes ----------------------------------------------------------------------------


def kinds(state: dict[str, tuple[int, ...]], **options: Any) -> dict[str, tuple[str, Any]]:
    tensors = {name: torch.randn(shape) for name, shape in state.items()}
    found = guess_layers(tb.analysis.formats.in_memory(tensors), **options)
    return {x.name: (x.kind, x.shape) for x in found.layers.layers}


def reasons(state: dict[str, tuple[int, ...]]) -> dict[str, str]:
    tensors = {name: torch.randn(shape) for name, shape in state.items()}
    found = guess_layers(tb.analysis.formats.in_memory(tensors))
    return {s.name: s.reason for s in found.layers.skipped}


def test_types_are_told_from_names_and_shapes() -> None:
    assert kinds(
        {
            "stem.weight": (32, 3, 3, 3),
            "up.weight": (32, 16, 2, 2),
            "up.bias": (16,),
            "signal.weight": (24, 12, 5),
            "volume.weight": (12, 8, 3, 3, 3),
            "fc.weight": (10, 16),
            "moe.experts.gate_up_proj": (4, 24, 16),
            "attn.in_proj_weight": (48, 16),
            "attn.in_proj_bias": (48,),
            "attn.out_proj.weight": (16, 16),
            "h.c_fc.weight": (16, 64),
            "h.c_fc.bias": (64,),
            "custom.kernel": (20, 30),
        }
    ) == {
        "stem": ("Conv2d", (9, 32, 3)),
        "up": ("ConvTranspose2d", (4, 32, 16)),
        "signal": ("Conv1d", (5, 24, 12)),
        "volume": ("Conv3d", (27, 12, 8)),
        "fc": ("Linear", (1, 10, 16)),
        "moe.experts": ("Experts", (4, 24, 16)),
        "attn.q": ("MultiheadAttention", (1, 16, 16)),
        "attn.k": ("MultiheadAttention", (1, 16, 16)),
        "attn.v": ("MultiheadAttention", (1, 16, 16)),
        "attn.out_proj": ("Linear", (1, 16, 16)),
        "h.c_fc": ("Conv1D", (1, 64, 16)),
        "custom": ("Matrices", (1, 20, 30)),
    }


def test_stacks_of_experts_are_told_from_convolutions() -> None:
    """Where no name says so: by sides, by the weight that leads back, by biases."""
    assert kinds(
        {
            "0.up.weight": (8, 64, 32),  # both sides longer than there are matrices
            "0.down.weight": (8, 32, 64),
            "1.up.weight": (40, 24, 16),  # more matrices than that, but the next leads back
            "1.down.weight": (40, 16, 24),
            "2.w.weight": (30, 20, 12),
            "2.w.bias": (30, 20),  # no matrix of its own
            "audio.positions.weight": (96, 24, 128),
            "audio.sinc.weight": (16, 40, 251),
            "audio.biased.weight": (16, 40, 32),
            "audio.biased.bias": (16,),
            "audio.last.weight": (1, 64, 32),
        }
    ) == {
        "0.up": ("Experts", (8, 64, 32)),
        "0.down": ("Experts", (8, 32, 64)),
        "1.up": ("Experts", (40, 24, 16)),
        "1.down": ("Experts", (40, 16, 24)),
        "2.w": ("Experts", (30, 20, 12)),
        "audio.positions": ("Conv1d", (128, 96, 24)),
        "audio.sinc": ("Conv1d", (251, 16, 40)),
        "audio.biased": ("Conv1d", (32, 16, 40)),
    }
    stored = tb.analysis.formats.in_memory({"0.up.weight": torch.randn(8, 64, 32)})
    assert "taken for stacks of experts: 0.up.weight" in guess_layers(stored).notes[0]


@pytest.mark.parametrize(
    ("name", "shape", "parts"),
    [
        ("blocks.0.attn.qkv.weight", (48, 16), [16, 16, 16]),
        ("blocks.0.self_attn.qkv_proj.weight", (32, 16), [16, 8, 8]),  # few key heads
        ("h.0.attn.c_attn.weight", (48, 16), [16, 16, 16]),
    ],
)
def test_fused_projections_are_cut(name: str, shape: tuple[int, int], parts: list[int]) -> None:
    module = name.removesuffix(".weight")
    found = kinds({name: shape})
    assert {k: v[1][1] for k, v in found.items()} == {
        f"{module}.{part}": size for part, size in zip("qkv", parts, strict=True)
    }
    assert list(kinds({name: shape}, fused={module: 2})) == [f"{module}.0", f"{module}.1"]


def test_a_fused_projection_stored_as_gpt2_does_is_cut_along_its_outputs() -> None:
    weight = torch.randn(16, 48)
    state = {"h.attn.c_attn.weight": weight, "h.attn.c_attn.bias": torch.zeros(48)}
    report = tb.analyze(state)
    norm = torch.linalg.matrix_norm(weight[:, 16:32], 2)
    assert report["h.attn.c_attn.k"].spectral_norm == pytest.approx(float(norm), rel=1e-5)
    assert "cut into query, key and value: h.attn.c_attn" in report.notes[0]


def test_what_is_no_weight_matrix_is_listed_with_the_reason() -> None:
    told = reasons(
        {
            "model.embed_tokens.weight": (100, 16),
            "encoder.pos_embed": (1, 50, 16),
            "norm.weight": (16,),
            "dw.weight": (32, 1, 3, 3),
            "q.lora_A.default.weight": (4, 16),
            "bn.weight": (16,),
            "bn.running_mean": (16,),
        }
    )
    assert "embedding" in told["model.embed_tokens.weight"]
    assert "table of vectors" in told["encoder.pos_embed"]
    assert "normalization" in told["norm.weight"] and "normalization" in told["bn.weight"]
    assert "depthwise" in told["dw.weight"]
    assert "low-rank factor" in told["q.lora_A.default.weight"]
    assert "bn.running_mean" not in told  # a buffer is no parameter


def test_integers_do_not_matter_unless_they_are_a_weight() -> None:
    state = {
        "a.weight": torch.randn(20, 20),
        "a.position_ids": torch.arange(40).view(1, 40),
        "bn.num_batches_tracked": torch.tensor(3),
        "b.weight": torch.ones(20, 20, dtype=torch.int8),
    }
    report = tb.analyze(state)
    assert [r.name for r in report] == ["a"] and report.numel == 800
    assert "quantized" in report.skipped[0].reason


def test_grouped_convolutions_are_told_by_the_one_before() -> None:
    resnext = {"c1.weight": (64, 32, 1, 1), "c2.weight": (64, 4, 3, 3), "c3.weight": (96, 64, 1, 1)}
    assert kinds(resnext)["c2"] == ("Conv2d", (16 * 9, 4, 4))
    resnet = {"c1.weight": (64, 256, 1, 1), "c2.weight": (64, 64, 3, 3)}
    assert kinds(resnet | {"down.0.weight": (256, 64, 1, 1)})["down.0"][1] == (1, 256, 64)


def test_weights_in_parts_are_put_together() -> None:
    for wrap in (nn.utils.parametrizations.weight_norm, nn.utils.weight_norm):
        layer = nn.Linear(20, 30)
        weight = layer.weight.detach().clone()
        state = wrap(nn.Sequential(layer)[0]).state_dict()
        state = {k: v * 3 if k.endswith(("original0", "weight_g")) else v for k, v in state.items()}
        (record,) = tb.analyze({f"fc.{k}": v for k, v in state.items()})
        assert (record.name, record.kind) == ("fc", "Linear")
        norm = 3 * float(torch.linalg.matrix_norm(weight, 2))
        assert record.spectral_norm == pytest.approx(norm, rel=1e-5)


def test_complex_weights_stored_as_real_ones() -> None:
    weight = torch.randn(12, 16, 5, 4, dtype=torch.complex64)
    report = tb.analyze({"layers.spectral.weights1": torch.view_as_real(weight)})
    twin = tb.analyze({"layers.spectral.weights1": weight})
    assert report.layers[0].shape == (20, 12, 16)
    assert report.layers[0].alpha == pytest.approx(twin.layers[0].alpha)
    assert report.complex_layers == {"layers.spectral"}


def test_tied_weights_are_counted_once() -> None:
    table = torch.randn(100, 16)
    report = tb.analyze(
        {"embed.weight": table, "h.weight": torch.randn(16, 16), "head.weight": table}
    )
    assert [r.name for r in report] == ["h"]
    assert report.numel == 1600 + 256
    assert "tied to 'embed.weight'" in {s.name: s.reason for s in report.skipped}["head.weight"]


def test_what_is_no_network_is_refused() -> None:
    with pytest.raises(CheckpointError, match="holds no state dict; it has the keys lr"):
        tb.analyze({"lr": 0.1})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="a state dict or the path of a file, got ndarray"):
        tb.analyze(np.ones((3, 3)))  # type: ignore[call-overload]


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.gguf", "a.ckpt"])
def test_an_empty_file_is_called_empty(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=rf"{name} is empty: 0 bytes"):
        tb.analyze(tmp_path / name)


def test_a_bare_pickle_is_refused_by_one_message(tmp_path: Path) -> None:
    """Not by a warning of torch about the pickle's protocol before it."""
    with (tmp_path / "a.pkl").open("wb") as file:
        pickle.dump({"w": [1.0]}, file, protocol=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError, match=r"a\.pkl"):
            tb.analyze(tmp_path / "a.pkl")
