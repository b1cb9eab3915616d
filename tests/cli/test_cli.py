"""The command line: every kind of checkpoint, every error in one line, exit codes, JSON, tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tempbalance as tb
from tempbalance.cli.checkpoints import CheckpointError, build_model, load_into, read_state
from tempbalance.cli.command import main

FACTORY = """
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(16, 16, bias=False)
        self.b = nn.Linear(16, 16, bias=False)
        self.b.weight = self.a.weight

def net(width=24, name="x"):
    assert name != "bad", "a bad name"
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Linear(width, 32))

def compiled():
    return torch.compile(net())

def number():
    return 3

instance = net()
"""
MODEL = ["--model", "cli_factory:net"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a model factory in it, which is found although it is not installed."""
    (tmp_path / "cli_factory.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    monkeypatch.delitem(sys.modules, "cli_factory", raising=False)


def make(seed: int = 0) -> nn.Module:
    build_model("cli_factory:net", {})  # importing it draws random numbers too
    torch.manual_seed(seed)
    return build_model("cli_factory:net", {})


@pytest.fixture
def saved() -> tuple[str, tb.Report]:
    model = make()
    torch.save(model.state_dict(), "net.pt")
    return "net.pt", tb.analyze(model)


def alphas(capsys: pytest.CaptureFixture[str]) -> dict[str, float | None]:
    content = json.loads(capsys.readouterr().out)
    return {layer["name"]: layer["alpha"] for layer in content["layers"]}


def expected(report: tb.Report) -> dict[str, float | None]:
    return {layer.name: layer.alpha for layer in report.layers}


def test_analyze_prints_the_report(
    saved: tuple[str, tb.Report], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", saved[0], *MODEL]) == 0
    out, err = capsys.readouterr()
    assert out == f"{saved[1]}\n"
    assert err == ""


WRAPPED: dict[str, Any] = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s, "optimizer": {"state": {0: torch.ones(2)}}},
    "model_state_dict": lambda s: {"model_state_dict": s},
    "ddp": lambda s: {f"module.{k}": v for k, v in s.items()},
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "lightning": lambda s: {
        "state_dict": {f"model.{k}": v for k, v in s.items()} | {"loss.weight": torch.ones(3)},
        "hyper_parameters": {"width": 24},
        "pytorch-lightning_version": "2.6.6",
    },
    "lightning compiled": lambda s: {"state_dict": {f"net._orig_mod.{k}": v for k, v in s.items()}},
    "nested": lambda s: {"model": {"state_dict": s}},
    "metadata": lambda s: {**s, "_metadata": {"width": 24}},
    "averaged too": lambda s: {
        "state_dict": {f"ema.{k}": 0 * v for k, v in s.items()}
        | {f"model.{k}": v for k, v in s.items()}
    },
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_checkpoints(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = make()
    torch.save(WRAPPED[kind](dict(model.state_dict())), "net.pt")
    assert main(["analyze", "net.pt", *MODEL, "--json"]) == 0
    assert alphas(capsys) == expected(tb.analyze(model))


def test_safetensors(capsys: pytest.CaptureFixture[str]) -> None:
    torch_files = pytest.importorskip("safetensors.torch")
    model = make()
    torch_files.save_file(dict(model.state_dict()), "net.safetensors")
    assert main(["analyze", "net.safetensors", *MODEL, "--json"]) == 0
    assert alphas(capsys) == expected(tb.analyze(model))
    Path("net.safetensors").write_bytes(b"nothing of the kind")
    assert main(["analyze", "net.safetensors", *MODEL]) == 2
    assert "no readable safetensors file" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["saved", "saved/model.safetensors.index.json"])
def test_shards_of_hugging_face(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch_files = pytest.importorskip("safetensors.torch")
    model = make()
    state = dict(model.state_dict())
    half = len(state) // 2
    files = {k: f"model-0000{1 + (i >= half)}-of-00002.safetensors" for i, k in enumerate(state)}
    Path("saved").mkdir()
    for name in set(files.values()):
        part = {k: v for k, v in state.items() if files[k] == name}
        torch_files.save_file(part, f"saved/{name}")
    index = Path("saved/model.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert main(["analyze", given, *MODEL, "--json"]) == 0
    assert alphas(capsys) == expected(tb.analyze(model))

    index.write_text(json.dumps({"weight_map": {**files, "more": files[next(iter(files))]}}))
    assert main(["analyze", given, *MODEL]) == 2
    assert "names weights that its files lack: more" in capsys.readouterr().err
    index.write_text(json.dumps({"architectures": ["Net"]}))
    assert main(["analyze", given, *MODEL]) == 2
    assert "JSON without the weight_map of an index" in capsys.readouterr().err
    index.unlink()
    torch_files.save_file(state, "saved/model.safetensors")
    assert main(["analyze", "saved", *MODEL, "--json"]) == 0
    assert alphas(capsys) == expected(tb.analyze(model))


def test_old_format_and_compiled_factory(capsys: pytest.CaptureFixture[str]) -> None:
    model = make()
    torch.save(model.state_dict(), "old.pt", _use_new_zipfile_serialization=False)
    assert main(["analyze", "old.pt", "--model", "cli_factory:compiled", "--json"]) == 0
    assert alphas(capsys) == expected(tb.analyze(model))


def test_a_weight_that_is_shared_may_be_saved_once() -> None:
    model = build_model("cli_factory:Tied", {})
    weight = torch.randn(16, 16)
    load_into(model, {"a.weight": weight}, "file")
    assert torch.equal(model.get_parameter("b.weight"), weight)


def test_key_names_other_weights(capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make(0), make(1)
    torch.save({"model": a.state_dict(), "ema": b.state_dict()}, "net.pt")
    assert main(["analyze", "net.pt", *MODEL, "--json", "--key", "ema"]) == 0
    assert alphas(capsys) == expected(tb.analyze(b))


def test_what_is_left_out_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(WRAPPED["lightning"](dict(make().state_dict())), "net.ckpt")
    main(["analyze", "net.ckpt", *MODEL])
    err = capsys.readouterr().err
    assert "'model.'" in err
    assert "loss.weight" in err


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def test_pickles_are_never_run(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": make().state_dict(), "x": Evil()}, "evil.pt")
    assert main(["analyze", "evil.pt", *MODEL]) == 2
    assert not Path("ran").exists()
    err = capsys.readouterr().err
    assert "could run code" in err
    assert "torch.save the state dict alone" in err
    assert err.count("\n") == 1


def _break(kind: str) -> list[str]:
    state: dict[str, Tensor] = dict(make().state_dict())
    argv = [*MODEL]
    if kind == "missing keys":
        state = {k: v for k, v in state.items() if not k.startswith("2.")}
    elif kind == "unexpected keys":
        state |= {"3.weight": torch.ones(2, 2)}
    elif kind == "other shape":
        argv += ["--model-arg", "width=8"]
    elif kind == "factory raises":
        argv += ["--model-arg", "name=bad"]
    elif kind == "factory argument":
        argv += ["--model-arg", "wide=3"]
    elif kind == "not a model":
        argv = ["--model", "cli_factory:number"]
    elif kind == "no such factory":
        argv = ["--model", "cli_factory:nothing"]
    elif kind == "no such module":
        argv = ["--model", "no_such_module_here:net"]
    elif kind == "no colon":
        argv = ["--model", "cli_factory.net"]
    elif kind == "rows of whole":
        argv += ["--whole", "--rows", "3"]
    elif kind == "no such windows":
        argv += ["--windows", "*=half"]
    elif kind == "windows twice":
        argv += ["--windows", "Conv2d=whole", "--windows", "farms"]
    elif kind == "windows of some":
        argv += ["--windows", "Conv2d=whole"]
    elif kind == "xmin-pos of ks":
        argv += ["--fit", "ks", "--xmin-pos", "3"]
    elif kind == "bad fused":
        argv += ["--fused", "qkv"]
    elif kind == "fused matches nothing":
        argv += ["--fused", "*.qkv=3"]
    elif kind == "model-arg":
        argv += ["--model-arg", "width"]
    elif kind == "key":
        argv += ["--key", "ema"]
    elif kind == "min-eigs":
        argv += ["--min-eigs", "1"]
    torch.save({"no weights": {"lr": 0.1}, "empty": {}}.get(kind, state), "net.pt")
    if kind == "truncated":
        Path("net.pt").write_bytes(Path("net.pt").read_bytes()[:3000])
    if kind == "text":
        Path("net.pt").write_text("hello world")
    path = {"no file": "none.pt", "folder": "."}.get(kind, "net.pt")
    return ["analyze", path, *argv]


ERRORS = {
    "missing keys": "2 missing (2.weight, 2.bias)",
    "unexpected keys": "1 unexpected (3.weight)",
    "other shape": "0.weight is 24x3x3x3 there and 8x3x3x3 in the model",
    "factory raises": "(name='bad') failed: AssertionError: a bad name",
    "factory argument": "--model-arg NAME=VALUE",
    "not a model": "gave a int, not a torch.nn.Module",
    "no such factory": "has no 'nothing'",
    "no such module": "importing 'no_such_module_here' failed",
    "no colon": "package.module:factory",
    "rows of whole": "--rows has no meaning with whole windows",
    "no such windows": "--windows *=half: there are farms, whole, released-conv, released-linear",
    "windows twice": "write --windows '*=farms', last",
    "windows of some": "none of the patterns ['Conv2d'] matches the layer '2' (Linear)",
    "xmin-pos of ks": "--xmin-pos has no meaning with --fit ks",
    "bad fused": "is not PATTERN=N",
    "fused matches nothing": "no measured module matches ['*.qkv']",
    "model-arg": "is not NAME=VALUE",
    "key": "has no key 'ema'; it has the keys 0.weight",
    "min-eigs": "min_eigs must be at least 2",
    "no weights": "holds no state dict; it has the keys lr",
    "truncated": "no checkpoint that torch.load can read",
    "text": "no checkpoint that torch.load can read",
    "no file": "no such file: none.pt",
    "folder": "is a folder: name the file",
    "empty": "holds no state dict; it has no keys; save model.state_dict()",
}


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_are_one_line_with_the_cure(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_break(kind)) == 2
    out, err = capsys.readouterr()
    assert ERRORS[kind] in err
    assert err.startswith("tempbalance: error: ")
    assert err.count("\n") == 1
    assert out == ""


def test_strict_and_nothing_measured_exit_with_1(
    saved: tuple[str, tb.Report], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", saved[0], *MODEL, "--min-eigs", "26"]) == 0
    assert main(["analyze", saved[0], *MODEL, "--min-eigs", "26", "--strict"]) == 1
    assert "layer '2' (1 x 32 x 24)" in capsys.readouterr().err
    assert main(["analyze", saved[0], *MODEL, "--min-eigs", "999"]) == 1
    assert "no layer has an alpha" in capsys.readouterr().err


def test_method_options(saved: tuple[str, tb.Report], capsys: pytest.CaptureFixture[str]) -> None:
    model = make()
    for argv, options in (
        (["--whole"], {"windows": tb.WholeMatrix()}),
        (["--rows", "8", "--aspect-ratio", "0.5"], {"windows": tb.Farms(0.5, rows=8)}),
        (["--rows", "6", "--per-dim", "3"], {"windows": tb.Farms(rows=6, per_dim=3)}),
        (["--windows", "released-conv"], {"windows": tb.Farms.released_conv()}),
        (
            [*("--windows", "Conv2d=released-conv"), *("--windows", "*=farms"), "--rows", "6"],
            {"windows": {"Conv2d": tb.Farms.released_conv(), "*": tb.Farms(rows=6)}},
        ),
        (["--stride", "5", "--pool", "alpha"], {"windows": tb.Farms(stride=5, pool="alpha")}),
        (["--fit", "ks"], {"fit": tb.KSFit()}),
        (["--fit", "peak", "--min-eigs", "5"], {"fit": tb.PeakFit(), "min_eigs": 5}),
        (["--xmin-pos", "4"], {"fit": tb.Hill(4)}),
        (["--fused", "2=2"], {"fused": {"2": 2}}),
        (["--memory", "1"], {"budget": 2**20}),
    ):
        assert main(["analyze", saved[0], *MODEL, "--json", *argv]) == 0
        assert alphas(capsys) == expected(tb.analyze(model, **options))  # type: ignore[arg-type]


def test_json_file_plot_and_sort(
    saved: tuple[str, tb.Report], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    argv = ["analyze", saved[0], *MODEL, "--json", "new/r.json", "--plot", "pics"]
    assert main([*argv, "--plot-layer", "2", "--sort", "alpha"]) == 0
    content = json.loads(Path("new/r.json").read_text())
    assert content["coverage"] == saved[1].coverage
    assert sorted(p.name for p in Path("pics").iterdir()) == ["alphas.png", "esd_2.png"]
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:3]]
    assert names == [r.name for r in sorted(saved[1], key=lambda r: r.alpha or 0)]
    assert main([*argv, "--plot-layer", "7"]) == 2
    out, err = capsys.readouterr()
    assert "no layer '7'; there are ['0', '2'" in err and not out  # before it measures
    assert main(["analyze", saved[0], *MODEL, "--json", "pics"]) == 2
    assert "--json pics: this cannot be written" in capsys.readouterr().err


def test_compare(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    a, b = make(0), make(0)
    with torch.no_grad():
        b.get_parameter("2.weight").mul_(torch.exp(torch.randn(32, 1)))
    torch.save(a.state_dict(), "a.pt")
    torch.save({"state_dict": {f"model.{k}": v for k, v in b.state_dict().items()}}, "b.ckpt")
    argv = ["compare", "a.pt", "b.ckpt", *MODEL]
    assert main([*argv, "--json", "--plot", "pics"]) == 0
    rows = json.loads(capsys.readouterr().out)["layers"]
    assert [row["name"] for row in rows] == ["0", "2"]
    assert rows[0]["difference"] == 0
    difference = (tb.analyze(b)["2"].alpha or 0) - (tb.analyze(a)["2"].alpha or 0)
    assert rows[1]["difference"] == pytest.approx(difference)
    assert Path("pics/compare.png").exists()
    assert main([*argv, "--sort", "change"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[0] == "2"
    assert f"{difference:+.3f}" in lines[1]
    assert "1 moved by more than 3 units of noise: 2" in lines
    assert main([*argv, "--min-eigs", "999"]) == 1


def test_rich_table_on_a_terminal(
    saved: tuple[str, tb.Report], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["analyze", saved[0], *MODEL]) == 0
    out = capsys.readouterr().out
    assert f"{saved[1]['2'].alpha:.3f}" in out
    assert "2 of 2 layers measured" in out
    assert "Conv2d" in out
    assert main(["compare", saved[0], saved[0], *MODEL]) == 0
    assert "+0.000" in capsys.readouterr().out


def test_without_a_model_the_layers_are_told_from_the_file(
    saved: tuple[str, tb.Report], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", saved[0], "--json"]) == 0
    assert alphas(capsys) == expected(saved[1])
    assert main(["analyze", saved[0], "--model-arg", "width=3"]) == 2
    assert "--model-arg has no meaning without --model" in capsys.readouterr().err
    assert main(["analyze", saved[0], "--device", "nowhere"]) == 2
    assert "--device nowhere" in capsys.readouterr().err


def test_integer_buffers_do_not_matter(capsys: pytest.CaptureFixture[str]) -> None:
    model = make()
    more = {
        "embeddings.position_ids": torch.arange(8).view(1, 8),
        "1.num_batches_tracked": torch.ones(3, 1, dtype=torch.int64),
    }
    torch.save({**model.state_dict(), **more}, "net.pt")
    assert main(["analyze", "net.pt", *MODEL, "--json"]) == 0
    assert alphas(capsys) == expected(tb.analyze(model))


def test_page_picture_and_traps(
    saved: tuple[str, tb.Report], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    argv = ["analyze", saved[0], "--html", "out/r.html", "--plot", "out/p.pdf", "--traps"]
    assert main([*argv, "--plot-layer", "2"]) == 0
    assert Path("out/p.pdf").read_bytes().startswith(b"%PDF")
    assert Path("out/p_esd_2.pdf").exists()
    assert "net.pt" in Path("out/r.html").read_text()
    assert "trap units" in capsys.readouterr().out
    assert main(["analyze", saved[0], "--plot", "p.jpeg"]) == 2
    assert "no picture ends in .jpeg" in capsys.readouterr().err


def test_rank(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scipy")
    names = []
    for i in range(4):
        model = make(i)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(2.0**i)
        torch.save(model.state_dict(), f"m{i}.pt")
        names.append(f"m{i}.pt")
    Path("scores.csv").write_text("model,accuracy\nm0.pt,0.9\nm1,0.8\nm2.pt,0.7\nm3.pt,0.6\n")
    assert main(["rank", *names, "--scores", "scores.csv", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    taus = {row["metric"]: row["tau"] for row in content["correlations"]}
    assert taus["log_norm"] == pytest.approx(-1) and taus["parameters"] is None
    assert content["models"]["m2.pt"]["score"] == 0.7
    exact = tb.rank({name: name for name in names}).metrics["m0.pt"]["weighted_alpha"]
    assert content["models"]["m0.pt"]["weighted_alpha"] == exact
    assert main(["rank", *names]) == 0
    assert "Kendall" not in capsys.readouterr().out
    Path("scores.csv").write_text("m0.pt,0.9\nm1.pt,good\n")
    assert main(["rank", *names, "--scores", "scores.csv"]) == 2
    assert "line 2: 'm1.pt,good' is not MODEL,NUMBER" in capsys.readouterr().err
    Path("scores.csv").write_text("m0.pt,0.9\n")
    assert main(["rank", *names, "--scores", "scores.csv"]) == 2
    assert "has no line for m1.pt, m2.pt, m3.pt" in capsys.readouterr().err
    assert main(["rank", names[0]]) == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert f"tempbalance {tb.__version__} (torch {torch.__version__})" in capsys.readouterr().out


def test_instance_and_usage(saved: tuple[str, tb.Report]) -> None:
    assert main(["analyze", saved[0], "--model", "cli_factory:instance", "--json", "x.json"]) == 0
    for argv in ([], ["analyze"], ["compare", "net.pt"], ["nothing"]):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 2


def test_read_state_and_meta_models() -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_state("nothing.pt")
    model = make()
    with torch.device("meta"):
        empty = build_model("cli_factory:net", {})
    load_into(empty, dict(model.state_dict()), "file")
    assert expected(tb.analyze(empty)) == expected(tb.analyze(model))


def test_as_a_command(saved: tuple[str, tb.Report]) -> None:
    """Once as users run it: a process, its exit code, no traceback."""
    command = [sys.executable, "-m", "tempbalance", "analyze"]
    done = subprocess.run([*command, "none.pt", *MODEL], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "tempbalance: error: no such file: none.pt\n"
