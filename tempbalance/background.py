"""Background: work in a thread beside the training.

On CUDA it runs on a side stream, after what the training has queued so far (the snapshot).
"""

from __future__ import annotations

import concurrent.futures.thread as _threads
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class Dropped(BaseException):
    """Raised inside a job that nobody wants any more: no failure, so no ``Exception``."""


class Job(Generic[T]):
    """``work(progress)`` under way in a thread of its own, which ends with it.

    ``work`` must call ``progress`` now and then: there a job ends that was dropped, that nobody
    holds any longer, or that would keep the interpreter from exiting.

    Args:
        devices: where it reads tensors.
        after: an earlier job that must be over before this one begins.
    """

    def __init__(
        self,
        work: Callable[[Callable[[float], None]], T],
        devices: Iterable[torch.device] = (),
        after: Job[Any] | None = None,
    ) -> None:
        self._process = os.getpid()
        self._stop = stop = threading.Event()

        def progress(_: float) -> None:
            # At exit the interpreter waits for the threads of every pool.
            if stop.is_set() or getattr(_threads, "_shutdown", False):
                raise Dropped

        streams = _side_streams(devices)
        earlier = [] if after is None or after._process != self._process else [after._future]

        def run() -> tuple[T, float]:
            wait(earlier)
            started = time.perf_counter()
            with _on(streams):
                result = work(progress)
            return result, time.perf_counter() - started

        pool = ThreadPoolExecutor(1, "tempbalance-background")
        self._future: Future[tuple[T, float]] = pool.submit(run)
        pool.shutdown(wait=False)  # the thread ends after this job

    def result(self) -> T:
        """Wait for it.

        Raises:
            RuntimeError: in a process that was forked while it ran: its thread is not there.
            BaseException: what the job raised.
        """
        if self._process != os.getpid() and not self._future.done():
            raise RuntimeError("this process was forked while a thread of the other one measured")
        return self._future.result()[0]

    @property
    def seconds(self) -> float:
        """How long it took; waits for it."""
        return self._future.result()[1]

    def drop(self) -> None:
        """Nobody will ask for the result: end soon."""
        self._stop.set()

    def __del__(self) -> None:
        self._stop.set()


def _side_streams(devices: Iterable[torch.device]) -> list[tuple[Any, Any]]:
    """A stream for each CUDA device, and an event: all that is queued there now."""
    streams = []
    for device in {d for d in devices if d.type == "cuda"}:
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(device))
        streams.append((torch.cuda.Stream(device), ready))
    return streams


@contextlib.contextmanager
def _on(streams: list[tuple[Any, Any]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for stream, ready in streams:
            stream.wait_event(ready)
            stack.enter_context(torch.cuda.stream(stream))
            # Memory goes back to the training's streams only once nothing here uses it.
            stack.callback(stream.synchronize)
        yield
