"""Double quantization of absmax on the device: launches of nested.cu."""

from threading import get_ident
from typing import Any

import cupy
from cupy.cuda import runtime
from nf4.blockwise import block_count
from nf4.nested import NESTED_BLOCK_SIZE, NestedAbsmax

from nf4_gpu.arrays import address, scratch
from nf4_gpu.codebooks import dynamic_map
from nf4_gpu.compile import processors
from nf4_gpu.launch import Calls, launcher

_SOURCE = "nested.cu"
_FLOAT32 = 0
_BINS = 16 * 256 + 1  # sums of significands in copies, and a counter: as in nested.cuh


def empty_nested(blocks: int) -> NestedAbsmax:
    """Return uninitialised memory for the nested form of so many absmax."""
    table, _, _ = dynamic_map(runtime.getDevice())
    nested_blocks = block_count(blocks, NESTED_BLOCK_SIZE)
    offset: Any = cupy.empty(1, cupy.float32)
    return NestedAbsmax(
        cupy.empty(blocks, cupy.uint8), cupy.empty(nested_blocks, cupy.float32), offset, table
    )


def take_bins() -> cupy.ndarray:
    """Return the zeros, uint64 [4097], to which encode adds the exact sum of absmax (NF4-6.1).

    They are this stream's, and encode_nested leaves them zero again.
    """
    return scratch.take("bins", _BINS, cupy.uint64, zeroed=True)


def sum_absmax(absmax: cupy.ndarray) -> cupy.ndarray:
    """Return the bins with the sum of absmax [n], finite and not negative, not made by encode (NF4-6.1)."""
    bins = take_bins()
    device = runtime.getDevice()
    grid = min(-(-absmax.size // 256), processors(device) * 4)
    if grid:
        launcher(device, _SOURCE, "sum_absmax", DTYPE=_FLOAT32)((grid, 1), 256, (absmax, absmax.size, bins))
    return bins


def encode_nested(
    absmax: Any, n: int, bins: cupy.ndarray, out: NestedAbsmax, status: int, calls: Calls | None = None
) -> None:
    """Launch the 8-bit form of n absmax, not negative, with their sum in bins, into out (NF4-6.1, NF4-6.3).

    status is the address of an int that is set where a finite absmax would decode to an infinity (NF4-6.6),
    or 0. calls keeps what is the same for the same out.
    """
    if n == 0:
        runtime.memsetAsync(address(out.offset), 0, 4, cupy.cuda.get_current_stream().ptr)
        return
    device = runtime.getDevice()
    aligned = address(absmax) % 16 == 0 and address(out.codes) % 8 == 0
    key = ("encode_nested", get_ident(), device, aligned)
    call = None if calls is None else calls.get(key)
    if call is None:
        grid = min(-(-n // (8 * NESTED_BLOCK_SIZE)), processors(device) * 4)
        function = launcher(device, _SOURCE, "encode_nested", DTYPE=_FLOAT32)
        results = (out.codes, out.absmax, out.offset, status)
        call = function.prepare((grid, 1), 256, (absmax, n, aligned, bins, *dynamic_map(device), *results))
        if calls is not None:
            calls[key] = call
    call.values[0], call.values[3], call.values[10] = address(absmax), address(bins), status
    call()


def decode_nested(nested: NestedAbsmax, out: cupy.ndarray) -> None:
    """Launch out = absmax [n] (NF4-6.4)."""
    n = nested.codes.size
    if n:
        defines = {"DTYPE": _FLOAT32}
        if nested.block_size != NESTED_BLOCK_SIZE:
            defines["NESTED_BLOCK"] = nested.block_size
        function = launcher(runtime.getDevice(), _SOURCE, "decode_nested", **defines)
        function((-(-n // 256), 1), 256, (nested.codes, n, nested.absmax, nested.offset, nested.map, out))
