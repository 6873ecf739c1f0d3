"""torchao's NF4Tensor: to_nf4, and get_original_weight.

Its scalers are always int8 around their mean, another format than NF4-6. So absmax is what get_block_absmax
gives before that, and a tensor is decoded one block at a time, with the absmax as the mean and 0 around it.
"""

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.conform.libraries.tensors import to_numpy, to_torch, torch_dtype, whole_blocks


def quantize(x: NDArray[Any], block_size: int, codebook: str) -> dict[str, NDArray[Any]]:
    """to_nf4 of x, flat, with all scalers in one block, and get_block_absmax."""
    module = _module(codebook)
    tensor = to_torch(x).reshape(-1)
    quantized = module.to_nf4(tensor, block_size, max(1, x.size // block_size))
    absmax = module.get_block_absmax(tensor, block_size)
    return {"codes": to_numpy(quantized.quantized_data), "absmax": to_numpy(absmax.float())}


def dequantize(
    codes: NDArray[Any], absmax: NDArray[Any], shape: list[int], dtype: str, block_size: int, codebook: str
) -> NDArray[Any]:
    """get_original_weight of each block."""
    module, torch, kind = _module(codebook), importlib.import_module("torch"), torch_dtype(dtype)
    whole_blocks(codes, absmax, shape, block_size)
    blocks = []
    for block, scale in zip(to_torch(codes).view(len(absmax), -1), to_torch(absmax), strict=True):
        tensor = module.to_nf4(torch.ones(block_size, dtype=kind), block_size, 1)
        tensor.quantized_data, tensor.scaler_mean = block, scale.to(kind)
        tensor.quantized_scalers.zero_()
        tensor.quantization_factor.fill_(1)
        blocks.append(to_numpy(tensor.get_original_weight()))
    return np.concatenate(blocks)


def _module(codebook: str) -> Any:
    if codebook != "nf4":
        raise NotImplementedError(f"no codebook {codebook}")
    module = "torchao.quantization.quantize_.workflows.nf4.nf4_tensor"
    return importlib.import_module(module)
