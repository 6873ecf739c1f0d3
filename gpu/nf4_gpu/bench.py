"""Kernel times on the GPU: medians of graph replays over buffers that the L2 cache does not hold.

The copy ceiling, our side and a peer's are measured in one process, their replays in turn.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import cupy
from cupy.cuda import runtime
from nf4.bench import machine
from nf4.floats import BFLOAT16

from nf4_gpu.blas import multiply
from nf4_gpu.product import matmul
from nf4_gpu.tensor import dequantize, quantize

SHAPES = ((8192, 28672), (4096, 14336), (4096, 4096))
BLOCK_SIZE = 64
ROWS = (1, 2, 4, 8, 16, 32, 64)
PEER_PACKAGES = ("torch", "bitsandbytes")
_SMALL, _API_CALLS = (256, 256), 200
_REPLAYED = 1 << 32  # elements of weights that a replay goes through at least

Calls = Sequence[Callable[[], object]]
"""One operation on one set of buffers each."""
Replay = Callable[[], float]
"""Runs an operation's calls on the device once, and returns the seconds of one."""


class Side(Protocol):
    """Whoever is measured."""

    def operations(self, weights: Sequence[cupy.ndarray], double: bool) -> Mapping[str, Calls]:
        """Return calls by operation for each of weights, bfloat16 [out, in]."""

    def record(self, operation: str, calls: Calls) -> Replay:
        """Return the replay of an operation's calls, in a graph."""


def run(rounds: int, against: str | None) -> dict[str, Any]:
    """Measure every operation at every shape and return the report (see `nf4 bench --device cuda --json`).

    With `against` ("bitsandbytes") it runs in a fresh process that holds both sides. Raises InputError if the
    peer isn't installed.
    """
    if against is None:
        measured = measure({"nf4": Ours()}, rounds)
    else:
        machine.require(PEER_PACKAGES, f"nf4 bench --device cuda --against {against}")
        measured = json.loads(machine.run_module("nf4_gpu.peers", ["--rounds", str(rounds)]))
    packages = ("cupy-cuda13x", "cupy-cuda12x", *(PEER_PACKAGES if against else ()))
    return {
        "benchmark": "cuda",
        **machine.describe(packages),
        "against": against,
        "block_size": BLOCK_SIZE,
        "rounds": rounds,
        **measured,
    }


def measure(sides: Mapping[str, Side], rounds: int) -> dict[str, Any]:
    """Return the GPU's name, seconds and shares of the copy's rate by shape, and what calls cost the host."""
    properties = runtime.getDeviceProperties(runtime.getDevice())
    with cupy.cuda.Stream(non_blocking=True):
        shapes = [_measure_shape(shape, sides, rounds, properties["l2CacheSize"]) for shape in SHAPES]
        calls = _measure_calls(sides)
    return {"gpu": properties["name"].decode(), "shapes": shapes, "calls": calls}


class Ours:
    """nf4_gpu, through its public functions."""

    def operations(self, weights: Sequence[cupy.ndarray], double: bool) -> dict[str, Calls]:
        """Return the calls of quantize and dequantize, and of the products if double."""
        results = [cupy.empty_like(w) for w in weights]
        tensors = [quantize(w, BLOCK_SIZE, "nf4", double) for w in weights]
        again = partial(quantize, block_size=BLOCK_SIZE, double_quant=double, check=False)
        found: dict[str, Calls] = {
            "quantize": [partial(again, w, out=q) for w, q in zip(weights, tensors, strict=True)],
            "dequantize": [partial(dequantize, q, out=y) for q, y in zip(tensors, results, strict=True)],
        }
        if double:
            for rows in ROWS:
                x, y = activations(rows, weights[0])
                found[product(rows)] = [partial(matmul, x, q, y) for q in tensors]
        return found

    def record(self, operation: str, calls: Calls) -> Replay:
        """Return the replay of a graph of the calls, captured on the current stream."""
        return record(calls)


class Unquantized:
    """The same products with the bfloat16 weights themselves, in cuBLAS."""

    def operations(self, weights: Sequence[cupy.ndarray], double: bool) -> dict[str, Calls]:
        """Return the calls of the products if double."""
        found: dict[str, Calls] = {}
        for rows in ROWS if double else ():
            x, y = activations(rows, weights[0])
            found[product(rows)] = [partial(multiply, x, w, y, transpose_b=True) for w in weights]
        return found

    def record(self, operation: str, calls: Calls) -> Replay:
        """Return the replay of a graph of the calls, captured on the current stream."""
        return record(calls)


def product(rows: int) -> str:
    """Return the name of the product with so many rows."""
    return f"x W^T, {rows} row{'s' if rows > 1 else ''}"


def activations(rows: int, weight: cupy.ndarray) -> tuple[cupy.ndarray, cupy.ndarray]:
    """Return x [rows, in], N(0, 1), and y [rows, out] for a weight [out, in], in its dtype."""
    outputs, inputs = weight.shape
    x = cupy.random.standard_normal((rows, inputs), dtype=cupy.float32).astype(weight.dtype)
    return x, cupy.empty((rows, outputs), weight.dtype)


def record(calls: Calls) -> Replay:
    """Return the replay of a graph of the calls, captured on the current stream."""
    stream = cupy.cuda.get_current_stream()
    for call in calls:
        call()
    stream.synchronize()
    stream.begin_capture()
    for call in calls:
        call()
    graph = stream.end_capture()
    start, end = cupy.cuda.Event(), cupy.cuda.Event()

    def replay() -> float:
        start.record()
        graph.launch()
        end.record()
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(start, end)) / 1e3 / len(calls)

    return replay


def medians(replays: Mapping[str, Replay], rounds: int) -> dict[str, float]:
    """Return the median seconds of each, taking turns for so many rounds after two of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in replays}
    for turn in range(rounds + 2):
        for name, replay in replays.items():
            seconds = replay()
            if turn > 1:
                times[name].append(seconds)
    return {name: statistics.median(found) for name, found in times.items()}


def _measure_calls(sides: Mapping[str, Side]) -> list[dict[str, Any]]:
    """Return the host's seconds of a call, with weights so small that the device is never waited for."""
    weights = [cupy.ones(_SMALL, BFLOAT16)]
    results = []
    for double in (False, True):
        operations = {name: side.operations(weights, double) for name, side in sides.items()}
        for operation in operations["nf4"]:
            seconds = {
                name: _call_seconds(found[operation][0])
                for name, found in operations.items()
                if operation in found
            }
            results.append({"operation": operation, "double_quant": double, "seconds": seconds})
    return results


def _call_seconds(call: Callable[[], object]) -> float:
    """Return the seconds of one of many calls in a row: the median of five runs, after five of warm-up."""
    times = []
    for _ in range(10):
        cupy.cuda.Device().synchronize()
        started = time.perf_counter()
        for _ in range(_API_CALLS):
            call()
        times.append((time.perf_counter() - started) / _API_CALLS)
    return statistics.median(times[5:])


def _measure_shape(shape: tuple[int, int], sides: Mapping[str, Side], rounds: int, l2: int) -> dict[str, Any]:
    n = math.prod(shape)
    # So many that even the codes alone are three times what the cache holds, and gone through so often that
    # the start of a graph, and what the copy left in the cache, is no part of a call.
    sets = max(3, -(-3 * l2 // (n // 2)))
    turns = -(-_REPLAYED // (n * sets))
    weights = [
        (cupy.random.standard_normal(shape, dtype=cupy.float32) * 0.02).astype(BFLOAT16) for _ in range(sets)
    ]
    copies = _copies(weights)
    copy = record([*copies] * turns)
    results = []
    for double in (False, True):
        contenders = {**sides, "cublas": Unquantized()}
        operations = {name: side.operations(weights, double) for name, side in contenders.items()}
        for operation in operations["nf4"]:
            replays = {
                name: contenders[name].record(operation, [*found[operation]] * turns)
                for name, found in operations.items()
                if operation in found
            }
            results.append(
                {
                    "operation": operation,
                    "double_quant": double,
                    "bytes": _bytes_moved(operation, n, double),
                    **_summary(medians({"copy": copy, **replays}, rounds), n, operation, double),
                }
            )
        del operations, replays
        cupy.get_default_memory_pool().free_all_blocks()
    seconds = medians({"copy": copy}, rounds)["copy"]
    return {
        "shape": list(shape),
        "buffers": sets,
        "calls_a_replay": sets * turns,
        "copy": {"seconds": seconds, "bytes_per_second": 4 * n / seconds},
        "results": results,
    }


def _copies(weights: Sequence[cupy.ndarray]) -> Calls:
    """A copy of each to memory of its own, by the runtime."""
    stream = cupy.cuda.get_current_stream().ptr
    targets = [cupy.empty_like(w) for w in weights]

    def copy(target: cupy.ndarray, source: cupy.ndarray) -> None:
        kind = runtime.memcpyDeviceToDevice
        runtime.memcpyAsync(target.data.ptr, source.data.ptr, source.nbytes, kind, stream)

    return [partial(copy, t, w) for t, w in zip(targets, weights, strict=True)]


def _bytes_moved(operation: str, n: int, double: bool) -> int:
    """What has to be read or written once: 16-bit elements, codes and absmax; of a product, the weight."""
    absmax = n // BLOCK_SIZE * (1 if double else 4)
    return n // 2 + absmax + (0 if operation.startswith("x") else 2 * n)


def _summary(seconds: Mapping[str, float], n: int, operation: str, double: bool) -> dict[str, Any]:
    """Seconds by side; the share of the copy's rate, measured in the same rounds, that is ours; ratios."""
    copy_rate = 4 * n / seconds["copy"]
    ours = seconds["nf4"]
    found: dict[str, Any] = {
        "seconds": dict(seconds),
        "of_copy": _bytes_moved(operation, n, double) / ours / copy_rate,
    }
    others: Iterable[str] = (name for name in seconds if name not in {"nf4", "copy"})
    return {**found, "ratios": {name: seconds[name] / ours for name in others}}
