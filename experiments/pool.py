"""Fill a table: run what is missing of it in some processes, until nothing is."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")

log = logging.getLogger(__name__)


def fill(
    missing: Callable[[], Sequence[K]],
    run: Callable[[K], R],
    keep: Callable[[K, R], None],
    jobs: int,
    console: Console,
    title: Callable[[K], str],
) -> int:
    """Run all that is missing, keep each result as it comes, and ask again; how many failed.

    Args:
        missing: what is wanted next, from what is there; what failed is not tried again.
        run: one run, picklable where there are several jobs.
        title: of the bar, from the first of those that are missing.
    """
    failed: set[K] = set()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with _pool(jobs) as pool, Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        while todo := [key for key in missing() if key not in failed]:
            task = bar.add_task(title(todo[0]), total=len(todo))
            waiting = {pool.submit(run, key): key for key in todo}
            try:
                for future in as_completed(waiting):
                    key = waiting[future]
                    try:
                        keep(key, future.result())
                    except Exception as error:
                        failed.add(key)
                        log.error("%s: %s: %s", key, type(error).__name__, error)
                    bar.advance(task)
            except BaseException:  # Ctrl-C: what has not begun does not begin
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return len(failed)


def _pool(jobs: int) -> Executor:
    """Processes of one thread each; for one job this process does, which keeps what it loaded."""
    if jobs == 1:
        return ThreadPoolExecutor(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # several on few cores would wait for each other
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_one_thread)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
