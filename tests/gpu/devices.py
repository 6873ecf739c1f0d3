"""The devices that tests of the model run on: the emulated one, and the GPU if there is one; memory to and from them."""

import os
import shutil
from typing import Any

import numpy as np
import pytest
from conftest import without
from emulated import Emulated
from nf4_gpu.device import Cuda
from nf4_gpu.matrix import Matrix
from numpy.typing import NDArray


def make(kind: str) -> Any:
    if kind.startswith("emulated"):
        if shutil.which("g++") is None:
            pytest.skip("there is no g++ to compile the kernels for this processor")
        return Emulated(late=kind == "emulated, late")
    from nf4_gpu.arrays import require_gpu

    try:
        require_gpu()
    except ImportError as error:
        without(str(error))
    return Cuda()


on_each_device = pytest.mark.parametrize(
    "device", ["emulated", "cuda"], indirect=True
)


def upload(device: Any, array: NDArray[Any], pitch: int | None = None) -> Matrix:
    """A matrix on the device; the columns of the pitch that it hasn't are poison."""
    rows = array.reshape(array.shape[0] if array.ndim > 1 else 1, -1)
    pitch = pitch or rows.shape[1]
    padded = np.full((len(rows), pitch * array.dtype.itemsize), 0xFF, np.uint8).view(array.dtype)
    padded[:, : rows.shape[1]] = rows
    address = device.allocate(padded.nbytes)
    device.copy(address, padded.ctypes.data, padded.nbytes)
    device.synchronize()
    return Matrix(address, len(rows), rows.shape[1], pitch, array.dtype)


def download(device: Any, matrix: Matrix) -> NDArray[Any]:
    device.synchronize()
    whole = np.empty((matrix.rows, matrix.pitch), matrix.dtype)
    device.copy(whole.ctypes.data, matrix.address, whole.nbytes)
    device.synchronize()
    return whole[:, : matrix.columns].copy()


def require(kind: str) -> bool:
    return os.environ.get("NF4_REQUIRE_GPU") == "1" or kind != "cuda"
