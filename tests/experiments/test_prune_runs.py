"""Pruning runs: perplexity, text, one run, the resumable table and what is made of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from experiments import rows as rows_csv
from experiments import sweep
from experiments.prune import grid, report, table, texts
from experiments.prune.perplexity import perplexity
from experiments.prune.run import run

transformers = pytest.importorskip("transformers")

WORDS = [f"w{i}" for i in range(40)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its tokenizer and two texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=40,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(
        folder / "model"
    )
    (folder / "text").mkdir()
    for name in ("valid", "test"):
        ids = torch.randint(40, (600,)).tolist()
        (folder / "text" / f"wikitext2-{name}.txt").write_text(" ".join(WORDS[i] for i in ids))
    return folder


SMALL = ["length=16", "calibration_windows=2", "text.test.windows=4"]


def configured(place: Path, *overrides: str) -> Any:
    with initialize_config_dir(str(sweep.CONF), version_base="1.3"):
        return compose(
            "prune", [f"model.path={place}/model", f"data_root={place}", *SMALL, *overrides]
        )


@pytest.mark.parametrize("allocation", grid.ALLOCATIONS)
def test_every_allocation_runs(place: Path, allocation: str) -> None:
    result = run(configured(place, f"allocation={allocation}", "total=0.5"))
    told = result["pruning"]
    assert told["sparsity"] == pytest.approx(0.5, abs=0.03)
    assert (told["allocation"], told["split"], told["tokens"]) == (allocation, "validation", 60)
    # Random text: no model does better than its uniform law, a random one hardly worse.
    assert 35 < result["value"] < 60


@pytest.mark.parametrize("method", [*grid.METHODS, "wanda_2of4"])
@pytest.mark.parametrize("windows", ["farms", "farms_2000x10"])
def test_every_method_runs_and_repeats_to_the_bit(place: Path, method: str, windows: str) -> None:
    cfg = configured(
        place, f"method={method}", f"windows={windows}", "allocation=uniform", "total=0.5",
        "split=test",
    )  # fmt: skip
    assert run(cfg)["value"] == run(cfg)["value"]


def test_a_fine_tuned_model_keeps_its_zeros_and_is_saved_where_asked(
    place: Path, tmp_path: Path
) -> None:
    common = ("total=0.7", "allocation=depth", "split=test")
    plain = run(configured(place, *common))
    tuned = run(configured(place, *common, "finetune.steps=30", "finetune.lr=0.01",
                           f"save={tmp_path}/out"))  # fmt: skip
    assert tuned["value"] != plain["value"]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weights = [m.weight for m in again.model.layers.modules() if isinstance(m, nn.Linear)]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert zeros == pytest.approx(plain["pruning"]["sparsity"], abs=1e-9)


class Bigram(nn.Module):
    """Knows the probability of each token after each other."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table.log())

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return type("Output", (), {"logits": self.table[input_ids]})


def test_perplexity_is_the_inverse_geometric_mean_of_the_probabilities() -> None:
    law = torch.softmax(torch.randn(5, 5), -1)
    windows = torch.tensor([[0, 1, 2, 3], [4, 4, 0, 2]])
    steps = [(0, 1), (1, 2), (2, 3), (4, 4), (4, 0), (0, 2)]
    wanted = math.prod(float(law[a, b]) for a, b in steps) ** (-1 / 6)
    assert perplexity(Bigram(law), windows) == pytest.approx(wanted, rel=1e-5)


def test_windows_do_not_overlap_and_the_seed_draws_those_of_calibration() -> None:
    ids = torch.arange(100)
    assert texts.windows(ids, 30).tolist() == [list(range(i, i + 30)) for i in (0, 30, 60)]
    assert len(texts.windows(ids, 30, stride=10)) == 8
    assert texts.windows(ids, 30, most=1).shape == (1, 30)
    first, again, other = (texts.drawn(ids, 30, 4, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(ValueError, match="fewer than a window of 101"):
        texts.windows(ids, 101)


def test_the_cuts_of_wikitext_are_undone_and_parts_do_not_overlap(tmp_path: Path) -> None:
    file = tmp_path / "wiki.txt"
    cut = 'A two @-@ fold rise , of 1 @,@ 000 ( or " so " ) , it \'s said . <unk>'
    file.write_text(cut)
    assert texts.read(file) == 'A two-fold rise, of 1,000 (or "so"), it\'s said. <unk>'
    file.write_text("0123456789")
    assert texts.read(file, (0, 0.5)) + texts.read(file, (0.5, 1)) == "0123456789"


def test_the_command_writes_its_result_and_skips_it_the_next_time(
    place: Path, tmp_path: Path
) -> None:
    from experiments.prune.__main__ import _stored

    cfg = configured(place, f"folder={tmp_path}/run", "overrides=[]", "allocation=depth")
    first = sweep.run(cfg, _stored)
    assert first == json.loads((tmp_path / "run" / "result.json").read_text())
    assert sweep.run(cfg, lambda _: pytest.fail("run again")) == first


def test_the_table_goes_on_where_it_stopped(place: Path, tmp_path: Path) -> None:
    path, results = f"{place}/model", tmp_path / "rows.csv"
    settings = [f"data_root={place}", *SMALL]
    given = [path, "--methods", "wanda", "--totals", "0.6", "--results", str(results), "--set",
             *settings]  # fmt: skip
    assert table.main([*given, "--allocations", "uniform", "depth"]) == 0
    rows = grid.read(results)
    # Uniform has nothing to choose: 1 and 3 rows; depth 3 spreads, then 3 seeds with the best.
    assert [row.split for row in rows].count("validation") == 4 and len(rows) == 10
    best = min((r for r in rows if r.allocation == "depth" and r.split == "validation"),
               key=lambda r: r.perplexity)  # fmt: skip
    finals = [r for r in rows if r.allocation == "depth" and r.split == "test"]
    assert {r.spread for r in finals} == {best.spread} and {r.seed for r in finals} == {0, 1, 2}
    before = results.read_text()
    assert table.main([*given, "--allocations", "uniform", "depth"]) == 0
    assert results.read_text() == before
    results.write_text("".join(before.splitlines(keepends=True)[:-1]))  # one row is lost
    assert table.main([*given, "--allocations", "uniform", "depth"]) == 0
    assert {r.key for r in grid.read(results)} == {r.key for r in rows}


def test_the_table_holds_rows_of_one_design() -> None:
    with pytest.raises(SystemExit):
        table.main(["model", "--set", "length=16"])


def _row(key: grid.Key, perplexity: float) -> grid.Row:
    rest = {"sparsity": 0.5986, "sparsity_before": 0.0, "seconds": 1.0, "tokens": 100}
    told = {"device": "cpu", "commit": "0", "settings": ""}
    return grid.Row(**vars(key), perplexity=perplexity, **rest, **told)


def _searched(cell: tuple[str, str, str, float], by_spread: dict[float, float]) -> list[grid.Row]:
    """The validation rows of a cell, run in the order in which they are wanted."""
    rows: list[grid.Row] = []
    while todo := [k for k in grid.search(rows, *cell) if k not in {row.key for row in rows}]:
        rows += [_row(key, by_spread[key.spread or 0]) for key in todo]
    return rows


@pytest.mark.parametrize(
    ("perplexities", "run", "best"),
    [  # of the spreads 0.1, 0.2, 0.3, 0.5
        ((20, 25, 30, 1), {0.1, 0.2, 0.3}, 0.1),
        ((30, 25, 25, 1), {0.1, 0.2, 0.3}, 0.2),  # the smaller of equals
        ((1, 30, 25, 40), {0.2, 0.3, 0.5}, 0.3),
        ((1, 30, 25, 20), {0.2, 0.3, 0.5}, 0.5),
    ],
)
def test_the_search_goes_on_at_the_side_of_the_better(
    perplexities: tuple[float, ...], run: set[float], best: float
) -> None:
    cell = ("tiny", "wanda", "depth", 0.6)
    rows = _searched(cell, dict(zip(sorted(grid.SPREADS), perplexities, strict=True)))
    assert {row.spread for row in rows} == run
    for method in ("wanda", "sparsegpt"):  # one search for both
        found = grid.chosen(rows, "tiny", method, "depth", 0.6)
        assert found is not None and found.spread == best
    assert grid.chosen(rows[:-1], *cell) is None
    assert grid.chosen(rows, "tiny", "magnitude", "depth", 0.6) is None


def test_the_page_shows_what_was_run_and_names_what_was_not(tmp_path: Path) -> None:
    results = tmp_path / "results" / "pruning.csv"
    cell = ("tiny", "wanda", "depth", 0.6)
    rows = _searched(cell, {0.3: 30.0, 0.2: 25.0, 0.1: 26.0})
    best = grid.chosen(rows, *cell)
    assert best is not None
    rows += [_row(key, 20.0 * 1.1**key.seed) for key in grid.finals(best, "wanda")]
    rows += _searched(("tiny", "wanda", "uniform", 0.6), {0: 50.0})
    rows += [_row(key, 40.0 * 1.1**key.seed) for key in grid.finals(rows[-1], "wanda")]
    # Magnitude draws nothing: one seed, but of what is shuffled.
    rows += [_row(grid.Key("tiny", "magnitude", "uniform", 0.6, None, 0, "test"), 100.0)]
    rows += [_row(grid.Key("tiny", "magnitude", "shuffled", 0.6, 0.2, seed, "test"), 200.0)
             for seed in grid.SEEDS]  # fmt: skip
    for row in rows:
        rows_csv.append(results, row)
    assert grid.read(results) == rows
    paths = report.write(results)
    assert [path.name for path in paths] == ["pruning.md", "pruning.png"]
    text = paths[0].read_text()
    assert "4 of 152 rows on validation text were run, 10 of 204 on test text." in text
    # Half of uniform's, whatever the seed; 22 is the geometric mean of 20, 22 and 24.2.
    assert "| depth | not run | 22.0 (0.2; -50.0%, -50.0 to -50.0) | not run" in text
    assert "| uniform | not run | 44.0 | not run | not run |" in text
    assert "| uniform | not run | 100.0 | not run | not run |" in text
    assert "| shuffled | not run | 200.0 (+100.0%, +100.0 to +100.0) | not run | not run |" in text
    assert "| farms | not run | not run | not run | not run | - |" in text
    assert paths[1].stat().st_size > 10_000


def test_the_report_of_a_sweep_has_its_table_and_the_picture(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from experiments.prune.__main__ import _stored
    from experiments.report import main

    for allocation in ("uniform", "depth"):
        folder = tmp_path / allocation
        sweep.run(configured(place, f"folder={folder}", "overrides=[]", f"allocation={allocation}"),
                  _stored)  # fmt: skip
    assert main([str(tmp_path), "--baseline", "uniform"]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "prune model=model method=wanda total=0.6 split=validation | depth | perplexity" in text
    assert (tmp_path / "perplexity.png").is_file()
