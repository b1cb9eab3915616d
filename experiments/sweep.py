"""Jobs that survive: one folder for one configuration, skipped when finished, resumed when not.

Hydra starts the jobs; this module names their folders, keeps the state of each in `run.json`,
catches the failure of one so that the others go on, and sums up at the end.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only

from experiments.provenance import write_json

log = logging.getLogger(__name__)

CONF = Path(__file__).resolve().parents[1] / "conf"
SWEEP = "TEMPBALANCE_SWEEP"  # environment: the sweep a job belongs to, inherited by its workers

# What may differ between two attempts at one run: where it writes, what it shows, how it resumes.
_FREE = (
    "folder",
    "overrides",
    "outputs",
    "logger",
    "rerun",
    "data_root",
    "data.root",
    "data.cache_dir",
    "trainer.ckpt_path",
    "trainer.default_root_dir",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "callbacks.progress",
)
_NAMED = (
    "experiment",
    "balance",
    "decay",
    "seed",
)  # these have a place of their own in the folder's name
_LONGEST = 140  # of a folder's name; file systems stop at 255 bytes


def settings(overrides: Iterable[str]) -> list[str]:
    """Those overrides that set a run apart beside its experiment, method and seed, sorted."""
    kept = []
    for item in overrides:
        key = item.lstrip("+~").split("=", 1)[0].split("@", 1)[0]
        free = any(key == name or key.startswith(name + ".") for name in _FREE)
        if not free and key not in _NAMED and not key.startswith("hydra"):
            kept.append(item)
    return sorted(kept)


def run_label(method: str, seed: int, overrides: Sequence[str]) -> str:
    """Folder name of a run: `farms-seed43-optimizer.lr=0.05`; a hash stands in for a long rest."""
    rest = settings(overrides)
    label = "-".join([f"{method}-seed{seed}", *rest])
    safe = re.sub(r"[^A-Za-z0-9._=+-]", "_", label)
    if safe == label and len(safe) <= _LONGEST:
        return safe
    digest = hashlib.sha256(label.encode()).hexdigest()[:8]
    return f"{safe[:_LONGEST]}-{digest}"


def at_share(share: float, table: Mapping[Any, Any]) -> Any:
    """The entry of a table by data share that holds for `share`: the smallest listed above it.

    Raises: ValueError for a share over all those listed.
    """
    listed = {float(key): value for key, value in table.items()}
    above = [key for key in listed if key >= float(share) - 1e-9]
    if not above:
        raise ValueError(f"data.share={share} is above the shares with settings: {sorted(listed)}")
    return listed[min(above)]


def by_method(method: str, table: Mapping[str, Any], default: Any) -> Any:
    """The entry of a table by balance method, or the default."""
    return table.get(method, default)


def part(whole: int, share: float) -> int:
    """So many of `whole`, rounded, at least 1."""
    return max(1, round(whole * share))


def times(a: float, b: float) -> int:
    """The product, rounded."""
    return round(a * b)


def either(value: Any, default: Any) -> Any:
    """The value, or the default where it is null."""
    return default if value is None else value


def with_decay(method: str, decay: str) -> str:
    """The name of a method of rates with one of weight decay; that of rates where there is none."""
    return method if decay == "none" else f"{method}+{decay}"


def choose(condition: bool, yes: Any, no: Any) -> Any:
    """The first value where the condition holds, else the second."""
    return yes if condition else no


for _resolver in (run_label, at_share, by_method, part, times, either, with_decay, choose):
    OmegaConf.register_new_resolver(_resolver.__name__, _resolver, replace=True)
OmegaConf.register_new_resolver("is_zero", lambda value: not value, replace=True)
OmegaConf.register_new_resolver("minus", lambda value: -value, replace=True)


def compose(overrides: Sequence[str], folder: Path | None = None) -> DictConfig:
    """Configuration of a run outside the command line, as `python -m experiments.train` has it.

    `folder` defaults to `<outputs>/<name>/<label>`, the folder the command line would use.
    """
    initialized = GlobalHydra.instance().is_initialized()
    if initialized:
        GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra_compose("train", overrides=list(overrides))
    cfg.overrides = list(overrides)
    cfg.folder = str(
        folder or Path(cfg.outputs) / cfg.name / run_label(cfg.whole_method, cfg.seed, overrides)
    )
    return cfg


def fingerprint(cfg: DictConfig) -> str:
    """Hash of all that decides the result: the resolved configuration without what is free."""
    placeless = cfg.copy()
    placeless.folder = placeless.outputs = placeless.data_root = ""  # paths are made of these
    content = OmegaConf.to_container(placeless, resolve=True)
    assert isinstance(content, dict)
    for path in _FREE:
        *parents, last = path.split(".")
        node: Any = content
        for name in parents:
            node = node.get(name) or {}
        node.pop(last, None)
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def find_checkpoint(ckpt_path: str | None, folder: Path) -> str | None:
    """Checkpoint to go on from: `auto` (the last, if any), `last`, a path, or None.

    Raises: FileNotFoundError for `last` where there is none, or a path that does not exist.
    """
    if ckpt_path is None:
        return None
    last = folder / "checkpoints" / "last.ckpt"
    # A sharded checkpoint is a folder; its meta file is written when it is whole.
    whole = last.is_file() or (last / "meta.pt").is_file()
    if ckpt_path == "auto":
        return str(last) if whole else None
    if ckpt_path == "last":
        if not whole:
            raise FileNotFoundError(
                f"trainer.ckpt_path=last: no {last}. Give the overrides of the run to resume (its "
                "folder is named by them), or the path of a checkpoint"
            )
        return str(last)
    if not Path(ckpt_path).exists():
        raise FileNotFoundError(f"trainer.ckpt_path={ckpt_path}: no such checkpoint")
    return ckpt_path


class Job:
    """State of one run in its folder: `run.json` while it runs, `result.json` once finished."""

    def __init__(self, cfg: DictConfig) -> None:
        self.folder = Path(cfg.folder)
        self.fingerprint = fingerprint(cfg)
        self.anew = bool(cfg.rerun)
        self.state: dict[str, Any] = _read(self.folder / "run.json") or {}

    @property
    def result(self) -> dict[str, Any] | None:
        """Result of this very configuration, where it has been run to the end."""
        found = _read(self.folder / "result.json")
        same = found is not None and found.get("fingerprint") == self.fingerprint
        return found if same and not self.anew else None

    @rank_zero_only
    def start(self) -> None:
        """Note the attempt; set aside what another configuration left in this folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.state and (self.anew or self.state.get("fingerprint") != self.fingerprint):
            self._set_aside()
        attempts = [*self.state.get("attempts", []), {"started": time.time(), "pid": os.getpid()}]
        self._write(status="running", attempts=attempts, error=None)

    @rank_zero_only
    def fail(self, error: BaseException) -> None:
        """Record a failure, with its traceback."""
        text = "".join(traceback.format_exception(error))
        self._write(status="failed", error=f"{type(error).__name__}: {error}", traceback=text)

    @rank_zero_only
    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the result: from here on the job is skipped."""
        content = {**result, "fingerprint": self.fingerprint, "attempts": self.attempts}
        write_json(self.folder / "result.json", content)
        self._write(status="finished", error=None)
        self.anew = False  # it is

    @property
    def attempts(self) -> int:
        """How often this run was started."""
        return len(self.state.get("attempts", []))

    def _write(self, **changes: Any) -> None:
        self.state = {
            **self.state,
            **changes,
            "fingerprint": self.fingerprint,
            "sweep": os.environ.get(SWEEP),
        }
        if changes.get("error") is None:
            self.state.pop("traceback", None)
        write_json(self.folder / "run.json", self.state)

    def _set_aside(self) -> None:
        number = sum(1 for _ in self.folder.glob("replaced-*"))
        old = self.folder / f"replaced-{number}"
        old.mkdir()
        log.warning("%s holds a run of another configuration: moved to %s", self.folder, old.name)
        for path in list(self.folder.iterdir()):
            # Hydra has written its files of the new run already.
            if not path.name.startswith((".", "replaced-")) and path.suffix != ".log":
                shutil.move(str(path), str(old / path.name))
        self.state = {}


def run(cfg: DictConfig, function: Callable[[DictConfig], dict[str, Any]]) -> dict[str, Any] | None:
    """Run one job, or read its result if it has one; None where it failed as one of a sweep.

    Alone, a job that fails raises; within a sweep it is recorded and the others go on.
    """
    job = Job(cfg)
    if (done := job.result) is not None:
        log.info("%s: finished before, skipped (rerun=true does it anew)", job.folder)
        return done
    job.start()
    try:
        result = function(cfg)
    except Exception as error:
        job.fail(error)
        if not _in_sweep():
            raise
        log.exception("%s: failed, the sweep goes on", job.folder)
        return None
    job.finish(result)
    return job.result


class Summary(Callback):
    """Hydra callback: marks the jobs of a sweep, lists those that failed, and exits with 1."""

    def __init__(self) -> None:
        self._outputs: Path | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Name the sweep in the environment, which local and cluster jobs inherit."""
        os.environ[SWEEP] = uuid.uuid4().hex
        self._outputs = Path(config.outputs).absolute()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Say how many jobs failed and why; raise SystemExit(1) if any did."""
        assert self._outputs is not None
        failed = failures(self._outputs, os.environ.pop(SWEEP))
        for folder, error in failed.items():
            log.error("failed: %s\n  %s", folder, error)
        if failed:
            log.error(
                "%d of the sweep's jobs failed (run.json in each folder has the traceback). The "
                "same command goes on where it stopped",
                len(failed),
            )
            raise SystemExit(1)


def failures(outputs: Path, sweep: str | None = None) -> dict[str, str]:
    """Folder and error of each failed run under `outputs`; of one sweep where it is named."""
    return {
        folder: str(state.get("error"))
        for folder, state in _states(outputs).items()
        if state.get("status") == "failed" and sweep in (None, state.get("sweep"))
    }


def unfinished(outputs: Path) -> list[str]:
    """Folders of the runs under `outputs` that were killed, or are running still."""
    return [name for name, state in _states(outputs).items() if state.get("status") == "running"]


def _states(outputs: Path) -> dict[str, dict[str, Any]]:
    paths = sorted(outputs.rglob("run.json"))
    return {
        str(path.parent): _read(path) or {}
        for path in paths
        if not path.parent.name.startswith("replaced")
    }


def as_single_job(cfg: DictConfig) -> None:
    """Make `sys.argv` the command of this job alone.

    Lightning starts the other processes of a multi-GPU run with the command line it finds: within
    a sweep that would be the whole sweep once more.
    """
    if _in_sweep():
        hydra = HydraConfig.get()
        sys.argv = [sys.argv[0], *hydra.overrides.task]


def _in_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
