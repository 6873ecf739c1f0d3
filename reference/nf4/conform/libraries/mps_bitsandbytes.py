"""mps-bitsandbytes on the CPU: functional.quantize_4bit and dequantize_4bit, with bitsandbytes' API.

Rows are documented to be padded to whole blocks, so tensors are given flat, and of the whole blocks stored
the bytes of the elements are taken. Its nested level is int8: another format than NF4-6.
"""

import importlib
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.conform.libraries.tensors import filled, to_numpy, to_torch, torch_dtype


def quantize(x: NDArray[Any], block_size: int, codebook: str) -> dict[str, NDArray[Any]]:
    """quantize_4bit of x, flat."""
    functional = _functional(codebook)
    codes, state = functional.quantize_4bit(
        to_torch(x).reshape(-1), blocksize=block_size, quant_type=codebook
    )
    return {"codes": to_numpy(codes)[: math.ceil(x.size / 2)], "absmax": to_numpy(state.absmax)}


def dequantize(
    codes: NDArray[Any], absmax: NDArray[Any], shape: list[int], dtype: str, block_size: int, codebook: str
) -> NDArray[Any]:
    """dequantize_4bit with a QuantState of a flat shape."""
    functional, torch = _functional(codebook), importlib.import_module("torch")
    full = to_torch(filled(codes, absmax, shape, block_size))
    state = functional.QuantState(
        to_torch(absmax),
        torch.Size([int(np.prod(shape))]),
        blocksize=block_size,
        quant_type=codebook,
        dtype=torch_dtype(dtype),
    )
    return to_numpy(functional.dequantize_4bit(full, state))


def _functional(codebook: str) -> Any:
    if codebook not in {"nf4", "fp4"}:
        raise NotImplementedError(f"no codebook {codebook}")
    return importlib.import_module("mps_bitsandbytes.functional")
