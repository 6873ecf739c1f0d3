"""A second, slow way to the numbers of chapters 1 to 7: integers and fractions, no NumPy."""

from fractions import Fraction
from itertools import pairwise

FORMATS = {"float32": (8, 23), "float16": (5, 10), "bfloat16": (8, 7)}  # bits of exponent, of significand


def value(bits: int, dtype: str = "float32") -> Fraction:
    """The number that finite bits stand for."""
    exponent_bits, fraction_bits = FORMATS[dtype]
    exponent = bits >> fraction_bits & (1 << exponent_bits) - 1
    fraction = bits & (1 << fraction_bits) - 1
    assert exponent < (1 << exponent_bits) - 1, "not finite"
    if exponent:
        fraction |= 1 << fraction_bits
    bias = (1 << exponent_bits - 1) - 1
    magnitude = fraction * Fraction(2) ** (max(exponent, 1) - bias - fraction_bits)
    return -magnitude if bits >> exponent_bits + fraction_bits else magnitude


def rounded(x: Fraction, dtype: str = "float32", negative: bool | None = None) -> int:
    """The bits of x to nearest, ties to even; negative gives the sign where x may be or become zero."""
    exponent_bits, fraction_bits = FORMATS[dtype]
    sign = (x < 0 if negative is None else negative) << exponent_bits + fraction_bits
    x = abs(x)
    if x == 0:
        return sign
    bias = (1 << exponent_bits - 1) - 1
    # The biased exponent, guessed one too low at least and then raised; subnormals have that of the smallest.
    exponent = max(1, bias + x.numerator.bit_length() - x.denominator.bit_length() - 2)
    while exponent < 2 * bias and _at_least_power_of_two(x, exponent + 1 - bias):
        exponent += 1
    last = exponent - bias - fraction_bits  # the last bit is worth 2^last
    numerator, denominator = x.numerator << max(-last, 0), x.denominator << max(last, 0)
    whole, rest = divmod(numerator, denominator)
    if 2 * rest > denominator or (2 * rest == denominator and whole % 2):
        whole += 1
    # A subnormal has no hidden bit; a carry out of the significand moves into the exponent, up to infinity.
    bits = (exponent - 1 << fraction_bits) + whole
    return sign | min(bits, (1 << exponent_bits) - 1 << fraction_bits)


def _at_least_power_of_two(x: Fraction, power: int) -> bool:
    return x.numerator << max(-power, 0) >= x.denominator << max(power, 0)


def sign_of(bits: int) -> int:
    return bits >> 31


def multiply(a: int, b: int) -> int:
    """RN(a * b) of float32 bits, with the sign of a zero."""
    return rounded(abs(value(a) * value(b)), negative=bool(sign_of(a) ^ sign_of(b)))


def add(a: int, b: int) -> int:
    """RN(a + b) of float32 bits."""
    both_negative = bool(sign_of(a) and sign_of(b))
    total = value(a) + value(b)
    return rounded(total, negative=both_negative if total == 0 else None)


def midpoints(values: list[int]) -> list[int]:
    """RN of the midpoints of ascending float32 values."""
    return [rounded((value(a) + value(b)) / 2) for a, b in pairwise(values)]


def ranks_of(table: list[int]) -> tuple[list[int], list[int]]:
    """The thresholds of a codebook, and the code of each rank."""
    lowest: dict[Fraction, int] = {}
    for code, bits in enumerate(table):
        lowest.setdefault(value(bits), code)
    codes = [lowest[v] for v in sorted(lowest)]
    return midpoints([table[code] for code in codes]), codes


def scale(x: int, absmax: int) -> Fraction:
    """s of NF4-3.3 and NF4-3.4."""
    if value(absmax) == 0:
        return Fraction(0)
    lift = Fraction(2) ** 64 if value(absmax) <= Fraction(1, 2**128) else Fraction(1)
    reciprocal = rounded(1 / (value(absmax) * lift))
    return value(rounded(value(x) * lift * value(reciprocal)))


def encode(x: list[int], block_size: int, table: list[int]) -> tuple[list[int], list[int]]:
    """Codes, one an element, and absmax bits of float32 bits x (chapter 3)."""
    thresholds, of_rank = ranks_of(table)
    limits = [value(t) for t in thresholds]
    codes, scales = [], []
    for start in range(0, len(x), block_size):
        block = x[start : start + block_size]
        absmax = max(bits & 0x7FFFFFFF for bits in block)
        scales.append(absmax)
        for bits in block:
            s = scale(bits, absmax)
            codes.append(of_rank[sum(limit < s for limit in limits)])
    return codes, scales


def pack(codes: list[int], table: list[int]) -> bytes:
    """Two codes a byte, the first high, padded with the code of 0 (chapter 5)."""
    thresholds, of_rank = ranks_of(table)
    pad = of_rank[sum(value(t) < 0 for t in thresholds)]
    if len(codes) % 2:
        codes = [*codes, pad]
    return bytes(16 * first + second for first, second in zip(codes[::2], codes[1::2], strict=True))


def unpack(packed: bytes, n: int) -> list[int]:
    return [nibble for byte in packed for nibble in (byte // 16, byte % 16)][:n]


def decode(codes: list[int], scales: list[int], block_size: int, table: list[int], dtype: str) -> list[int]:
    """Bits of the decoded values in dtype (chapter 4)."""
    out = []
    for i, code in enumerate(codes):
        product = multiply(table[code], scales[i // block_size])
        out.append(rounded(abs(value(product)), dtype, negative=bool(sign_of(product))))
    return out


def mean(x: list[int]) -> int:
    """RN of the exact mean (NF4-6.1)."""
    return rounded(sum((value(bits) for bits in x), Fraction(0)) / len(x)) if x else 0


def encode_nested(absmax: list[int], table: list[int]) -> tuple[list[int], list[int], int]:
    """8-bit codes, their absmax and the offset (NF4-6.1 to NF4-6.3)."""
    offset = mean(absmax)
    centred = [add(a, offset ^ 0x80000000) for a in absmax]
    codes, scales = encode(centred, 256, table)
    return codes, scales, offset


def decode_nested(codes: list[int], scales: list[int], offset: int, table: list[int]) -> list[int]:
    """absmax bits (NF4-6.4)."""
    return [add(multiply(table[code], scales[i // 256]), offset) for i, code in enumerate(codes)]
