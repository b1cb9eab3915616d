"""The second part of the study: what is searched, what is run, and that it goes on."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from experiments import pool, rows, sweep
from experiments.evidence import __main__ as command
from experiments.evidence import report
from experiments.evidence.cells import CELLS, DECAY, RATE, Cell, Variant
from experiments.evidence.run import overrides
from experiments.evidence.search import Key, Row, missing, tune

CELL = Cell(
    "toy", "toy", (),
    {
        "uniform": Variant((), start=(0.1, 0.01), axes=(RATE, DECAY)),
        "method": Variant((), of="uniform"),
        "decay": Variant((), of="uniform", axes=(DECAY,)),
    },
    tuning=(1000, 1001), finals=(0, 1, 2), factors={RATE: 2**0.5, DECAY: 2.0},
)  # fmt: skip


def row(key: Key, value: float) -> Row:
    return Row(**vars(key), value=value, held_out=value, seconds=1.0, measuring=0.0,
               commit="0", device="cpu", overrides="")  # fmt: skip


def bowl(key: Key, rate: float, decay: float) -> float:
    """A loss with one minimum; the seed shifts all alike."""
    return (math.log(key.rate / rate) ** 2 + math.log(key.decay / decay) ** 2) + key.seed % 7


def searched(cell: Cell, rate: float, decay: float) -> list[Row]:
    done: list[Row] = []
    for _ in range(100):
        if not (todo := missing(cell, done)):
            return done
        assert not {row.key for row in done} & set(todo), "wanted again"
        done += [row(key, bowl(key, rate, decay)) for key in todo]
    raise AssertionError("the search does not end")


@settings(max_examples=30, deadline=None)
@given(st.floats(0.03, 0.3), st.floats(0.002, 0.05))
def test_the_search_ends_at_the_best_point_with_worse_ones_around_it(
    rate: float, decay: float
) -> None:
    done = searched(CELL, rate, decay)
    best, wanted = tune(CELL, "uniform", done)
    assert best is not None and not wanted
    # Nearest on the lattice to the minimum, in both axes, to half a step (and the rounding).
    assert abs(math.log(best[0] / rate)) <= 0.51 * math.log(2**0.5)
    assert abs(math.log(best[1] / decay)) <= 0.51 * math.log(2.0)
    tuned = {r.point for r in done if r.variant == "uniform" and r.seed >= 1000}
    assert len(tuned) >= 5
    # A method starts there and searches the axes that it has.
    for name, axis in (("method", 1), ("decay", 0)):
        assert {r.point[axis] for r in done if r.variant == name} == {best[axis]}


def test_final_seeds_come_last_at_the_own_point_and_at_uniforms() -> None:
    done = searched(CELL, 0.1, 0.01)
    ends = [r for r in done if r.seed < 1000]
    assert done[-len(ends) :] == ends
    assert {(r.variant, r.seed) for r in ends} == {(v, s) for v in CELL.variants for s in (0, 1, 2)}
    moved = [r if r.variant != "method" else row(r.key, -r.rate) for r in done if r.seed >= 1000]
    while todo := [k for k in missing(CELL, moved) if k.seed >= 1000]:
        moved += [row(k, -k.rate if k.variant == "method" else 0.0) for k in todo]
    points = {k.point for k in missing(CELL, moved) if k.variant == "method"}
    assert len(points) == 2 and (0.1, 0.01) in points


def test_a_diverged_run_is_never_the_best() -> None:
    keys = missing(CELL, [])
    done = [row(key, math.nan if key.rate > 0.1 else bowl(key, 0.1, 0.01)) for key in keys]
    best, _ = tune(CELL, "uniform", done)
    assert best == (0.1, 0.01)


@pytest.mark.parametrize("name", [name for name in CELLS if name not in ("sst2_64", "sst2_1024")])
def test_every_variant_of_a_cell_is_a_configuration(name: str) -> None:
    cell = CELLS[name]
    assert not set(cell.tuning) & set(cell.finals)
    for variant in cell.variants:
        root = cell.variants[cell.root(variant)]
        assert root.start is not None and root.of is None
        chosen = overrides(cell, Key(variant, *root.start, seed=107))
        cfg = sweep.compose(chosen)
        assert (cfg.optimizer.lr, cfg.optimizer.weight_decay, cfg.seed) == (*root.start, 107)
        assert cfg.data.seed == (107 // cell.subset_of if cell.subset_of else 107)
        sweep.fingerprint(cfg)  # everything in it resolves


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    written = [row(Key("uniform", 0.1, 0.01, 3), 1.5), row(Key("a, b", 2e-5, 1.0, 4), math.inf)]
    for one in written:
        rows.append(path, one)
    assert rows.read(path, Row) == written
    assert rows.read(tmp_path / "none.csv", Row) == []


def test_the_command_runs_what_is_missing_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Key] = []

    def run(key: Key, cell: str) -> Row:
        made.append(key)
        return row(key, bowl(key, 0.1, 0.01))

    monkeypatch.setattr(command, "run", run)
    monkeypatch.setitem(command.CELLS, "toy", CELL)
    arguments = ["toy", "--jobs", "1", "--results", str(tmp_path)]
    assert command.main(arguments) == 0
    path = command.path_of(CELL, tmp_path)
    whole = path.read_text()
    assert len(rows.read(path, Row)) == len(made) == len(set(made))
    path.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    assert command.main(arguments) == 0 and len(made) == len(set(made)) + 1
    assert command.main([*arguments, "--list"]) == 0
    assert "experiments.train" not in capsys.readouterr().err


def test_the_page_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = dataclasses.replace(CELL, subset_of=0)
    monkeypatch.setattr(
        report, "CELLS", {"toy": cell, "other": dataclasses.replace(cell, name="o")}
    )
    assert report.write(tmp_path / "results") == []
    test = {"uniform": (1.0, 2.0, 3.0), "method": (0.9, 1.9, 2.9), "decay": (1.0, 2.2, 2.9)}
    path = report.path_of(cell, tmp_path / "results")
    for one in searched(cell, 0.1, 0.01):
        value = test[one.variant][one.seed] if one.seed < 1000 else 99.0
        rows.append(path, dataclasses.replace(one, value=value))
    page, picture = report.write(tmp_path / "results")
    text = page.read_text()
    # 0.1 of a mean of 2, alike for all seeds; 0 to rounding.
    assert "| method | 0.1 | 0.01 | 3 | 1.9000 | -5.00 | -5.00 to -5.00 |" in text
    assert "| decay | 0.1 | 0.01 | 3 | 2.0333 | +1.67 |" in text
    assert "| uniform | 0.1 | 0.01 | 3 | 2.0000 |  |  |" in text
    assert "Not finished" not in text and "Not run: `python -m experiments.evidence o`" in text
    assert picture.stat().st_size > 5000
    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept[:-1]))
    unfinished = report.write(tmp_path / "results")[0].read_text()
    assert "**Not finished**: 1 more" in unfinished


def test_subsets_count_as_one_pair_each() -> None:
    cell = dataclasses.replace(CELL, subset_of=2, finals=(0, 1, 2, 3), mode="max")
    done = searched(cell, 0.1, 0.01)
    test = {0: 0.1, 1: -0.1, 2: 0.3, 3: 0.1}  # 0.0 and 0.2 by subset
    done = [
        dataclasses.replace(r, value=0.5 + test[r.seed] * (r.variant == "method"))
        for r in done if r.seed < 1000
    ] + [r for r in done if r.seed >= 1000]  # fmt: skip
    line = {x.variant: x for x in report.own(cell, done, report.best_points(cell, done))}["method"]
    assert line.difference is not None and line.subsets is not None
    assert (line.difference.n, line.subsets.n) == (4, 2)
    assert line.difference.mean == pytest.approx(10.0) == line.subsets.mean
    assert line.subsets.se == pytest.approx(10.0)


def test_steps_forth_and_back_meet_whatever_the_start() -> None:
    start = {"uniform": dataclasses.replace(CELL.variants["uniform"], start=(0.1, 1e-4))}
    cell = dataclasses.replace(CELL, variants={**CELL.variants, **start})
    for rate in (0.03, 0.1, 0.119, 0.3):
        rates = sorted({r.rate for r in searched(cell, rate, 1e-4)})
        assert all(b / a > 1.3 for a, b in itertools.pairwise(rates)), rates


def test_a_row_that_is_cut_off_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    for seed in (1, 2):
        rows.append(path, row(Key("uniform", 0.1, 0.01, seed), 1.5))
    path.write_text(path.read_text()[:-12])
    with pytest.raises(ValueError, match="last row is cut off"):
        rows.append(path, row(Key("uniform", 0.1, 0.01, 3), 1.5))
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match="row 3"):
        rows.read(path, Row)


def test_an_interrupted_table_runs_nothing_more() -> None:
    ran: list[int] = []

    def run(key: int) -> int:
        ran.append(key)
        time.sleep(0.1)
        return key

    def keep(key: int, result: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.fill(lambda: list(range(20)), run, keep, 1, Console(quiet=True), title=str)
    assert len(ran) <= 3
