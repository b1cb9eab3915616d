"""The study: which runs it asks for, how it picks rates, and what its tables say."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats as scipy_stats
import torch
from omegaconf import OmegaConf
from rich.console import Console

from experiments import statistics, sweep
from experiments.study import numbers, table
from experiments.study import run as study
from experiments.study.__main__ import main
from experiments.study.cells import CELLS, CONTROLS, LATER, METHODS, TUNING_SEED, VARIANTS, Cell
from experiments.study.files import RESULTS, best_rate, load, mean_by_rate, save, widened
from experiments.study.files import Run as StudyRun
from experiments.study.write import write_study

TOY = Cell("toy", "Toy", (), (0.1, 0.2, 0.4), {"uniform": 4, "farms": 4, "pertype": 4}, 2)


def run_of(variant: str, rate: float, seed: int, value: float, **more: Any) -> StudyRun:
    given = {
        "second": 0.25, "held_out": value, "curve": "1:0.5", "seconds": 1.0, "measuring": 0.01,
        "commit": "abc", "changed": False, "device": "cpu", "overrides": "a=1 b=2",
    }  # fmt: skip
    return StudyRun(variant, rate, seed, value, **(given | more))


@pytest.mark.parametrize("name", CELLS)
def test_every_run_of_every_cell_composes(name: str, tmp_path: Path) -> None:
    cell = CELLS[name]
    # All variants once, in the cell that has most of them.
    some = ["uniform", "farms_sigmoid"]
    if cell.extra:
        some = [*cell.seeds, *LATER, *cell.extra, *cell.late]
    for variant in some:
        chosen = study.overrides(cell, variant, 0.0123, 7)
        cfg = sweep.compose([*chosen, f"outputs={tmp_path}", f"data_root={tmp_path}"])
        assert isinstance(OmegaConf.to_container(cfg, resolve=True), dict)
        assert (cfg.optimizer.lr, cfg.seed) == (0.0123, 7)
        assert (cfg.balance is None) == (variant == "uniform")
        assert cfg.metric.mode == cell.mode
        assert cfg.trainer.max_epochs % cfg.trainer.check_val_every_n_epoch == 0  # last: validated
        excluded = list(cfg.tuned.exclude)
        assert excluded == (["SpectralConv"] if variant.endswith("_rest") else excluded)


def test_final_seeds_are_not_those_that_tune() -> None:
    for cell in CELLS.values():
        assert max(cell.seeds.values()) < TUNING_SEED
        assert cell.seeds["uniform"] == max(cell.seeds.values())  # every run has its partner
    assert set(VARIANTS) >= {"uniform", *METHODS, *CONTROLS}


def test_files_keep_runs(tmp_path: Path) -> None:
    runs = [run_of("farms", 0.1, 3, math.nan), run_of("a b", 0.025, 1, 0.123456789, changed=True)]
    path = tmp_path / "new" / "toy.csv"
    save(path, runs)
    found = load(path)
    assert list(found) == [("a b", 0.025, 1), ("farms", 0.1, 3)]
    assert found["a b", 0.025, 1] == dataclasses.replace(runs[1], value=0.123457, held_out=0.123457)
    assert math.isnan(found["farms", 0.1, 3].value)
    assert load(tmp_path / "none.csv") == {}


def test_equal_accuracies_tie_in_memory_and_in_the_file(tmp_path: Path) -> None:
    # The same four accuracies in another order, as quotients of float32.
    values = [193 / 202, 195 / 202, 194 / 202, 196 / 202]
    runs = [
        run_of("uniform", rate, TUNING_SEED + i, v)
        for rate, some in ((0.2, values), (0.1, values[::-1]))
        for i, v in enumerate(some)
    ]
    save(tmp_path / "a.csv", runs)
    assert best_rate(runs, "uniform", "max") == 0.1  # of equal ones the smallest
    assert list(load(tmp_path / "a.csv").values()) == sorted(runs, key=lambda run: run.key)


def test_the_best_rate_is_by_validation_and_no_diverged_run_wins() -> None:
    tune = TUNING_SEED
    runs = [
        run_of("uniform", 0.1, tune, 0.9, held_out=0.5),
        run_of("uniform", 0.1, tune + 1, 0.9, held_out=0.7),
        run_of("uniform", 0.2, tune, 0.1, held_out=0.65),
        run_of("uniform", 0.4, tune, 0.0, held_out=0.1),
        run_of("uniform", 0.4, tune + 1, math.nan),
        run_of("uniform", 0.8, 1, 0.0, held_out=0.0),  # a final seed has no say
    ]
    assert mean_by_rate(runs, "uniform") == {0.1: 0.6, 0.2: 0.65, 0.4: math.inf}
    assert best_rate(runs, "uniform", "min") == 0.1
    assert best_rate(runs, "uniform", "max") == 0.2
    assert widened([0.1, 0.2, 0.4], 0.1) == [0.05]
    assert widened([0.1, 0.2, 0.4], 0.4) == [0.8]
    assert widened([0.1, 0.2, 0.4], 0.2) == []


def test_a_study_widens_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = {"uniform": 0.8, "farms": 0.4, "pertype": 0.8}
    asked: list[tuple[str, float, int]] = []

    def fake(self: study.Study, wanted: list[tuple[str, float, int]], what: str) -> None:
        for variant, rate, seed in wanted:
            if (variant, rate, seed) not in self.runs:
                asked.append((variant, rate, seed))
                value = abs(math.log(rate / best[variant]))
                said = " ".join(study.overrides(TOY, variant, rate, seed))
                self.runs[variant, rate, seed] = run_of(variant, rate, seed, value, overrides=said)
        save(self.path, self.runs.values())

    monkeypatch.setattr(study.Study, "_run", fake)
    study.Study(TOY, 1, tmp_path, Console(quiet=True)).go()
    tuned = {rate for v, rate, seed in asked if v == "uniform" and seed >= TUNING_SEED}
    assert tuned == {0.1, 0.2, 0.4, 0.8, 1.6}  # until 0.8 lies inside
    finals = {(v, rate) for v, rate, seed in asked if seed < TUNING_SEED}
    uniform = {("uniform", rate) for rate in (0.4, 0.8, 1.6)}
    others = {(v, rate) for v in ("farms", "pertype") for rate in (0.4, 0.8)}
    assert finals == {*uniform, *others}  # and all at one rate beside uniform's
    count = len(asked)
    study.Study(TOY, 1, tmp_path, Console(quiet=True)).go()
    assert len(asked) == count


def _toy(*rows: tuple[str, float, tuple[float, ...]]) -> list[StudyRun]:
    """Final runs, and two tuning runs a variant that make its first rate here the best."""
    runs, tuned = [], set()
    for variant, rate, values in rows:
        runs += [run_of(variant, rate, seed, value) for seed, value in enumerate(values)]
        if variant not in tuned:
            tuned.add(variant)
            for factor, held_out in ((0.5, 0.3), (1, 0.1), (2, 0.2)):
                runs.append(run_of(variant, rate * factor, TUNING_SEED, held_out))
    return runs


def test_tables_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = _toy(
        ("uniform", 0.2, (1.0, 2.0, 4.0, 9.0)),  # mean 4
        ("uniform", 0.1, (1.0, 2.0, 3.0, 4.0)),
        ("farms", 0.1, (0.9, 1.8, 3.6, 9.3)),  # -0.1 -0.2 -0.4 +0.3
        ("farms", 0.2, (1.1, 2.2, 4.4, 9.1)),
        ("pertype", 0.2, (0.45, 0.9, 1.8, math.nan)),
        ("pertype", 0.1, (1.0, 2.0, 3.0, 5.0)),
    )
    save(tmp_path / "toy.csv", runs)
    found = numbers.read(TOY, tmp_path)
    assert found is not None and found.complete and found.edges == []
    *others, beside = found.own
    assert beside.variant == "uniform" and beside.difference is not None
    assert (beside.rate, beside.difference.mean, beside.p) == (0.1, pytest.approx(-37.5), None)
    rows = {row.variant: row for row in others}
    farms = rows["farms"].difference
    assert farms is not None and (farms.mean, farms.wins, farms.n) == (pytest.approx(-2.5), 3, 4)
    assert rows["uniform"].difference is None
    assert list(found.matched) == [0.2, 0.1]
    for rate, mean in ((0.2, 100 * 0.2 / 4), (0.1, 100 * 1.4 / 2.5)):  # of uniform at that rate
        same = {row.variant: row for row in found.matched[rate]}["farms"].difference
        assert same is not None and same.mean == pytest.approx(mean)
    # The run that diverged loses its pair and takes the interval with it.
    pertype = rows["pertype"].difference
    assert rows["pertype"].diverged == 1 and pertype is not None
    assert (pertype.wins, pertype.losses, pertype.n, pertype.low) == (3, 1, 4, None)
    assert pertype.p == pytest.approx(0.625)  # sign test of 3 against 1
    against = found.pair("farms", "pertype")
    assert against is not None and (against.wins, against.n) == (1, 4)
    text = "\n".join(table.section(found))
    assert "| farms | 0.1 | 4 |" in text and "(1 diverged)" in text
    assert "both at 0.2, the rate of 2 of 3" in text and "Not finished" not in text

    monkeypatch.setattr(table, "CELLS", {"toy": TOY, "gpu": CELLS["cifar100_vgg16"]})
    whole = table.markdown(tmp_path)
    assert "Not run (no GPU was at hand): `python -m experiments.study cifar100_vgg16`" in whole


def test_all_cells_beside_each_other_and_corrected_together(tmp_path: Path) -> None:
    def cell(name: str, farms: tuple[float, ...]) -> numbers.Cellwise:
        base = (1.0, 2.0, 2.0, 3.0)
        save(
            tmp_path / f"{name}.csv",
            _toy(
                ("uniform", 0.2, base),  # mean 2
                ("uniform", 0.1, (1.0, 1.0, 1.0, 1.0)),
                ("farms", 0.2, farms),
                ("farms", 0.1, (1.5, 1.4, 1.3, 1.2)),
                ("pertype", 0.2, (1.1, 1.9, 2.2, 2.8)),
                ("pertype", 0.1, (1.0, 1.1, 0.9, 1.0)),
            ),
        )
        found = numbers.read(dataclasses.replace(TOY, name=name), tmp_path)
        assert found is not None
        return found

    first = cell("first", (0.9, 1.901, 1.899, 2.9))  # 5% better by 4 digits
    second = cell("second", (0.9, 2.0, 1.8, 3.0))
    assert [row.rate for row in first.level] == [0.1] * 3
    text = table.overview([first, second])
    own, level = (text.index(line) for line in text if line.endswith(":"))
    row = next(line for line in text[own:level] if line.startswith("| farms"))
    left, right = (part.strip() for part in row.split("|")[2:4])
    assert left.startswith("**-5.00 (") and right.startswith("-3.75 (")
    row = next(line for line in text[level:] if line.startswith("| farms"))
    assert "+35.00" in row.split("|")[2]  # of uniform's mean at 0.1
    assert "| uniform: rate, seeds | 0.1, 4 | 0.1, 4 |" in text[level:]
    assert any(line.startswith("| detectable |") for line in text[own:level])
    assert table.overview([first]) == []


def test_equal_methods_do_not_differ_in_percent() -> None:
    # A mean of ratios would be +25%.
    found = numbers.compare({0: 1.0, 1: 2.0}, {0: 2.0, 1: 1.0}, "min")
    assert found is not None and found.mean == 0.0


def test_an_unfinished_cell_says_so_and_has_no_p(tmp_path: Path) -> None:
    few = _toy(
        ("uniform", 0.2, (1.0, 2.0, 4.0)),
        ("farms", 0.1, (0.9, 1.8, 3.5)),
        ("pertype", 0.2, (0.4, 0.9)),
    )
    save(tmp_path / "toy.csv", few)
    found = numbers.read(TOY, tmp_path)
    assert found is not None and not found.complete and found.matched == {}
    assert all(row.p is None for row in found.own)
    text = "\n".join(table.section(found))
    assert "**Not finished**" in text and "| pertype | 0.2 | 2 of 4 |" in text


def test_a_best_rate_at_an_edge_is_named(tmp_path: Path) -> None:
    runs = _toy(("uniform", 0.2, (1.0, 2.0)), ("farms", 0.2, (1.0, 2.0)))
    runs = [run for run in runs if (run.variant, run.rate) != ("farms", 0.1)]
    save(tmp_path / "toy.csv", runs)
    found = numbers.read(TOY, tmp_path)
    assert found is not None and found.edges == ["farms"]
    assert "edge of the rates that were tried: farms." in "\n".join(table.section(found))


def test_sensitivity_is_against_farms_on_the_same_seeds(tmp_path: Path) -> None:
    cell = dataclasses.replace(TOY, untuned=0.05, extra={"farms x": ()})
    runs = _toy(
        ("uniform", 0.2, (1.0, 1.0, 1.0, 9.0)),
        ("farms", 0.2, (2.0, 2.0, 2.0, 9.0)),
        ("farms x", 0.2, (1.0, 1.1, 0.9)),
        ("uniform", 0.05, (2.0, 3.0)),
        ("farms", 0.05, (1.0, 2.0)),
    )
    save(tmp_path / "toy.csv", runs)
    found = numbers.read(cell, tmp_path)
    assert found is not None
    rows = {row.variant: row for row in found.extra}
    assert {name: row.n for name, row in rows.items()} == {"farms": 3, "uniform": 3, "farms x": 3}
    x = rows["farms x"].difference
    assert x is not None and x.mean == pytest.approx(-50.0)
    low = {row.variant: row for row in found.untuned}["farms"].difference
    assert low is not None and low.mean == pytest.approx(-40.0)
    text = "\n".join(table.section(found))
    assert "difference from farms" in text and "far below the best, 0.05" in text


def test_late_variants_are_against_uniform_at_their_rate(tmp_path: Path) -> None:
    cell = dataclasses.replace(TOY, late={"late farms": ()}, late_rate=0.4)
    runs = _toy(
        ("uniform", 0.2, (1.0, 1.0)),
        ("uniform", 0.4, (2.0, 2.0, 2.0)),
        ("late farms", 0.4, (1.0, 1.5)),
    )
    save(tmp_path / "toy.csv", runs)
    found = numbers.read(cell, tmp_path)
    assert found is not None
    assert {row.variant: row.n for row in found.late} == {"uniform": 3, "late farms": 2}
    late = found.late[-1].difference
    assert late is not None and late.mean == pytest.approx(-37.5)
    assert "Started after a third of the training, at 0.4" in "\n".join(table.section(found))


def test_late_variants_share_a_third_of_their_training_with_uniform() -> None:
    cell = CELLS["darcy_fno_5"]
    assert cell.late
    for own in cell.late.values():
        assert [text for text in own if text.startswith("+balance.start=")] == ["+balance.start=27"]
    runs = load(RESULTS / "darcy_fno_5.csv")
    late = [run for run in runs.values() if run.variant in {"frozen", *cell.late}]
    assert late
    for run in late:
        if run.rate == cell.late_rate and run.seed < TUNING_SEED:
            beside = runs["uniform", run.rate, run.seed].curve.split()
            shared = sum(a == b for a, b in zip(beside, run.curve.split(), strict=True))
            assert shared >= 3, run.key  # validated every 8 epochs, started after 27


def test_committed_results_are_what_the_report_writes() -> None:
    assert (RESULTS.parent / "results.md").read_text() == table.markdown()


def test_report_without_folders_writes_the_study(tmp_path: Path) -> None:
    cell = CELLS["darcy_fno_5"]
    runs = [
        run_of(v, 0.008, seed, 0.1 + 0.01 * seed + 0.001 * i)
        for i, v in enumerate(("uniform", "farms"))
        for seed in (0, 1, 2, TUNING_SEED)
    ]
    folder = tmp_path / "results"
    save(folder / f"{cell.name}.csv", runs)
    (folder / "conclusions.md").write_text("## In short\n\nNothing.\n")
    paths = write_study(folder)
    text = paths[0].read_text()
    assert text.index("In short") < text.index(cell.title)
    assert "(images/study.png)" in text
    assert all(path.is_file() for path in paths) and len(paths) == 3


def test_a_run_that_diverges_is_kept_and_a_broken_machine_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(error: Exception) -> Any:
        def run(cfg: Any, train: Any) -> None:
            raise error

        return run

    monkeypatch.setattr(study.sweep, "run", broken(FloatingPointError("no")))
    run = study.run_one(CELLS["digits"], "uniform", 0.1, 0, "outputs")
    assert math.isnan(run.value) and "FloatingPointError" in run.curve
    monkeypatch.setattr(study.sweep, "run", broken(FileNotFoundError("no data")))
    with pytest.raises(FileNotFoundError, match="no data"):
        study.run_one(CELLS["digits"], "uniform", 0.1, 0, "outputs")


def test_runs_of_other_settings_are_not_taken_over(tmp_path: Path) -> None:
    cell = CELLS["digits"]
    good = study.overrides(cell, "farms", 0.1, 0)
    save(tmp_path / "digits.csv", [run_of("farms", 0.1, 0, 1.0, overrides=" ".join(good))])
    assert len(study.Study(cell, 1, tmp_path, Console(quiet=True)).runs) == 1
    save(tmp_path / "digits.csv", [run_of("farms", 0.1, 0, 1.0, overrides="a=1")])
    with pytest.raises(SystemExit, match="farms at 0.1, seed 0, was run with other settings"):
        study.Study(cell, 1, tmp_path, Console(quiet=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cell_for_gpus_says_that_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="cifar100_vgg16 needs a GPU"):
        main(["cifar100_vgg16", "--results", str(tmp_path)])


@pytest.mark.slow
def test_one_run_of_the_study_is_that_of_the_command_line(tmp_path: Path) -> None:
    short = dataclasses.replace(
        CELLS["digits"],
        overrides=(
            *CELLS["digits"].overrides, "trainer.max_epochs=2", "data.share=0.2",
            "trainer.check_val_every_n_epoch=1", f"data_root={tmp_path}",
        ),
    )  # fmt: skip
    a = study.run_one(short, "farms", 0.05, 3, str(tmp_path / "a"))
    b = study.run_one(short, "farms", 0.05, 3, str(tmp_path / "b"))
    assert a.value == b.value and a.curve == b.curve and a.curve.startswith("1:")
    assert a.measuring > 0 and a.overrides.endswith("optimizer.lr=0.05 seed=3")


def test_the_detectable_effect_is_found_four_times_in_five() -> None:
    # Simulated: pairs of standard deviation 1 around the effect.
    n, rng = 12, np.random.default_rng(0)
    effect = statistics.detectable(n**-0.5, n)
    pairs = rng.normal(effect, 1.0, (20_000, n))
    p = scipy_stats.ttest_1samp(pairs, 0.0, axis=1).pvalue
    assert 0.78 < (p < 0.05).mean() < 0.82


def test_pooled_means_weigh_by_inverse_variance() -> None:
    one = statistics.pooled([1.0, 4.0], [1.0, 2.0])  # weights 1 and 1/4
    assert one.mean == pytest.approx((1.0 + 4.0 / 4) / 1.25)
    assert one.high - one.mean == pytest.approx(1.959964 / 1.25**0.5)
    # Cochran's Q of two cells is the square of their difference over its own error.
    assert one.p_heterogeneity == pytest.approx(2 * scipy_stats.norm.sf(3.0 / 5**0.5))
    with pytest.raises(ValueError, match="above zero"):
        statistics.pooled([1.0], [0.0])


def test_all_variants_at_a_rate_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, float, int]] = []
    one = study.Study(TOY, 1, tmp_path, Console(quiet=True))
    monkeypatch.setattr(one, "_run", lambda wanted, what: asked.extend(wanted))
    one.at(0.3, ["uniform", "level"])
    assert asked == [(v, 0.3, s) for s in range(TOY.seeds["uniform"]) for v in ("uniform", "level")]
