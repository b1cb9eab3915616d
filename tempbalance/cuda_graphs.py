"""Replay a long chain of small CUDA operations on a batch as one graph.

A chain of thousands of launches costs the host several microseconds each, a graph about two on the
device. A graph reads and writes fixed memory: :class:`Plan` owns its input buffer, its result and
what lies between, so the number of bytes kept is bounded, the least recently used going first.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor

# Of all graphs together, input buffers and what is computed from them; a batch above it runs
# without a graph.
LIMIT_BYTES = 2**30
# A graph of 10,000 nodes takes some 10 MiB of host memory besides.
LIMIT_GRAPHS = 16

Solve = Callable[[Tensor], Tensor]
_Key = tuple[Solve, tuple[int, ...], torch.dtype, torch.device]

_log = logging.getLogger("tempbalance")


class Plan:
    """A captured ``solve`` with its own input ``work``. Use as a context, and fill ``work`` first.

    Calls on different streams wait for each other on the device, those of different threads on
    the host.
    """

    def __init__(self, shape: tuple[int, ...], like: Tensor, solve: Solve) -> None:
        self._lock = threading.Lock()
        self._done = torch.cuda.Event()
        self.work = like.new_zeros(shape)
        current = torch.cuda.current_stream(like.device)
        side = torch.cuda.Stream(like.device)
        side.wait_stream(current)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(side):
            solve(self.work)  # libraries take their handles and workspaces now
            # Not torch.cuda.graph: that waits for the device and empties the allocator's cache.
            # Other threads, those of the trainer, may allocate meanwhile.
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._out = solve(self.work)
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    self._graph.capture_end()
                raise
            self._graph.capture_end()
        current.wait_stream(side)
        self._done.record(current)

    @property
    def nbytes(self) -> int:
        """What it keeps: the input, and about a half more for what is computed from it."""
        return self.work.nbytes * 3 // 2

    def __enter__(self) -> Plan:
        self._lock.acquire()
        torch.cuda.current_stream(self.work.device).wait_event(self._done)
        return self

    def replay(self) -> Tensor:
        """Queue the graph; the result is the caller's own."""
        self._graph.replay()
        return self._out.clone()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.record(torch.cuda.current_stream(self.work.device))
        self._lock.release()


class Plans:
    """The graphs of this process, by computation, shape, dtype and device."""

    def __init__(self) -> None:
        self._plans: OrderedDict[_Key, Plan] = OrderedDict()
        self._seen: set[_Key] = set()
        self._failed = False
        self._lock = threading.Lock()

    def get(
        self, shape: tuple[int, ...], like: Tensor, solve: Solve, at_once: bool = False
    ) -> Plan | None:
        """The plan for inputs of ``shape``; None where ``solve`` is to be called as it is.

        That is the first time that a shape is seen (unless ``at_once``), for a batch too large to
        keep, inside a capture of the caller's, and once a capture has failed.
        """
        size = like.element_size()
        for side in shape:
            size *= side
        if not usable(like) or self._failed or size * 3 // 2 > LIMIT_BYTES:
            return None
        key = (solve, shape, like.dtype, like.device)
        with self._lock:
            if key in self._plans:
                self._plans.move_to_end(key)
                return self._plans[key]
            if key not in self._seen and not at_once:
                self._seen.add(key)
                return None
            self._make_room(size * 3 // 2)
            try:
                plan = Plan(shape, like, solve)
            except RuntimeError as error:
                self._failed = True
                _log.warning("CUDA graphs are not used for eigenvalues, which are then slower: "
                             "capturing one failed (%s)", error)  # fmt: skip
                return None
            self._plans[key] = plan
            return plan

    def _make_room(self, nbytes: int) -> None:
        while self._plans and (
            len(self._plans) >= LIMIT_GRAPHS
            or nbytes + sum(plan.nbytes for plan in self._plans.values()) > LIMIT_BYTES
        ):
            self._plans.popitem(last=False)

    def clear(self) -> None:
        """Free all graphs and their memory."""
        with self._lock:
            self._plans.clear()
            self._seen.clear()
            self._failed = False


plans = Plans()


def usable(tensor: Tensor) -> bool:
    """Whether work on this tensor may be launched outside torch's own operations, or captured.

    Not for the stand-ins of tracing (a fake or functional tensor), nor while the caller captures.
    """
    return (
        tensor.is_cuda
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and torch.cuda.is_available()
        and not torch.cuda.is_current_stream_capturing()
    )
