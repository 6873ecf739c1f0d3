"""NumPy arrays as PyTorch tensors and back, bit for bit, bfloat16 too."""

import importlib
import math
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


def fits(codes: NDArray[Any], absmax: NDArray[Any], shape: list[int], block_size: int) -> bool:
    """Whether there are as many codes and absmax as a tensor of this shape has."""
    n = math.prod(shape)
    return len(codes) == -(-n // 2) and block_size > 0 and len(absmax) == -(-n // block_size)


def whole_blocks(codes: NDArray[Any], absmax: NDArray[Any], shape: list[int], block_size: int) -> int:
    """Return the number of elements of a tensor of whole blocks.

    Raises NotImplementedError for others, which the library would not see as they are.
    """
    n = math.prod(shape)
    if not fits(codes, absmax, shape, block_size) or n % block_size:
        raise NotImplementedError("decodes whole blocks")
    return n


def filled(codes: NDArray[Any], absmax: NDArray[Any], shape: list[int], block_size: int) -> NDArray[np.uint8]:
    """Return the codes with bytes behind them to whole blocks; as they are where they do not fit."""
    if not fits(codes, absmax, shape, block_size):
        return codes
    return np.pad(codes, (0, len(absmax) * block_size // 2 - len(codes)))
