"""The operations of chapter 15 of the oracle's port: hexadecimal in, hexadecimal out."""

import json
import struct
from collections.abc import Callable, Mapping
from typing import Any

import oracle
import oracle_exact as exact
import oracle_step as step
from oracle_exact_port import Values, joined, spelled, spelled_64, words

Rows = exact.Rows
DIGITS = {"float32": 8, "float16": 4, "bfloat16": 4}
BLOCKS = dict.fromkeys(step.TARGETS[:4], "self_attn") | dict.fromkeys(step.TARGETS[4:], "mlp")


def float64(text: str) -> float:
    result: float = struct.unpack(">d", bytes.fromhex(text))[0]
    return result


def bits_of(text: str, dtype: str) -> list[int]:
    digits = DIGITS[dtype]
    return [int(text[i : i + digits], 16) for i in range(0, len(text), digits)]


def widened(text: str, dtype: str) -> list[int]:
    oracle.check_dtype(dtype)
    return [oracle.widen(bits, dtype) for bits in bits_of(text, dtype)]


def by_rows(elements: list[int], rows: int, columns: int) -> Rows:
    """Elements as rows, of which there may be none, or of none."""
    oracle.check_count("elements", len(elements), rows * columns)
    return [elements[i * columns : (i + 1) * columns] for i in range(rows)]


# NF4-15.1


def layer_of(i: Values) -> tuple[step.Linear, Rows]:
    out, into = i["shape"]
    packed, absmax = bytes.fromhex(i["codes"]), words(i["absmax"])
    weight = oracle.dequantize(packed, absmax, out * into, i["dtype"], i["block_size"], i["codebook"])
    oracle.check_dtype(i["adapter_dtype"], ("float32", "bfloat16"))
    scale = oracle.adapter_scale(i["rank"], float64(i["alpha"]), i["rslora"])
    p = float64(i["dropout"])
    keys = int(i["seed"], 16), int(i["stream"], 16), i["lengths"], i["samples"]
    a, b = (widened(i[side], i["adapter_dtype"]) for side in "AB")
    adapter = step.Adapter(
        by_rows(a, i["rank"], into),
        by_rows(b, out, i["rank"]),
        step.factor_of(scale, p),
        oracle.dropped_elements(*keys, into, p),
    )
    wide = [oracle.widen(bits, i["dtype"]) for bits in weight]
    bias = words(i["bias"]) if "bias" in i else None
    oracle.check_count("bias", out if bias is None else len(bias), out)
    x = by_rows(words(i["x"]), sum(i["lengths"]), into)
    return step.Linear(by_rows(wide, out, into), bias, adapter), x


def exact_linear(i: Values) -> Values:
    return {"y": joined(step.linear(*layer_of(i))[0])}


def exact_linear_steps(i: Values) -> Values:
    layer, x = layer_of(i)
    assert layer.adapter is not None
    weight = [oracle.narrow(x, i["dtype"]) for row in layer.weight for x in row]
    return {
        "weight": "".join(f"{bits:0{DIGITS[i['dtype']]}x}" for bits in weight),
        "kept": "".join("00" if drop else "01" for row in layer.adapter.drops for drop in row),
        "z": joined(step.low_rank(layer.adapter, x)),
    }


def linear_gradients(i: Values) -> tuple[Rows, step.Gradients]:
    layer, x = layer_of(i)
    assert layer.adapter is not None
    g = by_rows(words(i["dout"]), len(x), len(layer.weight))
    z = step.low_rank(layer.adapter, x)
    found = step.adapter_gradients(layer.adapter, g, x, z, i["lengths"])
    return step.input_gradient(layer, g, found.e), found


def exact_linear_backward(i: Values) -> Values:
    dx, found = linear_gradients(i)
    return {
        "dx": joined(dx),
        "dA": "".join(map(joined, found.a)),
        "dB": "".join(map(joined, found.b)),
    }


def exact_linear_backward_steps(i: Values) -> Values:
    return {**exact_linear_steps(i), "e": joined(linear_gradients(i)[1].e)}


# NF4-15.2


def heads_of(i: Values, *names: str) -> tuple[list[Rows], step.Heads]:
    heads = step.Heads(i["kv_heads"], i["group"], i["head_dim"], i.get("window"))
    oracle.check_sequences(i["lengths"])
    if min(*heads[:3], heads.window or heads.window is None) < 1:
        raise oracle.RefusedError(f"{heads}, lengths {i['lengths']} (NF4-15.2)")
    wide = heads.kv * heads.dim
    columns = {"q": wide * heads.group, "dout": wide * heads.group, "k": wide, "v": wide}
    return [by_rows(words(i[name]), sum(i["lengths"]), columns[name]) for name in names], heads


def exact_attention(i: Values) -> Values:
    arrays, heads = heads_of(i, "q", "k", "v")
    return {"y": joined(step.attention(*arrays, i["lengths"], heads)[0])}


def exact_attention_steps(i: Values) -> Values:
    arrays, heads = heads_of(i, "q", "k", "v")
    return {"p": spelled(step.attention(*arrays, i["lengths"], heads)[1])}


def exact_attention_backward(i: Values) -> Values:
    arrays, heads = heads_of(i, "dout", "q", "k", "v")
    *found, _ = step.attention_backward(*arrays, i["lengths"], heads)
    return dict(zip(("dq", "dk", "dv"), map(joined, found), strict=True))


def exact_attention_backward_steps(i: Values) -> Values:
    arrays, heads = heads_of(i, "dout", "q", "k", "v")
    e = step.attention_backward(*arrays, i["lengths"], heads)[3]
    return {**exact_attention_steps(i), "e": spelled(e)}


# NF4-15.3, NF4-15.6 to NF4-15.8


def rotation_table(i: Values) -> Values:
    if i["length"] < 1:
        raise oracle.RefusedError("a sequence without positions (NF4-15.3)")
    cos, sin = step.table(json.loads(i["rope"]), i["head_dim"], i["max_positions"], i["length"])
    return {"cos": joined(cos), "sin": joined(sin)}


def exact_gradient(i: Values) -> Values:
    elements, count = words(i["gradients"]), i["count"]
    if count < 1 or len(elements) % count:
        raise oracle.RefusedError(f"{len(elements)} elements of {count} gradients (NF4-15.6)")
    return {"sum": spelled(step.paired(by_rows(elements, count, len(elements) // count)))}


def exact_clip(i: Values) -> Values:
    if any(array["dtype"] != "float32" for array in i["gradients"].values()):
        raise oracle.RefusedError("a gradient is not float32 (NF4-10.7)")
    gradients = {name: words(array["data"]) for name, array in i["gradients"].items()}
    norm, after = step.clip(gradients, float64(i["max_norm"]))
    arrays = {name: array | {"data": spelled(after[name])} for name, array in i["gradients"].items()}
    return {"norm": spelled_64(norm), "gradients": arrays}


def exact_learning_rate(i: Values) -> Values:
    rate = step.learning_rate(i["step"], i["steps"], i["warmup"], i["schedule"], float64(i["lr"]))
    return {"lr": f"{rate:016x}"}


# NF4-15.4, NF4-15.5, NF4-15.9


def size(config: Values, name: str, default: int | None = None) -> int:
    found = config.get(name)
    found = default if found is None else found
    if not isinstance(found, int) or found < 1:
        raise oracle.RefusedError(f"{name} is {found} (NF4-15.4)")
    return found


def windows(config: Values) -> list[int | None]:
    """The window of each layer (NF4-15.4)."""
    kind, layers = config["model_type"], config["num_hidden_layers"]
    none = "sliding_window" in config and config["sliding_window"] is None
    if kind == "llama" or none or (kind != "mistral" and not config.get("use_sliding_window")):
        return [None] * layers
    window = size(config, "sliding_window", 4096)
    if kind == "mistral":
        return [window] * layers
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers")
        first = 28 if first is None else first
        types = ["full_attention"] * min(first, layers) + ["sliding_attention"] * max(0, layers - first)
    return [window if kind == "sliding_attention" else None for kind in types]


class Reader:
    """The model of an input, whose tensors are taken one by one: one that is left is too many."""

    def __init__(self, i: Values) -> None:
        self.i, self.config = i, json.loads(i["config"])
        self.left: dict[str, Mapping[str, Any]] = dict(i["tensors"])
        self.adapters: dict[str, Mapping[str, Any]] = dict(i["adapters"])
        c = self.config
        heads, self.hidden = size(c, "num_attention_heads"), size(c, "hidden_size")
        kind = c["model_type"]
        missing = {"mistral": 8, "qwen2": 32, "qwen3": 32}.get(kind, heads)
        kv = size(c, "num_key_value_heads", heads if "num_key_value_heads" in c else missing)
        self.dim = size(c, "head_dim", 128 if kind == "qwen3" else self.hidden // heads)
        self.sizes = kv, heads // kv, self.dim
        self.positions = size(
            c, "max_position_embeddings", {"llama": 2048, "mistral": 131072}.get(kind, 32768)
        )
        q, k, inner = heads * self.dim, kv * self.dim, size(c, "intermediate_size")
        h = self.hidden
        shapes = ((q, h), (k, h), (k, h), (h, q), (inner, h), (inner, h), (h, inner))
        self.shapes = dict(zip(step.TARGETS, shapes, strict=True))

    def tensor(self, name: str, *shape: int) -> tuple[list[int], str]:
        """The bits of a tensor and its dtype."""
        if name not in self.left or list(shape) != self.left[name]["shape"]:
            raise oracle.RefusedError(f"{name} is not there in the shape {shape} (NF4-8.1)")
        found = self.left.pop(name)
        oracle.check_dtype(found["dtype"])
        bits = bits_of(found["data"], found["dtype"])
        oracle.check_finite(name, [oracle.widen(x, found["dtype"]) for x in bits])
        return bits, found["dtype"]

    def wide(self, name: str, *shape: int) -> list[int]:
        bits, dtype = self.tensor(name, *shape)
        return [oracle.widen(x, dtype) for x in bits]

    def weight(self, name: str, out: int, into: int) -> Rows:
        """A weight quantized, decoded and widened."""
        bits, dtype = self.tensor(name, out, into)
        kind = (dtype, self.i["block_size"], self.i["codebook"])
        codes, absmax = oracle.quantize(bits, *kind)
        if self.i["double_quant"]:
            absmax = oracle.decode_absmax(*oracle.encode_absmax(absmax), oracle.DYNAMIC_MAP)
        decoded = oracle.dequantize(codes, absmax, len(bits), *kind)
        return by_rows([oracle.widen(x, dtype) for x in decoded], out, into)

    def adapter(self, module: str, out: int, into: int) -> step.Adapter | None:
        found = {side: self.adapters.pop(f"{module}.{side}", None) for side in "AB"}
        a, b = found["A"], found["B"]
        if a is None and b is None:
            return None
        if a is None or b is None or len(a["shape"]) != 2:
            raise oracle.RefusedError(f"half an adapter of {module} (NF4-9.6)")
        rank = a["shape"][0]
        if (a["shape"], b["shape"]) != ([rank, into], [out, rank]):
            raise oracle.RefusedError(f"the adapter of {module} does not fit (NF4-9.6)")
        for side in (a, b):
            oracle.check_dtype(side["dtype"], ("float32", "bfloat16"))
        p = float64(self.i["dropout"])
        scale = oracle.adapter_scale(rank, float64(self.i["alpha"]), self.i["rslora"])
        seed, stream = int(self.i["seed"], 16), oracle.stream_of(module)
        return step.Adapter(
            by_rows(widened(a["data"], a["dtype"]), rank, into),
            by_rows(widened(b["data"], b["dtype"]), out, rank),
            step.factor_of(scale, p),
            oracle.dropped_elements(seed, stream, self.i["lengths"], self.i["samples"], into, p),
        )

    def layer(self, index: int, window: int | None) -> step.Layer:
        prefix = f"model.layers.{index}."
        linears = {}
        for target, (out, into) in self.shapes.items():
            module = f"{prefix}{BLOCKS[target]}.{target}"
            weight = self.weight(f"{module}.weight", out, into)
            bias = self.wide(f"{module}.bias", out) if f"{module}.bias" in self.left else None
            linears[target] = step.Linear(weight, bias, self.adapter(module, out, into))
        norms = {
            name: self.wide(f"{prefix}{name}.weight", self.hidden)
            for name in ("input_layernorm", "post_attention_layernorm")
        }
        if self.config["model_type"] == "qwen3":
            for name in ("q_norm", "k_norm"):
                norms[name] = self.wide(f"{prefix}self_attn.{name}.weight", self.dim)
        return step.Layer(linears, norms, step.Heads(*self.sizes, window))

    def model(self) -> step.Model:
        c, shape = self.config, (size(self.config, "vocab_size"), self.hidden)
        embedding = by_rows(self.wide("model.embed_tokens.weight", *shape), *shape)
        layers = [self.layer(index, window) for index, window in enumerate(windows(c))]
        norm = self.wide("model.norm.weight", self.hidden)
        tied = bool(c.get("tie_word_embeddings"))
        head = embedding if tied else by_rows(self.wide("lm_head.weight", *shape), *shape)
        if self.left or self.adapters:
            raise oracle.RefusedError(f"{list(self.left)} and {list(self.adapters)} have no place (NF4-8.1)")
        eps = c.get("rms_norm_eps")
        return step.Model(embedding, layers, norm, head, 1e-6 if eps is None else eps)


def ran(i: Values) -> tuple[step.Step, list[int]]:
    """A step of an input, and the losses of its rows."""
    rows, lengths = len(i["ids"]), i["lengths"]
    fits = rows == len(i["targets"]) == sum(lengths) and len(lengths) == len(i["samples"])
    if not fits or min(lengths) < 1:
        raise oracle.RefusedError("ids, targets, lengths and samples don't fit")
    reader = Reader(i)
    model = reader.model()
    vocabulary = len(model.embedding)
    if not all(0 <= token < vocabulary for token in i["ids"]):
        raise oracle.RefusedError("a token is not in the vocabulary (NF4-15.4)")
    tables = [step.table(reader.config, reader.dim, reader.positions, n) for n in lengths]
    cos, sin = ([row for table in tables for row in table[side]] for side in range(2))
    run = step.Step(model, cos, sin, lengths)
    return run, run.run(i["ids"], i["targets"])


def exact_step(i: Values) -> Values:
    run, losses = ran(i)
    count = sum(target != step.IGNORED for target in i["targets"])
    loss = oracle.rn64(exact.sum_of_terms(losses) / count)
    gradients = {}
    for (index, target), found in run.found.items():
        module = f"model.layers.{index}.{BLOCKS[target]}.{target}"
        for side, sequences in (("A", found.a), ("B", found.b)):
            flat = [[x for row in rows for x in row] for rows in sequences]
            gradients[f"{module}.{side}"] = step.paired(flat)
    norm, clipped = step.clip(gradients, float64(i["max_norm"]))
    rates = oracle.Rates(*(int(i[name], 16) for name in oracle.Rates._fields))
    c = oracle.scalars(rates, 0, 2)
    adapters = {}
    for name, array in i["adapters"].items():
        dtype = array["dtype"]
        after = step.update(c, dtype, bits_of(array["data"], dtype), clipped[name])
        data = "".join(f"{oracle.narrow(x, dtype):0{DIGITS[dtype]}x}" for x in after)
        adapters[name] = array | {"data": data}
    return {
        "losses": spelled(losses),
        "loss": spelled_64(loss),
        "gradients": {
            name: {
                "dtype": "float32",
                "shape": i["adapters"][name]["shape"],
                "data": spelled(gradients[name]),
            }
            for name in i["adapters"]
        },
        "norm": spelled_64(norm),
        "adapters": adapters,
    }


def exact_step_steps(i: Values) -> Values:
    run, _ = ran(i)
    return {
        "values": {
            name: {"dtype": "float32", "shape": [len(rows), len(rows[0])], "data": joined(rows)}
            for name, rows in run.values.items()
        }
    }


STEPS: dict[str, Callable[[Values], Values]] = {
    "exact_linear": exact_linear_steps,
    "exact_linear_backward": exact_linear_backward_steps,
    "exact_attention": exact_attention_steps,
    "exact_attention_backward": exact_attention_backward_steps,
    "exact_step": exact_step_steps,
}

OPERATIONS: dict[str, Callable[[Values], Values]] = {
    function.__name__: function
    for function in (
        *(exact_linear, exact_linear_backward, exact_attention, exact_attention_backward, rotation_table),
        *(exact_gradient, exact_clip, exact_learning_rate, exact_step),
    )
}
