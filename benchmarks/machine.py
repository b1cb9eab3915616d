"""What a figure must carry with it: the machine, the versions, the commit, and how busy it was."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def describe(device: str) -> dict[str, Any]:
    """Plain values about this machine and this checkout."""
    facts: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "load_average": load(),
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    return facts


def load() -> float | None:
    """Processes that want to run, over the last minute: above 0.5 before a run, times are loose."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def commit() -> str | None:
    """The checked-out commit, with ``+`` where files differ from it.

    Without git (a copy of the files on another machine) what ``TEMPBALANCE_COMMIT`` says, or None.
    """
    here = Path(__file__).parent
    try:
        head, status = (
            subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout
            for command in (
                ["git", "rev-parse", "HEAD"],
                ["git", "status", "--porcelain", "--untracked-files=no"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("TEMPBALANCE_COMMIT")
    return head.strip() + ("+" if status.strip() else "")


def peak_extra_memory(work: Any) -> int | None:
    """Bytes by which the resident memory of this process rises at most during ``work()``.

    From the kernel's own high-water mark, so that nothing is missed between samples; run it in a
    fresh process, since memory that was freed before is used again unseen. None where there is no
    such mark.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the mark to what is in use now
        before = _status("VmHWM")
        work()
        return _status("VmHWM") - before
    except (OSError, KeyError):
        return None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
