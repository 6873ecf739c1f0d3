"""y = x W^T and dx = dy W with a quantized W: few rows without writing W out, more rows through cuBLAS."""

from functools import cache
from typing import Any

import cupy
from cupy.cuda import runtime
from nf4.errors import InputError
from nf4.floats import FLOAT32
from nf4.nested import NESTED_BLOCK_SIZE, NestedAbsmax
from nf4.tensor import QuantizedTensor

from nf4_gpu import hopper
from nf4_gpu.arrays import KINDS, address, check_output, on_device, scratch
from nf4_gpu.blas import multiply
from nf4_gpu.codebooks import tables
from nf4_gpu.compile import capability, processors, shared_memory
from nf4_gpu.launch import launcher
from nf4_gpu.tensor import check_tensor, dequantize

FEW, FEW_OF_SMALL = 64, 32  # rows of x up to which the kernel beat decoding and cuBLAS (H100): of any weight,
SMALL = 1 << 25  # and of one with fewer elements than this
_NEEDS = 80  # bfloat16 on tensor cores, asynchronous copies
_STAGE, _TABLE, _STATIC = 256, 256 * 32 * 4, 2048  # as in product.cu: columns, and bytes of shared memory


def matmul(x: Any, q: QuantizedTensor, out: Any = None) -> cupy.ndarray:
    """Return x W^T for x [..., in] and the W [out, in] of q, as [..., out] in the dtype of x (NF4-4.3).

    x is a contiguous device array of float32, float16 or bfloat16, whose leading dimensions are rows; out is
    one of the result's shape. Deterministic: the same bits on every run and stream. Raises InputError where
    shapes, dtypes or devices do not fit.
    """
    x = on_device(x, "x")
    outputs, inputs = _matrix(q)
    _check_rows(x, "x", inputs, q)
    shape = (*x.shape[:-1], outputs)
    y = cupy.empty(shape, x.dtype) if out is None else check_output(out, (shape,), x.dtype)
    rows = y.size // outputs if outputs else 0
    if rows == 0:
        return y
    if hopper.multiply(x, rows, q, y):
        return y
    if _fits(x, rows, q):
        _few_rows(x, rows, q, y)
    else:
        _many_rows(x.reshape(rows, inputs), q, y.reshape(rows, outputs), transposed=True)
    return y


def matmul_transposed(dy: Any, q: QuantizedTensor, out: Any = None) -> cupy.ndarray:
    """Return dy W, dy [..., out] times W [out, in] of q, as [..., in] in the dtype of dy: the gradient of x.

    As matmul in everything else (NF4-4.3).
    """
    dy = on_device(dy, "dy")
    outputs, inputs = _matrix(q)
    _check_rows(dy, "dy", outputs, q)
    shape = (*dy.shape[:-1], inputs)
    dx = cupy.empty(shape, dy.dtype) if out is None else check_output(out, (shape,), dy.dtype)
    rows = dx.size // inputs if inputs else 0
    if rows:
        _many_rows(dy.reshape(rows, outputs), q, dx.reshape(rows, inputs), transposed=False)
    return dx


def _matrix(q: QuantizedTensor) -> tuple[int, int]:
    check_tensor(q)
    if len(q.shape) != 2:
        raise InputError(f"the weight is of shape {list(q.shape)}; a product needs [out, in]")
    return q.shape[0], q.shape[1]


def _check_rows(x: cupy.ndarray, what: str, columns: int, q: QuantizedTensor) -> None:
    if x.dtype not in KINDS or x.ndim == 0 or x.shape[-1] != columns:
        raise InputError(
            f"{what} is {x.dtype} {list(x.shape)}; it must be float32, float16 or bfloat16 [..., {columns}] "
            f"for a weight {list(q.shape)}"
        )


def _fits(x: cupy.ndarray, rows: int, q: QuantizedTensor) -> bool:
    """Whether product.cu takes it: 16-bit rows that are whole chunks, aligned, on a GPU that can."""
    outputs, inputs = q.shape
    return bool(
        rows <= (FEW_OF_SMALL if q.size < SMALL else FEW)
        and x.dtype != FLOAT32
        and 0 < inputs < 1 << 31
        and inputs % min(q.block_size, 64) == 0
        and outputs < 1 << 31
        and address(x) % 16 == 0
        and address(q.codes) % 16 == 0
        and _buffers(runtime.getDevice(), _tiles(rows))
    )


def _tiles(rows: int) -> int:
    return 1 if rows <= 8 else 2 if rows <= 16 else 4 if rows <= 32 else 8


def _block_rows(tiles: int) -> int:
    """Rows of W of a thread block."""
    return 256 if tiles > 2 else 128


def _shared_bytes(tiles: int, buffers: int) -> int:
    """Dynamic shared memory of a thread block: the table, and of each buffer the codes and the padded x."""
    return _TABLE + buffers * (_block_rows(tiles) * _STAGE // 2 + 8 * tiles * (_STAGE + 8) * 2)


@cache
def _buffers(device: int, tiles: int) -> int:
    """As many as product.cu likes, or two where shared memory is short; 0 where it can't be run."""
    if capability(device) >= _NEEDS:
        for buffers in (2 if tiles > 4 else 3, 2):
            if _shared_bytes(tiles, buffers) + _STATIC <= shared_memory(device):
                return buffers
    return 0


def _few_rows(x: cupy.ndarray, rows: int, q: QuantizedTensor, y: cupy.ndarray) -> None:
    """Launch product.cu, with as many thread blocks as are resident at once."""
    device = runtime.getDevice()
    outputs, inputs = q.shape
    tiles = _tiles(rows)
    block_rows, buffers = _block_rows(tiles), _buffers(device, tiles)
    groups = -(-outputs // block_rows)
    resident = processors(device) * (1 if tiles > 2 else 2)
    splits = max(1, min(resident // groups, -(-inputs // _STAGE)))
    partial = scratch.take("partial", groups * splits * rows * block_rows, cupy.float32)
    counters = scratch.take("counters", groups, cupy.uint32, zeroed=True)
    defines = {"DTYPE": KINDS[x.dtype], "BLOCK": q.block_size, "TILES": tiles}
    if buffers == 2 and tiles <= 4:
        defines["BUFFERS"] = 2
    absmax: Any = q.absmax
    name, scales = "multiply", [absmax]
    if isinstance(absmax, NestedAbsmax):
        name = "multiply_double"
        if absmax.block_size != NESTED_BLOCK_SIZE:
            defines["NESTED_BLOCK"] = absmax.block_size
        scales = [absmax.codes, absmax.absmax, absmax.offset, absmax.map]
    shared = _shared_bytes(tiles, buffers)
    function = launcher(device, "product.cu", name, shared, **defines)
    head = (x, rows, inputs, q.codes, outputs, tables(device, q.codebook).values, y, partial, counters)
    function((groups, splits), 256, (*head, *scales))


def matmul_plain(x: cupy.ndarray, q: QuantizedTensor, y: cupy.ndarray) -> None:
    """Launch y = x W^T by the kernel that follows the clause word by word, for the tests.

    x is float16 or bfloat16 [rows, in], the absmax of q not nested.
    """
    device = runtime.getDevice()
    outputs, inputs = q.shape
    defines = {"DTYPE": KINDS[x.dtype], "BLOCK": q.block_size, "TILES": 1}
    function = launcher(device, "product.cu", "multiply_plain", **defines)
    head = (x, len(x), inputs, q.codes, outputs, tables(device, q.codebook).values, y, q.absmax)
    function((-(-y.size // 128), 1), 128, head)


def _many_rows(x: cupy.ndarray, q: QuantizedTensor, y: cupy.ndarray, transposed: bool) -> None:
    """Decode W into this stream's reused memory, and multiply by cuBLAS: y = x W, or x W^T if transposed.

    In float32, W is rounded to its own dtype first, as in NF4-9.2.
    """
    if x.shape[1] == 0:
        y.fill(0)
        return
    dtype = x.dtype
    weight = dequantize(q, out=_weight_memory(q, q.dtype if dtype == FLOAT32 else dtype))
    if weight.dtype != dtype:
        wide = _weight_memory(q, dtype)
        wide[...] = weight
        weight = wide
    multiply(x, weight, y, transpose_b=transposed)


def _weight_memory(q: QuantizedTensor, dtype: Any) -> cupy.ndarray:
    return scratch.take(f"weight {dtype}", q.size, dtype)[: q.size].reshape(q.shape)
