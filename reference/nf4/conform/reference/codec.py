"""The operations of chapters 2 to 7 on the reference: codebooks, conversion, encode, decode, nesting."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.blockwise import block_count
from nf4.codebooks import get_codebook
from nf4.errors import InputError
from nf4.floats import DTYPES
from nf4.floats import narrow as narrow_array
from nf4.floats import widen as widen_array
from nf4.nested import NestedAbsmax, decode_nested, encode_nested
from nf4.tensor import QuantizedTensor
from nf4.tensor import dequantize as dequantize_tensor
from nf4.tensor import quantize as quantize_tensor

Outputs = dict[str, Any]


def codebook(codebook: str) -> Outputs:
    """Return values float32 [16] and thresholds float32 [ranks - 1] (NF4-2.1 to NF4-2.3)."""
    book = get_codebook(codebook)
    return {"values": book.values, "thresholds": book.thresholds}


def widen(x: NDArray[Any], dtype: str) -> Outputs:
    """Return y float32 of x in dtype (NF4-7.1)."""
    return {"y": widen_array(x)}


def narrow(x: NDArray[np.float32], dtype: str) -> Outputs:
    """Return y in dtype of x float32 (NF4-7.2, NF4-7.3)."""
    return {"y": narrow_array(x, DTYPES[dtype])}


def quantize(x: NDArray[Any], block_size: int, codebook: str) -> Outputs:
    """Return codes and absmax of x, of any shape (NF4-3, NF4-5)."""
    q = quantize_tensor(x, block_size, codebook)
    return {"codes": q.codes, "absmax": q.absmax}


def quantize_double(x: NDArray[Any], block_size: int, codebook: str) -> Outputs:
    """Return codes, absmax_codes, nested_absmax and offset of x, of any shape (NF4-3, NF4-6)."""
    q = quantize_tensor(x, block_size, codebook, double_quant=True)
    assert isinstance(q.absmax, NestedAbsmax)
    return {"codes": q.codes, **_nested_outputs(q.absmax)}


def encode_absmax(absmax: NDArray[np.float32]) -> Outputs:
    """Return absmax_codes, nested_absmax and offset of absmax [blocks] (NF4-6.1, NF4-6.3)."""
    return _nested_outputs(encode_nested(absmax))


def decode_absmax(
    absmax_codes: NDArray[np.uint8],
    nested_absmax: NDArray[np.float32],
    offset: NDArray[np.float32],
    map: NDArray[np.float32],
) -> Outputs:
    """Return absmax float32 [blocks] (NF4-6.4)."""
    return {"absmax": decode_nested(nested(absmax_codes, nested_absmax, offset, map))}


def dequantize(
    codes: NDArray[np.uint8],
    absmax: NDArray[np.float32],
    shape: list[int],
    dtype: str,
    block_size: int,
    codebook: str,
) -> Outputs:
    """Return y, of shape and dtype (NF4-4)."""
    return _decoded(tensor(codes, absmax, shape, dtype, block_size, codebook))


def dequantize_double(
    codes: NDArray[np.uint8],
    absmax_codes: NDArray[np.uint8],
    nested_absmax: NDArray[np.float32],
    offset: NDArray[np.float32],
    map: NDArray[np.float32],
    shape: list[int],
    dtype: str,
    block_size: int,
    codebook: str,
) -> Outputs:
    """Return y, of shape and dtype (NF4-4, NF4-6.4)."""
    scales = nested(absmax_codes, nested_absmax, offset, map)
    return _decoded(tensor(codes, scales, shape, dtype, block_size, codebook))


def storage(elements: int, block_size: int, double_quant: bool) -> Outputs:
    """Return the bytes of a quantized tensor of that many elements (NF4-5.4)."""
    blocks = block_count(elements, block_size)
    codes = np.broadcast_to(np.uint8(0), -(-elements // 2))  # as large as it is, without its memory
    absmax: NDArray[np.float32] | NestedAbsmax = np.broadcast_to(np.float32(0), blocks)
    if double_quant:
        nested_blocks = np.broadcast_to(np.float32(0), block_count(blocks, 256))
        absmax = NestedAbsmax(codes[:blocks], nested_blocks, np.float32(0), np.zeros(256, np.float32))
    q = QuantizedTensor(codes, absmax, (elements,), DTYPES["float32"], block_size, get_codebook("nf4"))
    return {"bytes": q.nbytes}


def nested(
    absmax_codes: NDArray[np.uint8],
    nested_absmax: NDArray[np.float32],
    offset: NDArray[np.float32],
    map: NDArray[np.float32],
) -> NestedAbsmax:
    """Return the fields of a double-quantized absmax as one (NF4-5.3); offset is float32 [1]."""
    if offset.size != 1:
        raise InputError(f"offset has {offset.size} elements, must be one float32")
    return NestedAbsmax(absmax_codes, nested_absmax, offset[0], map)


def _nested_outputs(nested: NestedAbsmax) -> Outputs:
    offset = np.array([nested.offset], np.float32)
    return {"absmax_codes": nested.codes, "nested_absmax": nested.absmax, "offset": offset}


def tensor(
    codes: NDArray[np.uint8],
    absmax: NDArray[np.float32] | NestedAbsmax,
    shape: list[int],
    dtype: str,
    block_size: int,
    codebook: str,
) -> QuantizedTensor:
    """Return the fields of a quantized tensor as one (NF4-5.3). Raises InputError where they don't fit."""
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not supported; choose one of {', '.join(DTYPES)}")
    return QuantizedTensor(codes, absmax, tuple(shape), DTYPES[dtype], block_size, get_codebook(codebook))


def _decoded(q: QuantizedTensor) -> Outputs:
    return {"y": dequantize_tensor(q).reshape(q.size)}
