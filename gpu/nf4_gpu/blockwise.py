"""Encoding and decoding of blocks on the device: launches of blockwise.cu."""

from typing import Any

import cupy
from cupy.cuda import runtime
from nf4.blockwise import block_count
from nf4.codebooks import Codebook
from nf4.nested import NESTED_BLOCK_SIZE, NestedAbsmax

from nf4_gpu.arrays import KINDS, address
from nf4_gpu.codebooks import tables
from nf4_gpu.compile import kernel

_SOURCE = "blockwise.cu"
_TURNS, _UNROLL = 8, 2  # tiles of a thread block of encode, words of a thread of decode: as there


def encode(
    x: cupy.ndarray,
    block_size: int,
    codebook: Codebook,
    codes: Any,
    absmax: Any,
    status: int,
    bins: cupy.ndarray | None = None,
) -> None:
    """Launch codes uint8 [ceil(n / 2)] and absmax float32 [block_count] of contiguous x [n] (NF4-3, NF4-5).

    status is the address of an int that the kernel sets where x has a NaN or an infinity, or 0. The exact sum
    of absmax is added to bins (NF4-6.1).
    """
    n = x.size
    if n == 0:
        return
    device = runtime.getDevice()
    book = tables(device, codebook)
    name, table = "encode", book.buckets
    if table is None:
        name, table = "encode_by_thresholds", book.thresholds
    defines = {"DTYPE": KINDS[x.dtype], "BLOCK": block_size}
    if bins is not None:
        defines["SUM"] = 1
    function = kernel(device, _SOURCE, name, **defines)
    threads = max(256, block_size // 8)
    grid = -(-n // (threads * 8 * _TURNS))
    aligned = address(x) % 16 == 0 and address(codes) % 4 == 0
    sums = 0 if bins is None else bins
    function((grid,), (threads,), (x, n, aligned, codes, absmax, status, table, sums))


def decode(codes: Any, absmax: Any, block_size: int, codebook: Codebook, out: cupy.ndarray) -> None:
    """Launch out [n] = value * absmax, rounded once to its dtype (NF4-4).

    absmax is float32 [block_count] or a NestedAbsmax, which is decoded in the same launch (NF4-6.4).
    """
    n = out.size
    if n == 0:
        return
    device = runtime.getDevice()
    defines = {"DTYPE": KINDS[out.dtype], "BLOCK": block_size}
    name, scales = "decode", [absmax]
    if isinstance(absmax, NestedAbsmax):
        name = "decode_double"
        if absmax.block_size != NESTED_BLOCK_SIZE:
            defines["NESTED_BLOCK"] = absmax.block_size
        scales = [absmax.codes, absmax.absmax, absmax.offset, absmax.map]
    aligned = address(out) % 16 == 0 and address(codes) % 4 == 0
    head = (codes, n, aligned, tables(device, codebook).values, out)
    function = kernel(device, _SOURCE, name, **defines)
    function((-(-n // (2048 * _UNROLL)),), (256,), (*head, *scales))


def encode_plain(x: cupy.ndarray, block_size: int, codebook: Codebook, codes: Any, absmax: Any) -> None:
    """Launch the encoder that follows the clauses word by word: what the tests hold the fast one against."""
    device = runtime.getDevice()
    function = kernel(device, _SOURCE, "encode_plain", DTYPE=KINDS[x.dtype], BLOCK=block_size)
    grid = -(-block_count(x.size, block_size) // 128)
    function((grid,), (128,), (x, x.size, codes, absmax, tables(device, codebook).thresholds))


def decode_plain(codes: Any, absmax: Any, block_size: int, codebook: Codebook, out: cupy.ndarray) -> None:
    """Launch the decoder that follows the clauses word by word."""
    device = runtime.getDevice()
    function = kernel(device, _SOURCE, "decode_plain", DTYPE=KINDS[out.dtype], BLOCK=block_size)
    grid = -(-out.size // 256)
    function((grid,), (256,), (codes, out.size, tables(device, codebook).values, out, absmax))
