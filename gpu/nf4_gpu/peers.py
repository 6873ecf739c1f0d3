"""The other side of `nf4 bench --device cuda`: bitsandbytes; run as `python -m nf4_gpu.peers`.

It loads PyTorch, in a process of its own.
"""

import argparse
import importlib
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import cupy

from nf4_gpu.bench import BLOCK_SIZE, ROWS, Calls, Ours, Replay, activations, measure, product


class Bitsandbytes:
    """bitsandbytes' functions on PyTorch's views of the same memory, in graphs of PyTorch's."""

    def __init__(self) -> None:
        self._torch: Any = importlib.import_module("torch")
        self._bnb: Any = importlib.import_module("bitsandbytes")

    def operations(self, weights: Sequence[cupy.ndarray], double: bool) -> dict[str, Calls]:
        """Return the calls by operation; but for quantize with double quantization."""
        functional = self._bnb.functional
        tensors = [self._torch.from_dlpack(w) for w in weights]
        quantized = [self._quantize(w, double) for w in tensors]
        found: dict[str, Calls] = {
            "dequantize": [partial(functional.dequantize_4bit, *q) for q in quantized],
        }
        if not double:
            return found | {"quantize": [partial(self._quantize, w, False) for w in tensors]}
        for rows in ROWS:
            x = self._torch.from_dlpack(activations(rows, weights[0])[0])
            found[product(rows)] = [partial(self._multiply, x, *q) for q in quantized]
        return found

    def record(self, operation: str, calls: Calls) -> Replay:
        """Return the replay of a graph of the calls; quantize, which no graph records, is called."""
        cuda = self._torch.cuda
        for call in calls:
            call()
        cuda.synchronize()

        def run() -> None:
            for call in calls:
                call()

        play = run
        if operation != "quantize":
            graph = cuda.CUDAGraph()
            with cuda.graph(graph):
                run()
            play = graph.replay
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))

        def replay() -> float:
            start.record()
            play()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3 / len(calls)

        return replay

    def _quantize(self, weight: Any, double: bool) -> Any:
        return self._bnb.functional.quantize_4bit(
            weight, blocksize=BLOCK_SIZE, compress_statistics=double, quant_type="nf4"
        )

    def _multiply(self, x: Any, codes: Any, state: Any) -> Any:
        with self._torch.no_grad():
            return self._bnb.matmul_4bit(x, codes.t(), quant_state=state)


def main() -> None:
    """Print the measurements of both sides as one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m nf4_gpu.peers", description=__doc__)
    parser.add_argument("--rounds", type=int, required=True)
    rounds = parser.parse_args().rounds
    print(json.dumps(measure({"nf4": Ours(), "bitsandbytes": Bitsandbytes()}, rounds)))


if __name__ == "__main__":
    main()
