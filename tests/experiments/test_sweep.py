"""Jobs: names, states, failures, and a sweep that is killed halfway."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig
from processes import Command
from standins import composed

from experiments import sweep

ROOT = Path(__file__).parents[2]
TRAIN = ("-m", "experiments.train", "-m")
DONE = {"value": 0.5, "metric": {"name": "m", "mode": "max"}}


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_label_names_the_run_and_leaves_out_what_does_not_matter() -> None:
    overrides = ["experiment=x", "balance=farms", "seed=3", "logger=wandb", "outputs=/o", "rerun=1"]
    assert sweep.run_label("farms", 3, overrides) == "farms-seed3"
    resume = [*overrides, "trainer.ckpt_path=last", "hydra/launcher=joblib", "data.root=/data"]
    assert sweep.run_label("farms", 3, resume) == "farms-seed3"
    more = [*overrides, "+optimizer.nesterov=true", "data.share=0.1"]
    label = sweep.run_label("farms", 3, more)
    assert label == "farms-seed3-+optimizer.nesterov=true-data.share=0.1"
    assert label == sweep.run_label("farms", 3, more[::-1])  # order does not matter


def test_labels_of_odd_or_long_overrides_are_safe_and_distinct() -> None:
    labels = {
        sweep.run_label("tb", 1, ["balance.kinds=[a/b,c]"]),
        sweep.run_label("tb", 1, ["balance.kinds=[a_b,c]"]),
        sweep.run_label("tb", 1, [f"a.b={'x' * 300}"]),
        sweep.run_label("tb", 1, [f"a.b={'x' * 300}y"]),
    }
    assert len(labels) == 4
    assert all(len(label) < 200 and "/" not in label for label in labels)


def test_fingerprint_ignores_where_and_sees_what(tmp_path: Path) -> None:
    base = composed(tmp_path, "experiment=quickstart")
    free = composed(
        tmp_path / "other", "experiment=quickstart", "logger=wandb", "trainer.ckpt_path=last",
        "data.root=/somewhere", "rerun=true",
    )  # fmt: skip
    assert sweep.fingerprint(base) == sweep.fingerprint(free)
    for change in ("seed=9", "optimizer.lr=0.2", "model.width=9", "balance=tb", "data.share=0.5"):
        other = composed(tmp_path, "experiment=quickstart", change)
        assert sweep.fingerprint(other) != sweep.fingerprint(base), change


class Count:
    """A job that counts its runs."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, cfg: DictConfig) -> dict[str, Any]:
        self.calls += 1
        return dict(DONE)


def test_finished_jobs_are_skipped_unless_asked(tmp_path: Path) -> None:
    job = Count()
    cfg = composed(tmp_path, "experiment=quickstart")
    first = sweep.run(cfg, job)
    second = sweep.run(composed(tmp_path, "experiment=quickstart"), job)
    assert job.calls == 1
    assert first == second
    sweep.run(composed(tmp_path, "experiment=quickstart", "rerun=true"), job)
    assert job.calls == 2
    assert read(Path(cfg.folder) / "replaced-0" / "result.json")["value"] == 0.5


def test_another_configuration_in_the_folder_is_set_aside(tmp_path: Path) -> None:
    cfg = composed(tmp_path, "experiment=quickstart")
    sweep.run(cfg, Count())
    (Path(cfg.folder) / "checkpoints").mkdir()
    changed = composed(tmp_path, "experiment=quickstart")
    changed.optimizer.lr = 0.7  # as if the file had been edited in between
    job = Count()
    sweep.run(changed, job)
    assert job.calls == 1
    assert not (Path(cfg.folder) / "checkpoints").exists()
    assert (Path(cfg.folder) / "replaced-0" / "checkpoints").exists()
    assert sweep.failures(tmp_path) == {}


def test_a_result_that_is_half_written_does_not_count(tmp_path: Path) -> None:
    cfg = composed(tmp_path, "experiment=quickstart")
    job = Count()
    sweep.run(cfg, job)
    (Path(cfg.folder) / "result.json").write_text('{"value": 0.')
    sweep.run(cfg, job)
    assert job.calls == 2


def test_a_job_alone_raises_and_records(tmp_path: Path) -> None:
    def fail(cfg: DictConfig) -> dict[str, Any]:
        raise ValueError("no")

    cfg = composed(tmp_path, "experiment=quickstart")
    with pytest.raises(ValueError, match="no"):
        sweep.run(cfg, fail)
    assert sweep.failures(tmp_path) == {cfg.folder: "ValueError: no"}
    sweep.run(cfg, Count())  # the next attempt clears it
    assert sweep.failures(tmp_path) == {}


def test_find_checkpoint(tmp_path: Path) -> None:
    assert sweep.find_checkpoint(None, tmp_path) is None
    assert sweep.find_checkpoint("auto", tmp_path) is None
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.mkdir(parents=True)  # a sharded checkpoint cut off while it was written
    assert sweep.find_checkpoint("auto", tmp_path) is None
    (last / "meta.pt").touch()
    assert sweep.find_checkpoint("auto", tmp_path) == str(last)
    assert sweep.find_checkpoint("last", tmp_path) == str(last)
    assert sweep.find_checkpoint(str(last), tmp_path / "elsewhere") == str(last)


SMALL = (
    "experiment=quickstart", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu",
    "model.width=4", "data.share=0.1",
)  # fmt: skip


def test_a_failure_in_a_sweep_is_recorded_and_returned_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(cfg: DictConfig) -> dict[str, Any]:
        raise ValueError("no")

    monkeypatch.setattr(sweep, "_in_sweep", lambda: True)
    monkeypatch.setenv(sweep.SWEEP, "this")
    cfg = composed(tmp_path, "experiment=quickstart")
    assert sweep.run(cfg, fail) is None
    assert sweep.failures(tmp_path, "this") == {cfg.folder: "ValueError: no"}
    assert sweep.failures(tmp_path, "another") == {}
    summary = sweep.Summary()
    summary.on_multirun_start(cfg)
    summary.on_multirun_end(cfg)  # none of this sweep's own failed


@pytest.mark.ci
def test_a_failed_job_does_not_lose_the_others_side_by_side(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "threads=1")
    job = ("trainer.max_epochs=1", "optimizer.lr=0.1,-1,0.2")
    # Not forked: the launcher's workers end with the interpreter that started them.
    done = subprocess.run(
        [sys.executable, *TRAIN, *SMALL, f"outputs={tmp_path}", *job, *launcher],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    code, out = done.returncode, done.stdout
    assert code == 1, out
    assert len(list(tmp_path.rglob("result.json"))) == 2
    (failed,) = sweep.failures(tmp_path).items()
    assert "optimizer.lr=-1" in failed[0]
    assert "Invalid learning rate" in failed[1]
    assert "1 of the sweep's jobs failed" in out
    assert failed[0] in out


@pytest.mark.slow
def test_six_jobs_killed_halfway_and_run_again(tmp_path: Path) -> None:
    overrides = [
        *TRAIN, *SMALL, f"outputs={tmp_path}", "trainer.max_epochs=4", "seed=1,2,3",
        "optimizer.lr=0.05,0.1",
    ]  # fmt: skip
    command = Command(tmp_path / "log", *overrides)
    deadline = time.monotonic() + 90
    unfinished: list[Path] = []
    while time.monotonic() < deadline and command.running:
        done = [path.parent for path in tmp_path.rglob("result.json")]
        begun = [path.parents[1] for path in tmp_path.rglob("last.ckpt")]
        unfinished = [folder for folder in begun if folder not in done]
        if len(done) >= 2 and unfinished:
            break
        time.sleep(0.01)
    command.kill()
    finished = {path: path.read_bytes() for path in tmp_path.rglob("result.json")}
    assert 2 <= len(finished) < 6
    assert unfinished

    code, out = Command(tmp_path / "log", *overrides).finish()
    assert code == 0, out
    results = {path: read(path) for path in tmp_path.rglob("result.json")}
    assert len(results) == 6
    assert len({(run["seed"], *run["settings"]) for run in results.values()}) == 6
    for path, content in finished.items():
        assert path.read_bytes() == content  # not touched, let alone done again
        assert read(path.parent / "run.json")["status"] == "finished"
    assert out.count("finished before, skipped") >= len(finished)
    resumed = [run for run in results.values() if run["resumed_from"]]
    assert resumed
    assert all(run["attempts"] == 2 for run in resumed)
    for path in results:
        with (path.parent / "metrics.csv").open() as file:
            epochs = [float(row["epoch"]) for row in csv.DictReader(file) if row["train/loss"]]
        assert epochs == [0, 1, 2, 3]  # each trained once, across both attempts
