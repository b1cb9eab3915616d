"""Pictures of runs: what is read from the files, and what is in the figures."""

from __future__ import annotations

import builtins
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tempbalance as tb
from tempbalance.cli.command import main
from tempbalance.runs import plot as run_plots
from tempbalance.runs import write as history
from tempbalance.runs.read import find_run, read_run

pytest.importorskip("matplotlib")

NAN = float("nan")


def write(folder: Path, layers: int = 4, times: int = 5, steps: int = 10) -> Path:
    """A run whose layer i has alpha 2 + i + t / 10 at time t, but layer 1 none at the start."""
    for t in range(times):
        alphas: dict[str, float | None] = {
            f"model.block{i // 2}.conv{i % 2}": 2 + i + t / 10 for i in range(layers)
        }
        if t == 0 and layers > 1:
            alphas["model.block0.conv1"] = None
        factors = {name: 0.5 + i / layers for i, name in enumerate(alphas)}
        rates = {name: 0.1 * factor for name, factor in factors.items()}
        history.append(folder, t, t * steps, alphas, factors, rates)
    return folder


def write_spectra(folder: Path, names: list[str]) -> dict[str, Any]:
    """Spectra of random layers at the start, and of the same with a large direction at the end."""
    records: dict[str, Any] = {}
    for last in (False, True):
        model = nn.ModuleDict()
        for name in names:
            parent: Any = model
            *path, leaf = name.split(".")
            for part in path:
                if part not in parent:
                    parent[part] = nn.ModuleDict()
                parent = parent[part]  # type: ignore[assignment]
            parent[leaf] = nn.Linear(40, 40)
            if last:
                with torch.no_grad():
                    parent[leaf].weight.add_(torch.outer(torch.randn(40), torch.randn(40)))
        report = tb.analyze(model)
        history.save_esd(folder, report.layers, last)
        records["last" if last else "first"] = report
    return records


def test_reads_what_was_written(tmp_path: Path) -> None:
    run = read_run(find_run(write(tmp_path / "a" / "version_0").parent))
    assert run.folder == tmp_path / "a" / "version_0"
    assert run.short == ["block0.conv0", "block0.conv1", "block1.conv0", "block1.conv1"]
    assert run.prefix == "model."
    np.testing.assert_array_equal(run.epochs, range(5))
    np.testing.assert_array_equal(run.steps, np.arange(5) * 10)
    wanted = 2 + np.arange(4)[:, None] + np.arange(5) / 10
    wanted[1, 0] = NAN
    np.testing.assert_allclose(run.alphas, wanted)
    np.testing.assert_allclose(run.multipliers[:, 0], [0.5, 0.75, 1.0, 1.25])
    np.testing.assert_allclose(run.rates, 0.1 * run.multipliers)
    assert not run.observed_only


def test_a_resumed_run_counts_its_later_attempt(tmp_path: Path) -> None:
    write(tmp_path, times=4)
    for epoch in (2, 3):
        history.append(tmp_path, epoch, epoch * 10, {"model.block0.conv0": 9.0 + epoch}, {}, {})
    run = read_run(tmp_path)
    np.testing.assert_array_equal(run.epochs, range(4))
    np.testing.assert_allclose(run.alphas[0], [2.0, 2.1, 11.0, 12.0])
    assert np.isnan(run.alphas[2, 2:]).all()  # what the first attempt wrote there is void
    history.append(tmp_path, 3, 30, {"model.block0.conv0": 7.0}, {}, {})  # the same once more
    np.testing.assert_allclose(read_run(tmp_path).alphas[0], [2.0, 2.1, 11.0, 7.0])


@pytest.mark.parametrize("layers", [6, 300])
def test_alpha_heatmap(tmp_path: Path, layers: int) -> None:
    run = read_run(write(tmp_path, layers))
    figure: Any = run_plots.alpha_heatmap(run)
    axes, bar = figure.axes
    (mesh,) = axes.collections
    drawn = mesh.get_array().reshape(layers, 5)
    np.testing.assert_allclose(np.ma.filled(drawn, NAN), run.alphas)
    assert drawn.mask.sum() == 1
    assert axes.patch.get_hatch()  # what shows through where there is no alpha
    assert "not measured" in axes.get_legend().get_texts()[0].get_text()
    assert axes.yaxis_inverted()  # the first layer is on top
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert "block0.conv0" in labels[0] and len(labels) <= 48
    assert axes.get_xlabel() == "epoch"
    assert bar.get_ylabel() == r"$\alpha$"


def test_one_wild_alpha_does_not_flatten_the_rest(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(2, 4, 5000)
    assert run_plots._range(values) == (values.min(), values.max(), "neither")
    low, high, extend = run_plots._range(np.append(values, 60.0))
    assert (extend, 2 <= low < 2.1, 3.9 < high < 4.1) == ("max", True, True)


def test_multipliers_as_named_lines(tmp_path: Path) -> None:
    run = read_run(write(tmp_path, 20))
    figure: Any = run_plots.multipliers(run)
    (axes,) = figure.axes
    lines = [line for line in axes.lines if len(line.get_xdata()) == 5]
    np.testing.assert_allclose([line.get_ydata() for line in lines], run.multipliers)
    assert {text.get_text() for text in axes.texts} == set(run.short)
    figure.canvas.draw()
    boxes = sorted((t.get_window_extent().y0, t.get_window_extent().y1) for t in axes.texts)
    assert all(b[0] > a[1] - 2 for a, b in itertools.pairwise(boxes))  # none overlap


def test_names_of_equal_ends_are_spread(tmp_path: Path) -> None:
    ends = np.array([0.5, 0.5, 0.52, 0.1])
    places = run_plots._spread(ends, 0.1)
    assert np.diff(np.sort(places)).min() >= 0.1 - 1e-12
    assert places[3] == 0.1
    np.testing.assert_allclose(places[:3].mean(), ends[:3].mean())


def test_multipliers_of_many_layers_as_a_heatmap(tmp_path: Path) -> None:
    run = read_run(write(tmp_path, 300))
    figure: Any = run_plots.multipliers(run)
    axes, _ = figure.axes
    (mesh,) = axes.collections
    np.testing.assert_allclose(mesh.get_array().reshape(300, 5), run.multipliers)
    norm: Any = mesh.norm
    assert norm(1.0) == pytest.approx(0.5)  # no change is the middle of the colours
    assert norm(0.5) == pytest.approx(1 - norm(2.0))


def test_spectra_at_start_and_end(tmp_path: Path) -> None:
    names = list(read_run(write(tmp_path)).layers)
    records = write_spectra(tmp_path, names)
    run = read_run(tmp_path)
    figure: Any = run_plots.spectra(run, names[:2])
    assert [axes.get_title() for axes in figure.axes] == ["block0.conv0", "block0.conv1"]
    for axes, name in zip(figure.axes, names, strict=False):
        assert axes.get_xscale() == axes.get_yscale() == "log"
        texts = [text.get_text() for text in axes.get_legend().get_texts()]
        for when, text in zip(("first", "last"), texts, strict=True):
            assert text.startswith(when)
            assert f"= {records[when][name].alpha:.2f}" in text
        for line in axes.lines:
            x, y = (np.asarray(data, dtype=float) for data in line.get_data())
            record = records[str(line.get_label()).partition(":")[0]][name]
            np.testing.assert_allclose(np.diff(np.log(y)) / np.diff(np.log(x)), -record.alpha)
            assert x[0] == pytest.approx(record.xmin)


def test_chosen_layers_are_those_of_chief_alpha(tmp_path: Path) -> None:
    run = read_run(write(tmp_path, 5))
    assert [run.layers.index(name) for name in run_plots._chief(run)] == [0, 2, 4]
    assert run.matching(["block1.*", "model.block0.conv0"]) == [run.layers[i] for i in (0, 2, 3)]


def test_command_line(tmp_path: Path, capsys: Any) -> None:
    names = list(read_run(write(tmp_path / "run", 14)).layers)
    write_spectra(tmp_path / "run", names)
    assert main(["plot", str(tmp_path)]) == 0
    made = sorted(p.name for p in (tmp_path / "run" / "plots").iterdir())
    assert made == ["alpha.png", "esd.png", "multipliers.png"]
    for name in made:
        assert (tmp_path / "run" / "plots" / name).read_bytes().startswith(b"\x89PNG")
    out = tmp_path / "out"
    assert main(["plot", str(tmp_path / "run"), "--out", str(out), "--layers", "*"]) == 0
    assert {"esd.png", "esd_2.png"} <= {p.name for p in out.iterdir()}
    assert str(out / "esd_2.png") in capsys.readouterr().err


def test_an_observer_has_no_multipliers(tmp_path: Path) -> None:
    history.append(tmp_path, 0, 0, {"fc": 2.5}, {}, {})
    assert read_run(tmp_path).observed_only
    assert [path.name for path in run_plots.plot_run(tmp_path)] == ["alpha.png"]


def test_measured_by_step(tmp_path: Path) -> None:
    for step in (0, 5, 10, 30):
        history.append(tmp_path, step // 20, step, {"a": 2.0, "b": 3.0}, {"a": 0.5, "b": 1.5}, {})
    run = read_run(tmp_path)
    axes: Any = run_plots.alpha_heatmap(run).axes[0]
    assert axes.get_xlabel() == "optimizer step"
    edges = axes.collections[0].get_coordinates()[0, :, 0]
    np.testing.assert_allclose(edges, [-2.5, 2.5, 7.5, 20, 40])


def test_errors_say_what_to_do(tmp_path: Path, capsys: Any) -> None:
    def fails(*arguments: str) -> str:
        assert main(["plot", *arguments]) == 2
        return str(capsys.readouterr().err)

    assert "there is no folder" in fails(str(tmp_path / "none"))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "TempBalanceCallback writes it" in fails(str(empty))
    write(tmp_path / "two" / "a"), write(tmp_path / "two" / "b")
    text = fails(str(tmp_path / "two"))
    assert "holds 2 runs" in text and str(tmp_path / "two" / "b") in text
    run = str(tmp_path / "two" / "a")
    assert "no layer matches 'fc'; the layers are block0.conv0" in fails(run, "--layers", "fc")
    assert "no spectrum of model.block0.conv0 was kept" in fails(run, "--layers", "block0.conv0")
    (tmp_path / "two" / "a" / "esd_last.npz").write_bytes(b"PK no")
    assert "esd_last.npz is damaged" in fails(run)
    for content, message in (
        ("a,b\n1,2\n", "no column 'epoch'"),
        ("epoch,step,layer,alpha,multiplier,lr\n", "no measurement yet"),
        ("epoch,step,layer,alpha,multiplier,lr\n0,x,fc,2,1,1\n", "line 2: not a measurement"),
    ):
        (empty / "tempbalance.csv").write_text(content)
        assert message in fails(str(empty))


def test_without_matplotlib(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert main(["plot", str(write(tmp_path))]) == 2
    assert "pip install 'tempbalance[plot]'" in capsys.readouterr().err
