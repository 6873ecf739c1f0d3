"""Matrix products by cuBLAS through ctypes: CuPy refuses its own while a graph is captured."""

import ctypes
import math
import threading
from functools import cache
from typing import Any

import cupy
from cupy.cuda import runtime
from nf4.floats import BFLOAT16, FLOAT16, FLOAT32

from nf4_gpu.arrays import address, scratch

_TYPES = {FLOAT32: 0, FLOAT16: 2, BFLOAT16: 14}  # cudaDataType
_COMPUTE_32F, _COMPUTE_64F = 68, 70
_FLOAT64 = 1
_DEFAULT_ALGORITHM = -1
_WORKSPACE = 32 << 20  # bytes: what cuBLAS recommends on Hopper

_thread = threading.local()


@cache
def _library() -> Any:
    from cuda.pathfinder import load_nvidia_dynamic_lib

    return ctypes.CDLL(load_nvidia_dynamic_lib("cublas").abs_path)


def _handle() -> ctypes.c_void_p:
    """This thread's handle on the current device, set to the current stream, with a workspace of its own.

    The same algorithm is then chosen on every stream.
    """
    library, device = _library(), runtime.getDevice()
    handles: dict[int, ctypes.c_void_p] = vars(_thread).setdefault("handles", {})
    if device not in handles:
        handle = ctypes.c_void_p()
        _check(library.cublasCreate_v2(ctypes.byref(handle)), "cublasCreate")
        handles[device] = handle
    handle = handles[device]
    stream = ctypes.c_void_p(cupy.cuda.get_current_stream().ptr)
    _check(library.cublasSetStream_v2(handle, stream), "cublasSetStream")
    workspace = ctypes.c_void_p(address(scratch.take("cublas", _WORKSPACE, cupy.uint8)))
    status = library.cublasSetWorkspace_v2(handle, workspace, ctypes.c_size_t(_WORKSPACE))
    _check(status, "cublasSetWorkspace")
    return handle


def multiply(
    a: cupy.ndarray,
    b: cupy.ndarray,
    out: cupy.ndarray,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
) -> None:
    """Launch out = alpha op(a) op(b) + beta out, for contiguous matrices of one dtype, summed in float32.

    op(a) is [m, k], op(b) [k, n], out [m, n]; out is of the dtype of a and b or float32. No TF32.
    """
    m, n = out.shape
    k = a.shape[0] if transpose_a else a.shape[1]
    if m == 0 or n == 0:
        return
    # cuBLAS reads columns first: it is given out^T = op(b)^T op(a)^T.
    one, two = ctypes.c_float(alpha), ctypes.c_float(beta)
    status = _library().cublasGemmEx(
        _handle(),
        int(transpose_b),
        int(transpose_a),
        n,
        m,
        k,
        ctypes.byref(one),
        ctypes.c_void_p(address(b)),
        _TYPES[b.dtype],
        b.shape[1],
        ctypes.c_void_p(address(a)),
        _TYPES[a.dtype],
        a.shape[1],
        ctypes.byref(two),
        ctypes.c_void_p(address(out)),
        _TYPES[out.dtype],
        n,
        _COMPUTE_32F,
        _DEFAULT_ALGORITHM,
    )
    _check(status, f"cublasGemmEx [{m}, {k}] x [{k}, {n}] in {a.dtype}")


def multiply_float64(a: cupy.ndarray, b: cupy.ndarray, out: cupy.ndarray) -> None:
    """Launch out = a b in float64, a [..., m, k] and b [..., k, n], with as many matrices each.

    Of each matrix the rows are contiguous, or the columns; of out the rows. No FP64 emulation.
    """
    m, n = out.shape[-2:]
    k, batch = a.shape[-1], math.prod(out.shape[:-2])
    if not out.size:
        return
    one, two = ctypes.c_double(1.0), ctypes.c_double(0.0)
    # cuBLAS reads columns first: it is given out^T = b^T a^T.
    first, second, result = _matrix(b), _matrix(a), _matrix(out)
    status = _library().cublasGemmStridedBatchedEx(
        _handle(),
        first[0],
        second[0],
        n,
        m,
        k,
        ctypes.byref(one),
        ctypes.c_void_p(address(b)),
        _FLOAT64,
        *first[1:],
        ctypes.c_void_p(address(a)),
        _FLOAT64,
        *second[1:],
        ctypes.byref(two),
        ctypes.c_void_p(address(out)),
        _FLOAT64,
        *result[1:],
        batch,
        _COMPUTE_64F,
        _DEFAULT_ALGORITHM,
    )
    _check(status, f"cublasGemmStridedBatchedEx {batch} x [{m}, {k}] x [{k}, {n}] in float64")


def _matrix(x: cupy.ndarray) -> tuple[int, int, ctypes.c_longlong]:
    """Whether columns are contiguous; the elements from a row or column, and from a matrix, to the next."""
    transposed = x.strides[-1] != x.itemsize
    lead = x.strides[-1] if transposed else x.strides[-2]
    least = x.shape[-2] if transposed else x.shape[-1]  # of one row the stride means nothing
    stride = x.strides[-3] if x.ndim > 2 else 0
    return int(transposed), max(lead // x.itemsize, least, 1), ctypes.c_longlong(stride // x.itemsize)


def _check(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"{what} failed with cuBLAS status {status}")
