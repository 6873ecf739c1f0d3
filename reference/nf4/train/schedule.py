"""Learning-rate schedules: constant, linear and cosine, each after a linear warm-up."""

from decimal import Decimal, localcontext
from fractions import Fraction

from nf4.errors import InputError
from nf4.reals import CONTEXT, cosine

SCHEDULES = ("constant", "linear", "cosine")

# Rational cosines of fractions of a turn, by denominator: a rate of them may lie midway between two float64.
_RATIONAL = {1: Fraction(1), 2: Fraction(-1), 3: Fraction(-1, 2), 4: Fraction(0), 6: Fraction(1, 2)}


def learning_rate(step: int, *, steps: int, lr: float, schedule: str = "constant", warmup: int = 0) -> float:
    """Return the learning rate of a step, counted from 0, out of steps. NF4-10.6

    The rates are those of transformers' schedules of the same names: over the warm-up the rate is
    lr·step/warmup (so the first step of a warm-up moves nothing), then it stays, falls in a straight line to
    0, or falls along half a cosine to 0; each is the float64 nearest to the real number (NF4-15.8).
    Raises InputError for a schedule of another name.
    """
    if schedule not in SCHEDULES:
        raise InputError(f"schedule {schedule!r} is not known: it is one of {', '.join(SCHEDULES)}")
    peak = Fraction(lr)
    if step < warmup:
        return float(peak * Fraction(step, warmup))
    if schedule == "constant":
        return lr
    after = max(1, steps - warmup)
    if schedule == "linear":
        return float(peak * max(Fraction(0), Fraction(steps - step, after)))
    turns = Fraction(step - warmup, 2 * after) % 1
    if turns.denominator in _RATIONAL:
        return float(peak * (1 + _RATIONAL[turns.denominator]) / 2)
    with localcontext(CONTEXT):
        return float(Decimal(lr) * (1 + cosine(Decimal(turns.numerator) / turns.denominator)) / 2)
