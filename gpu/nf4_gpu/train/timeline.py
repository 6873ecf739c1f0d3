"""Where a step's time goes: every launch of one step timed on the device, one after the other."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from nf4_gpu.device import MAIN, Cuda
from nf4_gpu.matrix import Matrix

_WAIT = r"""
extern "C" __global__ void wait(long long cycles) {
  long long start = clock64();
  while (clock64() - start < cycles) {}
}
"""
_CYCLES = 1 << 28  # about 150 ms: until then the host has launched the step


class Timed(Cuda):
    """The GPU with a stopwatch: while `measured`, all streams are one, each launch between two events."""

    def __init__(self) -> None:
        super().__init__()
        self._events: list[tuple[str, float, Any, Any]] | None = None
        self._wait_kernel = self._cupy.RawKernel(_WAIT, "wait")

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
        """Launch a kernel."""
        sizes = " x ".join(map(str, grid))
        label = f"{name} {sizes}"
        with self._timed(label, 0.0):
            super().launch(source, name, grid, block, arguments, shared=shared, **defines)

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
        """Launch a kernel; while measured, after the one before it."""
        if self._events is None:
            super().launch_early(source, name, grid, block, arguments, shared=shared, **defines)
        else:
            self.launch(source, name, grid, block, arguments, shared=shared, **defines)

    def multiply(self, a: Matrix, b: Matrix, out: Matrix, **options: Any) -> None:
        """Launch a product."""
        m, n = out.rows, out.columns
        k = a.rows if options.get("transpose_a") else a.columns
        with self._timed(f"product {m} x {n} x {k}", 2.0 * m * n * k):
            super().multiply(a, b, out, **options)

    def copy(self, to: int, source: int, nbytes: int) -> None:
        """Copy."""
        with self._timed("copy", 0.0):
            super().copy(to, source, nbytes)

    def copy_rows(self, to: Matrix, source: Matrix) -> None:
        """Copy rows."""
        with self._timed("copy rows", 0.0):
            super().copy_rows(to, source)

    def fill(self, to: int, byte: int, nbytes: int) -> None:
        """Set bytes."""
        with self._timed("fill", 0.0):
            super().fill(to, byte, nbytes)

    @contextmanager
    def on(self, stream: int) -> Iterator[None]:
        """Send what is called inside to a stream, or to MAIN while measuring."""
        with super().on(stream if self._events is None else MAIN):
            yield

    def measured(self, run: Callable[[], None]) -> list[dict[str, Any]]:
        """Return count, seconds and rate of each kind of launch that run makes, the longest first."""
        self.synchronize()
        self._events = []
        with self._streams[MAIN]:
            self._wait_kernel((1,), (1,), (_CYCLES,))
        try:
            run()
            self.synchronize()
            found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
            for label, operations, start, end in self._events:
                row = found[label]
                row[0] += 1
                row[1] += self._cupy.cuda.get_elapsed_time(start, end) / 1e3
                row[2] += operations
        finally:
            self._events = None
        return [
            {"what": label, "count": int(count), "seconds": seconds, "flops": operations / seconds}
            for label, (count, seconds, operations) in sorted(found.items(), key=lambda item: -item[1][1])
        ]

    @contextmanager
    def _timed(self, label: str, operations: float) -> Iterator[None]:
        if self._events is None:
            yield
            return
        start, end = self._cupy.cuda.Event(), self._cupy.cuda.Event()
        stream = self._streams[self._current]
        start.record(stream)
        yield
        end.record(stream)
        self._events.append((label, operations, start, end))
