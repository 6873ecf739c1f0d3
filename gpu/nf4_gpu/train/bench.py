"""QLoRA steps on the GPU, ours and transformers + PEFT + bitsandbytes': time, memory, floors.

Run as `python -m nf4_gpu.train.bench MODEL` it measures our side of one model's rows.
"""

import argparse
import gc
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import cupy
import numpy as np
from nf4.bench import machine
from nf4.bench.ranks import Case
from nf4.errors import InputError
from nf4.floats import BFLOAT16
from nf4.formats.peft import linear_shapes
from nf4.lora import LoRA, init_lora
from nf4.model.config import LlamaConfig
from nf4.model.llama import Llama
from nf4.ranks import ALONE, Ranks
from nf4.train.data import IGNORE, Example
from nf4.train.engine import Engine, MicroBatch
from numpy.typing import NDArray

from nf4_gpu import blas
from nf4_gpu.arena import Arena
from nf4_gpu.matrix import Matrix
from nf4_gpu.model.weights import shapes_of
from nf4_gpu.tensor import quantize, to_host
from nf4_gpu.train import plan as planning
from nf4_gpu.train.engine import GpuEngine, Inference, forms_of
from nf4_gpu.train.exact import ExactEngine
from nf4_gpu.train.models import CONFIGS, config_of, weights
from nf4_gpu.train.plan import Settings
from nf4_gpu.train.timeline import Timed

RANK, ALPHA, RATE, CLIP = 16, 32, 1e-4, 1.0
WARM_UP, STEPS = 3, 5
PROMPT, GENERATED = 512, 128
PEER_PACKAGES = ("torch", "bitsandbytes", "transformers", "peft", "accelerate")
GENERATION_MODEL = "8B"


@dataclass(frozen=True)
class Row:
    """One measurement, and if it has one, the row of the peer it is compared with.

    budget: bytes in which as few layers as fit are computed again; None: all are. paged: AdamW's states go
    through the least budget on the device.
    """

    model: str
    batch: int
    tokens: int
    checkpointing: bool
    budget: int | None = None
    paged: bool = False
    exact: bool = False

    @property
    def plain(self) -> str:
        """What the peer's row is called, which has no such choices."""
        return f"{self.model}, {self.batch} x {self.tokens}{', checkpointing' if self.checkpointing else ''}"

    @property
    def name(self) -> str:
        """What it is called in the report."""
        budget = "" if self.budget is None else f", layers kept within {self.budget / 2**30:.0f} GiB"
        return f"{self.plain}{budget}{', states paged' * self.paged}{', exact' * self.exact}"


ROWS = (
    Row("135M", 1, 512, False),
    Row("135M", 8, 512, False),
    Row("1.2B", 4, 1024, False),
    Row("8B", 1, 2048, True),
    Row("8B", 1, 2048, True, paged=True),
    Row("8B", 4, 2048, True),
    Row("8B", 4, 2048, True, 28 << 30),
)
EXACT = Row("135M", 8, 512, False, exact=True)
_LEAST_STATES = 64 << 20  # of a paged row


def run(against: str | None, only: str | None = None, exact: bool = False) -> dict[str, Any]:
    """Measure every row, or those of one model, and return the report of `nf4 bench train --device cuda`.

    exact: the model of the exact row alone, and that row. Each side runs in fresh processes, a model at a
    time. Raises InputError if the peer isn't installed.
    """
    if against is not None:
        machine.require(PEER_PACKAGES, f"nf4 bench train --device cuda --against {against}")
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    if only is not None and only not in CONFIGS:
        raise InputError(f"--model {only}: on cuda the models measured are {', '.join(CONFIGS)}")
    if exact and only not in (None, EXACT.model):
        raise InputError(f"--model {only} --exact: the exact mode is measured on {EXACT.model}")
    for model in CONFIGS:
        if (EXACT.model if exact else only) not in (None, model):
            continue
        extra = ["--generation"] if model == GENERATION_MODEL else []
        options = [*extra, "--exact"] if exact else extra
        ours |= json.loads(machine.run_module("nf4_gpu.train.bench", [model, *options]))
        if against is not None:
            theirs |= json.loads(machine.run_module("nf4_gpu.train.peers", [model, *extra]))
    plain = {row.name: row.plain for row in (*ROWS, EXACT)}
    results = []
    for name, found in ours.items():
        if name == "ceilings":
            continue
        if "operations" in found:
            rates = ours["ceilings"]
            kind = "float64_operations_per_second" if name == EXACT.name else "product_operations_per_second"
            by_products = found["operations"] / rates[kind]
            found["floor_seconds"] = by_products + found["bytes"] / rates["copy_bytes_per_second"]
        peer = {against: theirs.get(plain.get(name, name))} if against else {}
        results.append({"row": name, "nf4": found} | peer)
    return {
        "benchmark": "train on cuda",
        **machine.describe(("cupy-cuda13x", "cupy-cuda12x", *(PEER_PACKAGES if against else ()))),
        "gpu": gpu_name(),
        "against": against,
        "ceilings": ours["ceilings"],
        "results": results,
    }


def cases(only: str | None, exact: bool) -> list[Case]:
    """Return the cases that ranks share, a GPU each: 1.2B at 4 x 1024 a rank, and 8B at 4 x 2048.

    Raises InputError for a model of another name.
    """
    known = {row.model: row for row in ROWS if row.batch == 4 and row.name == row.plain}
    if only is not None and only not in known:
        raise InputError(f"--model {only}: ranks on cuda measure one of {', '.join(known)}")
    return [_case(row, exact) for model, row in known.items() if only in (None, model)]


def _case(row: Row, exact: bool) -> Case:
    def engine(model: Llama, ranks: Ranks) -> Engine:
        cupy.get_default_memory_pool().free_all_blocks()  # of the engine before
        if exact:
            return _exact_engine(row, model, ranks)
        settings = Settings(row.batch, row.tokens, row.checkpointing)
        return GpuEngine(model, settings, max_grad_norm=CLIP, weight_decay=0.0, seed=0, ranks=ranks)

    return Case(f"{row.name} a rank", row.batch, row.tokens, RANK, lambda: random_model(row.model), engine)


def _exact_engine(row: Row, model: Llama, ranks: Ranks = ALONE) -> ExactEngine:
    return ExactEngine(
        model,
        batch_size=row.batch,
        max_grad_norm=CLIP,
        weight_decay=0.0,
        checkpointing=row.checkpointing,
        seed=0,
        threads=1,
        ranks=ranks,
    )


def gpu_name() -> str:
    """Return what the current GPU calls itself."""
    runtime = cupy.cuda.runtime
    name: bytes = runtime.getDeviceProperties(runtime.getDevice())["name"]
    return name.decode()


def token_ids(model: str, batch: int, tokens: int) -> NDArray[np.int32]:
    """Return the token ids that both sides take."""
    generator = np.random.default_rng(1)
    return generator.integers(0, CONFIGS[model]["vocab_size"], (batch, tokens)).astype(np.int32)


def random_model(name: str) -> Llama:
    """Return a model of random weights, double-quantized NF4 in the host's memory, with fresh adapters."""
    config, params = config_of(name), {}
    for parameter, value in weights(name):
        params[parameter] = to_host(quantize(value, 64, "nf4", True)) if "_proj" in parameter else value.get()
        del value
        cupy.get_default_memory_pool().free_all_blocks()
    return Llama(config, params, _adapters(config))


def _adapters(config: LlamaConfig) -> dict[str, LoRA]:
    return {
        name: init_lora(name, inputs, outputs, RANK, ALPHA, 0.0, 0)
        for name, (outputs, inputs) in linear_shapes(config).items()
    }


def settings_of(row: Row, model: Llama) -> Settings:
    """Return a row's settings: with a budget, as many layers kept as it has room for."""
    settings = Settings(
        row.batch, row.tokens, row.checkpointing, optimizer_budget=_LEAST_STATES if row.paged else None
    )
    if row.budget is None:
        return settings
    forms = forms_of(model)
    shapes = shapes_of(model.adapters)
    for kept in range(model.config.num_hidden_layers, -1, -1):
        settings = replace(settings, kept=kept)
        arena = Arena()
        planning.make(arena, model.config, shapes, forms, settings)
        if arena.size + (64 << 20) <= row.budget:
            break
    return settings


def measure(row: Row, model: Llama) -> dict[str, Any]:
    """Return the seconds of a step, losses, memory, the floor, and the timeline of one step."""
    pool = cupy.get_default_memory_pool()
    before = pool.total_bytes()
    device = Timed()
    settings = settings_of(row, model)
    _reset(model)
    engine = GpuEngine(model, settings, max_grad_norm=CLIP, weight_decay=0.0, seed=0, device=device)
    micro_batches = _step_of(row)
    step, losses = _time_steps(engine, micro_batches)
    peak = pool.total_bytes() - before
    timeline = engine.timeline(device, micro_batches, RATE)
    return {
        "seconds": step,
        "losses": losses,
        "plan": engine.plan.use,
        "kept_layers": settings.kept if row.checkpointing else model.config.num_hidden_layers,
        "peak_bytes": peak,
        **work(model.config, row, settings.kept),
        "timeline": timeline,
    }


def measure_exact(row: Row, model: Llama) -> dict[str, Any]:
    """Return as `measure` does; the timeline is of the float64 products, by their sizes.

    The peak is what the device says is gone, as graphs have memory of their own.
    """
    memory_info = cupy.cuda.runtime.memGetInfo
    before = memory_info()[0]
    _reset(model)
    engine, micro_batches = _exact_engine(row, model), _step_of(row)
    step, losses = _time_steps(engine, micro_batches)
    peak = before - memory_info()[0]
    del engine
    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    return {
        "seconds": step,
        "losses": losses,
        "peak_bytes": peak,
        **work(model.config, row, 0),
        "timeline": _exact_products(_exact_engine(row, model), micro_batches),
    }


def _reset(model: Llama) -> None:
    for name, lora in model.adapters.items():
        fresh = init_lora(name, lora.A.shape[1], lora.B.shape[0], RANK, ALPHA, 0.0, 0)
        lora.A[:], lora.B[:] = fresh.A, fresh.B


def _step_of(row: Row) -> list[MicroBatch]:
    # As transformers shifts its labels: the last position predicts nothing.
    ids = token_ids(row.model, row.batch, row.tokens)
    examples = [Example(line, np.append(line[1:], np.int32(IGNORE))) for line in ids]
    return [(examples, list(range(row.batch)))]


def _time_steps(engine: Engine, micro_batches: Sequence[MicroBatch]) -> tuple[float, list[float]]:
    """Return the median seconds of a step, and the losses of all."""
    losses, seconds = [], []
    for _ in range(WARM_UP + STEPS):
        started = time.perf_counter()
        losses.append(engine.step(micro_batches, RATE).loss)
        cupy.cuda.runtime.deviceSynchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM_UP:]), losses


def _exact_products(engine: ExactEngine, micro_batches: Sequence[MicroBatch]) -> list[dict[str, Any]]:
    """Return count, seconds and rate of a first step's products of each size, the longest first."""
    events: list[tuple[tuple[int, ...], Any, Any]] = []
    plain = blas.multiply_float64

    def timed(a: cupy.ndarray, b: cupy.ndarray, out: cupy.ndarray) -> None:
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        plain(a, b, out)
        end.record()
        events.append(((*out.shape, a.shape[-1]), start, end))

    blas.multiply_float64 = timed
    try:
        engine.step(micro_batches, RATE)
    finally:
        blas.multiply_float64 = plain
    cupy.cuda.runtime.deviceSynchronize()
    found: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for sizes, start, end in events:
        found[sizes].append(cupy.cuda.get_elapsed_time(start, end) / 1e3)
    rows = [
        {
            "what": f"product {' x '.join(map(str, sizes))} in float64",
            "count": len(seconds),
            "seconds": sum(seconds),
            "flops": 2.0 * math.prod(sizes) * len(seconds) / sum(seconds),
        }
        for sizes, seconds in found.items()
    ]
    return sorted(rows, key=lambda row: -row["seconds"])


def work(config: LlamaConfig, row: Row, kept: int) -> dict[str, float]:
    """Return the products' operations that a step needs, and the fewest bytes of device memory it moves.

    Operations: forward, and the gradient of inputs, of every weight, the head and attention; what
    checkpointing computes again; the adapters. Bytes: the weights' codes once a direction, and of each
    layer's vectors of a token what is written and read by the operations between products, once.
    """
    tokens, depth = row.batch * row.tokens, config.num_hidden_layers
    shapes = [shape for name, shape in linear_shapes(config).items() if ".layers.0." in name]
    linear = sum(outputs * inputs for outputs, inputs in shapes)
    down = config.hidden_size * config.intermediate_size
    again = depth - min(kept, depth) if row.checkpointing else 0
    width = config.num_attention_heads * config.head_dim
    attention = 4 * width * row.tokens / 2
    operations = depth * (4 * linear + 3.5 * attention) + again * (2 * (linear - down) + attention)
    operations += 4 * config.vocab_size * config.hidden_size
    operations += depth * 6 * RANK * sum(outputs + inputs for outputs, inputs in shapes)
    codes = depth * linear * (0.5 + 1 / 64) * (2 + again / depth)
    keys = 2 * config.num_key_value_heads * config.head_dim
    vectors = 14 * config.hidden_size + 6 * (2 * width + keys) + 8 * config.intermediate_size
    return {"operations": operations * tokens, "bytes": codes + 2.0 * tokens * depth * vectors}


def ceilings(exact: bool = False) -> dict[str, float]:
    """Return this GPU's rates: of a copy, bytes read and written a second; of bfloat16, float64 products."""
    device = Timed()
    size = 2 << 30
    first, second = device.allocate(size), device.allocate(size)
    n = 8192
    values = cupy.random.standard_normal((3 * n, n), dtype=cupy.float32).astype(BFLOAT16)
    a, b, c = (Matrix(values.data.ptr + i * n * n * 2, n, n, n, BFLOAT16) for i in range(3))

    def once() -> None:
        for _ in range(5):
            device.copy(first, second, size)
            device.multiply(a, b, c, transpose_b=True)

    once()
    rows = {row["what"]: row for row in device.measured(once)}
    copy, product = rows["copy"], rows[f"product {n} x {n} x {n}"]
    found = {
        "copy_bytes_per_second": 2 * size * copy["count"] / copy["seconds"],
        "product_operations_per_second": product["flops"],
    }
    return found | ({"float64_operations_per_second": _float64_rate()} if exact else {})


def _float64_rate(n: int = 4096) -> float:
    a, b, out = (cupy.random.standard_normal((n, n)) for _ in range(3))
    seconds = []
    for _ in range(6):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        blas.multiply_float64(a, b, out)
        end.record()
        end.synchronize()
        seconds.append(cupy.cuda.get_elapsed_time(start, end) / 1e3)
    return float(2 * n**3 / statistics.median(seconds[1:]))


def generate(model: Llama) -> dict[str, Any]:
    """Return the tokens a second of a greedy continuation, after the first, and the timeline of one token."""
    device = Timed()
    settings = Settings(1, PROMPT, positions=PROMPT + GENERATED, training=False)
    decoder = Inference(model, settings, device=device, decode=True).decoder
    assert decoder is not None
    ids = token_ids(GENERATION_MODEL, 1, PROMPT)[0]
    rate = 0.0
    for _ in range(2):
        tokens = decoder.likeliest(ids.tolist(), GENERATED)
        next(tokens)
        started = time.perf_counter()
        count = sum(1 for _ in tokens)
        rate = count / (time.perf_counter() - started)
    return {
        "tokens_per_second": rate,
        "bytes": decoder.bytes_read(),
        "timeline": decoder.timeline(device),
    }


def main() -> None:
    """Print the figures of one model's rows, by their names, and the GPU's ceilings, as one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m nf4_gpu.train.bench", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--generation", action="store_true")
    parser.add_argument("--exact", action="store_true")
    options = parser.parse_args()
    found: dict[str, Any] = {"ceilings": ceilings(options.exact)}
    gc.collect()
    model = random_model(options.model)
    for row in ROWS:
        if row.model == options.model:
            cupy.get_default_memory_pool().free_all_blocks()
            found[row.name] = measure(row, model)
            gc.collect()
    if options.exact:
        cupy.get_default_memory_pool().free_all_blocks()
        found[EXACT.name] = measure_exact(EXACT, model)
        gc.collect()
    if options.generation:
        cupy.get_default_memory_pool().free_all_blocks()
        found["generation"] = generate(model)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
