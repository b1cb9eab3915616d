"""Clocks: seconds of a piece of work, several of them in turn, and what the repeats say."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Work = Callable[[], object]
Clock = Callable[[Work, torch.device], float]


def seconds(work: Work, device: torch.device) -> float:
    """Wall-clock seconds on a CPU; between two events of the stream on CUDA."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def wall_seconds(work: Work, device: torch.device) -> float:
    """What a person waits: wall-clock seconds until the host and the device are done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def cpu_seconds(work: Work, device: torch.device) -> float:
    """Seconds of this process on a CPU, all its threads together: what neighbours hardly touch."""
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(
    works: Mapping[str, Work],
    repeats: int,
    device: torch.device,
    clock: Clock = seconds,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each, ``repeats`` times in turn, the order reversed each time."""
    times: dict[str, list[float]] = {name: [] for name in works}
    if warm_up:
        for work in works.values():
            work()
    for i in range(repeats):
        for name in list(works) if i % 2 == 0 else reversed(list(works)):
            times[name].append(clock(works[name], device))
    return times


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of a single value, itself."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
