"""The bias study: its law against a second one, its rankings by hand, its figure and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from reference import marchenko_pastur_alpha as by_midpoints

from experiments import bias, provenance


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.125, 0.03125])
def test_the_law_agrees_with_a_second_integration(ratio: float) -> None:
    assert bias.marchenko_pastur_alpha(ratio) == pytest.approx(by_midpoints(ratio), rel=1e-4)


def layer(rows: int, cols: int, plain: float, farms: float) -> dict[str, Any]:
    return {"name": "x", "kind": "Linear", "shape": [1, rows, cols], "plain": plain, "farms": farms}


LAYERS = [layer(10, 10, 2.0, 4.0), layer(10, 20, 3.0, 3.0), layer(40, 10, 4.0, 2.0)]


def test_rankings_by_hand() -> None:
    found = bias.rankings(LAYERS)
    assert found["rank"] == pytest.approx(-1.0)
    assert found["shape"] == pytest.approx(1.0) and found["shape_farms"] == pytest.approx(-1.0)
    assert (found["layers"], found["moved"], found["most"]) == (3, 2, pytest.approx(1.0))


def test_figure_and_text_come_from_the_file(tmp_path: Path, capsys: Any) -> None:
    row = {"ratio": 1.0, "shape": [256, 256], "marchenko_pastur": 2.12}
    rows = [
        {**row, "plain": [2.13, 0.1], "farms": [2.09, 0.1]},
        {**row, "ratio": 0.5, "shape": [362, 181], "plain": [2.7, 0.1], "farms": [2.08, 0.1]},
    ]
    networks = {"a net": {"overrides": [], "before": LAYERS, "after": LAYERS}}
    results = tmp_path / "results"
    results.mkdir()
    content = {"random": rows, "networks": networks, "commit": "abc", "device": "cpu"}
    provenance.write_json(results / "bias.json", content)
    assert bias.main(["--results", str(results)]) == 0
    text = (results / "bias.md").read_text()
    assert "from 2.13 to 2.70" in text and "a net, trained with one rate, 3 layers" in text
    assert (tmp_path / "images" / "bias.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_network_is_trained_and_measured(tmp_path: Path) -> None:
    overrides = ["experiment=quickstart", "model.width=16", "trainer.max_epochs=1"]
    more = ["data.share=0.1", "trainer.enable_progress_bar=false", f"data_root={tmp_path}"]
    found = bias.trained_alphas([*overrides, *more], str(tmp_path))
    assert [x["name"] for x in found["before"]] == [x["name"] for x in found["after"]]
    assert found["before"] != found["after"]
