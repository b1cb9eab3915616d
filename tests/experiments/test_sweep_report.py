"""Statistics against tables and hand-worked figures; what a report says of few or unequal runs."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from experiments import pictures, report, results, statistics


def write_run(folder: Path, method: str, seed: int, value: float | None, **more: Any) -> None:
    run = {
        "name": "toy",
        "method": method,
        "seed": seed,
        "settings": [],
        "metric": {"name": "test/accuracy", "mode": "max"},
        "value": value,
        "best": {"val/accuracy": {"value": (value or 0) + 0.01, "epoch": 3}},
        "best_on": "validation",
        "seconds": 10.0,
        "measuring_share": None if method == "none" else 0.02,
        "commit": "abc",
        "changed": False,
        "device": "cpu",
        **more,
    }
    settings = "-".join(run["settings"])
    where = folder / f"{run['name']}-{settings}" / f"{method}-seed{seed}"
    where.mkdir(parents=True)
    (where / "result.json").write_text(json.dumps(run))


def rows_of(folder: Path) -> tuple[dict[str, results.Row], list[str]]:
    cells, notes = results.load([folder])
    found = results.summarize(cells, notes)
    return {row.method: row for row in found.rows}, found.notes


def test_mean_and_standard_error() -> None:
    found = statistics.mean([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5
    assert found.sd == pytest.approx(math.sqrt(5 / 3))
    assert found.se == pytest.approx(math.sqrt(5 / 3) / 2)
    assert statistics.mean([7.0]) == statistics.Mean(1, 7.0, None, None)
    with pytest.raises(ValueError, match="no values"):
        statistics.mean([])


def test_paired_interval_by_hand() -> None:
    base = {1: 10.0, 2: 20.0, 3: 30.0}
    found = statistics.paired({1: 11.0, 2: 22.0, 3: 33.0}, base, "max")
    assert found is not None
    assert (found.n, found.mean, found.wins, found.losses) == (3, 2.0, 3, 0)
    # Student's t with 2 degrees of freedom: 4.302653 at 97.5%
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), rel=1e-6)
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), rel=1e-6)
    # t = 2 sqrt(3); with 2 degrees of freedom p = 1 - t / sqrt(t^2 + 2)
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14), rel=1e-9)


def test_interval_covers_as_often_as_it_says() -> None:
    draw = random.Random(0)
    hits = 0
    for _ in range(2000):
        base = {seed: draw.gauss(0, 5) for seed in range(4)}
        other = {seed: value + draw.gauss(1, 1) for seed, value in base.items()}
        found = statistics.paired(other, base, "max")
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 1 <= found.high
    assert abs(hits / 2000 - 0.95) < 0.015  # three standard errors of a share


def test_wins_follow_the_direction_of_the_metric_and_ties_win_nothing() -> None:
    found = statistics.paired({1: 1.0, 2: 2.0, 3: 3.0}, {1: 2.0, 2: 2.0, 3: 2.0}, "min")
    assert found is not None
    assert (found.wins, found.losses) == (1, 1)


def test_holm_by_hand() -> None:
    assert statistics.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert statistics.holm([]) == []


def test_table_pairs_by_seed(tmp_path: Path) -> None:
    for seed, value in ((1, 0.5), (2, 0.7), (3, 0.6)):
        write_run(tmp_path, "none", seed, value)
        write_run(tmp_path, "farms", seed, value + 0.1)
    rows, _ = rows_of(tmp_path)
    farms = rows["farms"].difference
    assert rows["none"].difference is None
    assert farms is not None
    assert farms.mean == pytest.approx(0.1)
    assert farms.high - farms.low < 1e-9  # type: ignore[operator]  # the seeds' spread cancels
    assert farms.wins == 3
    assert rows["farms"].share == pytest.approx(0.02)
    assert rows["farms"].seconds == 10.0
    assert rows["farms"].best is not None
    assert rows["farms"].best.mean == pytest.approx(0.71)


def test_one_seed_has_no_interval_and_says_so(tmp_path: Path) -> None:
    write_run(tmp_path, "none", 1, 0.5)
    write_run(tmp_path, "tb", 1, 0.6)
    rows, notes = rows_of(tmp_path)
    difference = rows["tb"].difference
    assert difference is not None
    assert difference.low is difference.high is difference.p is None
    assert rows["tb"].value.se is None
    assert any("tb: one seed" in note for note in notes)
    text = report.markdown(results.summarize(*results.load([tmp_path])))
    assert "nan" not in text.lower()


def test_unpaired_seeds_are_named_and_left_out(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write_run(tmp_path, "none", seed, 0.5)
    for seed in (2, 3, 4):
        write_run(tmp_path, "tb", seed, 0.6 if seed < 4 else 99.0)
    rows, notes = rows_of(tmp_path)
    assert rows["tb"].difference is not None
    assert rows["tb"].difference.unpaired == (1, 4)
    assert rows["tb"].difference.mean == pytest.approx(0.1)
    assert any("seeds 1, 4 have no partner" in note for note in notes)


def test_no_common_seed_and_no_baseline(tmp_path: Path) -> None:
    write_run(tmp_path, "none", 1, 0.5)
    write_run(tmp_path, "tb", 2, 0.6)
    write_run(tmp_path, "tb", 1, 0.6, settings=["data.share=0.1"])
    _, notes = rows_of(tmp_path)
    assert any("no seed in common" in note for note in notes)
    assert any("toy data.share=0.1: no run of 'none'" in note for note in notes)


def test_settings_and_metrics_are_cells_of_their_own(tmp_path: Path) -> None:
    for share in ("data.share=0.1", "data.share=1.0"):
        write_run(tmp_path, "none", 1, 0.5, settings=[share])
    cells, _ = results.load([tmp_path])
    assert sorted(cell.title for cell in cells) == ["toy data.share=0.1", "toy data.share=1.0"]


def test_mixed_origins_failures_and_trials_are_told(tmp_path: Path) -> None:
    write_run(tmp_path, "none", 1, 0.5)
    write_run(tmp_path, "none", 2, 0.5, commit="def", changed=True, best_on="test")
    write_run(tmp_path, "none", 3, 0.5, fast_dev_run=True)
    write_run(tmp_path, "none", 4, None)
    (tmp_path / "broken").mkdir()
    failed = {"status": "failed", "error": "ValueError: no"}
    (tmp_path / "broken" / "run.json").write_text(json.dumps(failed))
    rows, notes = rows_of(tmp_path)
    assert rows["none"].value.n == 2
    text = "\n".join(notes)
    for part in ("commits: abc, def", "changes after the commit", "ValueError: no", "test set"):
        assert part in text
    assert text.count("left out") == 2

    killed = tmp_path / "toy-" / "farms-seed9"
    killed.mkdir()
    (killed / "run.json").write_text(json.dumps({"status": "running"}))
    assert f"not finished (killed, or running): {killed}" in "\n".join(rows_of(tmp_path)[1])
    (killed / "result.json").write_text('{"name":')
    with pytest.raises(ValueError, match=r"farms-seed9.*no readable JSON.*run that job again"):
        results.load([tmp_path])


def test_same_run_twice_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "none", 1, 0.5)
    write_run(tmp_path / "b", "none", 1, 0.5)
    with pytest.raises(ValueError, match="second run of none with seed 1"):
        results.load([tmp_path])


def test_command_line_writes_three_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (1, 2, 3):
        write_run(tmp_path, "none", seed, 0.5 + 0.01 * seed)
        write_run(tmp_path, "tb", seed, 0.5 + 0.02 * seed)
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    with (out / "report.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == ["none", "tb"]
    assert float(lines[1]["difference"]) == pytest.approx(0.02)
    assert "| tb |" in (out / "report.md").read_text()
    image = imread(out / "report.png")
    assert image.std() > 0.01
    assert "lean" in capsys.readouterr().out  # three pairs are few


def test_command_line_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 1
    assert "no finished run" in capsys.readouterr().err
    assert report.main([str(tmp_path / "nowhere")]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_alphas_are_read_and_drawn(tmp_path: Path) -> None:
    (tmp_path / "tempbalance.csv").write_text(
        "epoch,step,layer,alpha,multiplier,lr\n"
        "0,0,model.conv1,2.0,1,0.1\n0,0,model.fc,9.0,1,0.1\n"
        "0,5,model.fc,5.0,1,0.1\n1,10,model.conv1,3.0,1,0.1\n1,10,model.fc,,1,0.1\n"
    )
    found = pictures.alphas(tmp_path / "tempbalance.csv")
    assert found is not None
    assert found.layers == ["conv1", "fc"]
    assert found.epochs == [0, 1]
    np.testing.assert_equal(found.values, [[2.0, 3.0], [5.0, np.nan]])
    console = Console(record=True, width=100, file=(tmp_path / "t").open("w"))
    console.print(pictures.terminal_heatmap(found))
    assert "2.00 to 5.00" in console.export_text()
    assert pictures.alphas(tmp_path / "nothing.csv") is None
    many = pictures.Alphas(list("abcde"), [0], np.arange(5.0)[:, None])
    assert many.some(3).layers == ["a", "c", "e"] and many.some(9).layers == list("abcde")
    np.testing.assert_equal(many.some(3).values, [[0], [2], [4]])


def test_sparkline_and_curves(tmp_path: Path) -> None:
    assert pictures.sparkline([0.0, 0.5, 1.0], 0, 1) == "▁▄█"
    pictures.curves({"a": [[1, 2, 3], [2, 3]]}, tmp_path / "c.png", "x")
    assert imread(tmp_path / "c.png").std() > 0.01
