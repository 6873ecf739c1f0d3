"""Encoding and decoding of blocks on the device: launches of blockwise.cu."""

from threading import get_ident
from typing import Any

import cupy
from cupy.cuda import runtime
from nf4.blockwise import block_count
from nf4.codebooks import Codebook
from nf4.nested import NESTED_BLOCK_SIZE, NestedAbsmax

from nf4_gpu.arrays import KINDS, address
from nf4_gpu.codebooks import tables
from nf4_gpu.launch import Calls, launcher

_SOURCE = "blockwise.cu"
_TURNS = 4  # as there: tiles of a thread block of encode,
_DECODERS, _UNROLL = 512, 2  # and the threads of one of decode, and their words


def encode(
    x: cupy.ndarray,
    block_size: int,
    codebook: Codebook,
    codes: Any,
    absmax: Any,
    status: int,
    bins: cupy.ndarray | None = None,
    calls: Calls | None = None,
) -> None:
    """Launch codes uint8 [ceil(n / 2)] and absmax float32 [block_count] of contiguous x [n] (NF4-3, NF4-5).

    status is the address of an int that the kernel sets where x has a NaN or an infinity, or 0. The exact sum
    of absmax is added to bins (NF4-6.1). calls keeps what is the same for the same codes.
    """
    n = x.size
    if n == 0:
        return
    device = runtime.getDevice()
    held = 32 // x.itemsize
    aligned = address(x) % 16 == 0 and address(codes) % (held // 2) == 0
    sums = 0 if bins is None else bins
    key = ("encode", get_ident(), device, x.dtype, aligned, bins is None)
    call = None if calls is None else calls.get(key)
    if call is None:
        book = tables(device, codebook)
        name, table = "encode", book.buckets
        if table is None:
            name, table = "encode_by_thresholds", book.thresholds
        defines = {"DTYPE": KINDS[x.dtype], "BLOCK": block_size}
        if bins is not None:
            defines["SUM"] = 1
        function = launcher(device, _SOURCE, name, **defines)
        threads = max(256, block_size // held)
        grid = -(-n // (threads * held * _TURNS))
        call = function.prepare((grid, 1), threads, (x, n, aligned, codes, absmax, status, table, sums))
        if calls is not None:
            calls[key] = call
    values = call.values
    values[0], values[4], values[5] = address(x), address(absmax), status
    if bins is not None:
        values[7] = address(bins)
    call()


def decode(
    codes: Any,
    absmax: Any,
    block_size: int,
    codebook: Codebook,
    out: cupy.ndarray,
    calls: Calls | None = None,
) -> None:
    """Launch out [n] = value * absmax, rounded once to its dtype (NF4-4).

    absmax is float32 [block_count] or a NestedAbsmax, which is decoded in the same launch (NF4-6.4). calls
    keeps what is the same for the same codes.
    """
    n = out.size
    if n == 0:
        return
    device = runtime.getDevice()
    aligned = address(out) % 16 == 0 and address(codes) % 4 == 0
    key = ("decode", get_ident(), device, out.dtype, aligned)
    call = None if calls is None else calls.get(key)
    if call is None:
        defines = {"DTYPE": KINDS[out.dtype], "BLOCK": block_size}
        name, scales = "decode", [absmax]
        if isinstance(absmax, NestedAbsmax):
            name = "decode_double"
            if absmax.block_size != NESTED_BLOCK_SIZE:
                defines["NESTED_BLOCK"] = absmax.block_size
            scales = [absmax.codes, absmax.absmax, absmax.offset, absmax.map]
        head = (codes, n, aligned, tables(device, codebook).values, out)
        grid = -(-n // (8 * _DECODERS * _UNROLL))
        call = launcher(device, _SOURCE, name, **defines).prepare((grid, 1), _DECODERS, (*head, *scales))
        if calls is not None:
            calls[key] = call
    call.values[4] = address(out)
    call()


def encode_plain(x: cupy.ndarray, block_size: int, codebook: Codebook, codes: Any, absmax: Any) -> None:
    """Launch the encoder that follows the clauses word by word: what the tests hold the fast one against."""
    device = runtime.getDevice()
    function = launcher(device, _SOURCE, "encode_plain", DTYPE=KINDS[x.dtype], BLOCK=block_size)
    grid = -(-block_count(x.size, block_size) // 128)
    function((grid, 1), 128, (x, x.size, codes, absmax, tables(device, codebook).thresholds))


def decode_plain(codes: Any, absmax: Any, block_size: int, codebook: Codebook, out: cupy.ndarray) -> None:
    """Launch the decoder that follows the clauses word by word."""
    device = runtime.getDevice()
    function = launcher(device, _SOURCE, "decode_plain", DTYPE=KINDS[out.dtype], BLOCK=block_size)
    grid = -(-out.size // 256)
    function((grid, 1), 256, (codes, out.size, tables(device, codebook).values, out, absmax))
