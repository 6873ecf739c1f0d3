"""A port without NumPy: the oracle behind the JSON-lines protocol (NF4-13.4), values in hexadecimal.

Run it with: nf4 conform -- python tests/conform/oracle_port.py
"""

import json
import math
import struct
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import oracle
import oracle_exact_port
import oracle_step_port

Values = dict[str, Any]
Matrix = list[list[float]]

DIGITS = {"float32": 8, "float16": 4, "bfloat16": 4, "float64": 16, "uint8": 2, "uint32": 8, "uint64": 16}


def bits_of(text: str, dtype: str) -> list[int]:
    """The elements of an array, as the integers their bits spell."""
    if dtype not in DIGITS:
        raise oracle.RefusedError(f"dtype {dtype} is not known (NF4-12.2)")
    digits = DIGITS[dtype]
    return [int(text[i : i + digits], 16) for i in range(0, len(text), digits)]


def hexadecimal(elements: list[int], dtype: str) -> str:
    return "".join(f"{bits:0{DIGITS[dtype]}x}" for bits in elements)


def float64(text: str) -> float:
    result: float = struct.unpack(">d", bytes.fromhex(text))[0]
    return result


def float64_bits(x: float) -> str:
    return struct.pack(">d", x).hex()


def float32_bits(x: float) -> int:
    """A float rounded to float32."""
    return oracle.rounded(Fraction(x), negative=math.copysign(1, x) < 0)


def matrix(elements: list[int], dtype: str, columns: int) -> Matrix:
    """Rows of floats, from the bits of dtype."""
    values = [oracle.number(bits, dtype) for bits in elements]
    return [values[start : start + columns] for start in range(0, len(values), columns)]


def flat(rows: Matrix) -> str:
    return hexadecimal([float32_bits(x) for row in rows for x in row], "float32")


def the_codebook(i: Values) -> Values:
    table = oracle.codebook(i["codebook"])
    thresholds, _ = oracle.ranks_of(table)
    return {"values": hexadecimal(table, "float32"), "thresholds": hexadecimal(thresholds, "float32")}


def widen(i: Values) -> Values:
    x = bits_of(i["x"], i["dtype"])
    oracle.check_dtype(i["dtype"])
    return {"y": hexadecimal([oracle.widen(bits, i["dtype"]) for bits in x], "float32")}


def narrow(i: Values) -> Values:
    oracle.check_dtype(i["dtype"])
    y = [oracle.narrow(bits, i["dtype"]) for bits in bits_of(i["x"], "float32")]
    return {"y": hexadecimal(y, i["dtype"])}


def quantized(i: Values) -> tuple[bytes, list[int]]:
    x = bits_of(i["x"], i["dtype"])
    oracle.check_count("x", len(x), oracle.counted(i["shape"]))
    return oracle.quantize(x, i["dtype"], i["block_size"], i["codebook"])


def quantize(i: Values) -> Values:
    codes, absmax = quantized(i)
    return {"codes": codes.hex(), "absmax": hexadecimal(absmax, "float32")}


def nested_outputs(codes: list[int], absmax: list[int], offset: int) -> Values:
    return {
        "absmax_codes": hexadecimal(codes, "uint8"),
        "nested_absmax": hexadecimal(absmax, "float32"),
        "offset": hexadecimal([offset], "float32"),
    }


def encode_absmax(i: Values) -> Values:
    return nested_outputs(*oracle.encode_absmax(bits_of(i["absmax"], "float32")))


def quantize_double(i: Values) -> Values:
    codes, absmax = quantized(i)
    return {"codes": codes.hex(), **nested_outputs(*oracle.encode_absmax(absmax))}


def decoded_absmax(i: Values) -> list[int]:
    offset = bits_of(i["offset"], "float32")
    oracle.check_count("offset", len(offset), 1)
    nested = (bits_of(i["absmax_codes"], "uint8"), bits_of(i["nested_absmax"], "float32"), offset[0])
    return oracle.decode_absmax(*nested, bits_of(i["map"], "float32"))


def decode_absmax(i: Values) -> Values:
    return {"absmax": hexadecimal(decoded_absmax(i), "float32")}


def decoded(i: Values, absmax: list[int]) -> list[int]:
    packed, n = bytes.fromhex(i["codes"]), oracle.counted(i["shape"])
    return oracle.dequantize(packed, absmax, n, i["dtype"], i["block_size"], i["codebook"])


def dequantize(i: Values) -> Values:
    return {"y": hexadecimal(decoded(i, bits_of(i["absmax"], "float32")), i["dtype"])}


def dequantize_double(i: Values) -> Values:
    return {"y": hexadecimal(decoded(i, decoded_absmax(i)), i["dtype"])}


def storage(i: Values) -> Values:
    return {"bytes": oracle.storage(i["elements"], i["block_size"], i["double_quant"])}


def philox(i: Values) -> Values:
    counters, key = bits_of(i["counter"], "uint32"), bits_of(i["key"], "uint32")
    words = [word for j in range(0, len(counters), 4) for word in oracle.philox(counters[j : j + 4], key)]
    return {"words": hexadecimal(words, "uint32")}


def stream(i: Values) -> Values:
    return {"stream": hexadecimal([oracle.stream_of(i["name"])], "uint32")}


def drawn_from(i: Values) -> tuple[int, int, int]:
    return int(i["seed"], 16), int(i["stream"], 16), int(i["sample"], 16)


def uniform(i: Values) -> Values:
    u = oracle.uniform(*drawn_from(i), oracle.whole(i["n"]))
    return {"y": hexadecimal([oracle.rounded(x) for x in u], "float32")}


def keep_mask(i: Values) -> Values:
    mask = oracle.keep_mask(*drawn_from(i), oracle.whole(i["n"]), float64(i["p"]))
    return {"mask": hexadecimal([int(keep) for keep in mask], "uint8")}


def permutation(i: Values) -> Values:
    order = oracle.permutation(int(i["seed"], 16), int(i["epoch"], 16), oracle.whole(i["n"]))
    return {"order": hexadecimal(order, "uint32")}


def init_adapter(i: Values) -> Values:
    a = oracle.init_adapter(int(i["seed"], 16), i["name"], i["in_features"], i["rank"], i["dtype"])
    return {"A": hexadecimal(a, i["dtype"])}


def init_matrix(i: Values) -> Values:
    y = oracle.init_matrix(int(i["seed"], 16), i["name"], oracle.whole(i["n"]))
    return {"y": hexadecimal([float32_bits(x) for x in y], "float32")}


def adapter(i: Values, features: int) -> oracle.Adapter:
    rank, dtype, p = i["rank"], i["adapter_dtype"], float64(i["dropout"])
    oracle.check_dtype(dtype, ("float32", "bfloat16"))
    scale = oracle.adapter_scale(rank, float64(i["alpha"]), i["rslora"])
    seed, stream_id = int(i["seed"], 16), int(i["stream"], 16)
    return oracle.Adapter(
        matrix(bits_of(i["A"], dtype), dtype, features),
        matrix(bits_of(i["B"], dtype), dtype, rank),
        scale,
        oracle.dropped_elements(seed, stream_id, i["lengths"], i["samples"], features, p),
        1 - oracle.drop_threshold(p) / 65536,
    )


def layer(i: Values, weight: list[int]) -> tuple[Matrix, Matrix, oracle.Adapter]:
    """x, W and the adapter of a layer whose weight has these bits of its dtype."""
    features = i["shape"][1]
    x = matrix(bits_of(i["x"], "float32"), "float32", features)
    return x, matrix(weight, i["dtype"], features), adapter(i, features)


def bias_of(i: Values) -> list[int]:
    bias = bits_of(i.get("bias", "00000000" * i["shape"][0]), "float32")
    oracle.check_count("bias", len(bias), i["shape"][0])
    return bias


def lora_forward(i: Values) -> Values:
    bias = bias_of(i)
    x, weight, lora = layer(i, decoded(i, bits_of(i["absmax"], "float32")))
    return {"y": flat(oracle.lora_forward(x, weight, matrix(bias, "float32", len(bias))[0], lora))}


def lora_backward(i: Values) -> Values:
    bias_of(i)
    dout = matrix(bits_of(i["dout"], "float32"), "float32", i["shape"][0])
    gradients = oracle.lora_backward(dout, *layer(i, decoded(i, bits_of(i["absmax"], "float32"))))
    return {name: flat(rows) for name, rows in zip(("dx", "dA", "dB"), gradients, strict=True)}


def scalars(i: Values, updates: int, dimensions: int) -> oracle.Scalars:
    rates = oracle.Rates(*(int(i[name], 16) for name in oracle.Rates._fields))
    return oracle.scalars(rates, updates, dimensions)


def adamw(i: Values) -> Values:
    states = [bits_of(i[name], "float32") for name in ("g", "m", "v")]
    oracle.check_count("p", len(bits_of(i["p"], i["dtype"])), oracle.counted(i["shape"]))
    c = scalars(i, oracle.whole(i["updates"]), len(i["shape"]))
    p, m, v = oracle.adamw(c, i["dtype"], bits_of(i["p"], i["dtype"]), *states)
    return {
        "p": hexadecimal(p, i["dtype"]),
        "m": hexadecimal(m, "float32"),
        "v": hexadecimal(v, "float32"),
    }


def learning_rate(i: Values) -> Values:
    numbers = (oracle.whole(i[name]) for name in ("step", "steps", "warmup"))
    rate = oracle.learning_rate(*numbers, i["schedule"], float64(i["lr"]))
    return {"lr": float64_bits(rate)}


def clip(i: Values) -> Values:
    gradients = {name: bits_of(array["data"], array["dtype"]) for name, array in i["gradients"].items()}
    norm, after = oracle.clip(gradients, float64(i["max_norm"]))
    arrays = {
        name: array | {"data": hexadecimal(after[name], "float32")} for name, array in i["gradients"].items()
    }
    return {"norm": float64_bits(norm), "gradients": arrays}


def example_order(i: Values) -> Values:
    numbers = (oracle.whole(i[name]) for name in ("examples", "first", "count", "batch"))
    order = oracle.example_order(int(i["seed"], 16), *numbers, i.get("lengths"))
    return {"order": hexadecimal(order, "uint32")}


def held_out(i: Values) -> Values:
    return {"order": hexadecimal(oracle.held_out(int(i["seed"], 16), i["examples"]), "uint32")}


def loss(i: Values) -> Values:
    bits = bits_of(i["logits"], "float32")
    oracle.check_finite("logit", bits)
    total, gradient = oracle.loss(matrix(bits, "float32", i["vocabulary"]), i["targets"])
    return {"loss": float64_bits(total), "dlogits": flat(gradient)}


def lora_step(i: Values) -> Values:
    """Quantize, run the layer, take the loss of its outputs as logits, and update the adapter."""
    weight = bits_of(i["weight"], i["dtype"])
    kind = (i["dtype"], i["block_size"], i["codebook"])
    codes, absmax = oracle.quantize(weight, *kind)
    if i["double_quant"]:
        absmax = oracle.decode_absmax(*oracle.encode_absmax(absmax), oracle.DYNAMIC_MAP)
    x, decoded_weight, lora = layer(i, oracle.dequantize(codes, absmax, len(weight), *kind))
    logits = oracle.lora_forward(x, decoded_weight, [0.0] * i["shape"][0], lora)
    total, dlogits = oracle.loss(logits, i["targets"])
    dx, da, db = oracle.lora_backward(dlogits, x, decoded_weight, lora)
    gradients = {
        name: [float32_bits(x) for row in rows for x in row] for name, rows in (("A", da), ("B", db))
    }
    norm, clipped = oracle.clip(gradients, float64(i["max_norm"]))
    out = {"loss": float64_bits(total), "dx": flat(dx), "dA": flat(da), "dB": flat(db)}
    out["norm"] = float64_bits(norm)
    c, dtype = scalars(i, 0, 2), i["adapter_dtype"]
    for name, gradient in clipped.items():
        zeros = [0] * len(gradient)
        p, _, _ = oracle.adamw(c, dtype, bits_of(i[name], dtype), gradient, zeros, zeros)
        out[name] = hexadecimal(p, dtype)
    return out


def merge(i: Values) -> Values:
    columns, dtype = i["shape"][1], i["dtype"]
    oracle.check_dtype(dtype)
    weight = matrix(bits_of(i["weight"], dtype), dtype, columns)
    a = matrix(bits_of(i["A"], "float32"), "float32", columns)
    b = matrix(bits_of(i["B"], "float32"), "float32", i["rank"])
    merged = oracle.merge(weight, a, b, float64(i["scale"]))
    y = [oracle.narrow(float32_bits(x), dtype) for row in merged for x in row]
    oracle.check_finite("merged element", [oracle.widen(bits, dtype) for bits in y])
    return {"y": hexadecimal(y, dtype)}


# The values on the way (NF4-13.1), by the names of the clauses


def scaling_steps(x: list[int], block_size: int) -> Values:
    _, reciprocals, s = oracle.scale(x, block_size)
    return {"reciprocal": hexadecimal(reciprocals, "float32"), "s": hexadecimal(s, "float32")}


def quantize_steps(i: Values) -> Values:
    x = [oracle.widen(bits, i["dtype"]) for bits in bits_of(i["x"], i["dtype"])]
    thresholds, _ = oracle.ranks_of(oracle.codebook(i["codebook"]))
    _, _, s = oracle.scale(x, i["block_size"])
    ranks = hexadecimal(oracle.ranks(s, thresholds), "uint8")
    return {**scaling_steps(x, i["block_size"]), "ranks": ranks}


def centred_steps(absmax: list[int]) -> Values:
    centred = oracle.centred(absmax, oracle.mean(absmax))
    return {"centred": hexadecimal(centred, "float32"), **scaling_steps(centred, 256)}


def encode_absmax_steps(i: Values) -> Values:
    return centred_steps(bits_of(i["absmax"], "float32"))


def quantize_double_steps(i: Values) -> Values:
    x = bits_of(i["x"], i["dtype"])
    _, absmax = oracle.quantize(x, i["dtype"], i["block_size"], i["codebook"])
    return {"absmax": hexadecimal(absmax, "float32"), **centred_steps(absmax)}


def decode_absmax_steps(i: Values) -> Values:
    codes, scales = bits_of(i["absmax_codes"], "uint8"), bits_of(i["nested_absmax"], "float32")
    products = oracle.products(codes, scales, 256, bits_of(i["map"], "float32"))
    return {"product": hexadecimal(products, "float32")}


def product_steps(i: Values, absmax: list[int]) -> Values:
    codes = oracle.unpack(bytes.fromhex(i["codes"]), math.prod(i["shape"]))
    products = oracle.products(codes, absmax, i["block_size"], oracle.codebook(i["codebook"]))
    return {"product": hexadecimal(products, "float32")}


def dequantize_steps(i: Values) -> Values:
    return product_steps(i, bits_of(i["absmax"], "float32"))


def dequantize_double_steps(i: Values) -> Values:
    absmax = decoded_absmax(i)
    return {"absmax": hexadecimal(absmax, "float32"), **product_steps(i, absmax)}


def permutation_steps(i: Values) -> Values:
    return {"draws": hexadecimal(oracle.draws(int(i["seed"], 16), int(i["epoch"], 16), i["n"]), "uint64")}


def layer_steps(i: Values) -> Values:
    absmax = bits_of(i["absmax"], "float32")
    drops = adapter(i, i["shape"][1]).dropped
    kept = [int(not drop) for row in drops for drop in row]
    return {"weight": hexadecimal(decoded(i, absmax), i["dtype"]), "kept": hexadecimal(kept, "uint8")}


def adamw_steps(i: Values) -> Values:
    states = [bits_of(i[name], "float32") for name in ("g", "m", "v")]
    c = scalars(i, i["updates"], len(i["shape"]))
    after = oracle.updates(c, i["dtype"], bits_of(i["p"], i["dtype"]), *states)
    return {
        "scalars": hexadecimal([c.step, c.root, c.decay], "float32"),
        "d": hexadecimal([x.d for x in after], "float32"),
        "u": hexadecimal([x.u for x in after], "float32"),
    }


STEPS: dict[str, Callable[[Values], Values]] = {
    "quantize": quantize_steps,
    "dequantize": dequantize_steps,
    "encode_absmax": encode_absmax_steps,
    "decode_absmax": decode_absmax_steps,
    "quantize_double": quantize_double_steps,
    "dequantize_double": dequantize_double_steps,
    "permutation": permutation_steps,
    "lora_forward": layer_steps,
    "lora_backward": layer_steps,
    "adamw": adamw_steps,
    **oracle_exact_port.STEPS,
    **oracle_step_port.STEPS,
}

OPERATIONS: dict[str, Callable[[Values], Values]] = {
    "codebook": the_codebook,
    "widen": widen,
    "narrow": narrow,
    "quantize": quantize,
    "dequantize": dequantize,
    "encode_absmax": encode_absmax,
    "decode_absmax": decode_absmax,
    "quantize_double": quantize_double,
    "dequantize_double": dequantize_double,
    "storage": storage,
    "philox": philox,
    "stream": stream,
    "uniform": uniform,
    "keep_mask": keep_mask,
    "permutation": permutation,
    "init_adapter": init_adapter,
    "init_matrix": init_matrix,
    "lora_forward": lora_forward,
    "lora_backward": lora_backward,
    "adamw": adamw,
    "learning_rate": learning_rate,
    "clip": clip,
    "example_order": example_order,
    "held_out": held_out,
    "loss": loss,
    "lora_step": lora_step,
    "merge": merge,
    **oracle_exact_port.OPERATIONS,
    **oracle_step_port.OPERATIONS,
}


def answer(operation: str, values: Values) -> Values:
    """What goes back beside the id."""
    if operation == "echo":
        return {"output": {"x": hexadecimal(bits_of(values["x"], values["dtype"]), values["dtype"])}}
    if operation not in OPERATIONS:
        return {"skipped": f"the oracle has no {operation}"}
    try:
        output = OPERATIONS[operation](values)
        steps = STEPS[operation](values) if operation in STEPS else {}
        return {"output": output, "steps": steps}
    except oracle.RefusedError as error:
        return {"refused": str(error)}
    except Exception as error:  # a port reports what went wrong and goes on
        return {"errored": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Read a request a line, write an answer a line."""
    for line in sys.stdin:
        request = json.loads(line)
        if request["cmd"] == "stop":
            return
        if request["cmd"] == "start":
            reply = {"version": 1, "name": "oracle", "operations": list(OPERATIONS)}
        else:
            reply = {"id": request["id"], **answer(request["operation"], request["input"])}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
