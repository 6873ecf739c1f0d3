"""What is accepted as an array on the device, and the memory that a stream's calls share."""

import threading
from typing import Any

import cupy
import numpy as np
from cupy.cuda import runtime
from nf4.errors import InputError
from nf4.floats import BFLOAT16, FLOAT16, FLOAT32

KINDS = {FLOAT32: 0, FLOAT16: 1, BFLOAT16: 2}  # DTYPE of the kernels
_CUDA = (2, 13)  # DLPack's device types: CUDA, managed CUDA


def require_gpu() -> None:
    """Raise ImportError with CUDA's reason where there is no GPU to run on."""
    try:
        devices = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise ImportError(f"nf4_gpu needs an NVIDIA GPU, and CUDA finds none: {error}") from error
    if devices == 0:
        raise ImportError("nf4_gpu needs an NVIDIA GPU, and CUDA finds none: is CUDA_VISIBLE_DEVICES empty?")


def on_device(x: Any, what: str) -> cupy.ndarray:
    """Return x as a CuPy array without a copy: a CuPy array, or what exports CUDA memory by DLPack.

    Raises InputError for a host array, for one on another than the current device, and for one that is not
    C-contiguous.
    """
    if not isinstance(x, cupy.ndarray):
        device = getattr(x, "__dlpack_device__", None)
        if device is None or device()[0] not in _CUDA:
            raise InputError(
                f"{what} is a {type(x).__module__}.{type(x).__name__} in host memory; "
                f"move it to the device first, with cupy.asarray"
            )
        x = cupy.from_dlpack(x)
    current = runtime.getDevice()
    if x.data.device_id != current and x.size:  # memory of no bytes is nowhere
        raise InputError(
            f"{what} is on GPU {x.data.device_id} and the current device is GPU {current}; "
            f"call inside `with cupy.cuda.Device({x.data.device_id}):`"
        )
    if not x.flags.c_contiguous:
        raise InputError(
            f"{what} has strides {x.strides} and is not contiguous; pass cupy.ascontiguousarray(...)"
        )
    return x


def check_output(out: Any, shapes: tuple[tuple[int, ...], ...], dtype: np.dtype[Any]) -> cupy.ndarray:
    """Return out if it is a contiguous device array of that dtype and one of the shapes, else InputError."""
    out = on_device(out, "out")
    if out.dtype != dtype or out.shape not in shapes:
        choices = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise InputError(f"out is {out.dtype} {list(out.shape)}; it must be {dtype} {choices}")
    return out


def address(array: Any) -> int:
    """Return where the memory of a device array begins."""
    return int(array.data.ptr)


def constant(array: np.ndarray[Any, Any]) -> cupy.ndarray:
    """Return a copy on the current device that every stream may read.

    It is made on a stream of its own, which is waited for: a graph that is being captured doesn't record it.
    """
    with cupy.cuda.Stream(non_blocking=True) as stream:
        copy = cupy.asarray(array)
        stream.synchronize()
    return copy


class _Scratch:
    """Memory that consecutive calls of one thread on one stream share.

    It only grows, and what it outgrew is kept: a captured graph may still write there.
    """

    def __init__(self) -> None:
        self._arrays: dict[tuple[int, int, int, str], list[cupy.ndarray]] = {}

    def take(self, name: str, n: int, dtype: Any, zeroed: bool = False) -> cupy.ndarray:
        """Return at least n elements; zeroed when they are first taken, if asked for."""
        stream = cupy.cuda.get_current_stream().ptr
        key = (runtime.getDevice(), stream, threading.get_ident(), name)
        arrays = self._arrays.get(key)
        if arrays is not None and arrays[-1].size >= n:
            return arrays[-1]
        n = max(n, 256)
        array = constant(np.zeros(n, dtype)) if zeroed else cupy.empty(n, dtype)
        self._arrays.setdefault(key, []).append(array)
        return array


scratch = _Scratch()
