"""A second, slow way to the numbers of this specification: integers and fractions, no NumPy.

Floating-point numbers are the integers that their bits spell. What a clause calls exact is computed as a
fraction and rounded where the clause rounds; what has a tolerance is computed in binary64.
"""

import math
import zlib
from collections.abc import Callable
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import NamedTuple

FORMATS = {"float32": (8, 23), "float16": (5, 10), "bfloat16": (8, 7), "float64": (11, 52)}
"""Bits of the exponent and of the significand."""

DTYPES = ("float32", "float16", "bfloat16")  # NF4-12.2
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # NF4-3.1
SIGN, INFINITY, NAN = 0x80000000, 0x7F800000, 0x7FC00000  # of a float32
SIGN_64, INFINITY_64, ONE_64 = 1 << 63, 0x7FF << 52, 0x3FF << 52  # of a float64


class RefusedError(ValueError):
    """The input is one that a clause refuses."""


# Chapter 1: numbers and their rounding


def value(bits: int, dtype: str = "float32") -> Fraction:
    """The number that finite bits stand for (NF4-1.1)."""
    exponent_bits, fraction_bits = FORMATS[dtype]
    exponent = bits >> fraction_bits & (1 << exponent_bits) - 1
    fraction = bits & (1 << fraction_bits) - 1
    assert exponent < (1 << exponent_bits) - 1, "not finite"
    if exponent:
        fraction |= 1 << fraction_bits
    if bits >> exponent_bits + fraction_bits:
        fraction = -fraction
    bias = (1 << exponent_bits - 1) - 1
    power = max(exponent, 1) - bias - fraction_bits
    return Fraction(fraction << power) if power >= 0 else Fraction(fraction, 1 << -power)


def rounded(x: Fraction, dtype: str = "float32", negative: bool | None = None) -> int:
    """The bits of x to nearest, ties to even (NF4-1.2); negative: the sign, where x may be or become zero."""
    exponent_bits, fraction_bits = FORMATS[dtype]
    sign = (x < 0 if negative is None else negative) << exponent_bits + fraction_bits
    numerator, denominator = abs(x.numerator), x.denominator
    if numerator == 0:
        return sign
    top = numerator.bit_length() - denominator.bit_length()  # floor(log2 |x|), or one more
    if numerator << max(-top, 0) < denominator << max(top, 0):
        top -= 1
    bias = (1 << exponent_bits - 1) - 1
    exponent = max(top + bias, 1)  # subnormals have that of the smallest normal number
    last = exponent - bias - fraction_bits  # the last bit is worth 2^last
    numerator, denominator = numerator << max(-last, 0), denominator << max(last, 0)
    whole, rest = divmod(numerator, denominator)
    if 2 * rest > denominator or (2 * rest == denominator and whole % 2):
        whole += 1
    # A subnormal has no hidden bit; a carry out of the significand moves into the exponent, up to infinity.
    bits = (exponent - 1 << fraction_bits) + whole
    return sign | min(bits, (1 << exponent_bits) - 1 << fraction_bits)


def magnitude(bits: int) -> int:
    return bits & ~SIGN


def is_finite(bits: int) -> bool:
    return magnitude(bits) < INFINITY


def is_nan(bits: int) -> bool:
    return magnitude(bits) > INFINITY


def order(bits: int) -> int:
    """An integer that orders like the float32; +0 and -0 are one."""
    return -magnitude(bits) if bits & SIGN else bits


def multiply(a: int, b: int) -> int:
    """RN(a * b) of float32 bits, with the sign of a zero."""
    sign = (a ^ b) & SIGN
    if is_finite(a) and is_finite(b):
        return sign | rounded(abs(value(a) * value(b)))
    if is_nan(a) or is_nan(b) or 0 in (magnitude(a), magnitude(b)):
        return NAN
    return sign | INFINITY


def add(a: int, b: int) -> int:
    """RN(a + b) of float32 bits; a zero is negative where both are."""
    if is_finite(a) and is_finite(b):
        total = value(a) + value(b)
        return rounded(total) if total else a & b & SIGN
    infinities = {x for x in (a, b) if magnitude(x) == INFINITY}
    return NAN if is_nan(a) or is_nan(b) or len(infinities) == 2 else infinities.pop()


def subtract(a: int, b: int) -> int:
    """RN(a - b) of float32 bits."""
    return add(a, b ^ SIGN)


def divide(a: int, b: int) -> int:
    """RN(a / b) of float32 bits."""
    sign = (a ^ b) & SIGN
    if is_nan(a) or is_nan(b):
        return NAN
    if is_finite(a) and is_finite(b) and magnitude(b):
        return sign | rounded(abs(value(a) / value(b)))
    if is_finite(a) != is_finite(b):
        return sign | (0 if is_finite(a) else INFINITY)
    return sign | INFINITY if magnitude(a) and is_finite(a) else NAN  # x / 0; 0 / 0 and infinity / infinity


def root(x: Fraction, dtype: str) -> int:
    """The bits of the square root of x >= 0, to nearest, ties to even."""
    shift = 200 + max(0, x.denominator.bit_length() - x.numerator.bit_length())  # that many bits, to be safe
    scaled = (x.numerator << 2 * shift) // x.denominator
    whole = math.isqrt(scaled)
    exact = whole * whole * x.denominator == x.numerator << 2 * shift
    # Between whole and whole + 1 there is neither a number of the dtype nor a tie: any point between will do.
    return rounded(Fraction(2 * whole + (not exact), 2 << shift), dtype)


def square_root(bits: int) -> int:
    """RN of the square root of float32 bits."""
    if is_nan(bits) or (bits & SIGN and magnitude(bits)):
        return NAN
    return root(value(bits), "float32") if is_finite(bits) and magnitude(bits) else bits


def rn64(x: Fraction) -> Fraction:
    """RN64 of NF4-1.6."""
    return value(rounded(x, "float64"), "float64")


def number(bits: int, dtype: str) -> float:
    """Finite bits as a Python float, which is a binary64; exact."""
    return float(value(bits, dtype))


# Chapter 2: codebooks


def _table(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


CODEBOOKS = {  # NF4-2.1
    "nf4": _table(
        "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000"
        " 3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
    ),
    "fp4": [rounded(Fraction(k, 12)) for k in map(Fraction, ("0", "1/16", *map(str, (8, 12, 4, 6, 2, 3))))],
    "fp4-e2m1": [rounded(Fraction(k) / 6) for k in (0, 0.5, 1, 1.5, 2, 3, 4, 6)],
    "int4": [rounded(Fraction(min(code - 7, 7), 7)) for code in range(16)],
}
CODEBOOKS["fp4"] += [bits and bits | SIGN for bits in CODEBOOKS["fp4"]]  # the second zero is +0 too
CODEBOOKS["fp4-e2m1"] += [bits | SIGN for bits in CODEBOOKS["fp4-e2m1"]]


def midpoints(values: list[int]) -> list[int]:
    """RN of the midpoints of ascending float32 values (NF4-2.2)."""
    return [rounded((value(a) + value(b)) / 2) for a, b in pairwise(values)]


def ranks_of(table: list[int]) -> tuple[list[int], list[int]]:
    """The thresholds of a codebook, and the code of each rank (NF4-2.2)."""
    lowest: dict[Fraction, int] = {}
    for code, bits in enumerate(table):
        lowest.setdefault(value(bits), code)
    codes = [lowest[v] for v in sorted(lowest)]
    return midpoints([table[code] for code in codes]), codes


def codebook(name: str) -> list[int]:
    """The values of a codebook by its name."""
    if name not in CODEBOOKS:
        raise RefusedError(f"there is no codebook {name!r} (NF4-2.1)")
    return CODEBOOKS[name]


# Chapter 3: encode


def lift_of(absmax: int) -> int:
    """What NF4-3.3 multiplies by first: 2^64 where the reciprocal would be infinite, else 1."""
    return rounded(Fraction(2**64 if value(absmax) <= Fraction(1, 2**128) else 1))


def reciprocal_of(absmax: int) -> int:
    """RN of 1 over the lifted absmax (NF4-3.3); 0 for a zero block (NF4-3.4)."""
    lifted = multiply(absmax, lift_of(absmax))
    return divide(rounded(Fraction(1)), lifted) if lifted else 0


def scale(x: list[int], block_size: int) -> tuple[list[int], list[int], list[int]]:
    """absmax and reciprocal by block, s by element, of float32 bits (NF4-3.1, NF4-3.2, NF4-3.3, NF4-3.4)."""
    scales, reciprocals, s = [], [], []
    for start in range(0, len(x), block_size):
        block = x[start : start + block_size]
        absmax = max(magnitude(bits) for bits in block)
        lift, reciprocal = lift_of(absmax), reciprocal_of(absmax)
        s += [multiply(multiply(bits, lift), reciprocal) for bits in block]
        scales.append(absmax)
        reciprocals.append(reciprocal)
    return scales, reciprocals, s


def ranks(s: list[int], thresholds: list[int]) -> list[int]:
    """How many thresholds are strictly below each s (NF4-3.5)."""
    limits = [order(t) for t in thresholds]
    return [sum(limit < key for limit in limits) for key in map(order, s)]


def encode(x: list[int], block_size: int, table: list[int]) -> tuple[list[int], list[int]]:
    """Codes, one an element, and absmax bits of float32 bits x (chapter 3)."""
    thresholds, of_rank = ranks_of(table)
    absmax, _, s = scale(x, block_size)
    return [of_rank[rank] for rank in ranks(s, thresholds)], absmax


# Chapter 4: decode


def decode(codes: list[int], scales: list[int], block_size: int, table: list[int], dtype: str) -> list[int]:
    """Bits of the decoded values in dtype (chapter 4)."""
    return [narrow(product, dtype) for product in products(codes, scales, block_size, table)]


def products(codes: list[int], scales: list[int], block_size: int, table: list[int]) -> list[int]:
    """RN(v * a) of NF4-4.1."""
    return [multiply(table[code], scales[i // block_size]) for i, code in enumerate(codes)]


# Chapter 5: packing and layout


def pack(codes: list[int], table: list[int]) -> bytes:
    """Two codes a byte, the first high, padded with the code of 0 (NF4-5.1, NF4-5.2)."""
    thresholds, of_rank = ranks_of(table)
    pad = of_rank[sum(value(t) < 0 for t in thresholds)]
    if len(codes) % 2:
        codes = [*codes, pad]
    return bytes(16 * first + second for first, second in zip(codes[::2], codes[1::2], strict=True))


def unpack(packed: bytes, n: int) -> list[int]:
    return [nibble for byte in packed for nibble in (byte // 16, byte % 16)][:n]


def blocks_of(n: int, block_size: int) -> int:
    return -(-n // block_size)


def storage(elements: int, block_size: int, double_quant: bool) -> int:
    """Bytes of a quantized tensor (NF4-5.4)."""
    check_block_size(block_size)
    blocks = blocks_of(elements, block_size)
    scales = blocks + 4 * blocks_of(blocks, 256) + 4 if double_quant else 4 * blocks
    return blocks_of(elements, 2) + scales


# Chapter 6: double quantization

_UPPER = """
    3513a3b7 365a1a94 370205ff 37b24206 38378034 388aefb3 38ba1f4b 3923d70b 398ce705 39c7e282
    3a016f00 3a1eecc1 3a3c6a80 3a59e83e 3a7765ff 3aa7ef9d 3af1a9fc 3b1db22d 3b428f5c 3b676c8a
    3b8624dd 3b989374 3bab020d 3bbd70a4 3bcfdf3c 3be24dd3 3bf4bc6a 3c039581 3c0ccccd 3c160418
    3c1f3b64 3c3ae148 3c68f5c3 3c8b851f 3ca28f5c 3cb9999a 3cd0a3d7 3ce7ae13 3cfeb852 3d0ae147
    3d166667 3d21eb85 3d2d70a3 3d38f5c2 3d447ae1 3d500000 3d5b8520 3d670a3d 3d728f5d 3d7e147b
    3d84cccd 3d8a8f5d 3d9051eb 3d96147b 3d9bd70b 3da1999a 3da75c2a 3dad1eb8 3db2e148 3db8a3d7
    3dbe6667 3dc428f7 3dc9eb85 3ddb3334 3df80000 3e0a6666 3e18cccd 3e273333 3e359999 3e440000
    3e526666 3e60cccd 3e6f3333 3e7d9999 3e860000 3e8d3333 3e946666 3e9b999a 3ea2cccc 3eaa0000
    3eb13332 3eb86666 3ebf999a 3ec6cccc 3ece0000 3ed53332 3edc6666 3ee39999 3eeacccc 3ef20000
    3ef93332 3f003333 3f03cccd 3f076666 3f0b0000 3f0e999a 3f123333 3f15cccd 3f196667 3f1d0000
    3f20999a 3f243333 3f27cccd 3f2b6667 3f2f0000 3f32999a 3f363333 3f39cccd 3f3d6667 3f410000
    3f44999a 3f483333 3f4bcccd 3f4f6666 3f530000 3f56999a 3f5a3333 3f5dcccd 3f616666 3f650000
    3f68999a 3f6c3333 3f6fcccd 3f736666 3f770000 3f7a999a 3f7e3333
"""
DYNAMIC_MAP = [
    *(SIGN | bits for bits in reversed(_table(_UPPER))),
    0,
    *_table(_UPPER),
    rounded(Fraction(1)),
]  # NF4-6.2


def mean(x: list[int]) -> int:
    """RN of the exact mean (NF4-6.1)."""
    return rounded(sum((value(bits) for bits in x), Fraction(0)) / len(x)) if x else 0


def encode_nested(absmax: list[int], table: list[int]) -> tuple[list[int], list[int], int]:
    """8-bit codes, their absmax and the offset (NF4-6.1, NF4-6.2, NF4-6.3)."""
    offset = mean(absmax)
    codes, scales = encode(centred(absmax, offset), 256, table)
    return codes, scales, offset


def centred(absmax: list[int], offset: int) -> list[int]:
    """r of NF4-6.3."""
    return [subtract(a, offset) for a in absmax]


def decode_nested(codes: list[int], scales: list[int], offset: int, table: list[int]) -> list[int]:
    """absmax bits (NF4-6.4)."""
    return [add(product, offset) for product in products(codes, scales, 256, table)]


# Chapter 7: float16 and bfloat16


def widen(bits: int, dtype: str) -> int:
    """The float32 that is this number (NF4-7.1)."""
    exponent_bits, fraction_bits = FORMATS[dtype]
    if dtype == "float32":
        return bits
    sign = (bits >> exponent_bits + fraction_bits) << 31
    exponent = bits >> fraction_bits & (1 << exponent_bits) - 1
    if exponent == (1 << exponent_bits) - 1:
        return sign | (NAN if bits & (1 << fraction_bits) - 1 else INFINITY)
    return sign | rounded(abs(value(bits, dtype)))


def narrow(bits: int, dtype: str) -> int:
    """A float32 rounded to dtype (NF4-7.2, NF4-7.3)."""
    if dtype == "float32":
        return bits
    exponent_bits, fraction_bits = FORMATS[dtype]
    sign = bits >> 31 << exponent_bits + fraction_bits
    infinity = (1 << exponent_bits) - 1 << fraction_bits
    if is_nan(bits):
        return sign | infinity | 1 << fraction_bits - 1
    return sign | (rounded(abs(value(bits)), dtype) if is_finite(bits) else infinity)


# Chapter 12: what is refused


def check_dtype(dtype: str, among: tuple[str, ...] = DTYPES) -> None:
    if dtype not in among:
        raise RefusedError(f"dtype {dtype} is not one of {', '.join(among)} (NF4-12.2)")


def check_block_size(block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise RefusedError(f"block size {block_size} is not one of {BLOCK_SIZES} (NF4-12.3)")


def check_finite(what: str, x: list[int]) -> None:
    for i, bits in enumerate(x):
        if not is_finite(bits):
            raise RefusedError(f"{what} {i} is {bits:08x}: not finite (NF4-12.1, NF4-12.5)")


def counted(shape: list[int]) -> int:
    """The number of elements of a shape."""
    if any(size < 0 for size in shape):
        raise RefusedError(f"shape {shape} has a negative size (NF4-1.4)")
    return math.prod(shape)


def whole(number: int) -> int:
    """A size, a count or an index (NF4-1.4)."""
    if number < 0:
        raise RefusedError(f"{number} is negative (NF4-1.4)")
    return number


def check_sequences(lengths: list[int]) -> None:
    if not lengths or min(lengths) < 1:
        raise RefusedError(f"sequences of {lengths} rows (NF4-9.2, NF4-15.1, NF4-15.2)")


def check_count(what: str, found: int, expected: int) -> None:
    if found != expected:
        raise RefusedError(f"{what}: {found} where {expected} belong (NF4-12.5)")


# The whole of quantizing and of dequantizing


def quantize(x: list[int], dtype: str, block_size: int, name: str) -> tuple[bytes, list[int]]:
    """Packed codes and absmax of an array, its bits being those of dtype (chapters 3 and 5)."""
    check_dtype(dtype)
    check_block_size(block_size)
    table = codebook(name)
    wide = [widen(bits, dtype) for bits in x]
    check_finite("element", wide)
    codes, absmax = encode(wide, block_size, table)
    return pack(codes, table), absmax


def dequantize(packed: bytes, absmax: list[int], n: int, dtype: str, block_size: int, name: str) -> list[int]:
    """The n decoded elements, bits of dtype (chapter 4)."""
    check_dtype(dtype)
    check_block_size(block_size)
    check_count("codes", len(packed), blocks_of(n, 2))
    check_count("absmax", len(absmax), blocks_of(n, block_size))
    check_finite("absmax of block", absmax)
    return decode(unpack(packed, n), absmax, block_size, codebook(name), dtype)


def encode_absmax(absmax: list[int]) -> tuple[list[int], list[int], int]:
    """The 8-bit form of absmax: codes, nested absmax and offset (chapter 6, NF4-6.6)."""
    check_finite("absmax of block", absmax)
    for i, bits in enumerate(absmax):
        if order(bits) < 0:
            raise RefusedError(f"absmax of block {i} is {bits:08x}: negative (NF4-6.6)")
    nested = encode_nested(absmax, DYNAMIC_MAP)
    check_finite("decoded absmax of block", decode_nested(*nested, DYNAMIC_MAP))
    return nested


def decode_absmax(codes: list[int], scales: list[int], offset: int, table: list[int]) -> list[int]:
    """absmax from its 8-bit form (NF4-6.4)."""
    check_count("map", len(table), 256)
    check_count("nested absmax", len(scales), blocks_of(len(codes), 256))
    absmax = decode_nested(codes, scales, offset, table)
    check_finite("decoded absmax of block", absmax)
    return absmax


# Chapter 11: random numbers

UNIFORM, DROPOUT, PERMUTATION = 0, 1, 2


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Four words of four words and a key of two (NF4-11.1)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p, q = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = q >> 32 ^ c1 ^ k0, q % 2**32, p >> 32 ^ c3 ^ k1, p % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def check_blocks(blocks: int) -> int:
    if blocks > 2**32:
        raise RefusedError(f"a draw has {blocks} blocks, it must have 2^32 at most (NF4-11.2)")
    return blocks


def block(i: int, seed: int, stream: int, sample: int, purpose: int) -> list[int]:
    """Block i of a draw (NF4-11.2)."""
    return philox([i, sample % 2**32, stream, purpose], [seed % 2**32, seed // 2**32])


def stream_of(name: str) -> int:
    """The stream of a named module (NF4-11.2)."""
    return zlib.crc32(name.encode("utf-8"))


def uniform(seed: int, stream: int, sample: int, n: int) -> list[Fraction]:
    """n numbers from 0 to below 1 (NF4-11.3)."""
    words = [
        word for i in range(check_blocks(blocks_of(n, 4))) for word in block(i, seed, stream, sample, UNIFORM)
    ]
    return [Fraction(word // 256, 2**24) for word in words[:n]]


def drop_threshold(p: float) -> int:
    """h: lanes below it are dropped (NF4-11.4)."""
    if not 0 <= p < 1:
        raise RefusedError(f"p is {p}, it must be at least 0 and below 1 (NF4-11.4)")
    return min(round(65536 * p), 65535)  # the product is exact; round takes a tie to the even integer


def keep_mask(seed: int, stream: int, sample: int, n: int, p: float) -> list[bool]:
    """Which of n elements are kept (NF4-11.4)."""
    threshold = drop_threshold(p)
    words = [
        word for i in range(check_blocks(blocks_of(n, 8))) for word in block(i, seed, stream, sample, DROPOUT)
    ]
    lanes = [half for word in words for half in (word % 2**16, word // 2**16)]
    return [lane >= threshold for lane in lanes[:n]]


def permutation(seed: int, epoch: int, n: int) -> list[int]:
    """The order of n things in an epoch (NF4-11.5)."""
    check_blocks(blocks_of(n, 2))
    return [j for _, j in sorted((value, j) for j, value in enumerate(draws(seed, epoch, n)))]


def draws(seed: int, epoch: int, n: int) -> list[int]:
    """The 64-bit values that a permutation sorts (NF4-11.5)."""
    values = []
    for j in range(n):
        words = block(j // 2, seed, 0, epoch, PERMUTATION)
        low, high = words[:2] if j % 2 == 0 else words[2:]
        values.append(low + 2**32 * high)
    return values


# Chapter 9: the LoRA linear layer


class Adapter(NamedTuple):
    """NF4-9.1: A [rank][in] and B [out][rank] widened, with what the forward pass does to them."""

    A: list[list[float]]
    B: list[list[float]]
    scale: float
    dropped: list[list[bool]]  # [T][in]
    keep: float  # 1 - q, the share that the lanes keep


def check_positive(what: str, count: int) -> None:
    if count < 1:
        raise RefusedError(f"{what} is {count}, it must be at least 1")


def adapter_scale(rank: int, alpha: float, rslora: bool) -> float:
    """s of NF4-9.1."""
    check_positive("rank", rank)
    if not math.isfinite(alpha):
        raise RefusedError(f"alpha is {alpha}, not finite (NF4-9.1)")
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def init_adapter(seed: int, name: str, in_features: int, rank: int, dtype: str) -> list[int]:
    """A of a new adapter, row by row (NF4-9.3)."""
    check_dtype(dtype, ("float32", "bfloat16"))
    check_positive("rank", rank)
    check_positive("in_features", in_features)
    bound = rounded(rn64(1 / value(root(Fraction(in_features), "float64"), "float64")))
    drawn = [
        rounded((2 * u - 1) * value(bound)) for u in uniform(seed, stream_of(name), 0, rank * in_features)
    ]
    return [narrow(bits, dtype) for bits in drawn]


def dropped_elements(
    seed: int, stream: int, lengths: list[int], samples: list[int], features: int, p: float
) -> list[list[bool]]:
    """[T][in], True where D sets 0: the rows of each sequence count from its own start (NF4-9.4)."""
    rows = []
    check_sequences(lengths)
    for length, sample in zip(lengths, map(whole, samples), strict=True):
        kept = keep_mask(seed, stream, sample, length * features, p)
        rows += [[not keep for keep in kept[t * features : (t + 1) * features]] for t in range(length)]
    return rows


Matrix = list[list[float]]


def matmul(a: Matrix, b: Matrix) -> Matrix:
    columns = transposed(b)
    return [[math.fsum(x * y for x, y in zip(row, column, strict=True)) for column in columns] for row in a]


def transposed(a: Matrix) -> Matrix:
    return [list(column) for column in zip(*a, strict=True)]


def scaled(factor: float, a: Matrix) -> Matrix:
    return [[factor * x for x in row] for row in a]


def summed(a: Matrix, b: Matrix) -> Matrix:
    return [[x + y for x, y in zip(first, second, strict=True)] for first, second in zip(a, b, strict=True)]


def dropout(x: Matrix, adapter: Adapter) -> Matrix:
    """D of NF4-9.4."""
    return [
        [0.0 if drop else element / adapter.keep for element, drop in zip(row, drops, strict=True)]
        for row, drops in zip(x, adapter.dropped, strict=True)
    ]


def lora_forward(x: Matrix, weight: Matrix, bias: list[float], adapter: Adapter) -> Matrix:
    """Y [T][out] (NF4-9.2)."""
    z = matmul(dropout(x, adapter), transposed(adapter.A))
    y = summed(matmul(x, transposed(weight)), scaled(adapter.scale, matmul(z, transposed(adapter.B))))
    return [[element + b for element, b in zip(row, bias, strict=True)] for row in y]


def lora_backward(dout: Matrix, x: Matrix, weight: Matrix, adapter: Adapter) -> tuple[Matrix, Matrix, Matrix]:
    """dX, dA and dB (NF4-9.5)."""
    kept = dropout(x, adapter)
    z = matmul(kept, transposed(adapter.A))
    dz = scaled(adapter.scale, matmul(dout, adapter.B))
    dx = summed(matmul(dout, weight), dropout(matmul(dz, adapter.A), adapter))
    return dx, matmul(transposed(dz), kept), scaled(adapter.scale, matmul(transposed(dout), z))


def merge(weight: Matrix, a: Matrix, b: Matrix, scale: float) -> Matrix:
    """W + scale (B A) before it is rounded to the dtype of W (NF4-8.8)."""
    return summed(weight, scaled(scale, matmul(b, a)))


# Chapter 10: AdamW and the training step


class Rates(NamedTuple):
    """The binary64 bits that an update has (NF4-10.2)."""

    lr: int
    beta1: int
    beta2: int
    eps: int
    weight_decay: int


class Scalars(NamedTuple):
    """The float32 bits of NF4-10.3."""

    step: int
    root: int
    decay: int
    rest1: int
    beta2: int
    rest2: int
    eps: int


def scalars(rates: Rates, updates: int, dimensions: int) -> Scalars:
    """What an update needs after `updates` before it (NF4-10.2, NF4-10.3)."""

    def power(beta: Fraction) -> Fraction:
        *_, last = accumulate([beta] * updates, lambda product, b: rn64(product * b), initial=beta)
        return last

    for name, bits in zip(rates._fields, rates, strict=True):
        limit = ONE_64 if name.startswith("beta") else INFINITY_64
        if bits != SIGN_64 and bits >= limit:  # with the sign set, or a NaN, it is greater still
            raise RefusedError(f"{name} has the bits {bits:016x}, out of its range (NF4-10.2)")
    lr, beta1, beta2, eps, weight_decay = (value(bits, "float64") for bits in rates)
    decay = 1 - rn64(lr * weight_decay) if dimensions >= 2 else Fraction(1)
    return Scalars(
        step=rounded(rn64(lr / rn64(1 - power(beta1)))),
        root=rounded(value(root(rn64(1 - power(beta2)), "float64"), "float64")),
        decay=rounded(rn64(decay)),
        rest1=rounded(rn64(1 - beta1)),
        beta2=rounded(beta2),
        rest2=rounded(rn64(1 - beta2)),
        eps=rounded(eps),
    )


class Updated(NamedTuple):
    """One element after an update, with d and u of NF4-10.4."""

    p: int
    m: int
    v: int
    d: int
    u: int


def update(c: Scalars, p: int, g: int, m: int, v: int) -> Updated:
    """One element after an update (NF4-10.4)."""
    m = add(m, multiply(c.rest1, subtract(g, m)))
    v = add(multiply(c.beta2, v), multiply(c.rest2, multiply(g, g)))
    d = add(divide(square_root(v), c.root), c.eps)
    u = multiply(c.step, divide(m, d))
    return Updated(subtract(multiply(c.decay, p), u), m, v, d, u)


def adamw(
    c: Scalars, dtype: str, p: list[int], g: list[int], m: list[int], v: list[int]
) -> tuple[list[int], list[int], list[int]]:
    """p, m and v after an update (NF4-10.1, NF4-10.5)."""
    check_dtype(dtype, ("float32", "bfloat16"))
    after = updates(c, dtype, p, g, m, v)
    return [narrow(x.p, dtype) for x in after], [x.m for x in after], [x.v for x in after]


def updates(c: Scalars, dtype: str, p: list[int], g: list[int], m: list[int], v: list[int]) -> list[Updated]:
    """Every element after an update, p in float32."""
    return [update(c, widen(p_, dtype), *states) for p_, *states in zip(p, g, m, v, strict=True)]


SCHEDULES: dict[str, Callable[[int, int, int], float]] = {
    "constant": lambda i, n, w: 1.0,
    "linear": lambda i, n, w: max(0.0, (n - i) / max(1, n - w)),
    "cosine": lambda i, n, w: max(0.0, (1 + math.cos(math.pi * (i - w) / max(1, n - w))) / 2),
}


def learning_rate(step: int, steps: int, warmup: int, schedule: str, lr: float) -> float:
    """The rate of step i of n after w steps of warm-up (NF4-10.6)."""
    if schedule not in SCHEDULES:
        raise RefusedError(f"schedule {schedule!r} is not one of {', '.join(SCHEDULES)} (NF4-10.6)")
    return lr * (step / warmup if step < warmup else SCHEDULES[schedule](step, steps, warmup))


def clip(gradients: dict[str, list[int]], max_norm: float) -> tuple[float, dict[str, list[int]]]:
    """The norm of float32 gradients, and the gradients clipped (NF4-10.7)."""
    if not max_norm >= 0:
        raise RefusedError(f"max_norm is {max_norm}, it must be at least 0 (NF4-10.7)")
    for name, gradient in gradients.items():
        check_finite(f"element of {name!r}", gradient)
    squares = [value(bits) ** 2 for name in sorted(gradients) for bits in gradients[name]]
    norm = number(root(sum(squares, Fraction(0)), "float64"), "float64")
    factor = max_norm / (norm + 1e-6)
    if max_norm == 0 or factor >= 1:
        return norm, gradients
    c = rounded(Fraction(factor))
    return norm, {name: [multiply(g, c) for g in gradient] for name, gradient in gradients.items()}


def example_order(
    seed: int, examples: int, first: int, count: int, batch: int, lengths: list[int] | None
) -> list[int]:
    """The examples that the sequences from first on take (NF4-10.8)."""
    check_positive("the number of examples", examples)
    epochs: dict[int, list[int]] = {}

    def epoch(e: int) -> list[int]:
        order = permutation(seed, e, examples)
        if lengths is None:
            return order
        runs = [order[start : start + 50 * batch] for start in range(0, examples, 50 * batch)]
        return [i for run in runs for i in sorted(run, key=lambda i: -lengths[i])]  # sorted keeps ties

    out = []
    for n in range(first, first + count):
        if n // examples not in epochs:
            epochs[n // examples] = epoch(n // examples)
        out.append(epochs[n // examples][n % examples])
    return out


def held_out(seed: int, examples: int) -> list[int]:
    """The examples held out (NF4-10.8)."""
    if examples < 2:
        raise RefusedError(f"{examples} examples cannot be split (NF4-10.8)")
    return permutation(seed, 2**32 - 1, examples)[: max(1, examples // 10)]


def loss(logits: Matrix, targets: list[int]) -> tuple[float, Matrix]:
    """The mean cross-entropy over the rows that have a target, and its gradient (NF4-10.9)."""
    count = sum(target != -100 for target in targets)
    check_positive("the number of target tokens", count)
    if any(
        target != -100 and not 0 <= target < len(row) for row, target in zip(logits, targets, strict=True)
    ):
        raise RefusedError(f"a target of {targets} is not in the vocabulary (NF4-10.9)")
    total, gradient = 0.0, []
    for row, target in zip(logits, targets, strict=True):
        if target == -100:
            gradient.append([0.0] * len(row))
            continue
        top = max(row)
        powers = [math.exp(x - top) for x in row]
        norm = math.fsum(powers)
        total += math.log(norm) - (row[target] - top)
        gradient.append([(power / norm - (i == target)) / count for i, power in enumerate(powers)])
    return total / count, gradient


def init_matrix(seed: int, name: str, n: int) -> list[float]:
    """A matrix of n elements drawn from nothing (NF4-10.10)."""
    half = blocks_of(n, 2)
    u = [float(x) for x in uniform(seed, stream_of(name), 0, 2 * half)]
    radius = [0.02 * math.sqrt(-2 * math.log(1 - x)) for x in u[:half]]
    angle = [2 * math.pi * x for x in u[half:]]
    pairs = list(zip(radius, angle, strict=True))
    return ([r * math.cos(a) for r, a in pairs] + [r * math.sin(a) for r, a in pairs])[:n]
