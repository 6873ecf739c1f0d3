"""Measures exp and log on every float32 against float64: python tests/exact/exhaustive.py (minutes).

NF4-14.5 and NF4-14.6 state what it prints; test_elementary.py keeps the worst inputs.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from nf4.exact import elementary
from numpy.typing import NDArray

STEP = 1 << 22


def bits(first: float, last: float) -> Iterator[NDArray[np.float32]]:
    """Every float32 from first to last, two of one sign, in pieces."""
    start, stop = (int(np.float32(x).view(np.uint32)) for x in (first, last))
    for low in range(start, stop + 1, STEP):
        yield np.arange(low, min(low + STEP, stop + 1), dtype=np.uint32).view(np.float32)


def measure(
    mine: Callable[[Any], Any], true: Callable[[Any], Any], pieces: Iterator[NDArray[np.float32]]
) -> None:
    """Print the largest error in ulp of the result, where it is, and how many results are not the nearest."""
    worst, where, count, wrong = 0.0, np.float32(0), 0, 0
    for x in pieces:
        y, r = mine(x), true(x.astype(np.float64))
        nearest = r.astype(np.float32)
        ulp = np.spacing(np.minimum(np.abs(nearest), np.float32(3e38))).astype(np.float64)
        error = np.where(np.isfinite(y), np.abs(y - r) / ulp, 0.0)
        at = int(error.argmax())
        if error[at] > worst:
            worst, where = float(error[at]), x[at]
        count += x.size
        wrong += int(np.count_nonzero(y != nearest))
    print(f"  worst {worst:.6f} ulp at {where.view(np.uint32):08x}; {wrong} of {count} not the nearest")


if __name__ == "__main__":
    with np.errstate(all="ignore"):
        for name, low, high in (("exp, x > 0", 0.0, 90.0), ("exp, x < 0", -0.0, -105.0)):
            print(name)
            measure(elementary.exp, np.exp, bits(low, high))
        print("log")
        measure(elementary.log, np.log, bits(1e-45, np.finfo(np.float32).max))
