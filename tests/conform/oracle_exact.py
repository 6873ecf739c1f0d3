"""Chapter 14 in integers and fractions: what oracle.py is for the other chapters. float32 are their bits."""

import math
from fractions import Fraction

from oracle import (
    INFINITY,
    NAN,
    SIGN,
    RefusedError,
    add,
    check_finite,
    divide,
    is_nan,
    magnitude,
    multiply,
    order,
    rn64,
    root,
    rounded,
    subtract,
    value,
)

Rows = list[list[int]]

ONE = 0x3F800000
LOG2_E, LN_2 = (
    Fraction(float.fromhex("0x1.71547652b82fep+0")),
    Fraction(float.fromhex("0x1.62e42fefa39efp-1")),
)
EXP = [
    Fraction(float.fromhex(f"0x1.{text}"))
    for text in (
        *(
            "62e42ff0e191bp-1",
            "ebfbe07786d64p-3",
            "c6b08ac069726p-5",
            "3b29f39d8a1c5p-7",
            "5d8a86032650bp-10",
        ),
        *("445c83de9f053p-13", "fde5f7c280a5dp-17"),
    )
]
LOG = [
    Fraction(float.fromhex(f"0x1.{text}"))
    for text in ("555554fda11eep-1", "999a7a84d63d3p-2", "2438d8d9ccdfep-2", "e2f639984fc29p-3")
]


def units_of(x: list[Fraction], bits: int) -> tuple[list[int], Fraction]:
    """x in units of bits below the power of two above the largest, and the unit (NF4-14.2, NF4-14.4)."""
    top = max(map(abs, x), default=Fraction(0))
    if top == 0:
        return [0] * len(x), Fraction(1)
    e = top.numerator.bit_length() - top.denominator.bit_length() - 1
    while Fraction(2) ** e <= top:
        e += 1
    unit = Fraction(2) ** (e - bits)
    return [round(v / unit) for v in x], unit  # half to even


def on_grid(x: list[Fraction], bits: int) -> list[Fraction]:
    """x on its grid (NF4-14.2, NF4-14.4)."""
    units, unit = units_of(x, bits)
    assert sum(map(abs, units)) <= 2**53 or bits != 41
    return [n * unit for n in units]


def bits_of_product(k: int) -> int:
    """q of NF4-14.2: the ceiling of log2 K is the least power that reaches K."""
    power = next(n for n in range(64) if 2**n >= k)
    return min(24, (53 - power) // 2)


def pieces_of(row: list[int]) -> list[list[int]]:
    """A row of an operand in pieces of 4096 (NF4-14.2); one without elements is one piece."""
    return [row[i : i + 4096] for i in range(0, max(len(row), 1), 4096)]


def gridded(rows: Rows) -> list[list[Fraction]]:
    """Rows of an operand on their grids (NF4-14.2)."""
    for row in rows:
        check_finite("operand", row)
    return [
        [
            x
            for piece in pieces_of(row)
            for x in on_grid([value(x) for x in piece], bits_of_product(len(piece)))
        ]
        for row in rows
    ]


def product(a: Rows, columns: Rows) -> Rows:
    """NF4-14.3: columns are those of B."""
    units = []
    for rows in (a, columns):
        for row in rows:
            check_finite("operand", row)
        units.append(
            [
                [units_of([value(x) for x in piece], bits_of_product(len(piece))) for piece in pieces_of(row)]
                for row in rows
            ]
        )

    def element(row: list[tuple[list[int], Fraction]], column: list[tuple[list[int], Fraction]]) -> int:
        sums = [
            sum(x * y for x, y in zip(left, right, strict=True)) * unit * other
            for (left, unit), (right, other) in zip(row, column, strict=True)
        ]
        return add(rounded(summed(sums) if len(sums) > 1 else Fraction(sums[0])), 0)

    return [[element(row, column) for column in units[1]] for row in units[0]]


def summed(terms: list[Fraction]) -> Fraction:
    """NF4-14.4."""
    pieces = [terms[i : i + 4096] for i in range(0, len(terms), 4096)]
    sums = [sum(on_grid(piece, 41), Fraction(0)) for piece in pieces]
    assert all(rn64(s) == s for s in sums)
    return summed(sums) if len(sums) > 1 else sum(sums, Fraction(0))


def sum_of(x: list[int], y: list[int]) -> Fraction:
    """The sum of products of float32 (NF4-14.4)."""
    check_finite("term", x)
    check_finite("term", y)
    return summed([value(a) * value(b) for a, b in zip(x, y, strict=True)])


def exp(bits: int) -> int:
    """NF4-14.5."""
    if is_nan(bits):
        return NAN
    infinite = -104 if bits & SIGN else 89
    x = (
        Fraction(infinite)
        if magnitude(bits) == INFINITY
        else min(max(value(bits), Fraction(-104)), Fraction(89))
    )
    t = rn64(x * LOG2_E)
    k = round(t)
    f = t - k
    p = Fraction(0)
    for c in reversed(EXP):
        p = rn64(rn64(p + c) * f)
    return rounded(rn64(p + 1) * Fraction(2) ** k)


def log(bits: int) -> int:
    """NF4-14.6."""
    if is_nan(bits) or order(bits) < 0:
        return NAN
    if magnitude(bits) in (0, INFINITY):
        return INFINITY if magnitude(bits) else SIGN | INFINITY
    m, k = value(bits), 0
    while m * m >= 2:
        m, k = m / 2, k + 1
    while m * m < Fraction(1, 2):
        m, k = m * 2, k - 1
    f = m - 1
    s = rn64(f / rn64(m + 1))
    z = rn64(s * s)
    p = Fraction(0)
    for c in reversed(LOG):
        p = rn64(rn64(p + c) * z)
    return rounded(rn64(rn64(rn64(p + 2) * s) + rn64(k * LN_2)))


def negative(bits: int) -> int:
    return bits ^ SIGN


def sigmoid(g: int) -> int:
    """w of NF4-14.7."""
    return divide(ONE, add(ONE, exp(negative(g))))


def swiglu(g: int, u: int) -> int:
    """NF4-14.7."""
    return multiply(multiply(g, sigmoid(g)), u)


def swiglu_backward(d: int, g: int, u: int) -> tuple[int, int]:
    """dg and du of NF4-14.7."""
    w = sigmoid(g)
    a = multiply(g, w)
    slope = multiply(add(subtract(g, a), ONE), w)
    return multiply(multiply(slope, d), u), multiply(d, a)


def powers(z: list[int]) -> tuple[list[int], int, int]:
    """E, N and t of a row (NF4-14.8)."""
    if any(is_nan(x) for x in z) or not z:
        raise RefusedError("a row has a NaN, or nothing (NF4-14.8)")
    top = max(z, key=order)
    check_finite("greatest", [top])
    e = [exp(subtract(x, top)) for x in z]
    return e, rounded(sum_of_terms(e)), top


def sum_of_terms(x: list[int]) -> Fraction:
    return sum_of(x, [ONE] * len(x))


def softmax(z: list[int]) -> list[int]:
    """NF4-14.8."""
    e, norm, _ = powers(z)
    return [divide(x, norm) for x in e]


def softmax_backward(d: list[int], p: list[int]) -> list[int]:
    """NF4-14.8."""
    c = rounded(sum_of(p, d))
    return [multiply(x, subtract(y, c)) for x, y in zip(p, d, strict=True)]


def rms_norm(x: list[int], weight: list[int], eps: float) -> tuple[list[int], int]:
    """y and r of NF4-14.9."""
    if not 0 < eps < math.inf:
        raise RefusedError(f"eps is {eps} (NF4-14.9)")
    mean = rn64(rn64(sum_of(x, x) / len(x)) + Fraction(eps))
    r = rounded(rn64(1 / value(root(mean, "float64"), "float64")))
    return [multiply(multiply(a, r), w) for a, w in zip(x, weight, strict=True)], r


def rms_norm_backward(d: list[int], x: list[int], weight: list[int], r: int) -> list[int]:
    """NF4-14.9."""
    h = [multiply(a, w) for a, w in zip(d, weight, strict=True)]
    scaled = rn64(rn64(sum_of(h, x) * value(r)) * value(r))
    b = rounded(rn64(scaled / len(x)))
    return [multiply(subtract(a, multiply(own, b)), r) for a, own in zip(h, x, strict=True)]


def cross_entropy(logits: Rows, targets: list[int]) -> tuple[list[int], Fraction, Rows]:
    """The losses of rows, that of the step, and the gradient (NF4-14.10)."""
    count = sum(target != -100 for target in targets)
    if not count or any(t != -100 and not 0 <= t < len(z) for z, t in zip(logits, targets, strict=True)):
        raise RefusedError(f"targets {targets} (NF4-10.9)")
    s = rounded(rn64(Fraction(1, count)))
    losses, gradient = [], []
    for z, target in zip(logits, targets, strict=True):
        if target == -100:
            losses.append(0)
            gradient.append([0] * len(z))
            continue
        e, norm, top = powers(z)
        losses.append(subtract(log(norm), subtract(z[target], top)))
        row = [multiply(x, divide(s, norm)) for x in e]
        row[target] = subtract(row[target], s)
        gradient.append(row)
    return losses, rn64(sum_of_terms(losses) / count), gradient


def rotate(x: list[int], cos: list[int], sin: list[int], inverse: bool) -> list[int]:
    """A head's row (NF4-14.11)."""
    h = len(cos)
    if inverse:
        sin = [negative(s) for s in sin]
    first = [
        subtract(multiply(a, c), multiply(b, s)) for a, b, c, s in zip(x[:h], x[h:], cos, sin, strict=True)
    ]
    second = [add(multiply(b, c), multiply(a, s)) for a, b, c, s in zip(x[:h], x[h:], cos, sin, strict=True)]
    return first + second
