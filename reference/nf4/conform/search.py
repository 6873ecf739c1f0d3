"""Beyond the vectors: Hypothesis looks for an input that a port gets wrong, and makes it small."""

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from numpy.typing import NDArray

from nf4.blockwise import BLOCK_SIZES, block_count
from nf4.codebooks import CODEBOOKS
from nf4.conform import reference
from nf4.conform.compare import Difference, compare
from nf4.conform.port import Answer, Port
from nf4.conform.python_port import PythonPort
from nf4.conform.values import encode_input
from nf4.errors import InputError
from nf4.floats import DTYPES
from nf4.model.config import MODEL_TYPES, ROPE_TYPES, LlamaConfig
from nf4.model.llama import parameter_shapes
from nf4.nested import DYNAMIC_MAP, NESTED_BLOCK_SIZE
from nf4.testing import absmax_lists, bit_patterns, quantized, shapes, tensors

_QUESTIONS_TO_SHRINK = 500  # a port that takes its time must not be asked for ever
Fields = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """The smallest input found on which a port leaves the specification, and both answers (NF4-13.4).

    difference is None where the port errored instead of answering.
    """

    operation: str
    input: Mapping[str, Any]
    expected: Answer
    got: Answer
    difference: Difference | None


def search(port: Port, operations: Iterable[str], seed: int = 0, examples: int = 200) -> list[Found]:
    """Ask a port `examples` drawn inputs of each operation; return what it gets wrong, one find an operation.

    Operations that the port does not offer, or that have no INPUTS (files), are passed over; what it skips is
    right. The same seed finds the same. Raises HarnessError where the port can't be asked any more.
    """
    truth = PythonPort(reference, "reference")
    found = (
        _search_one(port, truth, operation, seed, examples)
        for operation in operations
        if operation in port.operations and operation in INPUTS
    )
    return [one for one in found if one is not None]


class _Differs(Exception):  # noqa: N818  it carries a find
    def __init__(self, found: Found) -> None:
        super().__init__(found.operation)
        self.found = found


def _search_one(port: Port, truth: Port, operation: str, seed: int, examples: int) -> Found | None:
    # A port need not answer the same twice, and Hypothesis asks again: an input is asked once.
    asked: dict[str, Found | None] = {}
    first_find: int | None = None

    @seeded(zlib.crc32(operation.encode()) + seed)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
    )
    @given(INPUTS[operation])
    def ask(fields: Fields) -> None:
        nonlocal first_find
        question = encode_input(operation, fields, "the search")
        key = json.dumps(question, sort_keys=True)
        if key not in asked:
            if first_find is not None and len(asked) - first_find > _QUESTIONS_TO_SHRINK:
                return
            asked[key] = _ask(port, truth, f"search-{operation}-{len(asked)}", operation, question)
        found = asked[key]
        if found is not None:
            first_find = len(asked) if first_find is None else first_find
            raise _Differs(found)

    try:
        ask()
    except _Differs as differs:
        return differs.found
    return None


def _ask(port: Port, truth: Port, id: str, operation: str, question: Fields) -> Found | None:
    expected = truth.run(id, operation, question)
    if expected.kind not in {"output", "refused"}:
        raise AssertionError(f"the reference {expected.kind} on {operation}: {expected.message}")
    got = port.run(id, operation, question)
    if got.kind == "skipped":
        return None
    difference = None
    if got.kind != "errored":
        try:
            difference = compare(operation, question, expected, got)
        except InputError as error:  # not the outputs of this operation at all
            got = Answer("errored", message=str(error))
    if difference is None and got.kind != "errored":
        return None
    return Found(operation, question, expected, got, difference)


_dtypes = st.sampled_from(["float32", *DTYPES])  # every other one float32, which shows the most
_training_dtypes = st.sampled_from(["float32", "bfloat16"])
_codebooks = st.sampled_from(list(CODEBOOKS))
_block_sizes = st.one_of(st.sampled_from([32, 64]), st.sampled_from(BLOCK_SIZES))
_names = st.one_of(
    st.sampled_from(["model.layers.0.self_attn.q_proj", ""]),
    st.text(st.characters(codec="utf-8"), max_size=20),
)


def _float64(low: float, high: float) -> st.SearchStrategy[NDArray[np.float64]]:
    return st.floats(low, high).map(lambda value: np.array([value]))


def _one_of(*choices: float) -> st.SearchStrategy[NDArray[np.float64]]:
    return st.sampled_from(choices).map(lambda value: np.array([value]))


def _uint(bits: int) -> st.SearchStrategy[NDArray[Any]]:
    dtype = np.uint32 if bits == 32 else np.uint64
    small, whole = st.integers(0, 10), st.integers(0, 2**bits - 1)
    return st.one_of(small, whole).map(lambda value: np.array([value], dtype))


@st.composite
def _moderate(draw: st.DrawFn, size: int, positive: bool = False) -> NDArray[np.float32]:
    """Float32 [size] of magnitudes from 2^-20 to 8 and zeros: sums of products are far from the limits."""
    magnitude = st.one_of(st.just(0), st.integers(0x35800000, 0x41000000))
    some = draw(st.lists(magnitude, min_size=1, max_size=20))
    bits = np.resize(np.array(some, np.uint32), size)
    if not positive:
        bits = bits | np.resize(np.array(draw(st.lists(st.sampled_from([0, 1 << 31]), min_size=1))), size)
    return bits.astype(np.uint32).view(np.float32)


def _few_elements(block_size: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of blocks enough to cross, without the weight of four of the largest."""
    return shapes(block_size, min(4 * block_size, block_size + 300))


@st.composite
def _array_to_quantize(draw: st.DrawFn) -> Fields:
    dtype, block_size, codebook = draw(_dtypes), draw(_block_sizes), draw(_codebooks)
    x = draw(tensors(dtype, block_size, codebook, draw(_few_elements(block_size))))
    flat = x.reshape(-1).copy()
    if flat.size and draw(st.integers(0, 9)) == 9:
        flat[draw(st.integers(0, flat.size - 1))] = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    return {
        "x": flat,
        "shape": list(x.shape),
        "dtype": dtype,
        "block_size": block_size,
        "codebook": codebook,
    }


@st.composite
def _quantized(draw: st.DrawFn, nested: bool) -> Fields:
    dtype, block_size, codebook = draw(_dtypes), draw(_block_sizes), draw(_codebooks)
    q = draw(quantized(dtype, block_size, codebook, shape=draw(_few_elements(block_size))))
    blocks = block_count(q.size, block_size)
    if nested:
        absmax = draw(_nested(blocks))
    elif draw(st.booleans()):
        absmax = {"absmax": q.absmax}
    else:
        absmax = {"absmax": draw(bit_patterns("float32", blocks, finite=draw(st.integers(0, 9)) < 9))}
    tensor = {"shape": list(q.shape), "dtype": dtype, "block_size": block_size, "codebook": codebook}
    return {"codes": q.codes, **absmax, **tensor}


@st.composite
def _nested(draw: st.DrawFn, blocks: int | None = None) -> Fields:
    if blocks is None:
        blocks = draw(st.one_of(st.integers(0, 8), st.sampled_from([255, 256, 257, 513])))
    codes = np.resize(np.frombuffer(draw(st.binary(min_size=1, max_size=40)), np.uint8), blocks)
    absmax = draw(absmax_lists(block_count(blocks, NESTED_BLOCK_SIZE), signed=draw(st.booleans())))
    table = draw(st.one_of(st.just(DYNAMIC_MAP), bit_patterns("float32", 256)))
    return {
        "absmax_codes": codes,
        "nested_absmax": absmax,
        "offset": draw(absmax_lists(1, signed=draw(st.booleans()))),
        "map": table,
    }


@st.composite
def _any_bits(draw: st.DrawFn, operation: str) -> Fields:
    dtype = draw(_dtypes)
    x = draw(bit_patterns(dtype if operation == "widen" else "float32", finite=False))
    return {"x": x, "dtype": dtype}


@st.composite
def _layer(draw: st.DrawFn, backward: bool) -> Fields:
    dtype, block_size, adapter_dtype = draw(_dtypes), draw(_block_sizes), draw(_training_dtypes)
    wide, high, rank = (draw(st.integers(1, limit)) for limit in (70, 8, 3))
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))
    rows = sum(lengths)
    codes = np.resize(np.frombuffer(draw(st.binary(min_size=1, max_size=40)), np.uint8), -(-wide * high // 2))
    factors = {
        name: draw(_moderate(n)).astype(DTYPES[adapter_dtype])
        for name, n in (("A", rank * wide), ("B", high * rank))
    }
    fields = {
        "x": draw(_moderate(rows * wide)),
        "codes": codes,
        "absmax": draw(_moderate(block_count(wide * high, block_size), positive=True)),
        "shape": [high, wide],
        "dtype": dtype,
        "block_size": block_size,
        "codebook": draw(_codebooks),
        **factors,
        "adapter_dtype": adapter_dtype,
        "rank": rank,
        "alpha": draw(_one_of(16.0, 1.0, 8.0)),
        "rslora": draw(st.booleans()),
        "dropout": draw(_one_of(0.0, 0.1, 0.5)),
        "seed": draw(_uint(64)),
        "stream": draw(_uint(32)),
        "lengths": lengths,
        "samples": draw(st.lists(st.integers(0, 9), min_size=len(lengths), max_size=len(lengths))),
    }
    if draw(st.booleans()):
        fields["bias"] = draw(_moderate(high))
    if backward:
        fields["dout"] = draw(_moderate(rows * high))
    return fields


@st.composite
def _update(draw: st.DrawFn) -> Fields:
    dtype = draw(_training_dtypes)
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=2))
    n = math.prod(shape)
    return {
        "p": draw(_moderate(n)).astype(DTYPES[dtype]),
        "dtype": dtype,
        "g": draw(_moderate(n)),
        "m": draw(_moderate(n)),
        "v": draw(_moderate(n, positive=True)),
        "shape": shape,
        "updates": draw(st.integers(0, 50)),
        "lr": draw(_float64(0, 0.1)),
        "beta1": draw(_one_of(0.9, 0.8, 0.95)),
        "beta2": draw(_one_of(0.999, 0.95, 0.99)),
        "eps": draw(_one_of(1e-8, 1e-6)),
        "weight_decay": draw(_one_of(0.0, 0.01, 0.1)),
    }


@st.composite
def _loss(draw: st.DrawFn, parts: bool = True) -> Fields:
    vocabulary = draw(st.integers(1, 8))
    lengths = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    rows = sum(lengths)
    target = st.one_of(st.integers(0, vocabulary - 1), st.just(-100))
    fields = {
        "logits": draw(_moderate(rows * vocabulary)),
        "vocabulary": vocabulary,
        "targets": draw(st.lists(target, min_size=rows, max_size=rows)),
    }
    return {**fields, "parts": lengths} if parts else fields


@st.composite
def _product(draw: st.DrawFn) -> Fields:
    m, k, n = (draw(st.integers(0, limit)) for limit in (3, 70, 3))
    a, b = (draw(bit_patterns("float32", size)) for size in (m * k, k * n))
    return {"a": a, "b": b, "shape": [m, k, n]}


@st.composite
def _sum(draw: st.DrawFn) -> Fields:
    n = draw(st.one_of(st.integers(0, 40), st.sampled_from([4096, 4097, 9000])))
    fields = {name: np.resize(draw(bit_patterns("float32", min(n, 40))), n) for name in "xy"}
    return fields if draw(st.booleans()) else {"x": fields["x"]}


@st.composite
def _side_by_side(draw: st.DrawFn, *names: str) -> Fields:
    n = draw(st.integers(0, 20))
    return {name: draw(st.one_of(_moderate(n), bit_patterns("float32", n))) for name in names}


@st.composite
def _rows(draw: st.DrawFn, *names: str) -> Fields:
    columns, rows = draw(st.integers(1, 9)), draw(st.integers(0, 3))
    return {name: draw(_moderate(columns * rows)) for name in names} | {"columns": columns}


@st.composite
def _normed(draw: st.DrawFn, backward: bool) -> Fields:
    n, rows = draw(st.integers(1, 9)), draw(st.integers(0, 3))
    fields = {"x": draw(_moderate(n * rows)), "weight": draw(_moderate(n))}
    if not backward:
        return {**fields, "eps": draw(_one_of(1e-5, 1e-6, 0.1))}
    return {**fields, "dout": draw(_moderate(n * rows)), "rstd": draw(_moderate(rows, positive=True))}


@st.composite
def _rotated(draw: st.DrawFn) -> Fields:
    half, rows, heads = draw(st.integers(1, 4)), draw(st.integers(0, 3)), draw(st.integers(1, 3))
    angles = {name: draw(_moderate(rows * half)) for name in ("cos", "sin")}
    x = draw(_moderate(rows * heads * 2 * half))
    return {"x": x, **angles, "head_dim": 2 * half, "inverse": draw(st.booleans())}


@st.composite
def _attended(draw: st.DrawFn, backward: bool) -> Fields:
    kv_heads, group, dim = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=2))
    rows = sum(lengths)
    wide = {"q": group, "k": 1, "v": 1} | ({"dout": group} if backward else {})
    fields: Fields = {name: draw(_moderate(rows * kv_heads * n * dim)) for name, n in wide.items()}
    fields |= {"lengths": lengths, "kv_heads": kv_heads, "group": group, "head_dim": dim}
    return fields | ({"window": draw(st.integers(1, 5))} if draw(st.booleans()) else {})


_ratios = st.floats(0.25, 64).map(lambda x: float(np.float32(x)))  # few digits


@st.composite
def _rope(draw: st.DrawFn) -> Fields:
    half, positions = draw(st.integers(1, 6)), draw(st.integers(1, 64))
    kind = draw(st.sampled_from(ROPE_TYPES))
    scaling: Fields = {"rope_type": kind, "factor": draw(_ratios)}
    own: dict[str, Fields] = {
        "llama3": {"low_freq_factor": draw(st.floats(0.5, 2)), "high_freq_factor": draw(st.floats(1, 8))},
        "longrope": {
            name: draw(st.lists(_ratios, min_size=half, max_size=half))
            for name in ("short_factor", "long_factor")
        },
    }
    optional: dict[str, list[str]] = {
        "yarn": ["attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"],
        "longrope": ["attention_factor"],
    }
    if kind in ("llama3", "yarn", "longrope") and draw(st.booleans()):
        scaling["original_max_position_embeddings"] = draw(st.integers(1, 64))
    scaling |= own.get(kind, {})
    scaling |= {name: draw(_ratios) for name in optional.get(kind, []) if draw(st.booleans())}
    if kind == "yarn":
        scaling["truncate"] = draw(st.booleans())
    rope = {draw(st.sampled_from(["rope_scaling", "rope_parameters"])): scaling}
    if draw(st.booleans()):
        rope["rope_theta"] = draw(st.one_of(st.floats(1, 1e7), st.sampled_from([1e4, 5e5, 1000000])))
    return {
        "rope": json.dumps(rope),
        "head_dim": 2 * half,
        "max_positions": positions,
        "length": draw(st.integers(1, 9)),
    }


@st.composite
def _to_add(draw: st.DrawFn) -> Fields:
    count, n = draw(st.integers(1, 9)), draw(st.integers(0, 4))
    return {
        "gradients": draw(st.one_of(_moderate(count * n), bit_patterns("float32", count * n))),
        "count": count,
    }


@st.composite
def _to_clip(draw: st.DrawFn) -> Fields:
    names = draw(st.lists(st.sampled_from(["a", "b.A", "b.B", "B", "\u00e9"]), unique=True, max_size=4))
    arrays = {}
    for name in names:
        n = draw(st.one_of(st.integers(0, 5), st.sampled_from([4097])))
        arrays[name] = np.resize(draw(_moderate(min(n, 20))), n)
    return {"gradients": arrays, "max_norm": draw(st.one_of(_float64(0, 10), _one_of(0.0, 1.0, 1e9)))}


@st.composite
def _whole_step(draw: st.DrawFn) -> Fields:
    """A step of a model of one or two layers, few heads and few tokens."""
    kind = draw(st.sampled_from(MODEL_TYPES))
    kv_heads, group, dim = draw(st.integers(1, 2)), draw(st.integers(1, 2)), 2 * draw(st.integers(1, 2))
    config: Fields = {
        "model_type": kind,
        "vocab_size": 5,
        "hidden_size": draw(st.integers(1, 5)),
        "intermediate_size": draw(st.integers(1, 5)),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        "max_position_embeddings": 16,
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "use_sliding_window": draw(st.booleans()),
        "sliding_window": draw(st.sampled_from([None, 1, 2])),
        "max_window_layers": draw(st.integers(0, 1)),
    }
    shapes = parameter_shapes(LlamaConfig.from_dict(config, "the search"))
    dtype, adapter_dtype, rank = draw(_dtypes), draw(_training_dtypes), draw(st.integers(1, 2))

    def array(*shape: int, dtype: str = dtype) -> NDArray[Any]:
        return draw(_moderate(math.prod(shape))).astype(DTYPES[dtype]).reshape(shape)

    modules = [name.removesuffix(".weight") for name in shapes if "_proj.weight" in name]
    adapters = {}
    for module in draw(st.lists(st.sampled_from(modules), unique=True, min_size=1, max_size=4)):
        out, into = shapes[f"{module}.weight"]
        adapters[f"{module}.A"] = array(rank, into, dtype=adapter_dtype)
        adapters[f"{module}.B"] = array(out, rank, dtype=adapter_dtype)
    lengths = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    rows = sum(lengths)
    target = st.one_of(st.integers(0, 4), st.just(-100))
    return {
        "config": json.dumps(config),
        "tensors": {name: array(*shape) for name, shape in shapes.items()},
        "block_size": draw(_block_sizes),
        "codebook": draw(_codebooks),
        "double_quant": draw(st.booleans()),
        "adapters": adapters,
        "alpha": draw(_one_of(16.0, 1.0, 3.0)),
        "rslora": draw(st.booleans()),
        "dropout": draw(_one_of(0.0, 0.1, 0.5)),
        "seed": draw(_uint(64)),
        "ids": draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows)),
        "targets": draw(st.lists(target, min_size=rows, max_size=rows)),
        "lengths": lengths,
        "samples": draw(st.lists(st.integers(0, 9), min_size=len(lengths), max_size=len(lengths))),
        "max_norm": draw(_one_of(0.0, 0.1, 1.0)),
        "lr": draw(_float64(0, 0.1)),
        "beta1": draw(_one_of(0.9, 0.8)),
        "beta2": draw(_one_of(0.999, 0.95)),
        "eps": draw(_one_of(1e-8, 1e-6)),
        "weight_decay": draw(_one_of(0.0, 0.1)),
    }


@st.composite
def _rate(draw: st.DrawFn) -> Fields:
    steps = draw(st.integers(1, 100))
    return {
        "step": draw(st.integers(0, steps - 1)),
        "steps": steps,
        "warmup": draw(st.integers(0, steps)),
        "schedule": draw(st.sampled_from(["constant", "linear", "cosine"])),
        "lr": draw(_float64(0, 1)),
    }


def _keyed(**more: st.SearchStrategy[Any]) -> st.SearchStrategy[Fields]:
    draw = {"seed": _uint(64), "stream": _uint(32), "sample": _uint(64), "n": st.integers(0, 40)}
    return st.fixed_dictionaries(draw | more)


def _dict(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Fields]:
    return st.fixed_dictionaries(fields)


def _words(n: int) -> st.SearchStrategy[NDArray[np.uint32]]:
    return st.lists(st.integers(0, 2**32 - 1), min_size=n, max_size=n).map(lambda w: np.array(w, np.uint32))


INPUTS: dict[str, st.SearchStrategy[Fields]] = {
    "codebook": _dict(codebook=_codebooks),
    "widen": _any_bits("widen"),
    "narrow": _any_bits("narrow"),
    "quantize": _array_to_quantize(),
    "dequantize": _quantized(nested=False),
    "encode_absmax": _dict(absmax=absmax_lists()),
    "decode_absmax": _nested(),
    "quantize_double": _array_to_quantize(),
    "dequantize_double": _quantized(nested=True),
    "storage": _dict(elements=st.integers(0, 2**28), block_size=_block_sizes, double_quant=st.booleans()),
    "philox": _dict(counter=_words(4), key=_words(2)),
    "stream": _dict(name=_names),
    "uniform": _keyed(),
    "keep_mask": _keyed(p=st.one_of(_float64(0, 1), _one_of(0.0, 0.5, 1.5))),
    "permutation": _dict(seed=_uint(64), epoch=_uint(64), n=st.integers(0, 50)),
    "exact_product": _product(),
    "exact_sum": _sum(),
    "exact_exp": _dict(x=bit_patterns("float32", finite=False)),
    "exact_log": _dict(x=bit_patterns("float32", finite=False)),
    "exact_swiglu": _side_by_side("gate", "up"),
    "exact_swiglu_backward": _side_by_side("dout", "gate", "up"),
    "exact_softmax": _rows("z"),
    "exact_softmax_backward": _rows("dout", "p"),
    "exact_rms_norm": _normed(backward=False),
    "exact_rms_norm_backward": _normed(backward=True),
    "exact_cross_entropy": _loss(parts=False),
    "exact_rotate": _rotated(),
    "exact_linear": _layer(backward=False),
    "exact_linear_backward": _layer(backward=True),
    "exact_attention": _attended(backward=False),
    "exact_attention_backward": _attended(backward=True),
    "rotation_table": _rope(),
    "exact_gradient": _to_add(),
    "exact_clip": _to_clip(),
    "exact_learning_rate": _rate(),
    "exact_step": _whole_step(),
    "init_adapter": _dict(
        seed=_uint(64),
        name=_names,
        in_features=st.integers(1, 40),
        rank=st.integers(1, 4),
        dtype=_training_dtypes,
    ),
    "init_matrix": _dict(seed=_uint(64), name=_names, n=st.integers(1, 40)),
    "lora_forward": _layer(backward=False),
    "lora_backward": _layer(backward=True),
    "adamw": _update(),
    "learning_rate": _rate(),
    "held_out": _dict(seed=_uint(64), examples=st.integers(1, 60)),
    "loss": _loss(),
}
"""Inputs to draw by operation, as values.decode_input returns them; the text answers or refuses each."""
