"""Rates by the progress of alpha: by hand, against what they equalize, and resumed exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from standins import composed, substitute
from torch import Tensor

import tempbalance as tb
from experiments.progress import Equalizer, Progress, ProgressCallback
from experiments.train import train


@dataclass
class Weight:
    """A layer as far as a look sees it."""

    name: str
    weight: Tensor

    def read(self) -> Tensor:
        return self.weight


def look(
    rule: Progress, layers: list[Weight], alphas: list[float], sizes: list[int]
) -> list[float]:
    names = tuple(layer.name for layer in layers)
    return rule(alphas, tb.Population(("Linear",) * len(names), tuple(sizes), names)).tolist()


def watched(layers: list[Weight], **options: Any) -> Progress:
    return Progress(Equalizer(**options), lambda: {x.name: x for x in layers})  # type: ignore[misc]


def test_by_hand() -> None:
    """Norms 5 and 10; updates 0.1 and 0.2; moves 0.3 and 0.1; three times the parameters in b.

    log m before centring is -d log |d alpha| with gamma 1, -d log u with gamma 0, and
    d (log |d alpha| - 2 log u) with gamma -1: q = |d alpha| / u is 3 and 1/2.
    """
    for gamma, a, b in (
        (1.0, -math.log(0.3), -math.log(0.1)),
        (0.0, -math.log(0.1), -math.log(0.2)),
        (-1.0, math.log(0.3) - 2 * math.log(0.1), math.log(0.1) - 2 * math.log(0.2)),
    ):
        layers = [
            Weight("a", torch.tensor([[[3.0, 4.0]]])),
            Weight("b", torch.tensor([[[6.0, 8.0]]])),
        ]
        rule = watched(layers, gamma=gamma, damping=0.5, bounds=(0.1, 10.0))
        assert look(rule, layers, [2.5, 2.0], [1, 3]) == [1.0, 1.0]  # nothing to compare with
        layers[0].weight = torch.tensor([[[3.3, 4.4]]])
        layers[1].weight = torch.tensor([[[6.0, 10.0]]])
        got = look(rule, layers, [2.2, 2.1], [1, 3])
        centre = (a + 3 * b) / 4
        wanted = [math.exp(0.5 * (x - centre)) for x in (a, b)]
        assert got == pytest.approx(wanted, rel=1e-6)
        # Asked again about the same weights it says the same.
        assert look(rule, layers, [2.2, 2.1], [1, 3]) == got


def test_a_floor_bounds_and_layers_that_stand_still() -> None:
    layers = [Weight(name, torch.ones(1, 2, 2)) for name in "abc"]
    rule = watched(layers, floor=0.2, damping=1.0)
    look(rule, layers, [2.0, 2.0, 2.0], [1, 1, 1])
    layers[0].weight, layers[1].weight = torch.full((1, 2, 2), 1.1), torch.full((1, 2, 2), 1.3)
    # A move under the floor counts as the floor, both equal; c has not moved, and keeps 1.
    assert look(rule, layers, [2.1, 2.0, 2.5], [1, 1, 1]) == pytest.approx([1.0, 1.0, 1.0])
    layers[0].weight, layers[1].weight = torch.full((1, 2, 2), 1.0), torch.full((1, 2, 2), 1.0)
    got = look(rule, layers, [9.1, 2.0, math.nan], [1, 1, 1])
    assert got == pytest.approx([0.5, 2.0, 1.0])
    for bad in ({"damping": 0.0}, {"floor": 0.0}, {"bounds": (1.5, 2.0)}):
        with pytest.raises(ValueError, match="Equalizer"):
            Equalizer(**bad)  # type: ignore[arg-type]


@given(
    st.lists(
        st.tuples(st.floats(0.5, 2.0), st.floats(0.5, 2.0), st.integers(1, 10**6)),
        min_size=2,
        max_size=8,
    ),
    st.sampled_from([-1.0, 0.0, 0.5, 1.0]),
)
def test_it_reaches_what_it_says(rows: list[tuple[float, float, int]], gamma: float) -> None:
    """Layers with u = r m and |d alpha| = s u: in the end u is in proportion to q^-gamma."""
    r, s = (torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in (0, 1))
    sizes = torch.tensor([row[2] for row in rows], dtype=torch.float64)
    equalizer = Equalizer(gamma, floor=1e-9, bounds=(1e-3, 1e3))
    logs = torch.zeros_like(r)
    for _ in range(60):
        updates = r * logs.exp()
        logs = equalizer(logs, updates, s * updates, sizes)
    held = (r * logs.exp() * s**gamma).log()
    assert float(held.max() - held.min()) < 1e-6
    assert float((logs * sizes).sum() / sizes.sum()) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("balance", ["progress", "equal_updates"])
def test_a_run_resumes_bit_for_bit(balance: str, tmp_path: Path) -> None:
    def run(folder: str, epochs: int, **more: Any) -> dict[str, Any]:
        given = [f"trainer.max_epochs={epochs}", *(f"{k}={v}" for k, v in more.items())]
        cfg = substitute(
            composed(
                tmp_path / folder,
                "experiment=quickstart",
                f"balance={balance}",
                "schedule=constant",
                *given,
            )
        )
        return train(cfg)

    whole = run("whole", 4)
    run("parts", 2)
    checkpoint = next((tmp_path / "parts").rglob("last*.ckpt"))
    state = torch.load(checkpoint, weights_only=True)["callbacks"]
    (saved,) = [s for key, s in state.items() if key.startswith("ProgressCallback")]
    assert saved["progress"]["weights"] and saved["progress"]["logs"]
    again = run("again", 4, **{"trainer.ckpt_path": f"'{checkpoint}'"})
    assert again["resumed_from"]
    assert again["value"] == whole["value"]
    tables = [
        next((tmp_path / name).rglob("tempbalance.csv")).read_text().splitlines()
        for name in ("whole", "again")
    ]
    last = [[line for line in table if line.startswith("3,")] for table in tables]
    assert last[0] == last[1] and last[0]
    assert len({line.split(",")[4] for line in last[0]}) > 2  # multipliers differ


def test_delay_and_an_assignment_of_ones_own_are_refused() -> None:
    with pytest.raises(ValueError, match="delay must be 0"):
        ProgressCallback(delay=1)
    with pytest.raises(TypeError, match="assign"):
        ProgressCallback(assign=tb.LinearMap())
    quiet = ProgressCallback(log="none", esd=False, warn=False, every_n_steps=3, min_eigs=4)
    assert quiet.every == 3 and quiet.options["min_eigs"] == 4
    with pytest.raises(TypeError, match="did you mean 'min_eigs'"):
        ProgressCallback(min_eig=4)
