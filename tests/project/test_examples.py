"""Every example and every notebook runs offline, on data that comes with what is installed."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))


def run(
    name: str,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """What a script prints, started as a user does."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.stem)
def test_an_example_is_short_and_says_what_to_see(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") < 60
    assert f"python examples/{path.name}" in text and "What to see:" in text


def test_plain_loop(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = run("plain_loop.py", [], capsys, monkeypatch)
    rows = re.findall(r"^(\d)\s+([\d.]+)\s+([\d.]+)\s+([\d.e+-]+)", out, re.MULTILINE)
    assert [row[0] for row in rows] == ["0", "2", "4"]
    multipliers = sorted(float(row[2]) for row in rows)
    assert multipliers[0] == 0.5 and multipliers[-1] == 1.5
    for _, _, multiplier, rate in rows:  # halfway down the cosine
        assert float(rate) == pytest.approx(0.05 * float(multiplier), rel=2e-3)
    assert float(out.split()[-1]) > 0.88


def test_lightning_callback(
    elsewhere: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run("lightning_callback.py", ["--epochs", "3", "--out", "run"], capsys, monkeypatch)
    drawn = [Path(line.split(": ", 1)[1]) for line in out.splitlines() if "drawn:" in line]
    assert {path.name for path in drawn} == {"alpha.png", "multipliers.png", "esd.png"}
    assert all(path.stat().st_size > 5_000 for path in drawn)


def test_huggingface_trainer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run("huggingface_trainer.py", ["--steps", "40"], capsys, monkeypatch)
    multipliers = [float(x) for x in re.findall(r"alpha [\d.]+  rate x ([\d.]+)", out)]
    assert len(multipliers) == 15
    assert min(multipliers) == 0.5 and max(multipliers) == 1.5


def test_analyze_checkpoint(
    elsewhere: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run("analyze_checkpoint.py", [], capsys, monkeypatch)
    assert "3 of 3 layers measured" in out and "units of noise" in out
    assert "<svg" in (elsewhere / "outputs" / "checkpoint" / "report.html").read_text()

    torch.save(torch.nn.Linear(40, 30).state_dict(), "mine.pt")
    mine = run("analyze_checkpoint.py", ["mine.pt", "--out", "mine"], capsys, monkeypatch)
    assert "1 of 1 layer" in mine and "before" not in mine


def pruned(out: str) -> dict[str, float]:
    found = re.findall(r"^([a-z ]+):.*perplexity ([\d.]+)$", out, re.MULTILINE)
    return {name: float(value) for name, value in found}


def test_prune_llm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = run("prune_llm.py", ["--steps", "60"], capsys, monkeypatch)
    assert list(pruned(out)) == ["dense", "uniform", "by alpha"]
    assert 1 < pruned(out)["dense"] < 40  # of 256 bytes
    assert len(set(pruned(out).values())) == 3
    assert "uniform: 0.60 to 0.60" in out


def test_prune_llm_of_a_folder(
    elsewhere: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "to be or not to be that is the question " * 400
    words = {word: i for i, word in enumerate(dict.fromkeys(["<unk>", *text.split()]))}
    tokens = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokens.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained("model")
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained("model")
    Path("text.txt").write_text(text)
    options = ["--model", "model", "--text", "text.txt", "--total", "0.5"]
    out = run("prune_llm.py", options, capsys, monkeypatch)
    assert pruned(out)["dense"] == pytest.approx(len(words), rel=0.2)  # it has learned nothing
    assert "uniform: 0.50 to 0.50" in out


@pytest.mark.ci
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_and_is_kept_without_outputs(path: Path, elsewhere: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)
    resources = {"metadata": {"path": str(elsewhere)}}
    NotebookClient(notebook, timeout=300, resources=resources).execute()  # raises where a cell does
    shown = [output for cell in code for output in cell.outputs if "data" in output]
    assert any("image/png" in output.data for output in shown)
    said = [o.text for cell in code for o in cell.outputs if o.get("name") == "stderr"]
    # tqdm's, of notebooks without widgets.
    assert not [text for text in said if "Warning" in text and "TqdmWarning" not in text]


def test_there_are_three_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["look_into_a_network", "prune", "train"]
