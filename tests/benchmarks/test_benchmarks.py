"""The benchmarks' own pieces on tiny sizes, and the arithmetic of the cost model by hand."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tempbalance import Farms
from tempbalance.layers.find import find_layers
from tempbalance.spectra import batches as jobs

pytest.importorskip("rich")
import benchmarks.all as everything
from benchmarks import (
    agreement,
    clocks,
    command,
    growth,
    llm,
    loop,
    measure,
    memory,
    model,
    networks,
    on_cuda,
    rates,
    report,
    training,
)

CPU = torch.device("cpu")


# --- clocks and shared pieces --------------------------------------------------------------------


def test_quartiles_by_hand() -> None:
    assert clocks.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)
    assert clocks.quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_compare_takes_turns_and_reverses() -> None:
    calls: list[str] = []
    works = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = clocks.compare(works, 3, CPU)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"  # the first two warm up
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}
    calls.clear()
    clocks.compare(works, 1, CPU, clocks.wall_seconds, warm_up=False)
    assert calls == ["a", "b"]


def test_threads_must_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    with command.threads_kept() as before:
        assert before == torch.get_num_threads()
    with pytest.raises(AssertionError, match="was 2 and is 1"):  # noqa: PT012
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        with command.threads_kept():
            monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def test_progress_is_told_to_the_process_that_asks(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(command.PROGRESS, "1")
    with command.progress(2) as step:
        step("first")
        step("second")
    assert capfd.readouterr().err == f"{command.MARK}0/2 first\n{command.MARK}1/2 second\n"


# --- agreement -----------------------------------------------------------------------------------


def _layer(weight: torch.Tensor) -> Any:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight)
    return find_layers(linear).layers[0]


def test_alpha_by_hand() -> None:
    # Eigenvalues e^0, e^2, e^4, e^6: the upper half starts at e^4, logs 0 and 2: 1 + 2 / 2.
    layer = _layer(torch.diag(torch.exp(torch.tensor([0.0, 1.0, 2.0, 3.0]))))
    assert agreement.alpha(layer, Farms()) == pytest.approx(2.0, rel=1e-6)
    # A fit of each of two windows: diag(1, e) has only its largest in the tail, so no spread;
    # pooled e^0, e^2, e^4, e^6 as before.
    tall = torch.zeros(4, 2)
    tall[0, 0], tall[1, 1], tall[2, 0], tall[3, 1] = 1, math.e, math.e**2, math.e**3
    assert agreement.alpha(_layer(tall), Farms()) == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize("name", ["fno", "resnet18"])
def test_truth_is_that_of_the_published_loop(name: str) -> None:
    network = networks.NETWORKS[name]
    layers = find_layers(measure.build(network, "trained-like")).layers[:4]
    looped = loop.alphas(layers, network.windows.pool, torch.float64)
    mine = [agreement.alpha(layer, network.windows) for layer in layers]
    assert mine == pytest.approx(looped, rel=1e-9)


@pytest.mark.parametrize("windows", [Farms(), Farms(rows=8), Farms(2.0), Farms(rows=8, stride=3)])
def test_agreement_sees_every_window(windows: Farms) -> None:
    torch.manual_seed(0)
    layers = find_layers(nn.Sequential(nn.Linear(20, 44), nn.Linear(24, 24))).layers
    assert agreement.require(layers, windows, "net") < 1e-5


def test_a_disagreement_is_loud(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = find_layers(nn.Linear(30, 30)).layers
    right = agreement.alpha(layers[0], Farms())
    monkeypatch.setattr(agreement, "alpha", lambda *_: right * 1.001)
    with pytest.raises(agreement.DisagreementError, match=r"net: alpha is off by 1\.0e-03"):
        agreement.require(layers, Farms(), "net")
    row = measure.bench(networks.NETWORKS["fno"], "random", measure._parse(["--repeats", "1"]))
    assert row["disagrees"] and "times" not in row


def test_nothing_measured_is_no_agreement() -> None:
    assert agreement.largest_error(find_layers(nn.Linear(2, 2)).layers, Farms()) == math.inf


# --- networks ------------------------------------------------------------------------------------


def test_windows_are_the_published_ones() -> None:
    counts = {
        name: measure._counts(find_layers(networks.NETWORKS[name].build()).layers,
                              networks.NETWORKS[name])
        for name in ("resnet18", "gpt2", "fno64")
    }  # fmt: skip
    assert counts["gpt2"] == {"768x768": 24}
    assert counts["fno64"] == {"64x64": 8 * 144}
    sizes = {"3x3": 189, "64x64": 56, "128x128": 47, "256x256": 47, "512x512": 27, "100x100": 5}
    assert counts["resnet18"] == sizes


def test_trained_like_weights_have_heavy_tails_and_are_the_same_each_time() -> None:
    network = networks.NETWORKS["gpt2"]
    plain, one, two = (measure.build(network, w) for w in ("random", "trained-like",
                                                            "trained-like"))  # fmt: skip
    for p, a, b in zip(plain.parameters(), one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
        if p.ndim == 2:
            plain_s, heavy_s = (torch.linalg.svdvals(w.detach()) for w in (p, a))
            assert heavy_s[0] / heavy_s[384] > 1.2 * plain_s[0] / plain_s[384]


# --- what CUDA counts, without CUDA ---------------------------------------------------------------


def test_only_the_read_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = ["default"]

    @contextlib.contextmanager
    def mode(name: str) -> Any:
        modes.append(name)
        yield
        modes.pop()

    engine: Any = sys.modules["tempbalance.measure.engine"]
    from tempbalance.measure import measure as run

    monkeypatch.setattr(on_cuda, "_debug_mode", mode)
    torch.manual_seed(0)  # a spectrum without a second look
    layers = find_layers(nn.Linear(20, 20)).layers
    seen: list[str] = []
    read, table = engine.read_back, engine.table
    monkeypatch.setattr(engine, "read_back", lambda *a: (seen.append(modes[-1]), read(*a))[1])
    monkeypatch.setattr(engine, "table", lambda *a: (seen.append(modes[-1]), table(*a))[1])
    assert on_cuda.only_the_read_waits(lambda: run(layers)) is True
    assert seen == ["error", "default"]  # the table is made under "error", the read is not

    def waits() -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    assert on_cuda.only_the_read_waits(waits) is False
    with pytest.raises(RuntimeError, match="something else"):
        on_cuda.only_the_read_waits(lambda: (_ for _ in ()).throw(RuntimeError("something else")))


# --- the cost model, by hand ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "parameters"), [(0, 6_738_415_616), (1, 70_553_706_496), (2, 405_853_388_800)]
)
def test_parameters_are_the_published_ones(index: int, parameters: int) -> None:
    assert llm.MODELS[index].parameters == parameters


def test_grouped_query_attention_has_narrow_keys() -> None:
    shapes = {w.name: w.shape[1:] for w in llm.MODELS[1].weights()[:7]}
    assert shapes == {
        "0.q": (8192, 8192), "0.k": (1024, 8192), "0.v": (1024, 8192), "0.o": (8192, 8192),
        "0.gate": (28672, 8192), "0.up": (28672, 8192), "0.down": (8192, 28672),
    }  # fmt: skip


def test_work_of_one_layer_by_hand() -> None:
    up = llm.Weight("up", (1, 28672, 8192))
    small = llm.work(up, Farms(rows=1024))
    assert small.sides == {(1024, 1024): 28 * 8}
    assert small.gram_flops == 224 * 2 * 1024**3
    assert small.tridiagonal_flops == pytest.approx(224 * 4 / 3 * 1024**3)
    whole = llm.work(up, Farms())
    assert whole.sides == {(8192, 8192): 4}  # 3.5 fit side by side; four cover
    assert whole.tridiagonal_bytes == pytest.approx(4 * 4 / 3 * 8192**3)
    both = llm.together([small, whole, small])
    assert both.windows == 2 * 224 + 4
    assert both.gram_flops == 2 * small.gram_flops + whole.gram_flops


def test_roofline_by_hand() -> None:
    roof = rates.Roofline("x", 1e9, 1e12, 1e-3, 2, 3.0)
    # 4/3 1000^3 bytes at 1e9 a second, against two rounds of 1000 columns of 1 ms.
    some = llm.Work({(1000, 1000): 3})
    memory_bound, latency, gram = 4.0, 2.0, 3 * 2e9 / 1e12
    assert roof.seconds(some) == pytest.approx(3.0 * (max(memory_bound, latency) + gram))
    assert roof.seconds(llm.Work({(1000, 1000): 1})) == pytest.approx(3.0 * (4 / 3 + 2e9 / 1e12))
    few = llm.Work({(200, 100): 2})  # 2.7e6 bytes: the latency of 100 columns decides
    assert roof.seconds(few) == pytest.approx(3.0 * (0.1 + 2 * 2 * 200 * 100**2 / 1e12))


def test_measured_rates_by_hand() -> None:
    known = rates.Measured(((64, 1e-3), (256, 16e-3)), "here")
    for side, seconds in ((64, 1e-3), (256, 16e-3), (128, 4e-3), (512, 128e-3), (32, 0.125e-3)):
        assert known.seconds(llm.Work({(side, side): 2})) == pytest.approx(2 * seconds)
    # Twice as high: the Gram matrix doubles (2 to 4 parts), the reduction (4/3) does not.
    taller = (4 + 4 / 3) / (2 + 4 / 3)
    assert known.seconds(llm.Work({(128, 64): 1})) == pytest.approx(taller * 1e-3)


def test_rates_come_from_the_file_of_growth(tmp_path: Path) -> None:
    assert rates.measured("cpu", tmp_path) is None
    assert isinstance(model.default_rates(), (rates.Roofline, rates.Measured))
    points = [{"size": k, "seconds_a_window": k * 1e-3} for k in (256, 64)]
    rows = [{"series": "width", "points": []}, {"series": "rates", "points": points}]
    machine = {"cpu": "Abacus", "threads": 3}
    (tmp_path / "growth_cpu.json").write_text(json.dumps({"machine": machine, "rows": rows}))
    found = rates.measured("cpu", tmp_path)
    assert found is not None and found.sides == ((64, 0.064), (256, 0.256))
    assert found.source.startswith("measured up to 256 on Abacus, 3 threads")


@dataclass(frozen=True)
class _Second:
    """One second a window."""

    source: str = "made up"

    def seconds(self, work: llm.Work) -> float:
        return float(work.windows)


# One block of width 4 with ffn 16: q o are 4 x 4 and k v 2 x 4; the head is 8 x 4.
_TINY = llm.Transformer("tiny", 1, 4, 16, 2, 1, 8, "")
_PLAIN = model.Assumptions(
    peak_flops=1e6, mfu=0.5, tokens_per_step=100.0, shard_bytes=2, node=2,
    nvlink_bytes_per_second=1000.0, network_bytes_per_second=100.0, hop_seconds=0.0,
    launch_seconds=0.0, train_bytes_per_parameter=1.0, gpu_bytes=1e9,
)  # fmt: skip


def test_an_update_by_hand() -> None:
    assert _TINY.parameters == 2 * 16 + 2 * 8 + 3 * 64 + 32 + 32 + 3 * 4
    # Windows: q 1, o 1, k 2, v 2 (of 2 x 2), gate, up and down 4 each, the head 2.
    two = model.update(_TINY, Farms(), 2, _Second(), _PLAIN)
    assert two.count == 20 and two.device_seconds == 20.0
    # By cost: gate | up; down, then head + q | o ... : 4 + 4 + (k v) against 4 + 2 + 1 + 1 + ...
    assert two.compute_seconds == 10.0 and two.imbalance == 1.0
    measured = 2 * (2 * 16 + 2 * 8 + 3 * 64 + 32)
    assert two.gathered_bytes == measured / 2  # the other half is here already
    assert two.read_seconds == pytest.approx(measured / 2 / 1000)
    assert two.exchanged_bytes == 8 * 12 * 8
    assert two.exchange_seconds == pytest.approx(2 * 8 * 12 * 8 / 1000)
    assert two.seconds == pytest.approx(10.0 + measured / 2000 + 2 * 768 / 1000)
    assert two.step_seconds == pytest.approx(6 * _TINY.parameters * 100 / (2 * 1e6 * 0.5))
    assert two.share(10) == pytest.approx(two.seconds / (10 * two.step_seconds))
    assert 0.009 < two.share(two.every) <= 0.01
    four = model.update(_TINY, Farms(), 4, _Second(), _PLAIN)
    assert four.read_seconds == pytest.approx(measured * 3 / 4 / 100)  # beyond a node
    owner_only = model.update(_TINY, Farms(), 4, _Second(), model.dataclasses.replace(
        _PLAIN, gather_everywhere=False))  # fmt: skip
    assert owner_only.read_seconds == pytest.approx(four.read_seconds / 4)


def test_memory_of_a_window_is_what_the_engine_counts() -> None:
    slices = torch.zeros(1, 96, 64, dtype=torch.bfloat16)
    task = jobs.Task(slices, Farms(aspect_ratio=0.5).grid(96, 64), torch.ones(()))
    expected = model.window_bytes(task.grid.height, task.grid.width, 2)
    assert jobs.bytes_of(task, torch.float32) == expected


@settings(max_examples=30, deadline=None)
@given(
    blocks=st.integers(1, 5), width=st.sampled_from([8, 16, 32]), ranks=st.integers(1, 40)
)  # fmt: skip
def test_ranks_share_all_of_it(blocks: int, width: int, ranks: int) -> None:
    small = llm.Transformer("x", blocks, width, 3 * width, 4, 2, 5 * width, "")
    weights = small.weights()
    owners = model.owners(weights, Farms(rows=4), ranks)
    assert len(owners) == len(weights) and set(owners) <= set(range(ranks))
    some = model.update(small, Farms(rows=4), ranks, _Second(), _PLAIN)
    assert some.device_seconds == some.count
    largest = max(llm.work(w, Farms(rows=4)).windows for w in weights)
    assert max(largest, some.count / ranks) <= some.compute_seconds <= some.count
    assert some.imbalance >= 1 - 1e-9


def test_advice_is_the_largest_window_that_is_cheap() -> None:
    quick = model.dataclasses.replace(_PLAIN, tokens_per_step=1e9)
    updates = model.sweep(_Second(), quick, [_TINY], [2], [2, None])
    assert [u.windows for u in updates] == ["Farms(rows=2)", "Farms()"]
    assert model.advice(updates)[0].startswith("tiny on 2 GPUs: Farms(), ")
    slow = model.dataclasses.replace(_PLAIN, tokens_per_step=1.0)
    (line,) = model.advice(model.sweep(_Second(), slow, [_TINY], [2], [2, None]))
    assert "Farms()" in line and "1% when measured each" in line  # fewer windows, a second each
    tight = model.dataclasses.replace(_PLAIN, gpu_bytes=10.0)
    assert model.sweep(_Second(), tight, [_TINY], [2], [2]) == []


def test_smaller_windows_cost_less_on_a_large_model() -> None:
    updates = model.sweep(rates.Roofline(), model.Assumptions(), [llm.MODELS[1]], [64], [512, None])
    assert updates[1].device_seconds > 10 * updates[0].device_seconds
    assert len(model.cells(updates[0])) == len(model.COLUMNS)


# --- each command on something small --------------------------------------------------------------


def test_what_a_quick_a_full_and_a_cuda_run_measure() -> None:
    quick, full, cuda = (
        measure._parse(some).cases for some in ([], ["--full"], ["--device", "cuda"])
    )
    assert ("vgg16", "random") in quick and ("vgg16", "trained-like") not in quick
    assert ("gpt2", "trained-like") in quick and ("gpt2_full", "random") not in quick
    for some in (full, cuda):
        assert {("vgg16", "trained-like"), ("gpt2_full", "trained-like")} <= set(some)
    asked = measure._parse(["--networks", "vgg16"]).cases
    assert asked == [("vgg16", "random"), ("vgg16", "trained-like")]


def test_exponent_by_hand() -> None:
    x = [1.0, 2.0, 4.0, 8.0]
    assert growth.exponent(x, [3 * v**2.5 for v in x]) == pytest.approx(2.5)
    assert growth.exponent([3.0], [1.0]) == 0.0


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of figures of the smallest cases."""
    folder = tmp_path_factory.mktemp("figures")

    def at(name: str) -> list[str]:
        return ["--json", str(folder / f"{name}_cpu.json")]

    quick = ["--repeats", "1"]
    assert measure.main([*at("measure"), *quick, "--networks", "fno"]) == 0
    assert training.main([*at("training"), *quick, "--tiny"]) == 0
    assert memory.main([*at("memory"), "--tiny"]) == 0
    picture = ["--picture", str(folder / "growth.png")]
    # What it returns is a verdict on times, and no test may depend on those.
    growth.main([*at("growth"), "--repeats", "2", "--largest", "128", *picture])
    return folder


def test_files_say_where_and_how(figures: Path) -> None:
    for name in ("measure", "training", "memory", "growth"):
        machine = json.loads((figures / f"{name}_cpu.json").read_text())["machine"]
        assert machine["torch"] == torch.__version__
        assert machine["threads"] == machine["threads_after"] == torch.get_num_threads()
        assert {"commit", "cpu", "python", "load_average"} <= set(machine)
    assert (figures / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_measure_has_agreement_times_and_threads(figures: Path) -> None:
    rows = json.loads((figures / "measure_cpu.json").read_text())["rows"]
    assert [row["weights"] for row in rows] == ["random", "trained-like"]
    for row in rows:
        assert row["alpha_error"] < 1e-4 and row["threads_before"] == row["threads_after"]
        assert row["ratio"] == pytest.approx(row["times"]["loop"][0] / row["times"]["measure"][0])


def test_training_reports_division_and_truth(figures: Path) -> None:
    (row,) = json.loads((figures / "training_cpu.json").read_text())["rows"]
    one, update = row["step_quartiles"][1], row["update_quartiles"][1]
    assert row["by_division"]["100"] == pytest.approx(update / (100 * one))
    assert row["by_division"]["epoch"] == pytest.approx(update / (20 * one))
    plain = {r["every"]: r for r in row["trained"] if not r["variant"]}
    for every, steps, measurements in (("epoch", 20, 1), ("100", 100, 1), ("1", 5, 5)):
        assert plain[every]["of_steps"] == steps
        assert plain[every]["measurements"] == measurements
        times = plain[every]["times"]
        share = times["balanced"][0] / times["uniform"][0] - 1
        assert plain[every]["share"] == pytest.approx(share)


def test_what_would_take_too_long_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(training, "VARIANTS", {"100": {"": {}}})
    file = tmp_path / "t.json"
    training.main(["--tiny", "--repeats", "1", "--block-seconds", "0", "--json", str(file)])
    (row,) = json.loads(file.read_text())["rows"]
    (skipped,) = [r["not_run"] for r in row["trained"]]
    assert skipped.startswith("a block of 100 steps takes")


def test_memory_is_held_against_the_budget(figures: Path) -> None:
    (row,) = json.loads((figures / "memory_cpu.json").read_text())["rows"]
    assert row["windows"] == "Farms(rows=64)" and row["model_bytes"] == 512 * 256 * 2
    assert row["alpha_error"] < 1e-4 and not row["over_budget"]


def test_growth_that_is_too_fast_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def quadratic(works: Any, repeats: int, device: Any) -> dict[str, list[float]]:
        quadratic.calls += 1  # type: ignore[attr-defined]
        return {"measure": [4.0**quadratic.calls]}  # type: ignore[attr-defined]

    quadratic.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(growth, "compare", quadratic)
    arguments = ["--series", "depth", "--largest", "4", "--picture", ""]
    assert growth.main([*arguments, "--json", str(tmp_path / "g.json")]) == 1


def test_the_page_has_every_figure_and_names_what_is_missing(figures: Path, tmp_path: Path) -> None:
    page = report.write(figures, tmp_path / "page.md").read_text()
    assert "fno, trained-like" in page and "**CPU, tiny**" in page and "Farms(rows=64)" in page
    for name in ("measure", "training", "memory", "growth", "optimizer_groups"):
        assert f"not run (no GPU at hand): `python -m benchmarks.{name} --device cuda`" in page
    assert "not run (not yet): `python -m benchmarks.ranks --device cpu`" in page
    assert "assumed (H200 rooflines" in page and "`mfu = 0.4`" in page
    width = 0
    for line in page.splitlines():  # every row as wide as its header
        if line.startswith("|"):
            width = width or line.count("|")
            assert line.count("|") == width, line
        else:
            width = 0
    empty = report.text(tmp_path)
    assert "not run (not yet): `python -m benchmarks.measure --device cpu`" in empty


def test_eigensolver_figures_have_a_section(tmp_path: Path) -> None:
    machine = {"gpu": "X1", "cpu": "", "torch": "2", "threads": 1, "load_average": 0,
               "load_average_after": 0, "commit": "abc"}  # fmt: skip
    cases = [{"case": "56 x 64", "form": "library", "ms": 4.5},
             {"case": "56 x 64", "form": "triton", "note": "no triton"}]  # fmt: skip
    (tmp_path / "eigensolver_cuda.json").write_text(json.dumps({"machine": machine, "rows": cases}))
    assert "| CUDA | 56 x 64 | 4.50 |  |" in report.text(tmp_path)


def test_one_command_runs_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert {"measure", "training", "growth", "memory", "ranks"} <= set(everything.available("cpu"))
    assert "ranks" not in everything.available("cuda")
    ran: list[str] = []

    def run(name: str, options: Any, bar: Any) -> tuple[int, float]:
        ran.append(f"{name} {options.device}")
        return int(name == "memory"), 0.1

    monkeypatch.setattr(everything, "_run", run)
    monkeypatch.setattr(report, "write", lambda: tmp_path)
    assert everything.main(["--device", "cpu", "--only", "growth", "measure"]) == 0
    assert ran == ["measure cpu", "growth cpu"]
    assert everything.main(["--device", "cuda", "--only", "memory"]) == 1


@pytest.mark.slow
def test_a_process_of_its_own_reports_its_end(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from rich.progress import Progress

    options = everything.argparse.Namespace(device="cuda", full=False)
    with Progress() as bar:
        code, seconds = everything._run("memory", options, bar)
    if not torch.cuda.is_available():
        assert code == 1 and "no GPU at hand" in capfd.readouterr().out
    assert seconds > 0


@pytest.mark.slow
def test_two_ranks_share_the_time() -> None:
    from benchmarks import ranks

    row = ranks.bench("fno", 2, 2)
    assert row["layers"] == [4, 4] and len(row["times"]) == 2
    assert 0 < row["exchange"] < row["seconds"] and row["alpha_error"] < 1e-4


@pytest.mark.parametrize(
    "name",
    [path.stem for path in sorted(Path(everything.__file__).parent.glob("*.py"))
     if "def main(" in path.read_text()],
)  # fmt: skip
def test_help_can_be_read(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0 and "usage" in capsys.readouterr().out
