"""NumPy arrays as PyTorch tensors and back, bit for bit, bfloat16 too."""

import importlib
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray


def to_torch(array: NDArray[Any]) -> Any:
    """Return a torch tensor of the array's shape and dtype, with its own memory."""
    torch: Any = importlib.import_module("torch")
    array = np.array(array, order="C")  # torch warns of memory that it may not write
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: Any) -> NDArray[Any]:
    """Return a contiguous array of the tensor's shape and dtype."""
    torch: Any = importlib.import_module("torch")
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.view(torch.int16).numpy()).view(ml_dtypes.bfloat16)
    return np.asarray(tensor.numpy())


def torch_dtype(name: str) -> Any:
    """Return torch's dtype of that name."""
    return getattr(importlib.import_module("torch"), name)


def packed(codes: NDArray[Any]) -> NDArray[np.uint8]:
    """Return codes, one a byte, packed by NF4-5.1; for libraries that keep one element a byte or more."""
    flat = codes.reshape(-1).astype(np.uint8)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(7))
    return np.asarray(flat[0::2] << 4 | flat[1::2])


def unpacked(codes: NDArray[np.uint8], n: int) -> NDArray[np.uint8]:
    """Return the first n codes of packed ones, one a byte."""
    return np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)[:n]
