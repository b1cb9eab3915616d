"""Windows that differ by layer: the first pattern wins, and each layer reads as with its own."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

import tempbalance as tb
from tempbalance.layers.find import find_layers
from tempbalance.measure.measurement import measure

LINEAR = tb.Farms.released_linear(10, 1.0, per_dim=3)
CONV = tb.Farms.released_conv(1.0)
PUBLISHED = {"Linear": LINEAR, "*": CONV}


@dataclass
class Named:
    name: str
    kind: str = "Linear"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 20, 3), nn.Conv2d(20, 30, 3), nn.Flatten(), nn.Linear(50, 40), nn.Linear(40, 9)
    )


def test_first_matching_pattern_of_name_or_type_wins() -> None:
    windows = tb.ByLayer({"h.0.*": tb.WholeMatrix(), "Linear": LINEAR, "h.?.conv": tb.Farms()})
    assert windows.of(Named("h.0.fc")) == tb.WholeMatrix()
    assert windows.of(Named("h.1.fc")) == LINEAR
    assert windows.of(Named("h.1.conv", "Conv2d")) == tb.Farms()
    with pytest.raises(ValueError, match=r"'stem' \(conv2d\).*\"\*\": Farms\(\)"):
        windows.of(Named("stem", "conv2d"))
    assert windows.idle([Named("h.1.a"), Named("h.1.conv", "Conv2d")]) == ["h.0.*"]


def test_frozen_printable_and_a_value() -> None:
    windows = tb.ByLayer(PUBLISHED)
    scope = {"ByLayer": tb.ByLayer, "ReleasedLinear": type(LINEAR), "ReleasedConv": type(CONV)}
    assert eval(repr(windows), scope) == windows
    assert windows == pickle.loads(pickle.dumps(windows)) == copy.deepcopy(windows)
    assert hash(windows) == hash(tb.ByLayer(dict(PUBLISHED)))
    assert windows != tb.ByLayer(dict(reversed(PUBLISHED.items())))  # another order
    with pytest.raises(AttributeError):
        windows.windows = {}  # type: ignore[misc]
    given: dict[str, Any] = dict(PUBLISHED)
    held = tb.ByLayer(given)
    given.clear()
    assert held == windows


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: tb.ByLayer({}), ValueError, "need a pattern"),
        (lambda: tb.ByLayer({"*": tb.Farms}), TypeError, r"windows\['\*'\] is the class Farms"),
        (lambda: tb.ByLayer({"*": "farms"}), TypeError, r"windows\['\*'\] must be an object"),
        (lambda: tb.ByLayer({1: tb.Farms()}), TypeError, "a pattern is text"),
        (lambda: tb.ByLayer({"*": {"*": tb.Farms()}}), TypeError, r"windows\['\*'\] must be"),
        (lambda: tb.ByLayer(tb.Farms()), TypeError, "patterns and their windows"),
        (lambda: tb.analyze(net(), windows={"Conv2d": CONV}), ValueError, r"'3' \(Linear\), '4'"),
        (lambda: tb.analyze(net(), windows="farms"), TypeError, "windows must be an object"),
        (lambda: tb.analyze(net(), windows=tb.Farms), TypeError, "the class Farms: call it"),
    ],
)
def test_errors_name_the_layer_and_the_cure(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("windows", [PUBLISHED, tb.ByLayer(PUBLISHED)])
def test_every_layer_reads_as_with_its_own_windows_alone(windows: Any) -> None:
    """The two pool differently: one fit of all windows, and the mean of a fit a position."""
    model = net()
    got = tb.analyze(model, windows=windows)
    of_conv, of_linear = (tb.analyze(model, windows=w) for w in (CONV, LINEAR))
    for record in got:
        alone = of_linear if "Linear" in record.kind else of_conv
        same, wanted = replace(record, eigenvalues=None), alone[record.name]
        assert same == replace(wanted, eigenvalues=None)
    assert of_conv["3"].alpha != of_linear["3"].alpha


def test_the_second_look_in_float64_pools_by_layer_too() -> None:
    """Windows of nearly deficient rank are redone: positions of one layer, all of the other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(12, 40, 1), nn.Flatten(), nn.Linear(40, 40))
    for module in (model[0], model[2]):
        weight = module.weight.data.view(module.weight.shape[0], -1)
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        module.weight.data = (u * s * 10 ** torch.linspace(0, -5, len(s)) @ v).view_as(
            module.weight
        )
    conv, linear = measure(find_layers(model).layers, windows=PUBLISHED)
    matrix = model[0].weight.data.flatten(1).double()  # 40 x 12: three blocks of 12 x 12
    blocks = [hill(squares(matrix[12 * i : 12 * i + 12])) for i in range(3)]
    assert conv.alpha == pytest.approx(sum(blocks) / 3, rel=1e-9)
    pieces = [model[2].weight.data.double()[r : r + 10, c : c + 10]
              for r in (0, 15, 30) for c in (0, 15, 30)]  # fmt: skip
    assert linear.alpha == pytest.approx(hill(torch.cat([squares(p) for p in pieces])), rel=1e-5)


def squares(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(matrix) ** 2


def hill(values: torch.Tensor) -> float:
    tail = values.sort().values[len(values) // 2 :]
    return 1 + len(tail) / (tail / tail[0]).log().sum().item()
