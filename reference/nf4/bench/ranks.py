"""A QLoRA training step on one rank and on all of them, in turn, in one run of mpirun."""

import gc
import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nf4.bench import machine
from nf4.bench.train import BATCH, CONFIG, RANK, TOKENS
from nf4.errors import CheckFailed
from nf4.formats.checkpoint import QuantizeOptions, load_model
from nf4.formats.peft import linear_shapes
from nf4.lora import init_lora
from nf4.model.config import LlamaConfig
from nf4.model.llama import Llama, parameter_shapes
from nf4.parallel import worker_threads
from nf4.ranks import ALONE, Ranks, program
from nf4.tensor import quantize
from nf4.train.data import IGNORE, Example
from nf4.train.engine import Engine, FastEngine
from nf4.train.exact import ExactEngine

RATE, CLIP = 1e-4, 1.0
WARM_UP, STEPS = 2, 6


@dataclass(frozen=True)
class Case:
    """What is measured: a rank's share of a step is `batch` sequences of so many tokens.

    load: reads or makes the model; engine: makes an engine of these ranks, for it and adapters of that rank.
    """

    name: str
    batch: int
    tokens: int
    rank: int
    load: Callable[[], Llama]
    engine: Callable[[Llama, Ranks], Engine]


def run(cases: Sequence[Case], ranks: Ranks, rounds: int, exact: bool) -> dict[str, Any]:
    """Measure each case in turn on rank 0 alone and on all ranks, and return the report.

    Of each: a step of all ranks' sequences on one rank, which makes as many passes; a rank's share of it, as
    a step of its own; and the step shared by all. Raises CheckFailed where an exact step has other bits on
    one rank than on all.
    """
    ranks.agree(program() | {"cases": [case.name for case in cases], "exact": exact})
    results = [_measure(case, ranks, rounds, exact) for case in cases]
    return {
        "benchmark": "ranks",
        **machine.describe(("mpi4py", "cupy-cuda13x", "cupy-cuda12x")),
        "ranks": ranks.size,
        "hosts": len(set(ranks.gather(ranks.host))),
        "threads": ranks.gather(worker_threads()),
        "exact": exact,
        "rounds": rounds,
        "results": results,
    }


def _measure(case: Case, ranks: Ranks, rounds: int, exact: bool) -> dict[str, Any]:
    base = ranks.each(case.load)
    shape = ranks.size * case.batch, case.tokens
    ids = np.random.default_rng(1).integers(0, base.config.vocab_size, shape).astype(np.int32)
    # As transformers shifts its labels: the last position predicts nothing.
    examples = [Example(row, np.append(row[1:], np.int32(IGNORE))) for row in ids]
    found: dict[str, list[dict[str, Any]]] = {"one": [], "share": [], "all": []}
    for _ in range(rounds):
        found["one"].append(ranks.first(lambda: _steps(case, base, examples, ALONE)))
        found["share"].append(ranks.first(lambda: _steps(case, base, examples[: case.batch], ALONE)))
        found["all"].append(_steps(case, base, examples, ranks))
    seconds = {
        side: statistics.median(s for one in rows for s in one["seconds"]) for side, rows in found.items()
    }
    one, shared = found["one"][0], found["all"][0]
    if exact and one["digest"] != shared["digest"]:
        raise CheckFailed(f"{case.name}: the adapter of {ranks.size} ranks has other bits than that of one")
    return {
        "case": case.name,
        "batch": list(shape),
        "trainable": one["trainable"],
        "seconds": seconds,
        "tokens_per_second": {side: shape[0] * shape[1] / seconds[side] for side in ("one", "all")},
        "speed_up": seconds["one"] / seconds["all"],
        "overhead_seconds": seconds["all"] - seconds["share"],
        "losses": {"one": one["losses"], "all": shared["losses"]},
        "same_bits": one["digest"] == shared["digest"],
    }


def _steps(case: Case, base: Llama, examples: Sequence[Example], ranks: Ranks) -> dict[str, Any]:
    """Make steps on these examples from fresh adapters; return their seconds, losses and a digest."""
    adapters = {
        name: init_lora(name, inputs, outputs, case.rank, alpha=2 * case.rank, dropout=0.0, seed=0)
        for name, (outputs, inputs) in linear_shapes(base.config).items()
    }
    engine = case.engine(Llama(base.config, base.params, adapters), ranks)
    places = range(0, len(examples), case.batch)
    step = [(examples[i : i + case.batch], range(i, i + case.batch)) for i in places]
    losses, seconds = [], []
    for _ in range(WARM_UP + STEPS):
        ranks.any(False)  # so that they begin together
        began = time.perf_counter()
        losses.append(engine.step(step, RATE).loss)
        seconds.append(time.perf_counter() - began)
    engine.store()
    total, trainable = hashlib.sha256(), 0
    for array in engine.optimizer.params.values():
        total.update(array.tobytes())
        trainable += array.size
    del engine
    gc.collect()  # and with it the memory of a GPU
    return {
        "seconds": seconds[WARM_UP:],
        "losses": losses,
        "digest": total.hexdigest(),
        "trainable": trainable,
    }


def processors(model: Path | None, exact: bool) -> list[Case]:
    """Return the case of ranks on processors: 4 x 256 a rank, of a model or SmolLM2-135M's shape."""

    def load() -> Llama:
        return random_model() if model is None else load_model(model, quantize=QuantizeOptions())

    def engine(loaded: Llama, ranks: Ranks) -> Engine:
        settings: dict[str, Any] = {
            "batch_size": BATCH, "max_grad_norm": CLIP, "weight_decay": 0.0, "checkpointing": False,
            "seed": 0, "threads": worker_threads(), "ranks": ranks,
        }  # fmt: skip
        return ExactEngine(loaded, **settings) if exact else FastEngine(loaded, "lora", **settings)

    name = "SmolLM2-135M's shape" if model is None else str(model)
    return [Case(f"{name}, {BATCH} x {TOKENS} a rank", BATCH, TOKENS, RANK, load, engine)]


def random_model() -> Llama:
    """Return a model of SmolLM2-135M's shape, N(0, 0.02), double-quantized; the same on every rank."""
    config, generator = LlamaConfig.from_dict(CONFIG, "the random model"), np.random.default_rng(0)
    params: dict[str, Any] = {}
    for name, shape in parameter_shapes(config).items():
        if len(shape) == 1:
            params[name] = np.ones(shape, np.float32)
        else:
            weights = generator.standard_normal(shape, dtype=np.float32)
            weights *= np.float32(0.02)
            params[name] = quantize(weights, double_quant=True) if "_proj" in name else weights
    return Llama(config, params)
