"""Replay a long chain of small CUDA operations on a batch as one graph.

A chain of thousands of launches costs the host several microseconds each, a graph about two on the
device. A graph reads and writes fixed memory, which it keeps: the bytes are bounded, and the least
recently used graph goes first.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from types import TracebackType

import torch
from torch import Tensor

# Input buffers of all graphs together; a batch above it runs without a graph. What lies between
# input and result shares one pool, as large as the largest graph needs it.
LIMIT_BYTES = 2**28
# A graph of 10,000 nodes takes some 10 MiB of host memory besides.
LIMIT_GRAPHS = 16

Solve = Callable[[Tensor], Tensor]
_Key = tuple[Solve, tuple[int, ...], torch.dtype, torch.device]

_log = logging.getLogger("tempbalance")


class _Device:
    """What the graphs of one device share, so that they run one after another."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # of captures: memory is reused within a stream
        self.pool = torch.cuda.graph_pool_handle()
        self.done = torch.cuda.Event()
        self.lock = threading.RLock()


class Plan:
    """A captured ``solve`` with its own input ``work``. Use as a context, and fill ``work`` first.

    Uses on different streams wait for each other on the device, those of different threads on the
    host.
    """

    def __init__(self, shape: tuple[int, ...], like: Tensor, solve: Solve, shared: _Device) -> None:
        self._shared = shared
        self.work = like.new_zeros(shape)
        self._graph = torch.cuda.CUDAGraph()
        with self:
            solve(self.work)  # libraries take their handles and load their kernels now
            current = torch.cuda.current_stream(like.device)
            shared.stream.wait_stream(current)
            with torch.cuda.stream(shared.stream):
                self._capture(solve)
            current.wait_stream(shared.stream)

    def _capture(self, solve: Solve) -> None:
        # Not torch.cuda.graph: that waits for the device and empties the allocator's cache. Other
        # threads, those of the trainer, may allocate meanwhile.
        self._graph.capture_begin(pool=self._shared.pool, capture_error_mode="thread_local")
        try:
            self._out = solve(self.work)
        except BaseException:
            with contextlib.suppress(RuntimeError):
                self._graph.capture_end()
            raise
        self._graph.capture_end()

    def __enter__(self) -> Plan:
        self._shared.lock.acquire()
        torch.cuda.current_stream(self.work.device).wait_event(self._shared.done)
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
        current = torch.cuda.current_stream(self.work.device)
        # Made on one stream and used on others: not to be handed out again before they are done.
        self.work.record_stream(current)
        self._shared.done.record(current)
        self._shared.lock.release()


class Plans:
    """The graphs of this process, by computation, shape, dtype and device."""

    def __init__(self) -> None:
        self._plans: OrderedDict[_Key, Plan] = OrderedDict()
        self._devices: dict[torch.device, _Device] = {}
        self._seen: set[_Key] = set()
        self._failed = False
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._plans)

    def get(
        self, shape: tuple[int, ...], like: Tensor, solve: Solve, at_once: bool = False
    ) -> Plan | None:
        """The plan for inputs of ``shape``; None where ``solve`` is to be called as it is.

        That is the first time that a shape is seen (unless ``at_once``), for a batch too large to
        keep, inside a capture of the caller's, in a thread that may only replay what is there,
        and once a capture has failed.
        """
        nbytes = math.prod(shape) * like.element_size()
        if not usable(like) or self._failed or nbytes > LIMIT_BYTES:
            return None
        key = (solve, shape, like.dtype, like.device)
        with self._lock:
            if key in self._plans:
                self._plans.move_to_end(key)
                return self._plans[key]
            if getattr(_here, "only_replayed", False):
                return None
            if key not in self._seen and not at_once:
                self._seen.add(key)
                return None
            self._make_room(nbytes)
            try:
                if like.device not in self._devices:
                    self._devices[like.device] = _Device(like.device)
                # Of no use outside inference mode if it were made inside.
                with torch.inference_mode(False), torch.no_grad():
                    self._plans[key] = Plan(shape, like, solve, self._devices[like.device])
            except RuntimeError as error:
                self._failed = True
                _log.warning("CUDA graphs are not used for eigenvalues, which are then slower: "
                             "capturing one failed (%s)", error)  # fmt: skip
                return None
            return self._plans[key]

    def _make_room(self, nbytes: int) -> None:
        while self._plans and (
            len(self._plans) >= LIMIT_GRAPHS
            or nbytes + sum(plan.work.nbytes for plan in self._plans.values()) > LIMIT_BYTES
        ):
            self._plans.popitem(last=False)
        # The handle of a pool dies with its last graph.
        alive = {device for _, _, _, device in self._plans}
        self._devices = {d: shared for d, shared in self._devices.items() if d in alive}

    def clear(self) -> None:
        """Free all graphs, and forget what was seen."""
        with self._lock:
            self._plans.clear()
            self._devices.clear()
            self._seen.clear()
            self._failed = False


plans = Plans()
_here = threading.local()


@contextlib.contextmanager
def only_replayed() -> Iterator[None]:
    """In this thread, capture no graphs: not beside a training that may draw random numbers."""
    _here.only_replayed = True
    try:
        yield
    finally:
        _here.only_replayed = False


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
