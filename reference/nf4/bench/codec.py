"""Speed of quantize and dequantize, ours and a peer's in alternating rounds of one process."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

import nf4
from nf4.bench import machine

SHAPE = (4096, 4096)
BLOCK_SIZE = 64
PEER_PACKAGES = ("torch", "bitsandbytes")

Contenders = Mapping[str, Callable[[], object]]
"""Operation name -> a call that performs it once and allocates its own result."""


def run(rounds: int, against: str | None) -> dict[str, Any]:
    """Measure the four operations and return the report (see `nf4 bench --json`).

    With `against` ("bitsandbytes") the rounds run in a fresh process that holds both sides, since loading
    PyTorch belongs in no process of ours. Raises InputError if the peer isn't installed.
    """
    if against is None:
        timings = measure({"nf4": our_operations(random_weights())}, rounds)
    else:
        machine.require(PEER_PACKAGES, f"nf4 bench codec --against {against}")
        timings = json.loads(machine.run_module("nf4.bench.peers", ["codec", "--rounds", str(rounds)]))
    return {
        "benchmark": "codec",
        **machine.describe(PEER_PACKAGES if against else ()),
        "against": against,
        "shape": list(SHAPE),
        "block_size": BLOCK_SIZE,
        "rounds": rounds,
        "results": [summary(operation, seconds) for operation, seconds in timings.items()],
    }


def random_weights() -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the measured array: float32 [4096, 4096], N(0, 1), the same on every run."""
    return np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)


def our_operations(x: np.ndarray[Any, np.dtype[np.float32]]) -> Contenders:
    """Return our side of each operation on x [rows, columns], through the public functions."""
    plain = nf4.quantize(x, BLOCK_SIZE)
    double = nf4.quantize(x, BLOCK_SIZE, double_quant=True)
    return {
        "quantize float32": lambda: nf4.quantize(x, BLOCK_SIZE),
        "quantize float32, double": lambda: nf4.quantize(x, BLOCK_SIZE, double_quant=True),
        "dequantize to float32": lambda: nf4.dequantize(plain, np.float32),
        "dequantize to float32, double": lambda: nf4.dequantize(double, np.float32),
        "dequantize to bfloat16": lambda: nf4.dequantize(plain, ml_dtypes.bfloat16),
        "dequantize to bfloat16, double": lambda: nf4.dequantize(double, ml_dtypes.bfloat16),
    }


def measure(sides: Mapping[str, Contenders], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Time every operation of every side, in seconds: {operation: {side: [one time a round]}}.

    One round of warm-up an operation is thrown away; the sides take turns, and who goes first alternates,
    so that a machine that slows down slows both.
    """
    names = list(sides)
    operations = list(sides[names[0]])
    times: dict[str, dict[str, list[float]]] = {op: {name: [] for name in names} for op in operations}
    for operation in operations:
        for turn in range(rounds + 1):
            for name in names if turn % 2 else reversed(names):
                time.sleep(0.002)  # the other side's idle threads stop spinning
                started = time.perf_counter()
                result = sides[name][operation]()
                elapsed = time.perf_counter() - started
                del result  # freed outside the clock, before the other side allocates
                if turn > 0:
                    times[operation][name].append(elapsed)
    return times


def summary(operation: str, seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    """Return medians, elements per second and, with two sides, ours over the peer's."""
    elements = SHAPE[0] * SHAPE[1]
    result: dict[str, Any] = {"operation": operation}
    for side, times in seconds.items():
        median = statistics.median(times)
        result[side] = {"seconds": median, "elements_per_second": elements / median}
    peers = [side for side in seconds if side != "nf4"]
    if peers:
        result["speed_ratio"] = result[peers[0]]["seconds"] / result["nf4"]["seconds"]
    return result
