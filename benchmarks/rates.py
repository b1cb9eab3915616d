"""Seconds that a window takes on a device: measured where there are figures, assumed elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.command import RESULTS, read
from benchmarks.llm import Work


class Rates(Protocol):
    """Seconds of one device for some windows, and where the figures come from."""

    @property
    def source(self) -> str: ...

    def seconds(self, work: Work) -> float: ...


@dataclass(frozen=True)
class Roofline:
    """No measurement: the time that memory, arithmetic and latency leave as least, times a margin.

    Reducing a k x k matrix to tridiagonal form reads its trailing square once a column, so memory
    decides; few matrices at a time are bound by the latency of a column instead.
    """

    device: str = "H200"
    memory_bytes_per_second: float = 4.8e12  # data sheet
    gram_flops_per_second: float = 50e12  # float32 without TF32: 67e12 on the data sheet
    column_seconds: float = 2.5e-6  # a guess: one step of the reduction, whatever the size
    parallel_windows: int = 132  # that share this latency: one a multiprocessor
    margin: float = 2.0  # real kernels reach about half of a roofline

    @property
    def source(self) -> str:
        return f"assumed ({self.device} rooflines, times {self.margin:g})"

    def seconds(self, work: Work) -> float:
        total = 0.0
        for (n, k), count in work.sides.items():
            one = Work({(n, k): 1})
            memory = count * one.tridiagonal_bytes / self.memory_bytes_per_second
            latency = math.ceil(count / self.parallel_windows) * k * self.column_seconds
            gram = count * one.gram_flops / self.gram_flops_per_second
            total += max(memory, latency) + gram
        return total * self.margin


@dataclass(frozen=True)
class Measured:
    """Seconds a square window by its side, between the measured sides by a power law.

    Outside of them by the cube of the side; a window that is not square by its operations.
    """

    sides: tuple[tuple[int, float], ...]  # (k, seconds), ascending
    source: str

    def seconds(self, work: Work) -> float:
        total = 0.0
        for (n, k), count in work.sides.items():
            longer = (2 * n / k + 4 / 3) / (2 + 4 / 3)
            total += count * longer * self._square(k)
        return total

    @property
    def largest(self) -> int:
        return self.sides[-1][0]

    def _square(self, k: int) -> float:
        for (low, t_low), (high, t_high) in zip(self.sides, self.sides[1:], strict=False):
            if low <= k <= high:
                power = math.log(t_high / t_low) / math.log(high / low)
                return t_low * (k / low) ** power
        side, seconds = self.sides[0] if k < self.sides[0][0] else self.sides[-1]
        return seconds * (k / side) ** 3


def measured(device: str, folder: Path = RESULTS) -> Measured | None:
    """From the ``rates`` series of ``benchmarks.growth``, or None where that was not run."""
    content = read("growth", device, folder)
    rows = [row for row in (content or {}).get("rows", ()) if row["series"] == "rates"]
    if content is None or not rows:
        return None
    machine = content["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    points = [(int(p["size"]), float(p["seconds_a_window"])) for p in rows[0]["points"]]
    source = f"measured up to {max(points)[0]} on {where}, beyond by the cube of the side"
    return Measured(tuple(sorted(points)), source)
