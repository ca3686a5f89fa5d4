"""The order in which a device works: launches return at once, results arrive later.

`CudaStream` is that of a GPU. Tests use another, which works late on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol

import torch
from torch import Tensor

Work = Callable[[], None]


class Mark(Protocol):
    """A point in a stream."""

    def wait(self) -> None:
        """Return when all work before this point is done."""


class Stream(Protocol):
    """Runs work in order, after the call has returned."""

    def run(self, work: Work) -> None:
        """Run work after all earlier work."""

    def repeat(self, key: Hashable, work: Work) -> None:
        """Run work that does the same on the same memory whenever the key is the same."""

    def catch_up(self) -> None:
        """Run later work after what was done to the memory of the device by other means."""

    def mark(self) -> Mark:
        """Return the point after all work so far."""

    def reset(self) -> None:
        """Finish or drop all work, and forget all keys."""

    def host_buffer(self, size: int) -> Tensor:
        """Return int64 memory of the host that the device can copy from and to."""


class CudaStream:
    """A stream of a CUDA device, with a CUDA graph per key of `repeat`.

    The first work of a key runs as it is, which compiles kernels; the second one is captured.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, work: Work) -> None:
        """Run work after all earlier work."""
        with torch.cuda.stream(self._stream):
            work()

    def repeat(self, key: Hashable, work: Work) -> None:
        """Run work, from its second time on as a CUDA graph."""
        if key not in self._graphs:
            self._graphs[key] = None
            self.run(work)
            return
        graph = self._graphs[key]
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                work()
            self._graphs[key] = graph
        with torch.cuda.stream(self._stream):
            graph.replay()

    def catch_up(self) -> None:
        """Wait on the device for the stream that is current: it writes weights and new buffers."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def mark(self) -> Mark:
        """Return an event after all work so far."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return _Event(event)

    def reset(self) -> None:
        """Finish all work and free the graphs."""
        self._stream.synchronize()
        self._graphs.clear()
        # A pool whose graphs are all gone takes no new ones.
        self._pool = torch.cuda.graph_pool_handle()

    def host_buffer(self, size: int) -> Tensor:
        """Return pinned memory."""
        return torch.zeros(size, dtype=torch.int64, pin_memory=True)


class _Event:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()
