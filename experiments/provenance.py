"""What made a run: configuration, versions, commit, device. Stored before training starts."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only

PACKAGES = (
    "tempbalance",
    "torch",
    "torchvision",
    "numpy",
    "pytorch-lightning",
    "torchmetrics",
    "hydra-core",
    "neuraloperator",
    "scipy",
    "scikit-learn",
)


def versions() -> dict[str, str]:
    """Version of Python and of each package that shapes a result; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


@functools.cache
def commit() -> Mapping[str, Any]:
    """Commit of the code and whether tracked files differ from it; None where there is no git.

    As it was when a process first asked: what it has imported does not change with the files.
    """
    head = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no") if head else None
    return {"commit": head, "changed": None if changes is None else bool(changes)}


def device_name() -> str:
    """The accelerator, or the processor where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    """Model of the processor: another one rounds differently."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.processor() or platform.machine()


def write_json(path: Path, content: Any) -> None:
    """Write a file that is either whole or not there, even if the process is killed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=True) + "\n")
    partial.replace(path)


@rank_zero_only
def store(cfg: DictConfig, folder: Path) -> None:
    """Write `config.yaml` (resolved) and `provenance.json` into the folder of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    write_json(
        folder / "provenance.json",
        {
            **commit(),
            "versions": versions(),
            "device": device_name(),
            "platform": platform.platform(),
            "command": sys.argv,
            "threads": torch.get_num_threads(),
        },
    )
