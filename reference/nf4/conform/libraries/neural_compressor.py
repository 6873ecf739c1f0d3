"""Intel Neural Compressor on PyTorch: weight_only.utility.quant_tensor with dtype "nf4" and return_int.

Its integers stand for the values in another order (NF4_BIT), which is undone here. Values come back only
quantized and dequantized in one go, so that decoding by itself is not offered.
"""

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.conform.libraries.tensors import packed, to_numpy, to_torch


def quantize(x: NDArray[Any], block_size: int, codebook: str) -> dict[str, NDArray[Any]]:
    """quant_tensor of x as one channel with groups of the block size; the scale is widened."""
    if codebook != "nf4":
        raise NotImplementedError(f"no codebook {codebook}")
    module: Any = importlib.import_module("neural_compressor.torch.algorithms.weight_only.utility")
    integers, scale, _ = module.quant_tensor(
        to_torch(x).reshape(1, -1), bits=4, group_size=block_size, dtype="nf4", return_int=True
    )
    code = {integer: code for code, integer in enumerate(module.NF4_BIT)}
    codes = np.array([code[int(value)] for value in integers.reshape(-1).tolist()], np.uint8)
    return {"codes": packed(codes), "absmax": to_numpy(scale.float()).reshape(-1)}
