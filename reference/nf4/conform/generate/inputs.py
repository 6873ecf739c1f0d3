"""What the vectors of the codec are built from: bit patterns, fields of operations and steps."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.blockwise import scale_rows
from nf4.codebooks import CODEBOOKS
from nf4.conform.values import DTYPES, NAMES
from nf4.floats import narrow
from nf4.random import philox4x32

Float32 = NDArray[np.float32]

ALL_BYTES = np.arange(256, dtype=np.uint8)


def from_bits(*patterns: int) -> Float32:
    """The float32 of these bits."""
    return np.array(patterns, np.uint32).view(np.float32)


def noise(seed: int, n: int, dtype: str = "float32", spread: int = 8) -> NDArray[Any]:
    """n numbers of either sign, their exponents even over `spread` values up to that of 1."""
    counter = np.zeros((n, 4), np.uint32)
    counter[:, 0] = np.arange(n)
    words = philox4x32(counter, (seed, 0))
    exponent = 127 - words[:, 1] % np.uint32(spread)
    bits = (words[:, 0] & np.uint32(0x807FFFFF)) | exponent << np.uint32(23)
    return narrow(bits.astype(np.uint32).view(np.float32), DTYPES[dtype])


def ulps_away(x: Float32, k: int) -> Float32:
    """The floats k places farther from zero than those of x, of which none is crossed."""
    return (x.view(np.int32) + np.int32(k)).view(np.float32)


def padded(x: Float32, size: int = 32) -> Float32:
    """x with zeros behind it, to fill a block."""
    return np.append(x, np.zeros(-x.size % size, np.float32)).astype(np.float32)


def to_quantize(x: NDArray[Any], block_size: int = 32, codebook: str = "nf4") -> dict[str, Any]:
    """Inputs of quantize and quantize_double."""
    return {
        "x": x,
        "shape": list(x.shape),
        "dtype": NAMES[x.dtype],
        "block_size": block_size,
        "codebook": codebook,
    }


def scaling_steps(x: Float32, block_size: int) -> dict[str, Any]:
    """Steps reciprocal and s of x (NF4-3.3)."""
    blocks = [x[start : start + block_size] for start in range(0, x.size, block_size)]
    scaled = [scale_rows(block[None]) for block in blocks]
    absmax = np.concatenate([block_absmax for _, block_absmax in scaled])
    with np.errstate(over="ignore", divide="ignore"):
        reciprocal = 1 / np.where(absmax <= np.float32(2**-128), absmax * np.float32(2**64), absmax)
    return {
        "reciprocal": np.where(absmax > 0, reciprocal, np.float32(0)).astype(np.float32),
        "s": np.concatenate([s[0] for s, _ in scaled]),
    }


def coded(
    codes: NDArray[np.uint8],
    shape: list[int],
    dtype: str = "float32",
    block_size: int = 32,
    codebook: str = "nf4",
) -> dict[str, Any]:
    """Inputs of dequantize and dequantize_double but for the absmax."""
    return {"codes": codes, "shape": shape, "dtype": dtype, "block_size": block_size, "codebook": codebook}


def to_decode(
    codes: NDArray[np.uint8], absmax: Float32, shape: list[int], *rest: Any, **more: Any
) -> dict[str, Any]:
    """Inputs of dequantize: what coded takes, with absmax."""
    return {**coded(codes, shape, *rest, **more), "absmax": absmax}


def product_steps(
    codes: NDArray[np.uint8], absmax: Float32, n: int, block_size: int, codebook: str
) -> dict[str, Any]:
    """The step product of n elements (NF4-4.1)."""
    nibbles = np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)[:n]
    with np.errstate(all="ignore"):
        product = CODEBOOKS[codebook].values[nibbles] * np.repeat(absmax, block_size)[:n]
    return {"product": product}
