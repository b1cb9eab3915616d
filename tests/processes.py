"""Processes of their own, for what is killed or has ranks, without importing everything anew.

A server has imported the libraries once; each process is forked from it and runs a command there.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_HEAVY = {"torch.distributed.fsdp": "torch", "lightning.pytorch": "lightning",
          "pytorch_lightning": "pytorch_lightning", "hydra": "hydra"}  # fmt: skip
_SERVER.set_forkserver_preload(
    [module for module, package in _HEAVY.items() if importlib.util.find_spec(package)]
)


class Command:
    """What `python *words` does, in a process group of its own.

    Args:
        log: file for what it prints.
        words: the path of a script, or ``-m`` and a module, and arguments.
    """

    def __init__(self, log: Path, *words: str) -> None:
        self._log = log
        arguments = (str(log), words, dict(os.environ))
        self._process = _SERVER.Process(target=_run, args=arguments)
        self._process.start()

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        """End it, and what it has started, at once."""
        assert self._process.pid is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.join()

    def finish(self, timeout: float = 300) -> tuple[int | None, str]:
        """Wait for its end: exit code and what it printed."""
        self._process.join(timeout)
        if self.running:
            self.kill()
        return self._process.exitcode, self._log.read_text()


def _run(log: str, words: tuple[str, ...], environment: Mapping[str, str]) -> None:
    os.setsid()
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    if words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")
