"""qwix (JAX): quantize and dequantize with the type "nf4" and tiles of the block size along a flat tensor.

Its codes are one an element (uint4) and are packed here.
"""

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.conform.libraries.tensors import packed, unpacked, whole_blocks


def quantize(x: NDArray[Any], block_size: int, codebook: str) -> dict[str, NDArray[Any]]:
    """qwix.quantize of x, flat; the scale comes in the dtype of x and is widened."""
    qwix, jnp = _modules(codebook)
    array = qwix.quantize(jnp.asarray(x.reshape(-1)), "nf4", tiled_axes={0: block_size})
    return {
        "codes": packed(np.asarray(array.qvalue)),
        "absmax": np.asarray(array.scale).astype(np.float32).reshape(-1),
    }


def dequantize(
    codes: NDArray[Any], absmax: NDArray[Any], shape: list[int], dtype: str, block_size: int, codebook: str
) -> NDArray[Any]:
    """qwix.dequantize of a QArray whose scale is of the dtype asked for, which is what decides it there."""
    n = whole_blocks(codes, absmax, shape, block_size)
    qwix, jnp = _modules(codebook)
    values = jnp.asarray(unpacked(codes, n)).astype(jnp.uint4)
    scale = jnp.asarray(absmax).astype(dtype)
    return np.asarray(qwix.dequantize(qwix.QArray(values, scale, None, "nf4")))


def _modules(codebook: str) -> tuple[Any, Any]:
    if codebook != "nf4":
        raise NotImplementedError(f"no codebook {codebook}")
    return importlib.import_module("qwix"), importlib.import_module("jax.numpy")
