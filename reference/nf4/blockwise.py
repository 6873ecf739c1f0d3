"""Encoding, decoding and packing of blocks: chunks that stay in the cache, over the threads of the pool."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nf4.codebooks import Codebook
from nf4.errors import InputError
from nf4.floats import FLOAT32, narrow_into, widen, widen_into
from nf4.parallel import map_chunks

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
CHUNK = 1 << 17  # elements: a multiple of every block size; fewer cost more calls, more leave the caches

_MAGNITUDE = np.int32(0x7FFFFFFF)  # of the bits of a float32; as integers magnitudes order like their values
_INFINITY = np.int32(0x7F800000)  # a NaN is above
_TINY = np.float32(2**-128)  # up to here RN(1 / absmax) is infinite
_LIFT = np.float32(2**64)

_buffers = threading.local()


def check_block_size(block_size: int) -> None:
    """Raise InputError unless block_size is one of BLOCK_SIZES (NF4-3.1)."""
    if block_size not in BLOCK_SIZES:
        choices = ", ".join(str(size) for size in BLOCK_SIZES)
        raise InputError(f"block size {block_size!r} is not supported; choose one of {choices}")


def block_count(n: int, block_size: int) -> int:
    """Return the number of blocks of n elements; the last may be short (NF4-3.1)."""
    return -(-n // block_size)


def check_array(what: str, array: NDArray[Any], dtype: DTypeLike, size: int) -> None:
    """Raise InputError unless array is of dtype and one-dimensional of that size."""
    if array.dtype != dtype or array.shape != (size,):
        raise InputError(f"{what} is {array.dtype} {list(array.shape)}, must be {np.dtype(dtype)} [{size}]")


def scale_blocks(
    x: NDArray[np.float32], block_size: int, s: NDArray[np.float32], absmax: NDArray[np.float32]
) -> None:
    """Write absmax [block_count] and s [n] = x / absmax as NF4-3.2 and NF4-3.3 round it, for x [n].

    Where x has a NaN or an infinity, absmax of that block is a NaN or infinite and s means nothing.
    """
    with np.errstate(all="ignore"):
        for part, blocks, shape in _runs(x.size, block_size):
            _scale_rows(x[part].reshape(shape), s[part].reshape(shape), absmax[blocks])


def _runs(n: int, block_size: int) -> Iterator[tuple[slice, slice, tuple[int, int]]]:
    """Yield (elements, blocks, shape) of the full blocks among n elements, then of the short last one."""
    full = n // block_size
    body = full * block_size
    if body:
        yield slice(0, body), slice(0, full), (full, block_size)
    if body < n:
        yield slice(body, n), slice(full, full + 1), (1, n - body)


def _scale_rows(x: NDArray[np.float32], s: NDArray[np.float32], absmax: NDArray[np.float32]) -> None:
    """scale_blocks for x [rows, block] and s alike; both contiguous."""
    rows, width = x.shape
    magnitude = s.view(np.int32)  # borrow the memory of s
    np.bitwise_and(x.view(np.int32), _MAGNITUDE, out=magnitude)
    np.maximum.reduceat(magnitude.reshape(-1), np.arange(0, rows * width, width), out=absmax.view(np.int32))
    reciprocal = 1 / absmax  # [rows]
    np.multiply(x, reciprocal[:, None], out=s)
    tiny = np.flatnonzero(absmax <= _TINY)
    if tiny.size:  # times 2^64 is exact, and takes the reciprocal of any absmax but 0 into range
        lifted = absmax[tiny] * _LIFT
        reciprocal = np.where(lifted > 0, 1 / lifted, 0)
        s[tiny] = x[tiny] * _LIFT * reciprocal[:, None]


def encode(
    x: NDArray[Any], block_size: int, codebook: Codebook
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return (packed codes uint8 [ceil(n / 2)], absmax float32 [block_count]) of flat x [n] (NF4-3, NF4-5).

    x is float32, float16 or bfloat16, contiguous. Raises InputError where x has a NaN or an infinity.
    """
    packed = np.empty(-(-x.size // 2), np.uint8)
    absmax = np.empty(block_count(x.size, block_size), np.float32)
    thresholds, book = codebook.thresholds, codebook.codes
    in_order = np.array_equal(book, np.arange(book.size))  # as in nf4: a rank is its code

    def work(start: int, stop: int) -> None:
        n = stop - start
        s, codes = _buffer("s", np.float32, n), _buffer("codes", np.uint8, n + 1)
        above = _buffer("above", np.uint8, thresholds.size * n).reshape(thresholds.size, n)
        chunk = x[start:stop]
        if x.dtype != FLOAT32:
            wide = _buffer("wide", np.float32, n)
            widen_into(wide, chunk)
            chunk = wide
        blocks = absmax[start // block_size : block_count(stop, block_size)]
        scale_blocks(chunk, block_size, s, blocks)
        ranks = codes[:n]
        np.greater(s, thresholds[:, None], out=above.view(np.bool_))  # [thresholds, n]
        np.add.reduce(above, axis=0, out=ranks)
        if not in_order:
            np.take(book, ranks, out=ranks, mode="clip")
        codes[n] = codebook.zero_code  # the pad nibble, where n is odd
        pairs = codes[: n + n % 2].view("<u2")  # first element in the low byte
        np.bitwise_or(pairs << 4, pairs >> 8, out=packed[start // 2 : -(-stop // 2)], casting="unsafe")

    map_chunks(work, x.size, CHUNK)
    _refuse_nonfinite_blocks(x, block_size, absmax)
    return packed, absmax


def _refuse_nonfinite_blocks(x: NDArray[Any], block_size: int, absmax: NDArray[np.float32]) -> None:
    bad = np.flatnonzero(absmax.view(np.int32) >= _INFINITY)
    if bad.size:
        start = int(bad[0]) * block_size
        block = widen(x[start : start + block_size])
        at = int(np.flatnonzero(~np.isfinite(block))[0])
        raise NonFiniteError(start + at, float(block[at]))


class NonFiniteError(InputError):
    """A NaN or an infinity at a flat index; the caller, who knows the shape, says it in full."""

    def __init__(self, index: int, value: float) -> None:
        super().__init__(f"element {index} is {value}")
        self.index = index
        self.value = value


def decode(
    packed: NDArray[np.uint8],
    absmax: NDArray[np.float32],
    block_size: int,
    codebook: Codebook,
    out: NDArray[Any],
) -> None:
    """Write value * absmax into flat out [n], rounded once to its dtype (NF4-4.1, NF4-4.2).

    packed is uint8 [ceil(n / 2)], absmax float32 [block_count]; out is contiguous.
    """

    def work(start: int, stop: int) -> None:
        n = stop - start
        quads = -(-n // 4)  # a quad of elements is two bytes
        pairs = packed[start // 2 : -(-stop // 2)]
        if pairs.size % 2:
            pairs = np.append(pairs, np.uint8(0))
        direct = out.dtype == FLOAT32 and n % 4 == 0
        values = out[start:stop] if direct else _buffer("s", np.float32, 4 * quads)
        index = _buffer("index", np.intp, quads)  # np.take would make one each time
        np.copyto(index, pairs.view(np.uint16))
        np.take(codebook.quads, index, axis=0, out=values.reshape(quads, 4), mode="wrap")  # the fastest mode
        scales = absmax[start // block_size : block_count(stop, block_size)]
        with np.errstate(all="ignore"):
            for part, blocks, shape in _runs(n, block_size):
                products = values[part].reshape(shape)
                np.multiply(products, scales[blocks, None], out=products)
            if not direct:
                narrow_into(out[start:stop], values[:n], _buffer("bits", np.uint32, n))

    map_chunks(work, out.size, CHUNK)


def _buffer(name: str, dtype: Any, n: int) -> NDArray[Any]:
    """Return n elements of this thread's buffer of that name: fresh memory would cost page faults."""
    key = f"{name}:{np.dtype(dtype).name}"
    buffer: NDArray[Any] | None = getattr(_buffers, key, None)
    if buffer is None or buffer.size < n:
        buffer = np.empty(n, dtype)
        setattr(_buffers, key, buffer)
    return buffer[:n]
