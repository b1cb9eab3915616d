"""Every Python block of the README runs. One after ``<!-- not run -->`` is only compiled.

Each block starts afresh from what ``prelude`` gives it, so that none depends on another.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tempbalance as tb

README = Path(__file__).resolve().parents[2] / "README.md"
BLOCK = re.compile(r"(<!-- not run -->\s*)?```python\n(.*?)```", re.DOTALL)


def blocks() -> list[Any]:
    if not README.exists():
        return []
    text = README.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        line = text[: match.start(2)].count("\n") + 1
        found.append(pytest.param(bool(match[1]), line, match[2], id=f"line{line}"))
    return found


def prelude() -> dict[str, Any]:
    """The names that the README takes for granted: a model, data, and a training under way."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12), nn.Linear(12, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
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
        "epochs": 2,
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


@pytest.mark.parametrize(("compiled_only", "line", "code"), blocks())
def test_block(
    compiled_only: bool, line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = compile("\n" * (line - 1) + code, str(README), "exec")
    if compiled_only:
        return
    monkeypatch.chdir(tmp_path)
    copy = dict(tb.readers._READERS)  # a block may register
    monkeypatch.setattr(tb.readers.registry, "_READERS", copy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # torch's own: SequentialLR hands an epoch to its schedules.
        warnings.filterwarnings("ignore", message="The epoch parameter in `scheduler.step")
        exec(program, prelude())
