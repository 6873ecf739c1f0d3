"""NVIDIA ModelOpt's NF4QTensor on the CPU: quantize, and dequantize.

It decodes scales that are int8 around their mean, another format than NF4-6: absmax is given as those, with a
factor of 1 and a mean of 0. It stores whole blocks; the bytes of the elements are taken.
"""

import importlib
import math
from typing import Any

from numpy.typing import NDArray

from nf4.conform.libraries.tensors import filled, to_numpy, to_torch, torch_dtype


def quantize(x: NDArray[Any], block_size: int, codebook: str) -> dict[str, NDArray[Any]]:
    """NF4QTensor.quantize of x in its shape; scales come in the dtype of x and are widened."""
    tensor, scales = _class(codebook).quantize(to_torch(x), block_size, 1)  # its default of None fails
    codes = to_numpy(tensor._quantized_data)[: math.ceil(x.size / 2)]
    return {"codes": codes, "absmax": to_numpy(scales.float()).reshape(-1)}


def dequantize(
    codes: NDArray[Any], absmax: NDArray[Any], shape: list[int], dtype: str, block_size: int, codebook: str
) -> NDArray[Any]:
    """NF4QTensor.dequantize, the codes filled up to whole blocks."""
    torch: Any = importlib.import_module("torch")
    full = to_torch(filled(codes, absmax, shape, block_size))
    tensor = _class(codebook)(torch.Size(shape), torch_dtype(dtype), full)
    return to_numpy(
        tensor.dequantize(
            scale=to_torch(absmax).view(1, -1),
            block_sizes={-1: block_size},
            double_scale=torch.ones(1),
            scale_zeros=torch.zeros(1, dtype=torch_dtype(dtype)),
        )
    )


def _class(codebook: str) -> Any:
    if codebook != "nf4":
        raise NotImplementedError(f"no codebook {codebook}")
    return importlib.import_module("modelopt.torch.quantization.qtensor").NF4QTensor
