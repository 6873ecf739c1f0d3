"""Double quantization: the absmax of the blocks as 8-bit codes around their exact mean."""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.blockwise import block_count, check_array, scale_rows
from nf4.codebooks import from_hex, midpoint_thresholds
from nf4.errors import InputError
from nf4.floats import round_to_float32
from nf4.parallel import map_chunks

NESTED_BLOCK_SIZE = 256
_CHUNK = 1 << 15  # values scaled at a time: a multiple of the block size
DYNAMIC_MAP = from_hex(
    """
    bf7e3333 bf7a999a bf770000 bf736666 bf6fcccd bf6c3333 bf68999a bf650000
    bf616666 bf5dcccd bf5a3333 bf56999a bf530000 bf4f6666 bf4bcccd bf483333
    bf44999a bf410000 bf3d6667 bf39cccd bf363333 bf32999a bf2f0000 bf2b6667
    bf27cccd bf243333 bf20999a bf1d0000 bf196667 bf15cccd bf123333 bf0e999a
    bf0b0000 bf076666 bf03cccd bf003333 bef93332 bef20000 beeacccc bee39999
    bedc6666 bed53332 bece0000 bec6cccc bebf999a beb86666 beb13332 beaa0000
    bea2cccc be9b999a be946666 be8d3333 be860000 be7d9999 be6f3333 be60cccd
    be526666 be440000 be359999 be273333 be18cccd be0a6666 bdf80000 bddb3334
    bdc9eb85 bdc428f7 bdbe6667 bdb8a3d7 bdb2e148 bdad1eb8 bda75c2a bda1999a
    bd9bd70b bd96147b bd9051eb bd8a8f5d bd84cccd bd7e147b bd728f5d bd670a3d
    bd5b8520 bd500000 bd447ae1 bd38f5c2 bd2d70a3 bd21eb85 bd166667 bd0ae147
    bcfeb852 bce7ae13 bcd0a3d7 bcb9999a bca28f5c bc8b851f bc68f5c3 bc3ae148
    bc1f3b64 bc160418 bc0ccccd bc039581 bbf4bc6a bbe24dd3 bbcfdf3c bbbd70a4
    bbab020d bb989374 bb8624dd bb676c8a bb428f5c bb1db22d baf1a9fc baa7ef9d
    ba7765ff ba59e83e ba3c6a80 ba1eecc1 ba016f00 b9c7e282 b98ce705 b923d70b
    b8ba1f4b b88aefb3 b8378034 b7b24206 b70205ff b65a1a94 b513a3b7 00000000
    3513a3b7 365a1a94 370205ff 37b24206 38378034 388aefb3 38ba1f4b 3923d70b
    398ce705 39c7e282 3a016f00 3a1eecc1 3a3c6a80 3a59e83e 3a7765ff 3aa7ef9d
    3af1a9fc 3b1db22d 3b428f5c 3b676c8a 3b8624dd 3b989374 3bab020d 3bbd70a4
    3bcfdf3c 3be24dd3 3bf4bc6a 3c039581 3c0ccccd 3c160418 3c1f3b64 3c3ae148
    3c68f5c3 3c8b851f 3ca28f5c 3cb9999a 3cd0a3d7 3ce7ae13 3cfeb852 3d0ae147
    3d166667 3d21eb85 3d2d70a3 3d38f5c2 3d447ae1 3d500000 3d5b8520 3d670a3d
    3d728f5d 3d7e147b 3d84cccd 3d8a8f5d 3d9051eb 3d96147b 3d9bd70b 3da1999a
    3da75c2a 3dad1eb8 3db2e148 3db8a3d7 3dbe6667 3dc428f7 3dc9eb85 3ddb3334
    3df80000 3e0a6666 3e18cccd 3e273333 3e359999 3e440000 3e526666 3e60cccd
    3e6f3333 3e7d9999 3e860000 3e8d3333 3e946666 3e9b999a 3ea2cccc 3eaa0000
    3eb13332 3eb86666 3ebf999a 3ec6cccc 3ece0000 3ed53332 3edc6666 3ee39999
    3eeacccc 3ef20000 3ef93332 3f003333 3f03cccd 3f076666 3f0b0000 3f0e999a
    3f123333 3f15cccd 3f196667 3f1d0000 3f20999a 3f243333 3f27cccd 3f2b6667
    3f2f0000 3f32999a 3f363333 3f39cccd 3f3d6667 3f410000 3f44999a 3f483333
    3f4bcccd 3f4f6666 3f530000 3f56999a 3f5a3333 3f5dcccd 3f616666 3f650000
    3f68999a 3f6c3333 3f6fcccd 3f736666 3f770000 3f7a999a 3f7e3333 3f800000
    """
)
"""The 8-bit dynamic map, float32 [256], ascending (NF4-6.2)."""

THRESHOLDS = midpoint_thresholds(DYNAMIC_MAP)
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class NestedAbsmax:
    """The absmax of the blocks, quantized in turn (NF4-6).

    Raises InputError where the lengths or dtypes do not fit each other.
    """

    codes: NDArray[np.uint8]  # [blocks]
    absmax: NDArray[np.float32]  # [ceil(blocks / block_size)]
    offset: np.float32
    map: NDArray[np.float32]  # [256]
    block_size: int = NESTED_BLOCK_SIZE

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise InputError(f"nested block size {self.block_size} is not positive")
        check_array("nested absmax: codes", self.codes, np.uint8, self.codes.size)
        check_array(
            "nested absmax: absmax", self.absmax, np.float32, block_count(self.codes.size, self.block_size)
        )
        check_array("nested absmax: map", self.map, np.float32, 256)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NestedAbsmax):
            return NotImplemented
        return self._bits() == other._bits()

    def __hash__(self) -> int:
        return hash(self._bits())

    def _bits(self) -> tuple[Any, ...]:
        arrays = (self.codes, self.absmax, self.offset, self.map)
        return (self.block_size, *(array.tobytes() for array in arrays))

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, of their absmax and of the offset; the map is the same for every tensor."""
        return self.codes.nbytes + self.absmax.nbytes + 4


def exact_mean(x: NDArray[np.float32]) -> np.float32:
    """Return the float32 nearest to the exact mean of x [n], ties to even; 0 of nothing (NF4-6.1).

    x must be finite. The sum is one integer per binary exponent, so no order of the elements can change it.
    """
    if x.size == 0:
        return np.float32(0)
    least = float(x.min())
    if least > 0 and float(x.max()) * x.size < math.ldexp(math.ulp(least), 81):
        # All are multiples of a float32 ulp of the least, 2^29 of its float64 ulps, and the sum is below 2^52
        # of them: in float64 every partial sum is exact.
        return round_to_float32(Fraction(float(x.sum(dtype=np.float64))) / x.size)
    bits = x.view(np.int32)
    exponents = (bits >> 23) & 0xFF
    significands = np.where(exponents > 0, bits & 0x7FFFFF | 0x800000, bits & 0x7FFFFF)
    signed = np.where(bits < 0, -significands, significands)
    total = 0  # in units of 2^-149
    for start in range(0, x.size, 1 << 28):  # so that sums of 24-bit integers are exact in bincount's float64
        piece = slice(start, start + (1 << 28))
        sums = np.bincount(exponents[piece], weights=signed[piece])
        for exponent in np.flatnonzero(sums):
            scale = max(int(exponent), 1)  # a subnormal has the scale of exponent 1
            total += int(sums[exponent]) << scale - 1
    return round_to_float32(Fraction(total, x.size << 149))


@cache
def _search_table() -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return (below uint8, limit float32), both [65536], indexed by the upper half of the bits of s.

    below counts the thresholds strictly below every s with that upper half; limit is the next one. No two
    thresholds share an upper half, so that the code of s is below + (s > limit): a search of one step.
    """
    keys = np.arange(65536, dtype=np.uint32) << np.uint32(16)
    smallest = np.fmin(keys.view(np.float32), (keys | np.uint32(0xFFFF)).view(np.float32))
    below = np.searchsorted(THRESHOLDS, smallest, side="left")
    limit = np.append(THRESHOLDS, np.float32(np.inf))[below]
    return below.astype(np.uint8), limit


def encode_nested(absmax: NDArray[np.float32]) -> NestedAbsmax:
    """Return the 8-bit form of absmax [blocks] (NF4-6.1, NF4-6.2, NF4-6.3).

    Raises InputError, naming the block, where one is not finite, is negative, or would decode to an infinity
    (NF4-6.6).
    """
    fine = (absmax >= 0) & (absmax < np.inf)
    if not fine.all():
        block = int(np.argmin(fine))
        raise InputError(
            f"cannot double-quantize: the absmax of block {block} is {absmax[block]}; "
            "an absmax is finite and not negative"
        )
    offset = exact_mean(absmax)
    below, limit = _search_table()
    codes = np.empty(absmax.size, np.uint8)
    absmax2 = np.empty(block_count(absmax.size, NESTED_BLOCK_SIZE), np.float32)

    def work(start: int, stop: int) -> None:
        centred = absmax[start:stop] - offset  # one rounding each
        blocks = absmax2[start // NESTED_BLOCK_SIZE : block_count(stop, NESTED_BLOCK_SIZE)]
        body = centred.size - centred.size % NESTED_BLOCK_SIZE
        parts = [centred[:body].reshape(-1, NESTED_BLOCK_SIZE), centred[None, body:]]
        scaled = [scale_rows(part) for part in parts if part.size]
        np.concatenate([row_absmax for _, row_absmax in scaled], out=blocks)
        s = np.concatenate([part.reshape(-1) for part, _ in scaled])
        key = (s.view(np.uint32) >> np.uint32(16)).astype(np.intp)
        codes[start:stop] = below.take(key) + (s > limit.take(key))

    map_chunks(work, absmax.size, _CHUNK)
    nested = NestedAbsmax(codes, absmax2, offset, DYNAMIC_MAP)
    if float(absmax2.max(initial=0)) + float(offset) > _LARGEST:  # the map is at most 1: others are safe
        infinite = _first_nonfinite(_decode(nested))
        if infinite is not None:
            raise InputError(
                f"cannot double-quantize: the absmax of block {infinite}, {absmax[infinite]}, would decode "
                "to an infinity; scale the tensor down, or quantize it without double quantization"
            )
    return nested


def decode_nested(nested: NestedAbsmax) -> NDArray[np.float32]:
    """Return absmax [blocks] = RN(RN(map[code] * absmax2) + offset) (NF4-6.4).

    Raises InputError, naming the block, where one is not finite (NF4-12.5).
    """
    absmax = _decode(nested)
    block = _first_nonfinite(absmax)
    if block is not None:
        raise InputError(
            f"cannot dequantize: the absmax of block {block} is {absmax[block]}; the tensor is damaged"
        )
    return absmax


def _first_nonfinite(absmax: NDArray[np.float32]) -> int | None:
    finite = np.isfinite(absmax)
    return None if finite.all() else int(np.argmin(finite))


def _decode(nested: NestedAbsmax) -> NDArray[np.float32]:
    size = nested.block_size
    absmax = nested.map[nested.codes]
    full = absmax.size // size
    body = full * size
    with np.errstate(all="ignore"):
        absmax[:body].reshape(full, size)[:] *= nested.absmax[:full, None]
        if body < absmax.size:
            absmax[body:] *= nested.absmax[full]
        absmax += nested.offset
    return absmax
