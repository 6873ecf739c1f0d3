"""Real numbers to sixty digits, for what is defined by them: no bit of a float64 of one is in doubt."""

from decimal import Context, Decimal, localcontext

CONTEXT = Context(prec=60)
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628621")


def cosine(turns: Decimal) -> Decimal:
    """cos(2 pi turns), exactly 0 and 1 in magnitude where it is."""
    with localcontext(CONTEXT):
        part = abs(turns) % 1
        part = min(part, 1 - part)  # of half a turn
        negative = part > Decimal("0.25")
        part = min(part, Decimal("0.5") - part)
        if part == Decimal("0.25"):
            return Decimal(0)
        x = 2 * PI * part
        term = total = Decimal(1)
        k = 0
        while abs(term) > Decimal("1e-60"):
            k += 2
            term *= -x * x / (k * (k - 1))
            total += term
        return -total if negative else total
