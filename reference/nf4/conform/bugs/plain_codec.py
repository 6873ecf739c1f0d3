"""A correct port of chapters 2 to 7 in plain NumPy, a method a step, so that a subclass can do one wrong."""

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.codebooks import CODEBOOKS
from nf4.errors import InputError
from nf4.floats import BFLOAT16, DTYPES, FLOAT32, round_to_float32
from nf4.nested import DYNAMIC_MAP

Array = NDArray[Any]
Outputs = dict[str, Any]

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
TINY, LIFT = np.float32(2**-128), np.float32(2**64)  # NF4-3.3


class PlainCodec:
    """A port (NF4-13.3) written from the specification, for clarity, not from the reference.

    The methods named as operations are its port; those before them are the steps, each the work of the clause
    it names. InputError refuses an input.
    """

    # Steps: what is refused

    def check_dtype(self, dtype: str, among: Iterable[str] = tuple(DTYPES)) -> None:
        """NF4-12.2."""
        if dtype not in among:
            raise InputError(f"dtype {dtype} is not supported; choose one of {', '.join(among)}")

    def usable(self, block_size: int) -> int:
        """A block size that must be one of the eight (NF4-12.3)."""
        if block_size not in BLOCK_SIZES:
            raise InputError(f"block size {block_size} is not supported; choose one of {BLOCK_SIZES}")
        return block_size

    def fitting(self, what: str, array: Array, count: int) -> Array:
        """An array that must have so many elements (NF4-12.5)."""
        if array.size != count:
            raise InputError(f"{what} has {array.size} elements, must have {count}")
        return array

    def counted(self, shape: list[int]) -> int:
        """The number of elements of a shape (NF4-1.4)."""
        return math.prod(self.whole("size of a shape", size) for size in shape)

    def whole(self, what: str, number: int) -> int:
        """A size, a count or an index, which is not negative (NF4-1.4)."""
        if number < 0:
            raise InputError(f"{what} is {number}; it must not be negative")
        return number

    def check_finite(self, what: str, x: Array) -> None:
        """NF4-12.1, NF4-12.5."""
        bad = np.flatnonzero(~np.isfinite(x))
        if bad.size:
            raise InputError(f"{what} {bad[0]} is {x[bad[0]]}; it must be finite")

    def check_absmax(self, absmax: Array) -> None:
        """What may be double-quantized (NF4-6.6)."""
        self.check_finite("absmax of block", absmax)
        if np.any(absmax < 0):
            raise InputError(f"the absmax of block {np.argmax(absmax < 0)} is negative")

    def check_decodes(self, absmax: Array) -> None:
        """What absmax may decode to if it is to be double-quantized (NF4-6.6)."""
        self.check_finite("decoded absmax of block", absmax)

    # Steps: numbers

    def kept(self, x: Array) -> Array:
        """A result as the machine keeps it: subnormal numbers stay (NF4-1.1)."""
        return x

    def multiply_add(self, a: Array | np.float32, b: Array, c: Array) -> Array:
        """RN(RN(a * b) + c): two roundings (NF4-1.2)."""
        return self.kept(self.kept(a * b) + c)

    def mean(self, x: Array) -> Array:
        """The exact mean, rounded once, float32 [1] (NF4-6.1): the sum is an integer of units of 2^-149."""
        total = sum(int(math.ldexp(value, 149)) for value in x.tolist())
        return np.array([round_to_float32(Fraction(total, max(x.size, 1) << 149))], np.float32)

    def widened(self, x: Array) -> Array:
        """NF4-7.1."""
        if x.dtype == FLOAT32:
            return self.kept(x)
        with np.errstate(all="ignore"):
            wide = x.astype(np.float32)
        nan = np.isnan(wide)
        wide.view(np.uint32)[nan] = self.widened_nan(x[nan])
        return self.kept(wide)

    def widened_nan(self, x: Array) -> Array:
        """The bits of 16-bit NaNs in float32 (NF4-7.1)."""
        return np.where(np.signbit(x), np.uint32(0xFFC00000), np.uint32(0x7FC00000))

    def narrowed(self, x: Array, dtype: np.dtype[Any]) -> Array:
        """NF4-7.2, NF4-7.3."""
        if dtype == FLOAT32:
            return self.kept(x)
        with np.errstate(all="ignore"):
            short = self.rounded(x, dtype)
        nan = np.isnan(x)
        if dtype in DTYPES.values():  # a wrong port may have come here with another
            short.view(np.uint16)[nan] = self.narrowed_nan(x[nan], dtype)
        return self.kept(short)

    def rounded(self, x: Array, dtype: np.dtype[Any]) -> Array:
        """To the nearest of a 16-bit dtype, ties to even (NF4-7.2, NF4-7.3)."""
        return x.astype(dtype)

    def narrowed_nan(self, x: Array, dtype: np.dtype[Any]) -> Array:
        """The bits of NaNs in a 16-bit dtype (NF4-7.2, NF4-7.3)."""
        quiet = 0x7FC0 if dtype == BFLOAT16 else 0x7E00
        return np.where(np.signbit(x), quiet | 0x8000, quiet).astype(np.uint16)

    # Steps: encode (chapter 3)

    def values(self, codebook: str) -> Array:
        """The values of a codebook by code (NF4-2.1)."""
        if codebook not in CODEBOOKS:
            raise InputError(f"there is no codebook {codebook!r}; choose one of {', '.join(CODEBOOKS)}")
        return CODEBOOKS[codebook].values

    def blocks(self, shape: Iterable[int], block_size: int, decoding: bool) -> Array:
        """The block of each element (NF4-3.1, NF4-4.1)."""
        return np.arange(math.prod(shape)) // block_size

    def absmax(self, blocks: list[Array]) -> Array:
        """NF4-3.2."""
        return np.array([np.abs(block).max() for block in blocks], np.float32)

    def bounded(self, absmax: Array) -> Array:
        """absmax has no lower bound (NF4-3.2)."""
        return absmax

    def reciprocal(self, absmax: Array) -> Array:
        """RN(1 / absmax), of what NF4-3.3 has lifted."""
        return self.kept(np.float32(1) / absmax)

    def scaled(self, x: Array, absmax: Array, tail: Array) -> Array:
        """s of NF4-3.3, of x and the absmax of its block; tail marks the elements of a short last one."""
        lift = np.where(absmax <= TINY, LIFT, np.float32(1))
        return self.kept(x * lift * self.reciprocal(absmax * lift))

    def zero_block(self) -> np.float32:
        """s where absmax is 0 (NF4-3.4)."""
        return np.float32(0)

    def ranks(self, s: Array, distinct: Array) -> Array:
        """The number of thresholds strictly below s (NF4-3.5), of ascending values."""
        return np.searchsorted(self.thresholds(distinct), s, side="left")

    def thresholds(self, distinct: Array) -> Array:
        """RN of the midpoints of ascending float32 values, whose sums are exact in float64 (NF4-2.2)."""
        wide = distinct.astype(np.float64)
        return ((wide[:-1] + wide[1:]) / 2).astype(np.float32)

    def codes_of(self, ranks: Array, codes: Array) -> Array:
        """The code of each rank (NF4-2.2)."""
        return codes[ranks]

    def encoded(self, x: Array, shape: Iterable[int], block_size: int, values: Array) -> tuple[Array, Array]:
        """The code of each element and absmax of float32 x (chapter 3)."""
        index = self.blocks(shape, block_size, decoding=False)
        starts = np.flatnonzero(np.diff(index, prepend=-1))
        absmax = self.bounded(self.absmax(np.split(x, starts[1:]) if x.size else []))
        of_element = absmax[index]
        tail = np.arange(x.size) >= x.size - x.size % block_size
        with np.errstate(all="ignore"):
            s = np.where(of_element == 0, self.zero_block(), self.scaled(x, of_element, tail))
        distinct, codes = ranked(values)
        return self.codes_of(self.ranks(s, distinct), codes), absmax

    # Steps: packing and decode (chapters 4 and 5)

    def pad(self, values: Array) -> int:
        """The code in the last low nibble where the count is odd (NF4-5.2)."""
        distinct, codes = ranked(values)
        return int(self.codes_of(self.ranks(np.zeros(1, np.float32), distinct), codes)[0])

    def joined(self, first: Array, second: Array) -> Array:
        """The byte of two codes (NF4-5.1)."""
        return first << 4 | second

    def split(self, byte: Array) -> tuple[Array, Array]:
        """The two codes of a byte (NF4-5.1)."""
        return byte >> 4, byte & 15

    def product(self, value: Array, absmax: Array, dtype: np.dtype[Any]) -> Array:
        """RN(v * a), rounded to dtype (NF4-4.1, NF4-4.2)."""
        return self.narrowed(self.signed(self.kept(value * absmax)), dtype)

    def signed(self, product: Array) -> Array:
        """A product with its sign, also where it is zero (NF4-4.1)."""
        return product

    def decoded(
        self,
        codes: Array,
        absmax: Array,
        shape: list[int],
        dtype: np.dtype[Any],
        block_size: int,
        values: Array,
    ) -> Array:
        """The elements of packed codes, flat (NF4-4.1, NF4-5.1, NF4-12.5)."""
        absmax = self.bounded(absmax)
        self.check_finite("absmax of block", absmax)
        each = np.stack(self.split(codes), axis=-1).reshape(-1)[: math.prod(shape)]
        index = self.blocks(shape, block_size, decoding=True)
        with np.errstate(all="ignore"):
            return self.product(values[each], absmax[index], dtype)

    # Steps: double quantization (chapter 6)

    def encoder_map(self) -> Array:
        """NF4-6.2."""
        return DYNAMIC_MAP

    def decoder_map(self, stored: Array) -> Array:
        """The map stored with the tensor (NF4-6.2)."""
        return stored

    def nested_scale(self, nested_absmax: Array) -> Array:
        """What a value of the map is multiplied by (NF4-6.4), of each element."""
        return nested_absmax

    def decoder_offset(self, offset: Array) -> Array:
        """What is added to that (NF4-6.4)."""
        return offset

    # Operations

    def codebook(self, codebook: str) -> Outputs:
        """Values and thresholds (NF4-2.1 to NF4-2.3)."""
        values = self.values(codebook)
        return {"values": values, "thresholds": self.thresholds(ranked(values)[0])}

    def widen(self, x: Array, dtype: str) -> Outputs:
        """NF4-7.1."""
        self.check_dtype(dtype)
        return {"y": self.widened(x)}

    def narrow(self, x: Array, dtype: str) -> Outputs:
        """NF4-7.2, NF4-7.3."""
        self.check_dtype(dtype)
        return {"y": self.narrowed(x, dtype_of(dtype))}

    def quantize(self, x: Array, block_size: int, codebook: str) -> Outputs:
        """Codes and absmax (NF4-3, NF4-5)."""
        self.check_dtype(str(x.dtype))
        block_size = self.usable(block_size)
        values = self.values(codebook)
        wide = self.widened(x.reshape(-1))
        self.check_finite("element", wide)
        codes, absmax = self.encoded(wide, x.shape, block_size, values)
        padded = np.append(codes, np.full(codes.size % 2, self.pad(values))).astype(np.uint8)
        return {"codes": self.joined(padded[::2], padded[1::2]), "absmax": absmax}

    def encode_absmax(self, absmax: Array) -> Outputs:
        """The 8-bit form of absmax (NF4-6.1 to NF4-6.3)."""
        self.check_absmax(absmax)
        offset = self.mean(absmax)
        with np.errstate(all="ignore"):
            centred = self.kept(absmax - offset)
        nested_map = self.encoder_map()
        codes, nested = self.encoded(centred, absmax.shape, NESTED_BLOCK, nested_map)
        out = {"absmax_codes": codes.astype(np.uint8), "nested_absmax": nested, "offset": offset}
        self.check_decodes(self._absmax(map=nested_map, **out))
        return out

    def quantize_double(self, x: Array, block_size: int, codebook: str) -> Outputs:
        """Codes and the 8-bit form of absmax (NF4-3, NF4-6)."""
        plain = self.quantize(x, block_size, codebook)
        return {"codes": plain["codes"], **self.encode_absmax(plain["absmax"])}

    def decode_absmax(self, absmax_codes: Array, nested_absmax: Array, offset: Array, map: Array) -> Outputs:
        """absmax (NF4-6.4)."""
        absmax = self._absmax(absmax_codes, nested_absmax, offset, map)
        self.check_finite("decoded absmax of block", absmax)
        return {"absmax": absmax}

    def _absmax(self, absmax_codes: Array, nested_absmax: Array, offset: Array, map: Array) -> Array:
        map = self.fitting("map", map, 256)
        offset = self.fitting("offset", offset, 1)
        blocks = -(-absmax_codes.size // NESTED_BLOCK)
        nested_absmax = self.fitting("nested absmax", nested_absmax, blocks)
        index = self.blocks(absmax_codes.shape, NESTED_BLOCK, decoding=True)
        with np.errstate(all="ignore"):
            scales = self.nested_scale(nested_absmax)[index]
            value = self.decoder_map(map)[absmax_codes]
            return self.multiply_add(value, scales, self.decoder_offset(offset))

    def dequantize(
        self, codes: Array, absmax: Array, shape: list[int], dtype: str, block_size: int, codebook: str
    ) -> Outputs:
        """y of shape (NF4-4)."""
        self.check_dtype(dtype)
        block_size = self.usable(block_size)
        values, n = self.values(codebook), self.counted(shape)
        codes = self.fitting("codes", codes, -(-n // 2))
        absmax = self.fitting("absmax", absmax, -(-n // block_size))
        return {"y": self.decoded(codes, absmax, shape, dtype_of(dtype), block_size, values)}

    def dequantize_double(
        self,
        codes: Array,
        absmax_codes: Array,
        nested_absmax: Array,
        offset: Array,
        map: Array,
        shape: list[int],
        dtype: str,
        block_size: int,
        codebook: str,
    ) -> Outputs:
        """y of shape (NF4-4, NF4-6.4)."""
        absmax = self._absmax(absmax_codes, nested_absmax, offset, map)
        return self.dequantize(codes, absmax, shape, dtype, block_size, codebook)

    def storage(self, elements: int, block_size: int, double_quant: bool) -> Outputs:
        """NF4-5.4."""
        block_size = self.usable(block_size)
        blocks = -(-elements // block_size)
        scales = blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 if double_quant else 4 * blocks
        return {"bytes": -(-elements // 2) + scales}


def ranked(values: Array) -> tuple[Array, Array]:
    """The different values of a codebook in ascending order, and the lowest code of each (NF4-2.2)."""
    return np.unique(values, return_index=True)


def dtype_of(name: str) -> np.dtype[Any]:
    """The dtype of that name, also one that a port must refuse."""
    return DTYPES[name] if name in DTYPES else np.dtype(name)
