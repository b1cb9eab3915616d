"""Labels keep what tells layers apart."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tempbalance.plots.labels import labels

PARTS = st.sampled_from(["encoder", "layer", "0", "11", "attention", "self", "query", "mlp"])
NAMES = st.lists(
    st.lists(PARTS, min_size=1, max_size=7).map(".".join), min_size=1, max_size=8, unique=True
)


def test_numbers_and_the_last_part_stay() -> None:
    names = [f"encoder.layer.{i}.attention.self.{x}" for i in range(12) for x in ("query", "key")]
    short = labels([*names, "pooler.dense"], 20)
    assert short[:2] == ["e.l.0.a.self.query", "e.l.0.a.self.key"]
    assert short[-1] == "p.dense" and short[22] == "e.l.11.a.self.query"


def test_what_all_share_goes() -> None:
    assert labels(["model.layers.0.fc", "model.layers.1.fc"], 40) == ["0.fc", "1.fc"]
    assert labels(["model.fc"], 40) == ["model.fc"]


@given(NAMES, st.integers(4, 40))
def test_no_two_names_become_one(names: list[str], most: int) -> None:
    assert len(set(labels(names, most))) == len(names)
