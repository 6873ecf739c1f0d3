"""The memory of inference and of training, part by part, from a model's shape alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from nf4.formats.checkpoint import LINEAR_WEIGHT
from nf4.model.config import LlamaConfig
from nf4.model.llama import TARGETS, parameter_shapes
from nf4.model.ops import HEAD_ELEMENTS

UNQUANTIZED, NF4, DOUBLE = "16 bits", "NF4", "NF4, double"
FORMS = (UNQUANTIZED, NF4, DOUBLE)
"""How the linear weights are kept; on a CPU, which computes in float32, the first takes 32 bits."""

WEIGHTS, CONSTANTS, REST = "linear weights", "constants of the blocks", "embeddings, norms, head"
ADAPTERS, GRADIENTS, STATES = "adapters", "their gradients", "states of AdamW"
ACTIVATIONS, CACHE, WORK, RUNTIME = "activations kept", "keys and values", "work space", "program"

_NESTED_BLOCK = 256
_SCORES = 1 << 17  # attention's scores that exist at a time (nf4.model.attention)
_QUERIES = 32


@dataclass(frozen=True)
class Engine:
    """Where a model runs, and what that costs, in bytes.

    compute: of an activation, and of a value of the embeddings, the norms and the head; runtime: what the
    process holds without a model; trainer: what training adds to it; token: of the tokenizer for each entry
    of the vocabulary.
    """

    name: str
    compute: int
    runtime: int
    trainer: int = 0
    token: int = 0


CPU = Engine("cpu", compute=4, runtime=60_000_000, trainer=40_000_000, token=500)
"""`nf4 finetune` and `nf4 generate`. The last three sizes are measured: Python, NumPy, what a run imports."""

CUDA = Engine("cuda", compute=2, runtime=500_000_000)
"""The package's own trainer on one GPU, in bfloat16. The runtime, the context of CUDA, is an estimate."""

_LOGITS_BYTES = 512 << 20  # on the GPU, where they share memory with a layer's weights as written out
_APART_BYTES = 64 << 20  # gradients of keys and values by query head, up to which few heads keep them apart
_STATES_BUDGET = 64 << 20  # of AdamW's states, the others in the host's memory
_PROCESSORS = 132  # of the GPU
_SUMS_BYTES = 2 * 17_301_504  # sums of the adapters' products in parts, on two streams
_SWIGLU_COLUMNS, _SWIGLU_RANK = 256, 16  # of a block whose sums are kept until all are there; up to what rank


@dataclass(frozen=True)
class Run:
    """What is run: a training step of batch_size x seq_len tokens, and inference of `context` tokens.

    adapter: bytes of a value of the adapters; source: of a linear weight before quantization; threads are
    the CPU's.
    """

    batch_size: int = 4
    seq_len: int = 256
    rank: int = 8
    adapter: int = 4
    block_size: int = 64
    context: int = 2048
    source: int = 2
    threads: int = 2


Parts = dict[str, int]


@dataclass(frozen=True)
class _Shape:
    """The sizes that memory depends on."""

    hidden: int
    inner: int
    query: int  # heads x head_dim
    key: int
    heads: int
    layers: int
    vocabulary: int
    linear: tuple[int, ...]  # elements of each linear weight
    rest: int  # elements of everything else
    lookup: int  # of them those of an embedding that is not the head too

    @classmethod
    def of(cls, config: LlamaConfig) -> "_Shape":
        shapes = parameter_shapes(config)
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        linear = tuple(n for name, n in sizes.items() if LINEAR_WEIGHT.fullmatch(name))
        return cls(
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
            config.num_attention_heads,
            config.num_hidden_layers,
            config.vocab_size,
            linear,
            sum(sizes.values()) - sum(linear),
            0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size,
        )

    def adapter(self, rank: int) -> int:
        """The elements of an adapter on every linear layer."""
        pairs = {
            "q_proj": (self.query, self.hidden), "k_proj": (self.key, self.hidden),
            "v_proj": (self.key, self.hidden), "o_proj": (self.hidden, self.query),
            "gate_proj": (self.inner, self.hidden), "up_proj": (self.inner, self.hidden),
            "down_proj": (self.hidden, self.inner),
        }  # fmt: skip
        return self.layers * rank * sum(sum(pairs[target]) for target in TARGETS)


def parameter_count(config: LlamaConfig) -> int:
    """The number of parameters of a model."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def inference(config: LlamaConfig, engine: Engine, run: Run, form: str) -> Parts:
    """The peak of one sequence of run.context tokens, read at once and gone on from, in bytes by part."""
    s, size = _Shape.of(config), engine.compute
    tokens = min(run.context, config.max_position_embeddings)
    layer = 2 * s.query + 2 * s.key + 6 * s.hidden + 3 * s.inner
    work = tokens * (layer + max(s.query, s.hidden)) + 2 * tokens * s.query
    work += 2 * min(_SCORES, _QUERIES * s.heads * tokens)
    return {
        **_base(s, engine, run, form),
        CACHE: 2 * s.layers * s.key * tokens * size,
        WORK: work * size + _written(s, engine, run, form),
        RUNTIME: engine.runtime + engine.token * s.vocabulary,
    }


def training(config: LlamaConfig, engine: Engine, run: Run, form: str, checkpointing: bool) -> Parts:
    """The peak of a training step with adapters on all linear layers, in bytes by part."""
    s = _Shape.of(config)
    adapter = s.adapter(run.rank)
    step = _cpu_step if engine is CPU else _cuda_step
    groups, activations, work = step(s, engine, run, form, checkpointing)
    return {
        **_base(s, engine, run, form),
        ADAPTERS: adapter * run.adapter,
        GRADIENTS: groups * adapter * 4,
        STATES: adapter * 8,
        ACTIVATIONS: activations,
        WORK: work,
        RUNTIME: engine.runtime + engine.trainer + engine.token * s.vocabulary,
    }


def _cpu_step(s: _Shape, engine: Engine, run: Run, form: str, checkpointing: bool) -> tuple[int, int, int]:
    """How many gradients there are, and the bytes of activations and of work space (nf4.model.llama).

    The batch is split into groups of sequences, one a thread, each of which holds all of: what backward
    needs of its own tokens, its work space, and its gradients.
    """
    groups = min(run.threads, run.batch_size)
    tokens = -(-run.batch_size // groups) * run.seq_len  # in the largest group

    # Kept of a layer: its input, q, k, v, attention's output, the residual in the middle, gate and up;
    # 1 / rms twice, the softmax's denominators, seven products of the adapters.
    kept = 2 * s.query + 2 * s.key + 2 * s.hidden + 2 * s.inner
    small = 2 + s.heads + 7 * run.rank
    if checkpointing:
        activations = tokens * (s.layers * s.hidden + kept - s.hidden + small)
    else:
        # Evaluation has one more layer's worth, which is then kept.
        activations = tokens * (s.layers * (kept + small) + kept + s.hidden)

    # Buffers that layers share, gradients on the way down, the tables of the rotation, scores, logits.
    widest = max(s.inner, s.query, s.hidden)
    work = tokens * (s.hidden + s.inner + 2 * widest)
    work += tokens * (s.inner + 5 * s.hidden + 4 * s.query + 2 * s.key)
    work += 2 * min(_SCORES, _QUERIES * s.heads * run.seq_len)
    chunks = max(1, -(-tokens * s.vocabulary // HEAD_ELEMENTS))
    work += -(-tokens // chunks) * s.vocabulary
    size = engine.compute
    return groups, groups * activations * size, groups * (work * size + _written(s, engine, run, form))


def _cuda_step(s: _Shape, engine: Engine, run: Run, form: str, checkpointing: bool) -> tuple[int, int, int]:
    """The same on the GPU: the whole batch at once, and every buffer laid out before the first step."""
    tokens = run.batch_size * run.seq_len
    # q, k and v; attention's output; the residual in the middle; gate and up; in float32 1 / rms twice and
    # the softmax's denominators. Each layer's input and its products with the adapters are kept in any case.
    kept = (2 * s.query + 2 * s.key + s.hidden + 2 * s.inner) * engine.compute + 4 * (2 + s.heads)
    layers = 1 if checkpointing else s.layers
    activations = tokens * (layers * kept + s.layers * (s.hidden + 7 * run.rank) * engine.compute)
    # A norm's output, that of SwiGLU, two gradients of a layer's output; what attention's backward sums up.
    work = tokens * ((3 * s.hidden + s.inner) * engine.compute + 4 * s.heads)
    apart = 4 * tokens * s.query
    key_heads = s.heads * s.key // s.query
    few = (tokens // 128 + run.batch_size + 1) * key_heads < 2 * _PROCESSORS
    work += 2 * apart if few and apart <= _APART_BYTES and s.key < s.query else 0
    if run.rank <= _SWIGLU_RANK:
        slot, blocks = -(-run.rank // 8) * 8, -(-s.inner // _SWIGLU_COLUMNS)
        parts = max(1, min(2 * _PROCESSORS // blocks, tokens // 64))
        work += 4 * (2 * slot * blocks * tokens + 3 * slot * parts * s.inner)
    logits = min(_LOGITS_BYTES, tokens * s.vocabulary * engine.compute)
    return 1, activations, work + max(logits, _written(s, engine, run, form)) + _SUMS_BYTES


def stored(config: LlamaConfig, run: Run, form: str) -> int:
    """The bytes of the model's file: linear weights in that form, embeddings, norms and head in 16 bits."""
    s = _Shape.of(config)
    return sum(_linear(s, CUDA, run, form)) + s.rest * CUDA.compute


def _base(s: _Shape, engine: Engine, run: Run, form: str) -> Parts:
    # The rows of an embedding that is not the head come from the host's memory, where the GPU computes.
    rest = (s.rest if engine is CPU else s.rest - s.lookup) * engine.compute
    weights, constants = _linear(s, engine, run, form)
    return {WEIGHTS: weights, CONSTANTS: constants, REST: rest}


def _linear(s: _Shape, engine: Engine, run: Run, form: str) -> tuple[int, int]:
    """The bytes of the linear weights, and of the constants of their blocks (NF4-5.4)."""
    if form == UNQUANTIZED:
        return sum(s.linear) * engine.compute, 0
    constants = 0
    for n in s.linear:
        blocks = -(-n // run.block_size)
        constants += blocks + 4 * -(-blocks // _NESTED_BLOCK) + 4 if form == DOUBLE else 4 * blocks
    return sum(-(-n // 2) for n in s.linear), constants


def _written(s: _Shape, engine: Engine, run: Run, form: str) -> int:
    """The bytes that weights are written out in: on the CPU the largest, decoded, in the dtype it had and in
    that of computing; on the GPU those of a layer, with its adapters beside them."""
    if engine is not CPU:
        return sum(s.linear) // s.layers * engine.compute
    if form == UNQUANTIZED:
        return 0
    return max(s.linear) * (engine.compute + (run.source if run.source != engine.compute else 0))


def total(parts: Parts) -> int:
    """What all parts take."""
    return sum(parts.values())


def longest_sequence(config: LlamaConfig, run: Run, gpu: float) -> int:
    """The most tokens of one sequence, in steps of 64, that the card trains in double-quantized NF4 with
    checkpointing; 0 if not even 64, and at most the model's positions."""

    def fits(tokens: int) -> bool:
        one = replace(run, batch_size=1, seq_len=tokens)
        return holds(gpu, training(config, CUDA, one, DOUBLE, checkpointing=True))

    low, high = 0, config.max_position_embeddings // 64
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(64 * middle) else (low, middle - 1)
    return 64 * low


# Shapes of published models: hidden, inner, layers, heads, key-value heads, vocabulary, tied head.
_FAMILY: dict[str, tuple[str, tuple[int, int, int, int, int, int, bool]]] = {
    "135M": ("SmolLM2 135M", (576, 1536, 30, 9, 3, 49152, True)),
    "360M": ("SmolLM2 360M", (960, 2560, 32, 15, 5, 49152, True)),
    "1B": ("Llama 3.2 1B", (2048, 8192, 16, 32, 8, 128256, True)),
    "1.7B": ("SmolLM2 1.7B", (2048, 8192, 24, 32, 32, 49152, True)),
    "3B": ("Llama 3.2 3B", (3072, 8192, 28, 24, 8, 128256, True)),
    "7B": ("LLaMA 7B", (4096, 11008, 32, 32, 32, 32000, False)),
    "8B": ("Llama 3 8B", (4096, 14336, 32, 32, 8, 128256, False)),
    "13B": ("LLaMA 13B", (5120, 13824, 40, 40, 40, 32000, False)),
    "33B": ("LLaMA 33B", (6656, 17920, 60, 52, 52, 32000, False)),
    "65B": ("LLaMA 65B", (8192, 22016, 80, 64, 64, 32000, False)),
    "70B": ("Llama 2 70B", (8192, 28672, 80, 64, 8, 32000, False)),
    "405B": ("Llama 3.1 405B", (16384, 53248, 126, 128, 8, 128256, False)),
}
_NEAR = 1.1  # a number of parameters this near to a model's is taken for that model


def family_shape(parameters: float) -> tuple[str, LlamaConfig]:
    """Return the name and shape of the published model of that size, or else of the nearest, made to fit.

    Its width is then scaled, with heads of the same size, so that about as many parameters come out.
    """
    sizes = {label: _count(label) for label in _FAMILY}
    label = min(sizes, key=lambda name: abs(math.log(sizes[name] / parameters)))
    name, (hidden, inner, layers, heads, kv_heads, vocabulary, tied) = _FAMILY[label]
    dim = hidden // heads
    if not 1 / _NEAR < sizes[label] / parameters < _NEAR:
        by_heads: Callable[[int], LlamaConfig] = lambda n: _config(  # noqa: E731
            n * dim,
            round(inner / heads * n / 64) * 64 or 64,
            layers,
            n,
            _divisor(n, kv_heads),
            vocabulary,
            tied,
        )
        count = min(range(1, 1025), key=lambda n: abs(parameter_count(by_heads(n)) - parameters))
        return f"{name} made {count} heads wide", by_heads(count)
    return name, _config(hidden, inner, layers, heads, kv_heads, vocabulary, tied)


def _divisor(n: int, most: int) -> int:
    return max(k for k in range(1, min(n, most) + 1) if n % k == 0)


def _count(label: str) -> float:
    unit = {"M": 1e6, "B": 1e9}[label[-1]]
    return float(label[:-1]) * unit


def _config(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool
) -> LlamaConfig:
    values: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 131072,
    }
    return LlamaConfig.from_dict(values, "the shape of that size")


CARDS = {
    8: "RTX 4060, 3070",
    12: "RTX 3060, 4070",
    16: "T4, RTX 4080",
    24: "RTX 3090, 4090, A10, L4",
    32: "RTX 5090, V100",
    40: "A100 40 GB",
    48: "A6000, A40, L40S",
    80: "A100 80 GB, H100",
    96: "RTX PRO 6000",
    141: "H200",
    180: "B200",
}
"""The memory of a card in GB as it is sold, which are 2^30 bytes, and some that have it."""

GIB = 1 << 30


def holds(gpu: float, parts: Parts) -> bool:
    """Whether a card of so many GB, as it is sold, holds all parts."""
    return total(parts) <= gpu * GIB


def smallest_card(parts: Parts) -> int | None:
    """The smallest of CARDS that holds all parts, or None."""
    return next((gpu for gpu in CARDS if holds(gpu, parts)), None)


@dataclass(frozen=True)
class Way:
    """A change of a training run, and what the run then takes."""

    change: str
    bytes: int
    holds: bool


def ways_to_fit(config: LlamaConfig, run: Run, gpu: float) -> list[Way]:
    """Return what to change, each on top of the one before, until training fits the card; [] if it does."""
    form, checkpointing, states, weights = NF4, False, math.inf, math.inf

    def size() -> int:
        parts = training(config, CUDA, run, form, checkpointing)
        paged = max(0, parts[STATES] - states) + max(0, parts[WEIGHTS] + parts[CONSTANTS] - weights)
        return total(parts) - int(paged)

    if size() <= gpu * GIB:
        return []
    found: list[Way] = []

    def note(change: str) -> bool:
        found.append(Way(change, size(), size() <= gpu * GIB))
        return found[-1].holds

    form = DOUBLE
    if note("double quantization"):
        return found
    checkpointing = True
    if note("--checkpointing"):
        return found
    if run.adapter > 2:
        run = replace(run, adapter=2)
        if note("--adapter-dtype bfloat16"):
            return found
    while run.batch_size > 1:
        run = replace(run, batch_size=run.batch_size // 2)
        if note(f"--batch-size {run.batch_size}, with more --grad-accum"):
            return found
    while run.seq_len > 256:
        run = replace(run, seq_len=run.seq_len // 2)
        if note(f"--seq-len {run.seq_len}"):
            return found
    while run.rank > 8:
        run = replace(run, rank=run.rank // 2)
        if note(f"--rank {run.rank}"):
            return found
    states = _STATES_BUDGET
    if note(f"--optimizer-budget {_STATES_BUDGET >> 20}M"):
        return found
    # Two layers, which the others go through from the host's memory, with a little room.
    layers = -(-2 * sum(_linear(_Shape.of(config), CUDA, run, form)) // config.num_hidden_layers)
    budget = (layers >> 20) + 2
    weights = budget << 20
    note(f"--weights-budget {budget}M")
    return found
    # Two layers, which the others go through from the host's memory.
    weights = -(-2 * sum(_linear(_Shape.of(config), CUDA, run, form)) // config.num_hidden_layers)
    weights = -(-weights >> 20) + 1 << 20
    note(f"--weights-budget {weights >> 20}M")
    return found
