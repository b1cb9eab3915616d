"""Compare: two reports of one network, layer by layer, against the noise of alpha."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from tempbalance.analysis.report import Report
from tempbalance.measure.null import NullAlpha, null_alphas
from tempbalance.words import some

# Layers that moved by more units than this are named.
_MOVED = 3.0


@dataclass(frozen=True)
class Change:
    """One layer in both reports; numbers are ``None`` where one of them has none."""

    name: str
    shape: tuple[int, int, int]
    before: float | None  # alpha
    after: float | None
    difference: float | None
    noise: float | None  # standard deviation of that difference for two random matrices
    units: float | None  # difference / noise
    norm_ratio: float | None  # spectral norm after / before
    random: float | None  # alpha of a random matrix of the shape


@dataclass(frozen=True)
class Comparison:
    """What moved between two reports, and by how much of what chance alone would do."""

    a: Report
    b: Report
    layers: tuple[Change, ...]

    @property
    def moved(self) -> tuple[Change, ...]:
        """The layers whose alpha moved by more than three units, the furthest first."""
        far = [x for x in self.layers if x.units is not None and abs(x.units) > _MOVED]
        return tuple(sorted(far, key=lambda x: -abs(x.units or 0.0)))

    def summary(self) -> list[str]:
        """What moved, in lines."""
        both = [x for x in self.layers if x.difference is not None]
        lines = [f"{len(both)} layer{'s' * (len(both) != 1)} measured in both"]
        if both:
            names = some([x.name for x in self.moved])
            lines.append(
                f"{len(self.moved)} moved by more than {_MOVED:g} units of noise"
                + (f": {names}" if names else "")
            )
        for title, old, new in (
            ("mean alpha", self.a.mean_alpha, self.b.mean_alpha),
            ("weighted alpha", self.a.weighted_alpha, self.b.weighted_alpha),
            ("mean log norm", self.a.mean_log_norm, self.b.mean_log_norm),
        ):
            if old is not None and new is not None:
                lines.append(f"{title} {old:.3f} -> {new:.3f} ({new - old:+.3f})")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        rows = [{**asdict(x), "shape": list(x.shape)} for x in self.layers]
        return {"layers": rows, "a": self.a.to_dict(), "b": self.b.to_dict()}


def compare(a: Report, b: Report, *, progress: Callable[[float], None] | None = None) -> Comparison:
    """Two reports of one network, of two checkpoints of a training, say.

    The unit is the noise of alpha under the null: the standard deviation of the difference between
    two random matrices of the layer's shape, measured the same way, simulated once a shape. A layer
    that moved by less has not shown that it moved.

    Args:
        a: the report of the earlier checkpoint.
        b: that of the later one, measured with the same windows and fit.
        progress: called with the share of the simulation that was just done.

    Raises:
        TypeError: for what is no report.
        ValueError: if the two were measured in different ways.
    """
    for given in (a, b):
        if not isinstance(given, Report):
            raise TypeError(
                f"compare takes two reports, got {type(given).__name__}: "
                "compare(analyze(earlier), analyze(later))"
            )
    if a.method != b.method:
        raise ValueError("the two reports were measured in different ways: give both one method")
    second = {layer.name: layer for layer in b}
    common = [x for x in a.measured if x.name in second and second[x.name].outcome.measured]
    null: dict[str, NullAlpha] = {}
    if a.method is not None:
        null = null_alphas(common, a.method, complex_=a.complex_layers, progress=progress)
    first = {layer.name: layer for layer in a}
    rows = []
    for name in dict.fromkeys([*first, *second]):
        old, new = first.get(name), second.get(name)
        shape = (old or second[name]).shape
        before, after = (None if x is None else x.alpha for x in (old, new))
        difference = None if before is None or after is None else after - before
        noise = null[name].std * math.sqrt(2) if name in null else None
        units = difference / noise if noise and difference is not None else None
        norms = [None if x is None else x.spectral_norm for x in (old, new)]
        ratio = norms[1] / norms[0] if norms[0] and norms[1] is not None else None
        random = null[name].mean if name in null else None
        rows.append(Change(name, shape, before, after, difference, noise, units, ratio, random))
    return Comparison(a, b, tuple(rows))
