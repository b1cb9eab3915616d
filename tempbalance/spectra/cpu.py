"""The CPU: windows in batches for a pool of threads, each pinned to one thread of its own."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from tempbalance.spectra import gram
from tempbalance.spectra.batches import Batch, Work, batches_of, bytes_of, flops_of, is_double

S = TypeVar("S")
T = TypeVar("T")

# Batches of the pool for each thread: few large ones, since a convolution's slices are read
# together, and yet enough that the small ones at the end balance the threads.
_BATCHES = 6
# Entries of the windows of one batch.
_BATCH_ENTRIES = 2**22
# Entries of the Gram matrices that are solved in one call: they stay in the cache.
_SOLVED = 2**16
# Bytes of interleaved slices (a convolution's) that are read before all slices are written.
_READ = 2**19


def compute(
    tasks: Sequence[Work],
    budget: int,
    dtype: torch.dtype,
    progress: Callable[[float], None] | None,
    workers: int,
) -> None:
    """Fill the tasks' outputs, on as many threads as the budget allows."""
    workers = workers if _pin_thread_calls() else 1
    largest = max(bytes_of(task, dtype) for task, _, _ in tasks)
    workers = max(1, min(workers, budget // largest))
    finite = [work for work in tasks if work[0].scale]  # the others stay NaN
    batches = _batches(finite, budget // workers, dtype, workers)
    total = sum(batch.flops for batch in batches)
    one_at_a_time = threading.Lock()

    def run(batch: Batch) -> None:
        _run(batch)
        if progress is not None:
            with one_at_a_time:
                progress(batch.flops / total)

    in_threads(run, batches, workers)


def in_threads(function: Callable[[S], object], items: Sequence[S], workers: int) -> None:
    """Call a function with each item, in order, from so many pinned threads; without gradients."""
    left = deque(items)

    @torch.no_grad()  # per thread
    def drain() -> None:
        while True:
            try:
                item = left.popleft()
            except IndexError:
                return
            function(item)

    if workers == 1 or len(items) <= 1 or not _pin_thread_calls():
        drain()
        return
    # This thread works too where it is pinned, instead of waiting for the others.
    joins = torch.get_num_threads() == 1
    others = workers - joins
    with ThreadPoolExecutor(others, "tempbalance", initializer=_pin_this_thread) as pool:
        running = [pool.submit(drain) for _ in range(others)]
        if joins:
            drain()
        for each in running:
            each.result()


def _batches(tasks: Sequence[Work], budget: int, dtype: torch.dtype, workers: int) -> list[Batch]:
    """The largest first; ``budget`` is that of one batch."""
    flops = sum(
        flops_of(task) * (out[..., 0].numel() if mask is None else int(mask.sum()))
        for task, out, mask in tasks
    )
    batches: list[Batch] = []
    for task, out, mask in tasks:
        size = min(
            flops / workers / _BATCHES / flops_of(task),
            _BATCH_ENTRIES / (task.grid.height * task.grid.width),
            budget / bytes_of(task, dtype),
        )
        slices = task.slices.shape[0]
        parts = math.ceil(slices / max(1, int(size)))
        size = math.ceil(slices / parts) if parts > 1 else size  # all parts of about one size
        batches += batches_of(task, out, mask, dtype, max(1, int(size)))
    return sorted(batches, key=lambda batch: batch.flops, reverse=True)


def _run(batch: Batch) -> None:
    if batch.large:
        values = gram.large_window(batch)
    else:
        at_once = max(1, _SOLVED // batch.task.grid.eigenvalues**2)
        windows = _gathered(batch).split(at_once)
        solver = batch.task.solver or functools.partial(gram.eigenvalues, wide=batch.task.wide)
        values = torch.cat([solver(w) for w in windows])
    batch.write(gram.settled(values.to(batch.dtype)))


def _gathered(batch: Batch) -> Tensor:
    """The windows or their transposes, whichever is read in order; scaled and converted."""
    views = batch.views()
    if views[0].stride(-1) > views[0].stride(-2):
        views = [view.mT for view in views]
    windows = views[0].new_empty(len(views), *views[0].shape, dtype=batch.target)
    scale = batch.task.scale
    if not is_double(batch.task.slices):
        scale = scale.to(batch.dtype)
    for view, into in zip(views, windows, strict=True):
        rows = view.shape[-2]
        if view.stride(-1) > 1 and len(view) > 1:  # slices share what is read at once
            rows = max(1, _READ // (view.stride(-2) * view.element_size()))
        for part, part_into in zip(view.split(rows, -2), into.split(rows, -2), strict=True):
            # A scale of one dimension takes part in the promotion of dtypes.
            torch.mul(part, scale.view(1), out=part_into)
    return windows.flatten(0, 1)


@functools.cache
def _pin_thread_calls() -> tuple[Callable[[int], object], ...]:
    """Calls that set the number of threads for the calling thread alone; empty where unknown.

    ``torch.set_num_threads`` is no substitute: it sets a default that every thread started later
    inherits, and resetting it switches off MKL's dynamic mode for good.
    """
    lib = os.path.join(os.path.dirname(torch.__file__), "lib")
    calls = []
    for pattern, symbol in (
        ("libgomp*.so*", "omp_set_num_threads"),
        ("libtorch_cpu.so", "MKL_Set_Num_Threads_Local"),
    ):
        for path in glob.glob(os.path.join(lib, pattern)):
            with contextlib.suppress(OSError, AttributeError):
                calls.append(getattr(ctypes.CDLL(path), symbol))
                break
    # Without OpenMP's own call ATen would still start a team in each worker.
    return tuple(calls) if calls and calls[0].__name__ == "omp_set_num_threads" else ()


def pinned(function: Callable[[], T]) -> T:
    """Call a function in a thread of its own with one intra-op thread.

    The threads that OpenMP leaves behind a parallel operation spin for a while and would take
    cores from the pool: small operations before it are faster without them.
    """
    if not _pin_thread_calls() or torch.get_num_threads() == 1:
        return function()
    with ThreadPoolExecutor(1, "tempbalance", initializer=_pin_this_thread) as pool:
        return pool.submit(function).result()


def _pin_this_thread() -> None:
    # ATen sets the number of threads once for each new thread, when first asked: let it do so now.
    torch.get_num_threads()
    for call in _pin_thread_calls():
        call(1)
