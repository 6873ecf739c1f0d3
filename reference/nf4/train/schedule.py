"""Learning-rate schedules: constant, linear and cosine, each after a linear warm-up."""

import math

from nf4.errors import InputError

SCHEDULES = ("constant", "linear", "cosine")


def learning_rate(step: int, *, steps: int, lr: float, schedule: str = "constant", warmup: int = 0) -> float:
    """Return the learning rate of a step, counted from 0, out of steps. NF4-10.6

    The rates are those of transformers' schedules of the same names: over the warm-up the rate is
    lr·step/warmup (so the first step of a warm-up moves nothing), then it stays, falls in a straight line to
    0, or falls along half a cosine to 0. Raises InputError for a schedule of another name.
    """
    if schedule not in SCHEDULES:
        raise InputError(f"schedule {schedule!r} is not known: it is one of {', '.join(SCHEDULES)}")
    if step < warmup:
        return lr * (step / warmup)
    if schedule == "constant":
        return lr
    after = max(1, steps - warmup)
    if schedule == "linear":
        return lr * max(0.0, (steps - step) / after)
    return lr * max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / after))))
