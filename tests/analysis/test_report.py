"""The report: lookup, sums, exports, the table, and strict mode."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tempbalance import Farms, MeasurementError, Outcome, Report, WholeMatrix, analyze
from tempbalance.spectra.windows import Windows


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    zero = nn.Linear(20, 20)
    nn.init.zeros_(zero.weight)
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(50, 20),
            "first": nn.Linear(20, 40),
            "norm": nn.LayerNorm(40),
            "conv": nn.Conv2d(12, 16, 3),
            "zero": zero,
            "small": nn.Linear(20, 3),
        }
    )


@pytest.fixture(scope="module")
def report() -> Report:
    return analyze(model())


def test_order_lookup_and_length(report: Report) -> None:
    assert [layer.name for layer in report] == ["first", "conv", "zero", "small"]
    assert len(report) == len(report.layers) == 4
    assert report["conv"] is report.layers[1]
    assert report["conv"].shape == (9, 16, 12)
    assert report["zero"].outcome is Outcome.ALL_ZERO
    assert [layer.name for layer in report.measured] == ["first", "conv"]
    assert [layer.name for layer in report.failed] == ["zero", "small"]


def test_a_missing_name_says_why(report: Report) -> None:
    with pytest.raises(KeyError, match="table of vectors"):
        report["embedding"]
    with pytest.raises(KeyError, match="normalization"):
        report["norm.weight"]
    with pytest.raises(KeyError, match="no layer 'fc'; there are .*first"):
        report["fc"]


def test_coverage_counts_parameters(report: Report) -> None:
    total = sum(p.numel() for p in model().parameters())
    assert report.numel == total
    assert report.coverage == pytest.approx((20 * 40 + 12 * 16 * 9) / total)
    assert sum(x.numel for x in report.layers) + sum(s.numel for s in report.skipped) == total


def test_model_metrics(report: Report) -> None:
    first, conv = report["first"], report["conv"]
    tops = [2 * math.log10(x.spectral_norm) for x in (first, conv) if x.spectral_norm]
    hats = [x.alpha * top for x, top in zip((first, conv), tops, strict=True) if x.alpha]
    assert report.weighted_alpha == pytest.approx(np.mean(hats))
    assert report.mean_alpha == pytest.approx(np.mean([first.alpha, conv.alpha]))  # type: ignore[list-item]
    # The log norm needs no fit: the layer that is too small for one counts, that of zeros has none.
    norms = [x.log_norm for x in (first, conv, report["small"])]
    assert report.mean_log_norm == pytest.approx(np.mean(norms))  # type: ignore[arg-type]


@pytest.mark.parametrize("windows", [WholeMatrix(), Farms()])
def test_norms_are_those_of_the_weight(windows: Windows) -> None:
    linear = nn.Linear(30, 50)
    record = analyze(linear, windows=windows).layers[0]
    weight = linear.weight.detach().double()
    assert record.spectral_norm == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)))
    frobenius = float(torch.linalg.matrix_norm(weight))
    assert record.frobenius_norm == pytest.approx(frobenius)
    assert record.log_norm == pytest.approx(2 * math.log10(frobenius))
    assert record.stable_rank == pytest.approx((frobenius / record.spectral_norm) ** 2)
    assert record.alpha is not None
    assert record.alpha_hat == pytest.approx(2 * record.alpha * math.log10(record.spectral_norm))
    assert record.eigenvalues is not None
    assert record.n_tail == record.n_eigs // 2
    assert record.xmin == pytest.approx(record.eigenvalues[record.n_eigs // 2])
    assert record.lambda_max == pytest.approx(record.eigenvalues[-1])


def test_norms_need_room(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 40))
    with caplog.at_level("INFO", "tempbalance"):
        large, small = analyze(model, windows=Farms(rows=64), budget=2**20).layers
    assert "norms of 1 of 2 layers are left out" in caplog.text
    assert large.alpha is not None and small.alpha is not None
    assert large.spectral_norm is large.alpha_hat is large.log_norm is large.stable_rank is None
    assert small.spectral_norm == pytest.approx(
        float(torch.linalg.matrix_norm(model[1].weight.detach(), 2))
    )
    assert str(analyze(model, windows=Farms(rows=64), budget=2**20))


def test_norms_of_a_wide_weight_are_not_those_of_its_windows() -> None:
    linear = nn.Linear(600, 20)
    whole, farms = (analyze(linear, windows=w).layers[0] for w in (WholeMatrix(), Farms()))
    assert farms.stable_rank == pytest.approx(whole.stable_rank)
    assert farms.stable_rank is not None and farms.stable_rank < 20
    assert farms.spectral_norm == pytest.approx(whole.spectral_norm)
    assert farms.lambda_max is not None and whole.lambda_max is not None
    assert farms.lambda_max < 0.5 * whole.lambda_max and farms.alpha != whole.alpha


def test_the_table(report: Report) -> None:
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["layer", "first", "conv", "zero", "small"]
    assert "1 x 40 x 20" in lines[1]
    assert f"{report['first'].alpha:.3f}" in lines[1]
    assert lines[3].split()[-2:] == ["all", "zero"]
    text = str(report)
    assert "2 of 4 layers measured" in text
    assert f"{report.coverage:.1%}" in text
    assert "layer 'zero' (1 x 20 x 20): every weight is zero" in text
    assert "lower min_eigs" in text
    assert "table of vectors" in text
    assert "nan" not in text
    assert "inf" not in text


def test_what_repeats_is_said_once_with_a_count() -> None:
    text = str(analyze(nn.Sequential(*[nn.Linear(20, 3) for _ in range(6)])))
    assert text.count("lower min_eigs to measure it") == 1
    assert "(5 more are too small: 1, 2, 3 and 2 more)" in text


def test_an_empty_model_has_a_report() -> None:
    report = analyze(nn.Sequential(nn.ReLU()))
    assert (len(report), report.coverage, report.numel) == (0, 0.0, 0)
    assert report.mean_alpha is report.weighted_alpha is report.mean_log_norm is None
    assert "no weight matrix" in str(report)
    json.dumps(report.to_dict(), allow_nan=False)


def test_to_dict_is_plain(report: Report) -> None:
    text = json.dumps(report.to_dict(), allow_nan=False)
    plain = json.loads(text)
    assert plain == report.to_dict()
    assert plain["layers"][2] == {
        **dict.fromkeys(plain["layers"][2]),
        "name": "zero",
        "kind": "Linear",
        "shape": [1, 20, 20],
        "numel": 400,
        "outcome": "all zero",
        "message": report["zero"].message,
        "n_eigs": 0,
    }
    assert plain["skipped"][0]["name"] == "embedding.weight"
    assert plain["coverage"] == report.coverage


def test_every_field_of_the_json_is_documented(report: Report) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "json.md").read_text()
    plain = report.to_dict()
    for field in (*plain, *plain["layers"][0], *plain["skipped"][0]):
        assert f"`{field}`" in text, field


def test_to_pandas(report: Report) -> None:
    pd = pytest.importorskip("pandas")
    frame = report.to_pandas()
    assert list(frame.index) == ["first", "conv", "zero", "small"]
    assert frame.loc["conv", "alpha"] == report["conv"].alpha
    assert frame.loc["zero", "alpha"] is pd.NA
    assert analyze(nn.ReLU()).to_pandas().empty


def test_plot(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for layer in (None, "conv"):
        report.plot(tmp_path / "esd.png", layer=layer)
        assert (tmp_path / "esd.png").stat().st_size > 5000
    with pytest.raises(KeyError, match="fc"):
        report.plot(tmp_path / "other.png", layer="fc")


def test_strict_raises_for_the_first_layer_and_counts_the_others() -> None:
    with pytest.raises(MeasurementError, match=r"'zero' \(1 x 20 x 20\): every.*\(and 1 more\)"):
        analyze(model(), strict=True)
    assert issubclass(MeasurementError, ValueError)
    assert len(analyze(nn.Linear(20, 20), strict=True)) == 1


def test_strict_raises_for_nothing_to_measure() -> None:
    with pytest.raises(MeasurementError, match="no weight matrix"):
        analyze(nn.ReLU(), strict=True)
    with pytest.raises(MeasurementError, match="meta tensor"):
        analyze(nn.Linear(20, 20, device="meta"), strict=True)


def test_strict_raises_for_a_rank_deficient_layer() -> None:
    layer = nn.Linear(40, 40)
    layer.weight.data[20:] = 0
    with pytest.raises(MeasurementError, match="zero to rounding"):
        analyze(layer, strict=True)


def test_misuse_is_refused() -> None:
    with pytest.raises(TypeError, match=r"a torch.nn.Module, a state dict or .*, got int"):
        analyze(3)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="preset must be 'weightwatcher'"):
        analyze(nn.Linear(20, 20), preset="ww")  # type: ignore[call-overload]
    for bad in (1, 0, -3):
        with pytest.raises(ValueError, match="min_eigs"):
            analyze(nn.Linear(20, 20), min_eigs=bad)
    with pytest.raises(ValueError, match="fused"):
        analyze(nn.Linear(20, 20), fused={"qkv": 3})
