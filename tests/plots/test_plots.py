"""Pictures: what is in them (axes, legends, numbers), not their pixels."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tempbalance as tb
from tempbalance.plots import report as plots
from tempbalance.plots import style

pytest.importorskip("matplotlib")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved, kept for a look."""
    figures: list[Any] = []
    save = plots.save

    def keep(figure: Any, path: Any) -> None:
        figures.append(figure)
        return save(figure, path)

    monkeypatch.setattr(plots, "save", keep)
    return figures


def network(layers: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 24, 3), *[nn.Linear(24, 24 + 4 * i) for i in range(layers)])


def legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_esd_of_a_layer(tmp_path: Path, drawn: list[Any]) -> None:
    report = tb.analyze(network())
    report.plot(tmp_path / "new" / "esd.png", layer="1")
    assert (tmp_path / "new" / "esd.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    record = report["1"]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    text = " ".join(legend(axes))
    assert f"= {record.alpha:.3f}" in text
    assert f"D = {record.D:.3f}" in text
    assert f"xmin = {record.xmin:.3g}" in text
    lines = {line.get_label(): line for line in axes.lines}
    (marked,) = [line for label, line in lines.items() if label.startswith("xmin")]
    assert marked.get_xdata()[0] == record.xmin
    assert "1" in axes.get_title()


def test_the_drawn_tail_is_the_fitted_density(tmp_path: Path, drawn: list[Any]) -> None:
    report = tb.analyze(nn.Linear(64, 64))
    report.plot(tmp_path / "esd.png", layer=report.layers[0].name)
    record = report.layers[0]
    assert record.alpha and record.xmin and record.n_tail
    (tail,) = [line for line in drawn[0].axes[0].lines if "alpha" in str(line.get_label())]
    x, y = (np.asarray(data, dtype=float) for data in tail.get_data())
    # Slope and mass: a density of exponent alpha that holds the tail's share of the spectrum.
    slope = np.diff(np.log(y)) / np.diff(np.log(x))
    np.testing.assert_allclose(slope, -record.alpha, rtol=1e-6)
    mass = y[0] * record.xmin / (record.alpha - 1)
    assert mass == pytest.approx(record.n_tail / record.n_eigs)


def test_the_histogram_is_a_density() -> None:
    values = np.sort(np.random.default_rng(0).pareto(1.5, 4000) + 1)
    edges, density = style.histogram(values, values[0])
    assert (density * np.diff(edges)).sum() == pytest.approx(1.0)
    edges, density = style.histogram(values, values[400])
    assert (density * np.diff(edges)).sum() == pytest.approx(0.9)


@pytest.mark.parametrize("layers", [1, 4, 70])
def test_overview_shows_every_layer(tmp_path: Path, drawn: list[Any], layers: int) -> None:
    report = tb.analyze(network(layers))
    report.plot(tmp_path / "all.png")
    depth, *esds = drawn[0].axes
    points = np.concatenate([np.asarray(c.get_offsets()) for c in depth.collections])
    by_depth = points[points[:, 0].argsort()]
    np.testing.assert_allclose(by_depth[:, 1], [r.alpha for r in report.layers])
    assert len(esds) == min(3, layers + 1)
    alphas = sorted(r.alpha for r in report.measured if r.alpha)
    assert f"= {alphas[0]:.3f}" in " ".join(legend(esds[0]))
    assert f"= {alphas[-1]:.3f}" in " ".join(legend(esds[-1]))
    ticks = [t.get_text() for t in depth.get_xticklabels()]
    assert len(ticks) == layers + 1 if layers < 40 else len(ticks) <= 20
    assert any(t.startswith("Linear") for t in legend(depth))


def test_the_level_is_that_of_random_matrices_of_the_shapes() -> None:
    """No line at 2 for all: a small layer reads another alpha at random than a large one."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(200, 200))
    report = tb.analyze(model, windows=tb.WholeMatrix())
    axes = report.plot().axes[0]
    (level,) = [x for x in axes.lines if "random matrix" in str(x.get_label())]
    assert list(level.get_xdata()) == [0, 1]
    np.testing.assert_allclose(
        np.asarray(level.get_ydata()), [report.level()["0"], report.level()["1"]]
    )
    for weight in model.parameters():
        nn.init.normal_(weight)
    large = tb.analyze(model, windows=tb.WholeMatrix())["1"].alpha
    assert report.level()["1"] == pytest.approx(large, abs=0.05)
    assert not [x for x in axes.lines if len(set(np.asarray(x.get_ydata()).tolist())) == 1]


@pytest.mark.parametrize(
    ("suffix", "start"), [("pdf", b"%PDF"), ("svg", b"<?xml"), ("png", b"\x89PNG")]
)
def test_the_suffix_says_the_format(tmp_path: Path, suffix: str, start: bytes) -> None:
    figure = tb.analyze(network()).plot(tmp_path / f"a.{suffix}")
    assert (tmp_path / f"a.{suffix}").read_bytes().startswith(start)
    assert figure.axes


def test_overview_marks_layers_without_alpha(tmp_path: Path, drawn: list[Any]) -> None:
    model = network()
    nn.init.zeros_(model[1].weight)  # type: ignore[arg-type, index]
    tb.analyze(model).plot(tmp_path / "all.png")
    assert "no alpha (1)" in legend(drawn[0].axes[0])


def test_one_wild_alpha_gets_a_logarithmic_axis(tmp_path: Path, drawn: list[Any]) -> None:
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)])
    with torch.no_grad():
        model[2].weight.copy_(torch.eye(32) + 0.01 * torch.randn(32, 32))  # type: ignore
    tb.analyze(model).plot(tmp_path / "a.png")
    assert drawn[0].axes[0].get_yscale() == "log"


def test_compare(tmp_path: Path, drawn: list[Any]) -> None:
    model = network(5)
    before = tb.analyze(model)
    with torch.no_grad():
        model[3].weight.mul_(torch.exp(torch.randn(model[3].weight.shape[0], 1)))  # type: ignore
    after = tb.analyze(model)
    plots.plot_compare(before.layers, after.layers, tmp_path / "c.pdf", ("epoch 1", "epoch 9"))
    assert (tmp_path / "c.pdf").read_bytes().startswith(b"%PDF")
    depth, *esds = drawn[0].axes
    assert any("epoch 1" in text for text in legend(depth))
    assert len(esds) == 3
    (changed,) = [axes for axes in esds if axes.get_title().endswith(": 3")]
    text = " ".join(legend(changed))
    assert f"{before['3'].alpha:.3f}" in text
    assert f"{after['3'].alpha:.3f}" in text


def test_no_global_state(tmp_path: Path) -> None:
    tb.analyze(network()).plot(tmp_path / "a.png")
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_errors(tmp_path: Path) -> None:
    report = tb.analyze(network())
    with pytest.raises(KeyError, match="no layer 'nope'"):
        report.plot(tmp_path / "a.png", layer="nope")
    with pytest.raises(ValueError, match="xyz"):
        report.plot(tmp_path / "a.xyz")
    zero = nn.Linear(16, 16)
    nn.init.zeros_(zero.weight)
    empty = tb.analyze(zero)
    with pytest.raises(ValueError, match="every weight is zero"):
        empty.plot(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no spectrum to draw.*every weight is zero"):
        empty.plot(tmp_path / "a.png", layer=empty.layers[0].name)
    with pytest.raises(ValueError, match="no weight matrix"):
        tb.analyze(nn.ReLU()).plot(tmp_path / "a.png")
    with pytest.raises(ValueError, match="nothing to compare"):
        plots.plot_compare(report.layers, empty.layers, tmp_path / "a.png")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def block(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    report = tb.analyze(network())
    monkeypatch.setattr(builtins, "__import__", block)
    with pytest.raises(ImportError, match=r"pip install 'tempbalance\[plot\]'"):
        report.plot(tmp_path / "a.png")
