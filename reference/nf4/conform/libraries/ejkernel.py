"""ejkernel (JAX, the kernels of EasyDeL): quantize and dequantize in mode "nf4", groups along a flat tensor.

Its codes come as uint32 words of eight, the first in the lowest bits, and are packed here. It is told its
runtime configuration: without one it measures several, and the dtype of the quickest is what it decodes to.
"""

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.conform.libraries.tensors import packed, unpacked, whole_blocks

_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_SHIFTS = np.arange(0, 32, 4, dtype=np.uint32)


def quantize(x: NDArray[Any], block_size: int, codebook: str) -> dict[str, NDArray[Any]]:
    """ejkernel.quantization.quantize of x as one row; the scales are widened."""
    quantization, jnp = _modules(codebook)
    words, scales = quantization.quantize(
        jnp.asarray(x.reshape(1, -1)),
        group_size=block_size,
        mode="nf4",
        axis="col",
        runtime_config=quantization.QuantRuntimeConfig(),
    )
    codes = np.asarray(words).reshape(-1, 1) >> _SHIFTS & 15
    return {"codes": packed(codes), "absmax": np.asarray(scales).astype(np.float32).reshape(-1)}


def dequantize(
    codes: NDArray[Any], absmax: NDArray[Any], shape: list[int], dtype: str, block_size: int, codebook: str
) -> NDArray[Any]:
    """ejkernel.quantization.dequantize, told to compute in float32."""
    quantization, jnp = _modules(codebook)
    n = whole_blocks(codes, absmax, shape, block_size)
    words = unpacked(codes, n).reshape(1, -1, 8).astype(np.uint32) << _SHIFTS
    y = quantization.dequantize(
        jnp.asarray(np.bitwise_or.reduce(words, axis=-1)),
        jnp.asarray(absmax.reshape(1, -1)),
        group_size=block_size,
        mode="nf4",
        axis="col",
        runtime_config=quantization.QuantRuntimeConfig(
            prefer_compute_dtype="fp32", dequant_output_dtype=_DTYPES[dtype]
        ),
    )
    return np.asarray(y)


def _modules(codebook: str) -> tuple[Any, Any]:
    if codebook != "nf4":
        raise NotImplementedError(f"no codebook {codebook}")
    return importlib.import_module("ejkernel.quantization"), importlib.import_module("jax.numpy")
