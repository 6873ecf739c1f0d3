"""A device made of this machine's processor: kernels compiled by g++ against emulator/, products by NumPy.

It runs what the GPU runs, thread by thread, slowly. Other streams than MAIN run either at once or as late
as they may, so that a wait that is missing shows as other bits.
"""

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from nf4.floats import BFLOAT16
from nf4.ranks import Ranks
from nf4_gpu.compile import ROOM
from nf4_gpu.device import MAIN, STREAMS
from nf4_gpu.matrix import Matrix
from numpy.typing import NDArray

HERE = Path(__file__).parent / "emulator"
COMPILER = shutil.which("g++")
_BUILT = Path(tempfile.gettempdir()) / "nf4-emulated-kernels"


@cache
def library(source: str, **defines: int) -> ctypes.CDLL:
    """The kernels of a source, compiled for this processor."""
    text = (ROOM / source).read_text()
    names = re.findall(r'extern "C" __global__ void(?:\s*__launch_bounds__\([^;{]*?\))?\s+(\w+)\(', text)
    assert names
    code = [
        f'#include "{HERE / "emulate.h"}"',
        text,
        *(
            f'extern "C" void launch_{name}(const unsigned* grid, const unsigned* block, unsigned shared, '
            "void** arguments, int count) "
            f"{{ emulation::launch({name}, grid, block, shared, arguments, count); }}"
            for name in names
        ),
    ]
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-ffp-contract=off", f"-I{HERE}", f"-I{ROOM}"]
    options += [f"-D{key}={value}" for key, value in sorted(defines.items())]
    headers = [path.read_bytes() for path in sorted([*ROOM.rglob("*.cuh"), *HERE.iterdir()])]
    key = hashlib.sha256(b"".join(headers) + "\n".join([*code, *options]).encode()).hexdigest()[:24]
    built = _BUILT / f"{Path(source).stem}-{key}.so"
    if not built.exists():
        _BUILT.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_BUILT) as folder:
            (Path(folder) / "kernels.cpp").write_text("\n".join(code))
            command = [str(COMPILER), *options, "kernels.cpp", "-o", "kernels.so"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[:4000]
            (Path(folder) / "kernels.so").rename(built)
    return ctypes.CDLL(str(built))


def view(matrix: Matrix) -> NDArray[Any]:
    """The elements of a matrix, in place."""
    if matrix.rows == 0:
        return np.empty((0, matrix.columns), matrix.dtype)
    size = ((matrix.rows - 1) * matrix.pitch + matrix.columns) * matrix.dtype.itemsize
    memory = np.frombuffer((ctypes.c_char * size).from_address(matrix.address), matrix.dtype)
    strides = (matrix.pitch * matrix.dtype.itemsize, matrix.dtype.itemsize)
    return np.lib.stride_tricks.as_strided(memory, (matrix.rows, matrix.columns), strides)


class Emulated:
    """A Device. late: streams other than MAIN do nothing until they are waited for."""

    processors = 3  # so few that splits happen at small sizes
    capability = 90
    shared_memory = 227 << 10

    def __init__(self, late: bool = False) -> None:
        self.late, self.launches = late, 0
        self._memory: list[Any] = []
        self._current = MAIN
        self._queues: list[list[Callable[[], None]]] = [[] for _ in range(STREAMS)]
        self._done = [0] * STREAMS
        self._recording: list[tuple[int, Callable[[], None]]] | None = None
        self.allocated = 0

    @property
    def taken(self) -> int:
        return self.allocated

    def allocate(self, nbytes: int) -> int:
        memory = np.zeros(nbytes + 256, np.uint8)
        self._memory.append(memory)
        self.allocated += nbytes
        return -(-memory.ctypes.data // 256) * 256

    def allocate_pinned(self, nbytes: int) -> NDArray[np.uint8]:
        return np.zeros(nbytes, np.uint8)

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
        function = getattr(library(source, **defines), f"launch_{name}")
        assert block % 32 == 0
        assert block <= 1024
        assert all(0 < size < 1 << 31 for size in grid), (name, grid)
        assert all(size < 65536 for size in grid[1:]), (name, grid)
        sizes = (ctypes.c_uint * 3)(*grid, *[1] * (3 - len(grid)))
        threads = (ctypes.c_uint * 3)(block, 1, 1)
        values = [_argument(value) for value in arguments]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])

        def run() -> None:
            assert values  # kept for the pointers
            function(sizes, threads, ctypes.c_uint(shared), pointers, len(values))

        self._do(run)

    launch_early = launch

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
        assert self._current == MAIN
        for matrix in (a, b, out, *([add] if add else [])):
            aligned = 16 if matrix.dtype == BFLOAT16 else 4  # gradients of any rank are added to
            assert matrix.address % aligned == 0
            assert matrix.pitch * matrix.dtype.itemsize % aligned == 0

        def run() -> None:
            left, right = (view(x).astype(np.float32) for x in (a, b))
            total = (
                (left.T if transpose_a else left) @ (right.T if transpose_b else right) * np.float32(alpha)
            )
            assert total.shape == (out.rows, out.columns)
            if add is not None:
                total += view(add).astype(np.float32)
            if bias:
                total += view(Matrix(bias, 1, out.columns, out.columns, BFLOAT16)).astype(np.float32)
            view(out)[...] = total.astype(out.dtype)

        self._do(run)

    def copy(self, to: int, source: int, nbytes: int) -> None:
        self._do(lambda: ctypes.memmove(to, source, nbytes) and None)

    def copy_rows(self, to: Matrix, source: Matrix) -> None:
        assert (to.rows, to.columns) == (source.rows, source.columns)
        self._do(lambda: np.copyto(view(to), view(source)))

    def fill(self, to: int, byte: int, nbytes: int) -> None:
        self._do(lambda: ctypes.memset(to, byte, nbytes) and None)

    @contextmanager
    def on(self, stream: int) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def mark(self) -> Any:
        place: list[Any] = [
            0,
            0,
            self._recording,
        ]  # the stream, what must be done of it, and in which recording
        stream = self._current

        def run() -> None:
            place[:2] = stream, self._done[stream] + len(self._queues[stream])

        self._at_once(run)
        return place

    def wait(self, mark: Any) -> None:
        assert mark[2] is self._recording  # as CUDA demands
        if self._current == MAIN:
            self._at_once(lambda: self._drain(*mark[:2]))
        else:
            fixed: list[tuple[int, int]] = []  # the place when this wait was called
            queue = self._current

            def run() -> None:
                fixed.append((mark[0], mark[1]))
                self._queues[queue].append(lambda: self._drain(*fixed.pop(0)))
                if not self.late:
                    self._drain(queue, self._done[queue] + len(self._queues[queue]))

            self._at_once(run)

    def reached(self, mark: Any) -> None:
        self._drain(*mark[:2])

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        assert self._recording is None
        self._recording = recorded = []
        try:
            run()
        finally:
            self._recording = None

        def launch() -> None:
            for stream, operation in recorded:
                with self.on(stream):
                    operation()

        return launch

    def join(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def sum_over_ranks(self, address: int, count: int, dtype: np.dtype[Any]) -> None:
        def run() -> None:
            mine = np.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(address), dtype)
            mine[:] = np.sum(self._ranks.gather(mine.copy()), axis=0, dtype=dtype)

        self._do(run)

    def synchronize(self) -> None:
        for stream in range(STREAMS):
            self._drain(stream, self._done[stream] + len(self._queues[stream]))

    def _do(self, run: Callable[[], None]) -> None:
        self.launches += 1
        stream = self._current

        def send() -> None:
            if stream == MAIN:
                run()
                return
            self._queues[stream].append(run)
            if not self.late:
                self._drain(stream, self._done[stream] + len(self._queues[stream]))

        self._at_once(send)

    def _at_once(self, run: Callable[[], None]) -> None:
        if self._recording is None:
            run()
        else:
            self._recording.append((self._current, run))

    def _drain(self, stream: int, until: int) -> None:
        while self._done[stream] < until:
            self._done[stream] += 1
            self._queues[stream].pop(0)()


def _argument(value: Any) -> Any:
    """As CuPy passes it: an int as 64 bits, a NumPy scalar as it is."""
    if isinstance(value, bool):
        return ctypes.c_bool(value)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    memory = np.array(value)
    assert memory.dtype != np.float64
    buffer = (ctypes.c_char * 8)()
    ctypes.memmove(buffer, memory.ctypes.data, memory.dtype.itemsize)
    return buffer
