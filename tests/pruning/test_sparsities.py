"""Sparsities: measured as the published codes do, and the controls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pruning.figures import figures, network
from torch import nn

import tempbalance
from tempbalance import Farms, Hill, KSFit, PeakFit, WholeMatrix
from tempbalance.pruning import (
    by_depth,
    by_depth_and_alpha,
    linear_layers,
    reversed,
    shuffled,
    sparsities,
    uniform,
)

FITS = {"mid": Hill(), "ks": KSFit(), "peak": PeakFit(released=True)}
METRICS = {
    "alpha_mid": (WholeMatrix(), FITS["mid"]),
    "alpha_ks": (WholeMatrix(), FITS["ks"]),
    "alpha_peak": (WholeMatrix(), FITS["peak"]),
    **{
        f"alpha_{fit}_farms_rows{rows}_Q{q}_ops{k}": (Farms.released_linear(rows, q, k), FITS[fit])
        for fit in ("mid", "peak")
        for rows, q, k in ((64, 1.0, 3), (48, 1.0, 5), (40, 2.0, 4))
    },
}
assert set(METRICS) == set(figures("pruning")["metrics"])


def cases() -> list[Any]:
    found = figures("pruning")["allocation"]
    chosen = [c for c in found if c["metric"] in METRICS and c["mapping"] == "block_wise"]
    return [
        pytest.param(c, id=f"{c['metric']}-{c['sparsity']}-{c['epsilon']}")
        for c in chosen
        if c["n_above_1"] == 0 and c["epsilon"] in (0.2, 0.3)
    ]


@pytest.fixture(scope="module")
def reports() -> dict[str, tempbalance.Report]:
    model = network()
    return {
        name: tempbalance.analyze(model, windows=windows, fit=fit, min_eigs=5)
        for name, (windows, fit) in METRICS.items()
    }


@pytest.mark.parametrize("metric", METRICS)
def test_alphas_are_those_published(metric: str, reports: dict[str, tempbalance.Report]) -> None:
    wanted = figures("pruning")["metrics"][metric]["alpha"]
    found = [reports[metric][f"layers.{name}"].alpha for name in figures("pruning")["order"]]
    assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("case", cases())
def test_block_ratios_are_those_published(
    case: dict[str, Any], reports: dict[str, tempbalance.Report]
) -> None:
    ratios = sparsities(
        reports[case["metric"]], case["sparsity"], spread=case["epsilon"], limit=0.9999
    )
    for name, ratio in ratios.items():
        block = int(name.split(".")[1])
        assert ratio == pytest.approx(case["block_ratios"][block], rel=2e-4)


def test_a_model_reads_as_its_report(reports: dict[str, tempbalance.Report]) -> None:
    model = network()
    windows, fit = METRICS["alpha_mid"]
    from_model = sparsities(model, 0.6, windows=windows, fit=fit)
    assert from_model == pytest.approx(sparsities(reports["alpha_mid"], 0.6))
    assert list(from_model) == [f"layers.{name}" for name in figures("pruning")["order"]]
    with pytest.raises(ValueError, match="measured already"):
        sparsities(reports["alpha_mid"], 0.6, fit=fit)


EACH = [uniform, by_depth, by_depth_and_alpha, shuffled, reversed, sparsities]


@pytest.mark.parametrize("allocation", EACH)
def test_every_allocation_meets_the_total_and_leaves_the_rest_alone(allocation: Any) -> None:
    model = network()
    ratios = allocation(model, 0.7)
    sizes = {layer.name: layer.numel for layer in linear_layers(model)}
    assert ratios.keys() == sizes.keys()
    assert not ratios.keys() & {"embed", "head", "layers.0.norm"}
    met = sum(ratios[n] * sizes[n] for n in ratios) / sum(sizes.values())
    assert met == pytest.approx(0.7, rel=1e-12)


def blocks(ratios: dict[str, float]) -> list[float]:
    found = {name.split(".")[1]: ratio for name, ratio in ratios.items()}
    return list(found.values())


def test_the_controls_are_what_they_say(reports: dict[str, tempbalance.Report]) -> None:
    report = reports["alpha_mid"]
    plain = torch.tensor(blocks(sparsities(report, 0.5, spread=0.2)))
    back = torch.tensor(blocks(reversed(report, 0.5, spread=0.2)))
    assert plain.argsort().tolist() == back.argsort(descending=True).tolist()
    # The blocks are of one size, so that dealing alphas out anew deals out the ratios.
    dealt = {tuple(blocks(shuffled(report, 0.5, spread=0.2, seed=s))) for s in range(8)}
    assert all(sorted(each) == pytest.approx(sorted(plain.tolist())) for each in dealt)
    assert len(dealt) > 3
    assert blocks(by_depth(report, 0.5, spread=0.3)) == pytest.approx([0.35, 0.45, 0.55, 0.65])
    assert by_depth_and_alpha(report, 0.5, share=0) == pytest.approx(by_depth(report, 0.5))


def test_the_residual_of_depth_alone_is_nothing_and_otherwise_orthogonal_to_it() -> None:
    report = tempbalance.analyze(network(), windows=WholeMatrix())
    # Adding a multiple of the place to every alpha leaves the residual as it is.
    place = {layer.name: float(layer.name.split(".")[1]) for layer in linear_layers(report)}
    tilted = tempbalance.Report(
        tuple(
            _with_alpha(x, x.alpha + 7 * place[x.name]) if x.name in place else x
            for x in report.layers
        ),
        report.skipped,
        report.numel,
    )
    wanted = by_depth_and_alpha(report, 0.6)
    assert by_depth_and_alpha(tilted, 0.6) == pytest.approx(wanted)
    assert wanted != pytest.approx(by_depth(report, 0.6))


def _with_alpha(record: Any, alpha: float | None) -> Any:
    return tempbalance.LayerRecord(**{**record.__dict__, "alpha": alpha})


def test_units_centers_and_layers_without_alpha() -> None:
    report = tempbalance.analyze(network(), windows=WholeMatrix(), fit=Hill())
    outlier, unknown = "layers.0.mlp.up_proj", "layers.1.mlp.up_proj"
    layers = tuple(
        _with_alpha(x, {outlier: 40.0, unknown: None}.get(x.name, x.alpha)) for x in report.layers
    )
    changed = tempbalance.Report(layers, report.skipped, report.numel)
    mean, median = (blocks(sparsities(changed, 0.5, center=c)) for c in ("mean", "median"))
    assert mean[0] == max(mean) and median[0] < mean[0]
    by_layer = sparsities(changed, 0.5, unit="layer")
    assert max(by_layer, key=by_layer.__getitem__) == outlier
    assert len(set(by_layer.values())) == len(by_layer)
    by_name = sparsities(changed, 0.5, unit=lambda name: name.rpartition(".")[2])
    assert len(set(by_name.values())) == 7
    assert len(set(sparsities(changed, 0.5, unit="type").values())) == 1  # all are Linear
    with pytest.raises(ValueError, match="unit must be one of"):
        sparsities(changed, 0.5, unit="stage")
    with pytest.raises(ValueError, match="center must be one of"):
        sparsities(changed, 0.5, center="mode")  # type: ignore[arg-type]


def test_a_file_names_its_layers_by_the_alphabet_and_depth_counts_its_blocks() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(20, 20)}) for _ in range(12))
    report = tempbalance.analyze(model)
    by_name = tuple(sorted(report.layers, key=lambda layer: layer.name))
    assert by_name[2].name == "layers.10.up"
    sorted_report = tempbalance.Report(by_name, report.skipped, report.numel)
    assert by_depth(sorted_report, 0.5) == pytest.approx(by_depth(model, 0.5))


def test_a_plain_network_prunes_all_its_linear_layers() -> None:
    model = nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 30))
    assert by_depth(model, 0.5).keys() == {"0", "2"}
    with pytest.raises(ValueError, match="no linear layer"):
        uniform(nn.Conv2d(3, 8, 3), 0.5)
    with pytest.raises(TypeError, match="Report"):
        uniform({"0": 1}, 0.5)  # type: ignore[arg-type]
