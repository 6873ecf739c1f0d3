"""Quantize and dequantize on the device, and the way there and back."""

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cupy
import numpy as np
from cupy.cuda import runtime
from nf4.blockwise import block_count, check_block_size
from nf4.codebooks import Codebook, get_codebook
from nf4.errors import InputError
from nf4.nested import DYNAMIC_MAP, NESTED_BLOCK_SIZE, NestedAbsmax
from nf4.nested import decode_nested as decode_nested_on_host
from nf4.tensor import QuantizedTensor, check_dtype
from numpy.typing import DTypeLike, NDArray

from nf4_gpu.arrays import check_output, on_device, scratch
from nf4_gpu.blockwise import decode, encode
from nf4_gpu.codebooks import dynamic_map
from nf4_gpu.launch import Kept
from nf4_gpu.nested import decode_nested, empty_nested, encode_nested, take_bins

_thread = threading.local()


def quantize(
    x: Any,
    block_size: int = 64,
    codebook: str | Codebook = "nf4",
    double_quant: bool = False,
    *,
    out: QuantizedTensor | None = None,
    check: bool = True,
) -> QuantizedTensor:
    """Quantize x, of any shape, as nf4.quantize does, to the same bits (NF4-3; NF4-6 if double_quant).

    x is a contiguous float32, float16 or bfloat16 array on the current device (CuPy's, or any with DLPack).
    The result, or out with its memory overwritten, holds device arrays. With check the call waits for the
    device and raises InputError on a NaN, an infinity or an overflow (NF4-12.1, NF4-6.6); without, it returns
    at once, as it does while a graph is captured, and `check(q)` says later whether the input was refused.
    """
    x = on_device(x, "x")
    check_dtype(x.dtype)
    check_block_size(block_size)
    book = get_codebook(codebook)
    calls = None
    if out is None:
        out = _empty(x.shape, x.dtype, block_size, book, double_quant)
    else:
        _check_like(out, x, block_size, book, double_quant)
        calls = kept(out).calls
        kept(out).settled.clear()
    waiting = check and not cupy.cuda.get_current_stream().is_capturing()
    refused, not_finite, would_overflow = _refusals() if waiting else (None, 0, 0)
    if isinstance(out.absmax, NestedAbsmax):
        blocks = out.absmax.codes.size
        absmax = scratch.take("absmax", blocks, cupy.float32)
        bins = take_bins()
        encode(x, block_size, book, out.codes, absmax, not_finite, bins, calls)
        encode_nested(absmax, blocks, bins, out.absmax, would_overflow, calls)
    else:
        encode(x, block_size, book, out.codes, out.absmax, not_finite, calls=calls)
    if refused is not None:
        cupy.cuda.get_current_stream().synchronize()
        if refused.any():
            _refuse(x, bool(refused[0]))
    return out


def dequantize(q: QuantizedTensor, dtype: DTypeLike | None = None, out: Any = None) -> cupy.ndarray:
    """Return the values of q as an array of q.shape, or out filled with them, in one launch (NF4-4, NF4-6.4).

    dtype is float32, float16 or bfloat16; by default that of out, or else q.dtype. Raises InputError where q
    or out is not on the current device or does not fit. It never waits: that the absmax are finite is checked
    by quantize, to_device and check.
    """
    if dtype is not None:
        kind = np.dtype(dtype)
    elif out is not None:
        out = on_device(out, "out")
        kind = out.dtype
    else:
        kind = q.dtype
    check_dtype(kind)
    check_tensor(q)
    out = cupy.empty(q.shape, kind) if out is None else check_output(out, (q.shape, (q.size,)), kind)
    decode(q.codes, q.absmax, q.block_size, q.codebook, out, kept(q).calls)
    return out


def to_device(q: QuantizedTensor) -> QuantizedTensor:
    """Return q with its arrays on the current device. InputError: an absmax is not finite (NF4-12.5)."""
    absmax = q.absmax
    if isinstance(absmax, NestedAbsmax):
        decode_nested_on_host(absmax)  # refuses what is damaged
        usual = np.array_equal(absmax.map, DYNAMIC_MAP)
        table = dynamic_map(runtime.getDevice())[0] if usual else cupy.asarray(absmax.map)
        offset = cupy.asarray(np.float32(absmax.offset).reshape(1))
        scales: Any = _nested(cupy.asarray, absmax, offset, table)
    else:
        finite = np.isfinite(absmax)
        if not finite.all():
            block = int(np.argmin(finite))
            raise InputError(f"the absmax of block {block} is {absmax[block]}; the tensor is damaged")
        scales = cupy.asarray(absmax)
    return replace(q, codes=cupy.asarray(q.codes), absmax=scales)


def to_host(q: QuantizedTensor) -> QuantizedTensor:
    """Return q with its arrays copied to the host. Waits for the device, and checks as check does."""
    check(q)
    absmax = q.absmax
    if isinstance(absmax, NestedAbsmax):
        offset = np.float32(cupy.asnumpy(absmax.offset).item())
        scales: Any = _nested(cupy.asnumpy, absmax, offset, cupy.asnumpy(absmax.map))
    else:
        scales = cupy.asnumpy(absmax)
    return replace(q, codes=cupy.asnumpy(q.codes), absmax=scales)


def check(q: QuantizedTensor) -> None:
    """Wait for the device; raise InputError, naming the block, where an absmax is not finite (NF4-12.5)."""
    check_tensor(q)
    absmax: Any = q.absmax
    if isinstance(absmax, NestedAbsmax):
        decoded = cupy.empty(absmax.codes.size, cupy.float32)
        decode_nested(absmax, decoded)
        absmax = decoded
    bad = cupy.flatnonzero(~cupy.isfinite(absmax))
    if bad.size:
        block = int(bad[0])
        raise InputError(
            f"the absmax of block {block} is {float(absmax[block])}: what was quantized had a NaN or an "
            "infinity, or was too large to be double-quantized"
        )


def check_tensor(q: QuantizedTensor) -> None:
    """Raise InputError unless every array of q is contiguous and on the current device.

    What is found right is remembered: the arrays of a tensor don't change.
    """
    device = runtime.getDevice()
    if vars(q).get("_checked_on") == device:
        return
    on_device(q.codes, "the codes of the quantized tensor")
    if isinstance(q.absmax, NestedAbsmax):
        on_device(q.absmax.codes, "the absmax of the quantized tensor")
        on_device(q.absmax.absmax, "the nested absmax of the quantized tensor")
        on_device(q.absmax.map, "the 8-bit map of the quantized tensor")
        offset = on_device(q.absmax.offset, "the offset of the quantized tensor")
        if offset.dtype != np.float32 or offset.size != 1:
            raise InputError(f"the offset is {offset.dtype} {list(offset.shape)}; it must be one float32")
    else:
        on_device(q.absmax, "the absmax of the quantized tensor")
    vars(q)["_checked_on"] = device


def kept(q: QuantizedTensor) -> Kept:
    """Return what q keeps."""
    found: Kept | None = vars(q).get("_kept")
    if found is None:
        found = vars(q)["_kept"] = Kept()
    return found


def _nested(move: Callable[[Any], Any], absmax: NestedAbsmax, offset: Any, table: Any) -> NestedAbsmax:
    """The nested absmax with its arrays moved, the last two already."""
    return NestedAbsmax(move(absmax.codes), move(absmax.absmax), offset, table, absmax.block_size)


def _empty(
    shape: tuple[int, ...], dtype: np.dtype[Any], block_size: int, codebook: Codebook, double_quant: bool
) -> QuantizedTensor:
    n = math.prod(shape)
    blocks = block_count(n, block_size)
    scales: Any = empty_nested(blocks) if double_quant else cupy.empty(blocks, cupy.float32)
    codes = cupy.empty(-(-n // 2), cupy.uint8)
    return QuantizedTensor(codes, scales, shape, dtype, block_size, codebook)


def _check_like(
    out: QuantizedTensor, x: cupy.ndarray, block_size: int, codebook: Codebook, double_quant: bool
) -> None:
    check_tensor(out)
    nested = isinstance(out.absmax, NestedAbsmax)
    if (out.shape, out.dtype, out.block_size, nested) != (x.shape, x.dtype, block_size, double_quant):
        raise InputError(
            f"out is a quantized {out.dtype} {list(out.shape)} in blocks of {out.block_size}, "
            f"double-quantized: {nested}; x asks for {x.dtype} {list(x.shape)}, {block_size}, {double_quant}"
        )
    if out.codebook is not codebook and out.codebook != codebook:
        raise InputError(f"out has the codebook {out.codebook.name}, not {codebook.name}")
    if isinstance(out.absmax, NestedAbsmax):
        usual = dynamic_map(runtime.getDevice())[0]
        if out.absmax.map is not usual or out.absmax.block_size != NESTED_BLOCK_SIZE:
            raise InputError("out is double-quantized with a map or nested blocks of its own; make a new one")


def _refusals() -> tuple[NDArray[np.int32], int, int]:
    """This thread's two ints in pinned memory, 0, with their addresses: not finite, would overflow."""
    if not hasattr(_thread, "refusals"):
        flags = np.frombuffer(cupy.cuda.alloc_pinned_memory(8), np.int32, 2)
        _thread.refusals = flags, flags.ctypes.data, flags.ctypes.data + 4
    refusals: tuple[NDArray[np.int32], int, int] = _thread.refusals
    refusals[0][:] = 0
    return refusals


def _refuse(x: cupy.ndarray, not_finite: bool) -> None:
    if not not_finite:
        raise InputError(
            "cannot double-quantize: an absmax would decode to an infinity; scale the tensor down, "
            "or quantize it without double quantization"
        )
    flat = x.reshape(-1)
    index = int(cupy.flatnonzero(~cupy.isfinite(flat.astype(cupy.float32)))[0])
    where = ", ".join(str(int(i)) for i in np.unravel_index(index, x.shape)) if x.ndim else ""
    raise InputError(
        f"cannot quantize: element {index} (index [{where}]) is {float(flat[index])}; "
        f"replace NaN and infinities with finite values first"
    )
