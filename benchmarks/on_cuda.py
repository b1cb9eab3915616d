"""What only a CUDA device can tell: peak memory and host synchronizations of one measurement."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.clocks import Work
from tempbalance.measure.method import DEFAULT_BUDGET


def counts(work: Work) -> dict[str, Any]:
    """Peak memory above what was allocated, and how often the host waited for the device.

    ``only_the_read_waits`` is whether the work runs with synchronizations forbidden but for its
    one read back.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    waits = synchronizations(work)
    return {
        "peak_extra_bytes": torch.cuda.max_memory_allocated() - before,
        "budget_bytes": DEFAULT_BUDGET,
        "synchronizations": len(waits),
        "synchronized_in": sorted(set(waits)),
        "only_the_read_waits": only_the_read_waits(work),
    }


def synchronizations(work: Work) -> list[str]:
    """Where each wait of the host for the device came from, as ``file:line``."""
    with _debug_mode("warn"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    return [
        f"{each.filename.rpartition('/')[2]}:{each.lineno}"
        for each in caught
        if "synchroniz" in str(each.message)
    ]


def only_the_read_waits(work: Work) -> bool:
    """Run with every synchronization an error, but inside the engine's one read back."""
    engine: Any = sys.modules["tempbalance.measure.engine"]
    read = engine.read_back

    def allowed(*args: Any, **kwargs: Any) -> Any:
        with _debug_mode("default"):
            return read(*args, **kwargs)

    engine.read_back = allowed
    try:
        with _debug_mode("error"):
            work()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return False
    finally:
        engine.read_back = read
    return True


@contextlib.contextmanager
def _debug_mode(mode: str) -> Iterator[None]:
    before, always = torch.cuda.get_sync_debug_mode(), torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # torch says each warning once otherwise
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
        torch.set_warn_always(always)
