"""The devices that a model's tests run on, the emulated one and the GPU; memory to and from them."""

import os
import shutil
from typing import Any

import numpy as np
import pytest
from emulated import Emulated
from nf4_gpu.matrix import Matrix
from numpy.typing import NDArray

EMULATED, LATE, GPU = "emulated", "emulated, other streams late", "cuda"


def make(kind: str) -> Any:
    """Return a device of a kind."""
    if kind != GPU:
        return Emulated(late=kind == LATE)
    from nf4_gpu.device import Cuda

    return Cuda()


def device_of(kind: str, request: pytest.FixtureRequest) -> Any:
    """Return a device; skip without the compiler that emulation needs, or without a GPU."""
    if kind == GPU:
        request.getfixturevalue("gpu")
    elif shutil.which("g++") is None:
        pytest.skip("there is no g++, which compiles the kernels for the processor")
    return make(kind)


def without(reason: str, at_least: int = 1) -> None:
    """Skip, or fail where NF4_REQUIRE_GPU is at least that."""
    if int(os.environ.get("NF4_REQUIRE_GPU") or 0) >= at_least:
        pytest.fail(f"NF4_REQUIRE_GPU={os.environ['NF4_REQUIRE_GPU']}, and {reason}")
    pytest.skip(reason)


def upload(device: Any, array: NDArray[Any], pitch: int | None = None) -> Matrix:
    """Return a matrix on the device; what its rows have beyond their columns is all ones in every bit."""
    rows = array.reshape(array.shape[0] if array.ndim > 1 else 1, -1)
    pitch = pitch or rows.shape[1]
    padded = np.full((len(rows), pitch * array.dtype.itemsize), 0xFF, np.uint8).view(array.dtype)
    padded[:, : rows.shape[1]] = rows
    address = device.allocate(padded.nbytes)
    device.copy(address, padded.ctypes.data, padded.nbytes)
    device.synchronize()
    return Matrix(address, len(rows), rows.shape[1], pitch, array.dtype)


def empty(device: Any, rows: int, columns: int, dtype: Any, pitch: int | None = None) -> Matrix:
    """Return a matrix on the device, all ones in every bit: NaN."""
    dtype = np.dtype(dtype)
    return upload(device, np.full((rows, columns * dtype.itemsize), 0xFF, np.uint8).view(dtype), pitch)


def whole(device: Any, matrix: Matrix) -> NDArray[Any]:
    """Return a matrix's rows with what lies between them."""
    device.synchronize()
    found = np.empty((matrix.rows, matrix.pitch), matrix.dtype)
    device.copy(found.ctypes.data, matrix.address, found.nbytes)
    device.synchronize()
    return found


def download(device: Any, matrix: Matrix) -> NDArray[Any]:
    """Return a matrix's elements, [rows, columns]; what lies between its rows must be as upload left it."""
    found = whole(device, matrix)
    beyond = found[:, matrix.columns :]
    assert (np.ascontiguousarray(beyond).view(np.uint8) == 0xFF).all()
    return np.ascontiguousarray(found[:, : matrix.columns])


def error(found: Any, expected: Any) -> float:
    """Return the norm of the difference over that of what is expected."""
    found, expected = (np.asarray(x).astype(np.float64) for x in (found, expected))
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))
