"""The operations of the specification on the GPU: the port for `nf4 conform --python nf4_gpu.conform`."""

from typing import Any

import cupy
import numpy as np
from nf4.codebooks import get_codebook
from nf4.conform.reference.codec import nested as nested_of
from nf4.conform.reference.codec import tensor as tensor_of
from nf4.conform.reference.training import check_counts, linear_layer, scalar, token_rows
from nf4.errors import InputError
from nf4.floats import DTYPES
from nf4.lora import Dropout, LoRA
from nf4.nested import NestedAbsmax
from nf4.tensor import QuantizedTensor
from numpy.typing import NDArray

from nf4_gpu.lora import LoRACache, LoRALinear
from nf4_gpu.nested import decode_nested, empty_nested, encode_nested, sum_absmax
from nf4_gpu.random import drop
from nf4_gpu.tensor import dequantize as dequantize_tensor
from nf4_gpu.tensor import quantize as quantize_tensor
from nf4_gpu.tensor import to_device, to_host

Array = NDArray[Any]
Outputs = dict[str, Any]


def quantize(x: Array, block_size: int, codebook: str) -> Outputs:
    """Return codes and absmax of x, of any shape (NF4-3, NF4-5)."""
    q = to_host(quantize_tensor(cupy.asarray(x), block_size, codebook))
    return {"codes": q.codes, "absmax": q.absmax}


def quantize_double(x: Array, block_size: int, codebook: str) -> Outputs:
    """Return codes, absmax_codes, nested_absmax and offset of x, of any shape (NF4-3, NF4-6)."""
    q = to_host(quantize_tensor(cupy.asarray(x), block_size, codebook, double_quant=True))
    assert isinstance(q.absmax, NestedAbsmax)
    return {"codes": q.codes, **_nested_outputs(q.absmax)}


def encode_absmax(absmax: NDArray[np.float32]) -> Outputs:
    """Return absmax_codes, nested_absmax and offset of absmax [blocks] (NF4-6.1, NF4-6.3)."""
    if not ((absmax >= 0) & (absmax < np.inf)).all():
        raise InputError("an absmax is finite and not negative")
    on_device, nested = cupy.asarray(absmax), empty_nested(absmax.size)
    encode_nested(on_device, absmax.size, sum_absmax(on_device), nested, 0)
    decode_nested(nested, on_device)
    if not np.isfinite(cupy.asnumpy(on_device)).all():
        raise InputError("an absmax would decode to an infinity")
    return _nested_outputs(nested)


def decode_absmax(**nested: Any) -> Outputs:
    """Return absmax float32 [blocks] (NF4-6.4)."""
    scales = nested_of(**nested)
    # As the absmax of blocks of 32, of which it checks what NF4-12.5 asks for.
    shape = (32 * scales.codes.size,)
    zeros = np.zeros(16 * scales.codes.size, np.uint8)
    q = to_device(QuantizedTensor(zeros, scales, shape, DTYPES["float32"], 32, get_codebook("nf4")))
    assert isinstance(q.absmax, NestedAbsmax)
    out = cupy.empty(scales.codes.size, cupy.float32)
    decode_nested(q.absmax, out)
    return {"absmax": cupy.asnumpy(out)}


def dequantize(codes: NDArray[np.uint8], absmax: NDArray[np.float32], **tensor: Any) -> Outputs:
    """Return y, of shape and dtype (NF4-4)."""
    return _decoded(tensor_of(codes, absmax, **tensor))


def dequantize_double(
    codes: NDArray[np.uint8],
    shape: list[int],
    dtype: str,
    block_size: int,
    codebook: str,
    **nested: Any,
) -> Outputs:
    """Return y, of shape and dtype (NF4-4, NF4-6.4)."""
    return _decoded(tensor_of(codes, nested_of(**nested), shape, dtype, block_size, codebook))


def keep_mask(seed: Any, stream: Any, sample: Any, n: int, p: Any) -> Outputs:
    """Return mask uint8 [n], 1 where the element is kept (NF4-11.4)."""
    check_counts(n=n)
    kept = cupy.ones((1, n), np.float32)
    drop(Dropout(scalar(seed), (1,), (scalar(sample),)), scalar(stream), scalar(p), kept, kept)
    return {"mask": cupy.asnumpy(kept).astype(np.uint8)}


def lora_forward(x: Array, **layer: Any) -> Outputs:
    """Return y [T, out] of x [T, in] and the fields of a layer (NF4-9.1, NF4-9.2, NF4-9.4)."""
    return {"y": cupy.asnumpy(_forward(x, **layer)[1])}


def lora_backward(x: Array, dout: Array, **layer: Any) -> Outputs:
    """Return dx [T, in], dA [rank, in] and dB [out, rank] of dout [T, out] (NF4-9.5)."""
    linear, _, cache = _forward(x, **layer)
    gradients = linear.backward(cupy.asarray(dout.reshape(-1, layer["shape"][0])), cache)
    return dict(zip(("dx", "dA", "dB"), map(cupy.asnumpy, gradients), strict=True))


def _forward(x: Array, **layer: Any) -> tuple[LoRALinear, cupy.ndarray, LoRACache]:
    host, dropout = linear_layer(**layer)
    assert isinstance(host.weight, QuantizedTensor)
    assert host.lora is not None
    adapter = host.lora
    factors = cupy.asarray(adapter.A), cupy.asarray(adapter.B)
    lora = LoRA(*factors, adapter.scale, adapter.dropout, adapter.stream)
    bias = None if host.bias is None else cupy.asarray(host.bias)
    linear = LoRALinear(to_device(host.weight), bias, lora)
    rows = cupy.asarray(token_rows(x, layer["shape"][1], dropout))
    return linear, *linear.forward(rows, dropout)


def _nested_outputs(nested: NestedAbsmax) -> Outputs:
    codes, absmax, offset = (cupy.asnumpy(array) for array in (nested.codes, nested.absmax, nested.offset))
    return {"absmax_codes": codes, "nested_absmax": absmax, "offset": offset.reshape(1)}


def _decoded(q: QuantizedTensor) -> Outputs:
    return {"y": cupy.asnumpy(dequantize_tensor(to_device(q)))}
