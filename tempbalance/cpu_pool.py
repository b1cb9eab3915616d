"""The CPU: windows in jobs for a pool of threads, each of them pinned to one thread of its own."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from tempbalance import gram
from tempbalance.jobs import Job, Work, bytes_of, converted, flops_of, jobs_of

T = TypeVar("T")

# Work of one job of the pool: small enough to balance two threads, large enough to hide Python.
_JOB_FLOPS = 2e8


def compute(
    tasks: Sequence[Work],
    budget: int,
    dtype: torch.dtype,
    progress: Callable[[float], None] | None,
    workers: int,
) -> None:
    """Fill the tasks' outputs, on as many threads as the budget allows; see :func:`spectra`."""
    workers = workers if _pin_thread_calls() else 1
    largest = max(bytes_of(task, dtype) for task, _, _ in tasks)
    workers = max(1, min(workers, budget // largest))
    jobs: list[Job] = []
    for task, out, mask in tasks:
        if not task.scale:  # not finite: stays NaN
            continue
        size = min(_JOB_FLOPS / flops_of(task), budget / workers / bytes_of(task, dtype))
        jobs += jobs_of(task, out, mask, dtype, max(1, int(size)))
    jobs.sort(key=lambda job: job.flops, reverse=True)
    total = sum(job.flops for job in jobs)
    left = deque(jobs)
    one_at_a_time = threading.Lock()

    def drain() -> None:
        while True:
            try:
                job = left.popleft()
            except IndexError:
                return
            _run(job)
            if progress is not None:
                with one_at_a_time:
                    progress(job.flops / total)

    if workers == 1 or len(jobs) == 1:
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


@torch.no_grad()  # per thread
def _run(job: Job) -> None:
    if job.large:
        values = gram.large_window(job)
    else:
        windows = converted(job.read(), job.task.scale, job.target)
        values = gram.eigenvalues(windows.flatten(0, 1), wide=job.task.wide)
    job.write(gram.settled(values.to(job.dtype)))


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
