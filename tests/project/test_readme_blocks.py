"""Every Python block of the README and of docs/ runs, and every ``tempbalance`` command in them.

A Python block after ``<!-- not run -->`` is only compiled: it needs a library, ranks or a model of
its own (tests/integrations and tests/experiments have those loops). Each block starts afresh from
what ``prelude`` gives it, so that none depends on another.
"""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tempbalance as tb
from tempbalance.cli import main

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(<!-- not run -->\s*)?```python\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r"^(?: {4})?(tempbalance (?!plot )\w+ .*)$", re.MULTILINE)


def pages() -> dict[str, str]:
    texts = {path.relative_to(ROOT).as_posix(): path for path in PAGES if "_build" not in str(path)}
    return {name: path.read_text(encoding="utf-8") for name, path in texts.items()}


def blocks() -> list[Any]:
    found = []
    for page, text in pages().items():
        for match in BLOCK.finditer(text):
            line = text[: match.start(2)].count("\n") + 1
            found.append(pytest.param(bool(match[1]), page, line, match[2], id=f"{page}:{line}"))
    return found


def commands() -> list[str]:
    found = [m[1].split("  #")[0] for text in pages().values() for m in COMMAND.finditer(text)]
    return sorted(set(found))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12), nn.Linear(12, 10))


def prelude() -> dict[str, Any]:
    """The names that the pages take for granted: a model, data, and a training under way."""
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    loader = [(torch.randn(4, 12), torch.randint(0, 10, (4,))) for _ in range(2)]
    names: dict[str, Any] = {
        "torch": torch,
        "nn": nn,
        "tb": tb,
        "model": model,
        "optimizer": optimizer,
        "cosine": cosine,
        "loader": loader,
        "batches": [x for x, _ in loader],
        "epochs": 2,
        "steps": 4,
        "rate": lambda step: 0.1 / (step + 1),
        "loss_of": lambda x, y: nn.functional.cross_entropy(names["model"](x), y),
    }

    def train_one_epoch(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    names["train_one_epoch"] = train_one_epoch
    names["scheduler"] = None
    return names


def lightning() -> dict[str, Any]:
    import pytorch_lightning as pl

    from tempbalance.integrations.lightning import TempBalanceCallback

    return {"pl": pl, "TempBalanceCallback": TempBalanceCallback}


# What single pages take for granted beyond that.
MORE = {"docs/guides/lightning.md": lightning}


@pytest.mark.parametrize(("compiled_only", "page", "line", "code"), blocks())
def test_block(
    compiled_only: bool,
    page: str,
    line: int,
    code: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = compile("\n" * (line - 1) + code, page, "exec")
    if compiled_only:
        return
    monkeypatch.chdir(tmp_path)
    copy = dict(tb.readers._READERS)  # a block may register
    monkeypatch.setattr(tb.readers.registry, "_READERS", copy)
    names = {**prelude(), **MORE.get(page, dict)()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # torch's own: SequentialLR hands an epoch to its schedules.
        warnings.filterwarnings("ignore", message="The epoch parameter in `scheduler.step")
        exec(program, names)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the commands name, small."""
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    state = {f"layers.{i}.fc.weight": torch.randn(24, 24) for i in range(2)}
    save_file(state, "model.safetensors")
    for i, (name, weight) in enumerate(state.items(), 1):
        save_file({name: weight}, f"model-{i:05}-of-00030.safetensors")
    for name in ("epoch10", "epoch90", "a", "b", "small", "medium", "large"):
        torch.save({key: weight + 0.1 * torch.randn(24, 24) for key, weight in state.items()},
                   f"{name}.pt")  # fmt: skip
    Path("accuracy.csv").write_text("small,0.7\nmedium,0.8\nlarge,0.9\n")
    return tmp_path


@pytest.mark.parametrize("command", commands())
def test_command(command: str, files: Path) -> None:
    arguments = shlex.split(command)[1:]
    assert main(arguments) == 0
    written = [a for a in arguments if a.endswith((".html", ".pdf"))]
    assert all((files / name).stat().st_size for name in written)


def test_the_readme_shows_a_table_as_it_is_printed(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its header, a line a layer of as many fields, and the two lines of totals."""
    assert main(["analyze", "model.safetensors", "--sort", "alpha"]) == 0
    printed = capsys.readouterr().out.splitlines()
    shown = README.read_text(encoding="utf-8").split("```text\n")[1].split("```")[0].splitlines()
    assert shown[0].split() == printed[0].split()
    assert {len(line.split()) for line in shown[1:] if line.endswith("  ok")} == {
        len(printed[1].split())
    }
    numbers = re.compile(r"[\d.,]+")
    totals = [numbers.sub("N", line) for line in printed[printed.index("") + 1 :][:2]]
    assert [numbers.sub("N", line) for line in shown[-2:]] == totals
