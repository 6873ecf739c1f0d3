"""The device as model and training see it: memory by address, launches on a few streams, products, graphs.

What is launched eagerly and what is recorded into a graph goes through the same calls. Memory is taken
before a run begins, so that nothing is allocated while a graph is recorded.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np
from nf4.errors import InputError
from nf4.ranks import Ranks
from numpy.typing import NDArray

from nf4_gpu.matrix import Matrix

MAIN, SIDE, AHEAD, IN, OUT = range(5)
"""Streams: what a step waits for; gradients of adapters; weights written ahead; copies in and out."""
STREAMS = 5

Mark = Any
"""A place in a stream that another stream can wait for."""


class Device(Protocol):
    """Where a model is computed. Calls go to the stream that `on` chose, and return before they are done."""

    processors: int
    capability: int
    shared_memory: int
    allocated: int

    @property
    def taken(self) -> int:
        """Bytes of the device that are gone since it was opened: what was allocated, graphs, kernels."""

    def allocate(self, nbytes: int) -> int:
        """Return the address of so many bytes, zeroed, aligned to 256, until the device is let go."""

    def allocate_pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Return host memory that copies reach asynchronously and kernels can read."""

    def launch(
        self,
        source: str,
        name: str,
        grid: tuple[int, ...],
        block: int,
        arguments: Sequence[Any],
        *,
        shared: int = 0,
        **defines: int,
    ) -> None:
        """Launch a kernel; shared: bytes of dynamic shared memory."""

    def launch_early(
        self,
        source: str,
        name: str,
        grid: tuple[int, ...],
        block: int,
        arguments: Sequence[Any],
        *,
        shared: int = 0,
        **defines: int,
    ) -> None:
        """Launch a kernel that may begin before the one that precedes it on the stream has ended.

        It waits for that by itself.
        """

    def multiply(
        self,
        a: Matrix,
        b: Matrix,
        out: Matrix,
        *,
        transpose_a: bool = False,
        transpose_b: bool = False,
        alpha: float = 1.0,
        add: Matrix | None = None,
        bias: int = 0,
    ) -> None:
        """Launch out = alpha op(a) op(b) + add + bias, on MAIN alone."""

    def copy(self, to: int, source: int, nbytes: int) -> None:
        """Copy between addresses of the device or of pinned host memory."""

    def copy_rows(self, to: Matrix, source: Matrix) -> None:
        """Copy a matrix to another of the same rows and columns on the device."""

    def fill(self, to: int, byte: int, nbytes: int) -> None:
        """Set so many bytes."""

    def on(self, stream: int) -> AbstractContextManager[None]:
        """Send what is called inside to a stream."""

    def mark(self) -> Mark:
        """Return the place that the current stream has reached."""

    def wait(self, mark: Mark) -> None:
        """Let the current stream wait for a place in another."""

    def reached(self, mark: Mark) -> None:
        """Wait, here, for a place in a stream."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record what run calls on MAIN, and on streams that wait for it and that it waits for; don't do it.

        Returns what does it, on the current stream.
        """

    def synchronize(self) -> None:
        """Wait for everything."""

    def join(self, ranks: Ranks) -> None:
        """Let sum_over_ranks reach the devices of other ranks; they all call this."""

    def sum_over_ranks(self, address: int, count: int, dtype: np.dtype[Any]) -> None:
        """Replace what all ranks have there by the sum, the same bits on all, on the current stream."""


class Cuda:
    """The current GPU."""

    def __init__(self) -> None:
        import cupy

        from nf4_gpu.blaslt import WORKSPACE, Products
        from nf4_gpu.compile import capability, processors, shared_memory

        self._cupy = cupy
        self._runtime = cupy.cuda.runtime
        self._number = self._runtime.getDevice()
        self.processors = processors(self._number)
        self.capability = capability(self._number)
        self.shared_memory = shared_memory(self._number)
        self._memory: list[Any] = []  # what keeps it allocated
        self._streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(STREAMS)]
        self._current = MAIN
        self._products = Products()
        self.allocated = 0
        self._free = self._runtime.memGetInfo()[0]
        self._workspace = self.allocate(WORKSPACE)

    @property
    def taken(self) -> int:
        """Bytes that are gone since, by what the driver says is free; other processes may free some, too."""
        return max(self.allocated, int(self._free - self._runtime.memGetInfo()[0]))

    def allocate(self, nbytes: int) -> int:
        """Return zeroed memory of the device. Raises InputError where there is not so much."""
        stream = self._streams[MAIN]
        try:
            with stream:
                memory = self._cupy.cuda.alloc(max(nbytes, 256))
                self._runtime.memsetAsync(memory.ptr, 0, max(nbytes, 256), stream.ptr)
        except self._cupy.cuda.memory.OutOfMemoryError as error:
            free, total = self._runtime.memGetInfo()
            raise InputError(
                f"{nbytes / 2**30:.2f} GiB of device memory can't be had: {free / 2**30:.2f} of "
                f"{total / 2**30:.2f} GiB are free; end what else uses the GPU, or take less "
                f"(--checkpointing, --batch-size, --optimizer-budget, --weights-budget)"
            ) from error
        stream.synchronize()
        self._memory.append(memory)
        self.allocated += max(nbytes, 256)
        return int(memory.ptr)

    def allocate_pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Return pinned host memory. Raises InputError where there is not so much."""
        try:
            memory = self._cupy.cuda.alloc_pinned_memory(max(nbytes, 1))
        except self._cupy.cuda.runtime.CUDARuntimeError as error:
            raise InputError(
                f"{nbytes / 2**30:.2f} GiB of pinned host memory can't be had ({error}); take a larger "
                f"--optimizer-budget or --weights-budget"
            ) from error
        return np.frombuffer(memory, np.uint8, nbytes)

    def launch(
        self,
        source: str,
        name: str,
        grid: tuple[int, ...],
        block: int,
        arguments: Sequence[Any],
        *,
        shared: int = 0,
        **defines: int,
    ) -> None:
        """Launch a kernel on the current stream."""
        from nf4_gpu.compile import kernel

        function = kernel(self._number, source, name, shared, **defines)
        function(grid, (block,), arguments, shared_mem=shared, stream=self._streams[self._current])

    def launch_early(
        self,
        source: str,
        name: str,
        grid: tuple[int, ...],
        block: int,
        arguments: Sequence[Any],
        *,
        shared: int = 0,
        **defines: int,
    ) -> None:
        """Launch a kernel on the current stream, from sm_90 on before what precedes it has ended."""
        from nf4_gpu.compile import kernel
        from nf4_gpu.launch import launch_early

        if self.capability < 90:
            self.launch(source, name, grid, block, arguments, shared=shared, **defines)
            return
        function = kernel(self._number, source, name, shared, **defines)
        launch_early(function, grid, block, arguments, shared, self._streams[self._current].ptr)

    def multiply(
        self,
        a: Matrix,
        b: Matrix,
        out: Matrix,
        *,
        transpose_a: bool = False,
        transpose_b: bool = False,
        alpha: float = 1.0,
        add: Matrix | None = None,
        bias: int = 0,
    ) -> None:
        """Launch a product by cuBLASLt."""
        assert self._current == MAIN  # whose workspace it is
        self._products.multiply(
            self._streams[MAIN].ptr,
            self._workspace,
            a,
            b,
            out,
            transpose_a=transpose_a,
            transpose_b=transpose_b,
            alpha=alpha,
            add=add,
            bias=bias,
        )

    def copy(self, to: int, source: int, nbytes: int) -> None:
        """Copy on the current stream."""
        kind = self._runtime.memcpyDefault
        self._runtime.memcpyAsync(to, source, nbytes, kind, self._streams[self._current].ptr)

    def copy_rows(self, to: Matrix, source: Matrix) -> None:
        """Copy on the current stream."""
        size = source.dtype.itemsize
        self._runtime.memcpy2DAsync(
            to.address,
            to.pitch * size,
            source.address,
            source.pitch * size,
            source.columns * size,
            source.rows,
            self._runtime.memcpyDeviceToDevice,
            self._streams[self._current].ptr,
        )

    def fill(self, to: int, byte: int, nbytes: int) -> None:
        """Set bytes on the current stream."""
        self._runtime.memsetAsync(to, byte, nbytes, self._streams[self._current].ptr)

    @contextmanager
    def on(self, stream: int) -> Iterator[None]:
        """Send what is called inside to a stream."""
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def mark(self) -> Mark:
        """Return an event on the current stream."""
        event = self._cupy.cuda.Event(disable_timing=True)
        self._streams[self._current].record(event)
        return event

    def wait(self, mark: Mark) -> None:
        """Let the current stream wait for an event."""
        self._streams[self._current].wait_event(mark)

    def reached(self, mark: Mark) -> None:
        """Wait for an event."""
        mark.synchronize()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Capture run into a graph; returns its launch."""
        from nf4_gpu.launch import capture

        graph, _ = capture(self._streams[MAIN], run)

        def launch() -> None:
            graph.launch(self._streams[self._current])

        return launch

    def join(self, ranks: Ranks) -> None:
        """Join NCCL's communicator."""
        from nf4_gpu.ranks import Nccl

        self._nccl = Nccl(ranks)

    def sum_over_ranks(self, address: int, count: int, dtype: np.dtype[Any]) -> None:
        """Launch NCCL's all-reduce."""
        self._nccl.sum(address, count, dtype, self._streams[self._current].ptr)

    def synchronize(self) -> None:
        """Wait for the streams."""
        for stream in self._streams:
            stream.synchronize()
