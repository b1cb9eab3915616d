"""Text: the words of a report, for a terminal and for a page alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tempbalance.layers import Skipped
from tempbalance.measure.measurement import LayerRecord, Outcome
from tempbalance.words import some


def table(layers: Sequence[LayerRecord]) -> Iterator[str]:
    """A line a layer, below a line of titles; traps where they were looked for."""
    if not layers:
        yield "No layers: the model has no weight matrix to measure."
        return
    traps = any(layer.trap_units is not None for layer in layers)
    width = max(5, *(len(layer.name) for layer in layers))
    yield (
        f"{'layer':<{width}}  {'slices x rows x cols':>20}  {'alpha':>7}  {'D':>6}  "
        f"{'eigs':>7}  {'spectral norm':>13}  {'stable rank':>11}  "
        + (f"{'traps':>5}  {'trap units':>10}  {'max entry':>9}  {'kurtosis':>8}  " * traps)
        + "outcome"
    )
    for layer in layers:
        found = "-" if layer.traps is None else str(layer.traps)
        more = (
            f"{found:>5}  {number(layer.trap_units, 10, 1)}  {number(layer.largest_entry, 9, 1)}  "
            f"{number(layer.kurtosis, 8, 2)}  "
        )
        yield (
            f"{layer.name:<{width}}  {' x '.join(map(str, layer.shape)):>20}  "
            f"{number(layer.alpha, 7, 3)}  {number(layer.D, 6, 3)}  {layer.n_eigs:>7}  "
            f"{number(layer.spectral_norm, 13, 4)}  {number(layer.stable_rank, 11, 2)}  "
            f"{more * traps}{layer.outcome.value}"
        )


def outcomes(layers: Sequence[LayerRecord]) -> list[str]:
    """What is to be said of layers that are not measured in full, each thing once."""
    said = []
    for outcome in Outcome:
        names = [layer.name for layer in layers if layer.outcome is outcome]
        if outcome is Outcome.OK or not names:
            continue
        first = next(layer for layer in layers if layer.outcome is outcome).message
        more = f" ({len(names) - 1} more are {outcome.value}: {some(names[1:], 3)})"
        said.append(first + more * (len(names) > 1))
    return said


def guessed(layers: Sequence[LayerRecord]) -> list[str]:
    """What there is to know of measured layers, each note once, with their parameters."""
    notes: dict[str, list[LayerRecord]] = {}
    for layer in layers:
        if layer.note:
            notes.setdefault(layer.note, []).append(layer)
    return [
        f"{sum(x.numel for x in noted):,} parameters {note} ({some([x.name for x in noted], 3)})"
        for note, noted in notes.items()
    ]


def left_out(skipped: Sequence[Skipped]) -> list[str]:
    """Why parameters are not measured, each reason once, with their number."""
    reasons: dict[str, list[Skipped]] = {}
    for each in skipped:
        reasons.setdefault(each.reason, []).append(each)
    lines = []
    for reason, those in reasons.items():
        names = ", ".join(s.name for s in those[:3]) + (", ..." if len(those) > 3 else "")
        count = sum(s.numel for s in those)
        lines.append(f"not measured, {count:,} parameters: {reason} ({names})")
    return lines


def number(value: float | None, width: int = 0, digits: int = 3) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"
