"""Background: work in a thread beside the training."""

from __future__ import annotations

import concurrent.futures.thread as _threads
import os
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Dropped(BaseException):
    """Raised inside a job that nobody wants any more: no failure, so no ``Exception``."""


class Job(Generic[T]):
    """``work(progress)`` under way in a thread of its own, which ends with it.

    ``work`` must call ``progress`` now and then: there a job ends that was dropped, that nobody
    holds any longer, or that would keep the interpreter from exiting.

    Args:
        after: an earlier job that must be over before this one begins.
    """

    def __init__(
        self,
        work: Callable[[Callable[[float], None]], T],
        after: Job[Any] | None = None,
    ) -> None:
        self._process = os.getpid()
        self._stop = stop = threading.Event()

        def progress(_: float) -> None:
            # At exit the interpreter waits for the threads of every pool.
            if stop.is_set() or getattr(_threads, "_shutdown", False):
                raise Dropped

        earlier = [] if after is None or after._process != self._process else [after._future]

        def run() -> tuple[T | None, float, BaseException | None]:
            wait(earlier)
            started = time.perf_counter()
            result, failure = None, None
            try:
                result = work(progress)
            except BaseException as error:
                failure = _without_frames(error)
            return result, time.perf_counter() - started, failure

        pool = ThreadPoolExecutor(1, "tempbalance-background")
        self._future: Future[tuple[T | None, float, BaseException | None]] = pool.submit(run)
        pool.shutdown(wait=False)  # the thread ends after this job

    def result(self) -> T:
        """Wait for it.

        Raises:
            RuntimeError: in a process that was forked while it ran: its thread is not there.
            BaseException: what the job raised.
        """
        if self._process != os.getpid() and not self._future.done():
            raise RuntimeError("this process was forked while a thread of the other one measured")
        result, _, failure = self._future.result()
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]

    @property
    def seconds(self) -> float:
        """How long it took; waits for it."""
        return self._future.result()[1]

    def drop(self) -> None:
        """Nobody will ask for the result: end soon."""
        self._stop.set()

    def __del__(self) -> None:
        self._stop.set()


def _without_frames(error: BaseException) -> BaseException:
    """The error without what its frames hold (copies of all weights), and where it came from."""
    if isinstance(error, Exception):
        error.add_note("".join(traceback.format_tb(error.__traceback__)).rstrip())
    each: BaseException | None = error
    while each is not None:
        each.__traceback__ = None
        each = each.__cause__ or each.__context__
    return error
