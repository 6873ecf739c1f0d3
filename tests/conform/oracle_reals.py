"""Real numbers as integers in units of 2^-400: logarithms, powers, roots, cosines, and pi."""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache

UNIT = 400
ONE = 1 << UNIT
DOUBT = Fraction(1, 1 << 300)  # far above what any of these functions is off by


def fixed(x: Fraction | int) -> int:
    """x in units, rounded down."""
    return math.floor(x * ONE)


def real(units: int) -> Fraction:
    """The number of so many units."""
    return Fraction(units, ONE)


def series(first: int, step: Callable[[int, int], int]) -> int:
    """The sum of terms, each made of the one before and its number, until they vanish."""
    term, total, n = first, 0, 1
    while term:
        total += term
        term = step(term, n)
        n += 1
    return total


def arctangent_of_inverse(k: int) -> int:
    total, power, n = 0, ONE // k, 1
    while power:
        total += (power if n % 4 == 1 else -power) // n
        power, n = power // (k * k), n + 2
    return total


@cache
def pi() -> int:
    return 16 * arctangent_of_inverse(5) - 4 * arctangent_of_inverse(239)


def artanh(z: int) -> int:
    square, total, power, n = z * z >> UNIT, 0, z, 1
    while power not in (0, -1):
        total += power // n
        power, n = power * square >> UNIT, n + 2
    return total


@cache
def ln(x: Fraction) -> Fraction:
    """The natural logarithm of x > 0."""
    k = x.numerator.bit_length() - x.denominator.bit_length()
    m = x / Fraction(2) ** k  # between 1/2 and 2
    return real(2 * artanh(fixed((m - 1) / (m + 1))) + k * 2 * artanh(fixed(Fraction(1, 3))))


def exp(x: Fraction) -> Fraction:
    ln_2 = ln(Fraction(2))
    k = round(x / ln_2)
    rest = fixed(x - k * ln_2)
    return real(series(ONE, lambda term, n: (term * rest >> UNIT) // n if term not in (0, -1) else 0)) * (
        Fraction(2) ** k
    )


def power(x: Fraction, y: Fraction) -> Fraction:
    return exp(y * ln(x)) if y else Fraction(1)


def root(x: Fraction) -> Fraction:
    return real(math.isqrt(fixed(x) << UNIT))


@cache
def cosine_and_sine(x: Fraction) -> tuple[Fraction, Fraction]:
    """Of x >= 0."""
    quarters, rest = divmod(fixed(x), pi() // 2)
    even = odd = 0
    term, n = ONE, 0
    while term:
        sign = 1 if n % 4 < 2 else -1
        if n % 2:
            odd += sign * term
        else:
            even += sign * term
        n += 1
        term = (term * rest >> UNIT) // n
    turned = [(even, odd), (-odd, even), (-even, -odd), (odd, -even)][quarters % 4]
    return real(turned[0]), real(turned[1])


def nearest(x: Fraction, rounded: Callable[[Fraction], int]) -> int:
    """What rounded makes of the real number that x is next to: the same on both sides of it."""
    below, above = rounded(x - abs(x) * DOUBT), rounded(x + abs(x) * DOUBT)
    assert below == above, "more digits are needed"
    return below
