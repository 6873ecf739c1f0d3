"""Launches through the driver: the host spends less on one than CuPy does."""

import ctypes
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar

import numpy as np
from cupy.cuda.runtime import CUDARuntimeError
from cupy.cuda.stream import get_current_stream

from nf4_gpu.compile import kernel

Result = TypeVar("Result")

_UINT8, _SWIZZLE_128B, _PROMOTE_128B = 0, 3, 2  # of CUtensorMap
_BOX_BYTES = 128


class TensorMap:
    """A matrix of bytes [rows, columns] as Hopper's copy engine knows it, in boxes of box_rows by 128.

    A kernel gets it by value. columns is a multiple of 16, and so is the address.
    """

    def __init__(self, address: int, rows: int, columns: int, box_rows: int) -> None:
        self._memory = ctypes.create_string_buffer(128 + 64)
        self.address = -(-ctypes.addressof(self._memory) // 64) * 64
        status = _library().cuTensorMapEncodeTiled(
            ctypes.c_void_p(self.address),
            _UINT8,
            2,
            ctypes.c_void_p(address),
            (ctypes.c_uint64 * 2)(columns, rows),
            (ctypes.c_uint64 * 1)(columns),
            (ctypes.c_uint32 * 2)(_BOX_BYTES, box_rows),
            (ctypes.c_uint32 * 2)(1, 1),
            0,
            _SWIZZLE_128B,
            _PROMOTE_128B,
            0,
        )
        if status:
            raise RuntimeError(f"cuTensorMapEncodeTiled [{rows}, {columns}] failed with CUDA status {status}")


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int * 16))


_OVERLAPPING = _Attribute(6)  # programmatic stream serialization
_OVERLAPPING.value[0] = 1


class Call:
    """A launch of a kernel with its arguments, of which some may be set anew. For one thread.

    arguments: arrays, integers and TensorMaps; they must stay where they are.
    """

    def __init__(
        self, kernel: "Launcher", grid: tuple[int, int], threads: int, arguments: Sequence[Any]
    ) -> None:
        count = len(arguments)
        self.values = (ctypes.c_uint64 * count)()
        """An argument's address or number, eight bytes each; not that of a TensorMap."""
        first = ctypes.addressof(self.values)
        self._pointers = (ctypes.c_void_p * count)(*range(first, first + 8 * count, 8))
        for i, argument in enumerate(arguments):
            if isinstance(argument, TensorMap):
                self._pointers[i] = argument.address
            else:
                self.values[i] = argument if isinstance(argument, int) else argument.data.ptr
        self._kernel, self._arguments = kernel, arguments
        self._config = _Config((*grid, 1), (threads, 1, 1), kernel.shared)
        self._config.attributes = ctypes.addressof(_OVERLAPPING)
        self._reference = ctypes.byref(self._config)
        self._launch = _library().cuLaunchKernelEx

    def __call__(self, overlapping: bool = False) -> None:
        """Launch on the current stream.

        If overlapping, it may begin before the kernel that precedes it there has ended, as far as that one
        lets it, and waits for its end by itself.
        """
        config = self._config
        config.stream = get_current_stream().ptr
        config.attribute_count = overlapping
        status = self._launch(self._reference, self._kernel.handle, self._pointers, None)
        if status:
            raise RuntimeError(f"the launch of {self._kernel.name} failed with CUDA status {status}")


Calls = dict[tuple[Any, ...], Call]
"""By everything that makes them differ; the thread is part of it."""


class Kept:
    """What a tensor keeps for its next operation, since its arrays don't change. A copy of it starts anew."""

    def __init__(self) -> None:
        self.calls: Calls = {}
        self.maps: dict[int, TensorMap] = {}
        """The map of the codes, by rows of a box."""
        self.settled: set[int] = set()
        """The streams on which a product has waited for the tensor to be written."""

    def __reduce__(self) -> tuple[type["Kept"], tuple[()]]:
        return Kept, ()


def launch_early(
    function: Any, grid: tuple[int, ...], block: int, arguments: Sequence[Any], shared: int, stream: int
) -> None:
    """Launch a kernel that may begin before the one that precedes it on the stream has ended. From sm_90 on.

    arguments: integers, booleans and NumPy scalars.
    """
    values = (ctypes.c_uint64 * len(arguments))()
    first = ctypes.addressof(values)
    for i, argument in enumerate(arguments):
        memory = np.asarray(argument)
        ctypes.memmove(first + 8 * i, memory.ctypes.data, memory.dtype.itemsize)
    pointers = (ctypes.c_void_p * len(arguments))(*range(first, first + 8 * len(arguments), 8))
    sizes = (*grid, *[1] * (3 - len(grid)))
    config = _Config(sizes, (block, 1, 1), shared, stream, ctypes.addressof(_OVERLAPPING), 1)
    status = _library().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(function.ptr), pointers, None)
    if status:
        raise RuntimeError(f"a launch failed with CUDA status {status}")


def capture(stream: Any, run: Callable[[], Result]) -> tuple[Any, Result]:
    """Return a graph of what run launches on a stream, and on others that join it, and what run returns.

    What run raises ends the capture.
    """
    stream.begin_capture()
    try:
        result = run()
    except BaseException:
        with suppress(CUDARuntimeError):  # that streams were not joined any more is no news
            stream.end_capture()
        raise
    return stream.end_capture(), result


class Launcher:
    """Launches one kernel."""

    def __init__(self, function: Any, name: str, shared: int) -> None:
        self._function = function  # and with it its module
        self.handle = ctypes.c_void_p(function.ptr)
        self.name = name
        self.shared = shared

    def __call__(self, grid: tuple[int, int], threads: int, arguments: Sequence[Any]) -> None:
        """Launch once on the current stream."""
        self.prepare(grid, threads, arguments)()

    def prepare(self, grid: tuple[int, int], threads: int, arguments: Sequence[Any]) -> Call:
        """Return a call that can be repeated."""
        return Call(self, grid, threads, arguments)


@cache
def launcher(device: int, source: str, name: str, shared: int = 0, **defines: int) -> Launcher:
    """Return what launches a kernel, as compile.kernel's."""
    return Launcher(kernel(device, source, name, shared, **defines), name, shared)


@cache
def _library() -> Any:
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
