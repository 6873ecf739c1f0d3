"""What a port can be asked: each operation with the types of its inputs and outputs, as data (NF4-13.3).

A type is one of

- "float32", "float16", "bfloat16", "float64", "uint8", "uint32", "uint64": an array, flat, written as the
  hexadecimal bits of its elements one after the other (NF4-13.2); "=dtype" is an array of the dtype that the
  input field named so gives;
- "int", "bool", "str", "ints" (a list of integers), "strs": the JSON value itself;
- "dtype" ("float32", "float16" or "bfloat16"), "codebook" (a name) and "shape" (a list of sizes): likewise;
- "bytes": a file as hexadecimal; "files": an object of relative path to such a file;
- "arrays": an object of name to {"dtype", "shape", "data"}.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Operation:
    """One operation: the clauses it exercises, its fields and their types, and how outputs are compared.

    tolerance gives outputs that may differ a bound, relative to the largest magnitude of that output; the
    others are exact. A vector may state a wider one, never the kit. steps are values on the way that a vector
    may state and a port may answer.
    """

    clauses: tuple[str, ...]
    inputs: dict[str, str]
    outputs: dict[str, str]
    optional: frozenset[str] = frozenset()  # inputs that may be absent
    tolerance: dict[str, float] = field(default_factory=dict)
    steps: dict[str, str] = field(default_factory=dict)


_TENSOR = {"shape": "shape", "dtype": "dtype", "block_size": "int", "codebook": "codebook"}
_QUANTIZE = {"x": "=dtype", **_TENSOR}
_PLAIN = {"codes": "uint8", "absmax": "float32"}
_NESTED = {"absmax_codes": "uint8", "nested_absmax": "float32", "offset": "float32"}
_MAP = {"map": "float32"}
# reciprocal: RN(1 / absmax) by block, or of absmax * 2^64 where NF4-3.3 says so, 0 in a zero block
_SCALING = {"reciprocal": "float32", "s": "float32"}
_RANKED = {**_SCALING, "ranks": "uint8"}  # of the elements
_CENTRED = {"centred": "float32", **_SCALING}  # r of NF4-6.3, and its scaling by nested block
_DRAW = {"seed": "uint64", "stream": "uint32", "sample": "uint64"}
_LAYER = {
    "x": "float32",  # [T, in]
    **_PLAIN,
    **_TENSOR,  # the weight: shape [out, in]
    "bias": "float32",  # [out]; absent: none
    "A": "=adapter_dtype",  # [rank, in]
    "B": "=adapter_dtype",  # [out, rank]
    "adapter_dtype": "dtype",
    "rank": "int",
    "alpha": "float64",
    "rslora": "bool",
    "dropout": "float64",  # the probability p; 0 outside training
    "seed": "uint64",
    "stream": "uint32",
    "lengths": "ints",  # of the packed sequences; they sum to T
    "samples": "ints",  # the index of each sequence in the run
}
# the decoded weight, and 1 where dropout keeps an element of x
_LAYER_STEPS = {"weight": "=dtype", "kept": "uint8"}
_HEADS = {
    "q": "float32",  # [T, kv_heads * group * head_dim]
    "k": "float32",  # [T, kv_heads * head_dim]
    "v": "float32",
    "lengths": "ints",
    "kv_heads": "int",
    "group": "int",
    "head_dim": "int",
    "window": "int",  # absent: none
}
_ADAMW = {
    "lr": "float64",
    "beta1": "float64",
    "beta2": "float64",
    "eps": "float64",
    "weight_decay": "float64",
}

OPERATIONS: dict[str, Operation] = {
    "codebook": Operation(
        ("NF4-2.1", "NF4-2.2", "NF4-2.3"),
        {"codebook": "codebook"},
        {"values": "float32", "thresholds": "float32"},
    ),
    "widen": Operation(("NF4-7.1",), {"x": "=dtype", "dtype": "dtype"}, {"y": "float32"}),
    "narrow": Operation(("NF4-7.2", "NF4-7.3"), {"x": "float32", "dtype": "dtype"}, {"y": "=dtype"}),
    "quantize": Operation(("NF4-3", "NF4-5"), _QUANTIZE, _PLAIN, steps=_RANKED),
    "dequantize": Operation(("NF4-4",), _PLAIN | _TENSOR, {"y": "=dtype"}, steps={"product": "float32"}),
    "encode_absmax": Operation(("NF4-6.1", "NF4-6.3"), {"absmax": "float32"}, _NESTED, steps=_CENTRED),
    "decode_absmax": Operation(
        ("NF4-6.4",), _NESTED | _MAP, {"absmax": "float32"}, steps={"product": "float32"}
    ),
    "quantize_double": Operation(
        ("NF4-3", "NF4-6"), _QUANTIZE, {"codes": "uint8", **_NESTED}, steps={"absmax": "float32", **_CENTRED}
    ),
    "dequantize_double": Operation(
        ("NF4-4", "NF4-6.4"),
        {"codes": "uint8", **_NESTED, **_MAP, **_TENSOR},
        {"y": "=dtype"},
        steps={"absmax": "float32", "product": "float32"},
    ),
    "storage": Operation(
        ("NF4-5.4",), {"elements": "int", "block_size": "int", "double_quant": "bool"}, {"bytes": "int"}
    ),
    "philox": Operation(("NF4-11.1",), {"counter": "uint32", "key": "uint32"}, {"words": "uint32"}),
    "stream": Operation(("NF4-11.2",), {"name": "str"}, {"stream": "uint32"}),
    "uniform": Operation(("NF4-11.3",), {**_DRAW, "n": "int"}, {"y": "float32"}),
    "keep_mask": Operation(
        ("NF4-11.4",), {**_DRAW, "n": "int", "p": "float64"}, {"mask": "uint8"}
    ),  # 1: kept
    "permutation": Operation(
        ("NF4-11.5",),
        {"seed": "uint64", "epoch": "uint64", "n": "int"},
        {"order": "uint32"},
        steps={"draws": "uint64"},
    ),
    "init_adapter": Operation(
        ("NF4-9.3",),
        {"seed": "uint64", "name": "str", "in_features": "int", "rank": "int", "dtype": "dtype"},
        {"A": "=dtype"},
    ),
    "init_matrix": Operation(
        ("NF4-10.10",), {"seed": "uint64", "name": "str", "n": "int"}, {"y": "float32"}, tolerance={"y": 1e-6}
    ),
    "lora_forward": Operation(
        ("NF4-9.1", "NF4-9.2", "NF4-9.4"),
        _LAYER,
        {"y": "float32"},
        frozenset({"bias"}),
        {"y": 1e-5},
        _LAYER_STEPS,
    ),
    "lora_backward": Operation(
        ("NF4-9.5",),
        _LAYER | {"dout": "float32"},
        {"dx": "float32", "dA": "float32", "dB": "float32"},
        frozenset({"bias"}),
        {"dx": 1e-4, "dA": 1e-4, "dB": 1e-4},
        _LAYER_STEPS,
    ),
    "adamw": Operation(
        ("NF4-10.1", "NF4-10.2", "NF4-10.3", "NF4-10.4", "NF4-10.5"),
        {"p": "=dtype", "dtype": "dtype", "g": "float32", "m": "float32", "v": "float32"}
        | {"shape": "shape", "updates": "int"}  # t before this update
        | _ADAMW,
        {"p": "=dtype", "m": "float32", "v": "float32"},
        steps={"scalars": "float32", "d": "float32", "u": "float32"},  # scalars: step, root, decay
    ),
    "learning_rate": Operation(
        ("NF4-10.6",),
        {"step": "int", "steps": "int", "warmup": "int", "schedule": "str", "lr": "float64"},
        {"lr": "float64"},
        tolerance={"lr": 1e-15},
    ),
    "clip": Operation(
        ("NF4-10.7",),
        {"gradients": "arrays", "max_norm": "float64"},
        {"norm": "float64", "gradients": "arrays"},
        tolerance={"norm": 1e-12, "gradients": 2**-22},
    ),
    "example_order": Operation(
        ("NF4-10.8",),
        {
            "seed": "uint64",
            "examples": "int",
            "first": "int",
            "count": "int",
            "batch": "int",
            "lengths": "ints",
        },
        {"order": "uint32"},
        frozenset({"lengths"}),  # given where examples are grouped by length
    ),
    "held_out": Operation(("NF4-10.8",), {"seed": "uint64", "examples": "int"}, {"order": "uint32"}),
    "loss": Operation(
        ("NF4-10.9",),
        {"logits": "float32", "vocabulary": "int", "targets": "ints", "parts": "ints"},  # -100: no target
        {"loss": "float64", "dlogits": "float32"},
        tolerance={"loss": 1e-5, "dlogits": 1e-5},
    ),
    "lora_step": Operation(
        ("NF4-3", "NF4-9.2", "NF4-9.5", "NF4-10.4", "NF4-10.7", "NF4-10.9"),
        {name: kind for name, kind in _LAYER.items() if name not in _PLAIN and name != "bias"}
        | {"weight": "=dtype", "double_quant": "bool", "targets": "ints", "max_norm": "float64"}
        | _ADAMW,
        {
            "loss": "float64",
            "dx": "float32",
            "dA": "float32",
            "dB": "float32",
            "norm": "float64",
            "A": "=adapter_dtype",
            "B": "=adapter_dtype",
        },
        tolerance={"loss": 1e-5, "dx": 1e-4, "dA": 1e-4, "dB": 1e-4, "norm": 1e-4, "A": 1e-4, "B": 1e-4},
        steps=_LAYER_STEPS,
    ),  # dx, dA and dB before clipping, A and B after the first update
    "read_tensor": Operation(
        ("NF4-8.2", "NF4-8.4", "NF4-8.5"), {"file": "bytes", "name": "str"}, {"y": "arrays"}
    ),  # y: the decoded tensor under its name
    "write_tensor": Operation(
        ("NF4-8.3", "NF4-8.4"),
        {"name": "str", "codes": "uint8", "absmax": "float32", **_NESTED, **_TENSOR},
        {"file": "bytes"},
        frozenset({"absmax", *_NESTED}),  # either absmax or the three of its nested form
    ),
    "read_model": Operation(
        ("NF4-8.1", "NF4-8.9"), {"files": "files"}, {"tensors": "arrays"}
    ),  # the parameters under their Hugging Face names, those in 4 bits decoded, without a tied head
    "quantize_model": Operation(
        ("NF4-8.6",),
        {"files": "files", "block_size": "int", "codebook": "codebook", "double_quant": "bool"},
        {"files": "files"},
    ),
    "read_adapter": Operation(
        ("NF4-8.7", "NF4-9.6"),
        {"files": "files", "model": "files"},
        {"tensors": "arrays", "scales": "arrays"},
    ),  # model: the config.json of the model it is for; tensors: M.A and M.B of each module M in float32;
    # scales: float64 [1] by module
    "merge": Operation(
        ("NF4-8.8",),
        {"weight": "=dtype", "shape": "shape", "dtype": "dtype", "A": "float32", "B": "float32"}
        | {"rank": "int", "scale": "float64"},
        {"y": "=dtype"},
        tolerance={"y": 2**-20},
    ),
    "exact_product": Operation(
        ("NF4-14.2", "NF4-14.3"),
        {"a": "float32", "b": "float32", "shape": "shape"},  # M, K and N
        {"y": "float32"},
        steps={"rows": "float32", "columns": "float32"},  # a and b on their grids
    ),
    "exact_sum": Operation(
        ("NF4-14.4",), {"x": "float32", "y": "float32"}, {"sum": "float64"}, frozenset({"y"})
    ),  # of x, or of the products x * y
    "exact_exp": Operation(("NF4-14.5",), {"x": "float32"}, {"y": "float32"}),
    "exact_log": Operation(("NF4-14.6",), {"x": "float32"}, {"y": "float32"}),
    "exact_swiglu": Operation(("NF4-14.7",), {"gate": "float32", "up": "float32"}, {"y": "float32"}),
    "exact_swiglu_backward": Operation(
        ("NF4-14.7",),
        {"dout": "float32", "gate": "float32", "up": "float32"},
        {"dgate": "float32", "dup": "float32"},
    ),
    "exact_softmax": Operation(("NF4-14.8",), {"z": "float32", "columns": "int"}, {"p": "float32"}),
    "exact_softmax_backward": Operation(
        ("NF4-14.8",), {"dout": "float32", "p": "float32", "columns": "int"}, {"dz": "float32"}
    ),
    "exact_rms_norm": Operation(
        ("NF4-14.9",),
        {"x": "float32", "weight": "float32", "eps": "float64"},
        {"y": "float32", "rstd": "float32"},  # rstd: r by row
    ),
    "exact_rms_norm_backward": Operation(
        ("NF4-14.9",),
        {"dout": "float32", "x": "float32", "weight": "float32", "rstd": "float32"},
        {"dx": "float32"},
    ),
    "exact_cross_entropy": Operation(
        ("NF4-14.10",),
        {"logits": "float32", "vocabulary": "int", "targets": "ints"},
        {"losses": "float32", "loss": "float64", "dlogits": "float32"},
    ),
    "exact_rotate": Operation(
        ("NF4-14.11",),
        {"x": "float32", "cos": "float32", "sin": "float32", "head_dim": "int", "inverse": "bool"},
        {"y": "float32"},
    ),  # x [T, heads, head_dim], cos and sin [T, head_dim / 2]
    "exact_linear": Operation(
        ("NF4-15.1",),
        _LAYER,
        {"y": "float32"},
        frozenset({"bias"}),
        steps={**_LAYER_STEPS, "z": "float32"},
    ),
    "exact_linear_backward": Operation(
        ("NF4-15.1",),
        _LAYER | {"dout": "float32"},
        {"dx": "float32", "dA": "float32", "dB": "float32"},  # dA and dB by sequence
        frozenset({"bias"}),
        steps={**_LAYER_STEPS, "z": "float32", "e": "float32"},
    ),
    "exact_attention": Operation(
        ("NF4-15.2",), _HEADS, {"y": "float32"}, frozenset({"window"}), steps={"p": "float32"}
    ),
    "exact_attention_backward": Operation(
        ("NF4-15.2",),
        {"dout": "float32", **_HEADS},
        {"dq": "float32", "dk": "float32", "dv": "float32"},
        frozenset({"window"}),
        steps={"p": "float32", "e": "float32"},
    ),
    "rotation_table": Operation(
        ("NF4-15.3",),
        {"rope": "str", "head_dim": "int", "max_positions": "int", "length": "int"},
        {"cos": "float32", "sin": "float32"},
    ),  # rope: the JSON text of the keys of config.json that concern it
    "exact_gradient": Operation(
        ("NF4-15.6",), {"gradients": "float32", "count": "int"}, {"sum": "float32"}
    ),  # gradients [count, n]
    "exact_clip": Operation(
        ("NF4-15.7",),
        {"gradients": "arrays", "max_norm": "float64"},
        {"norm": "float64", "gradients": "arrays"},
    ),
    "exact_learning_rate": Operation(
        ("NF4-15.8",),
        {"step": "int", "steps": "int", "warmup": "int", "schedule": "str", "lr": "float64"},
        {"lr": "float64"},
    ),
    "exact_step": Operation(
        ("NF4-15.4", "NF4-15.5", "NF4-15.6", "NF4-15.7", "NF4-15.9"),
        {
            "config": "str",  # the JSON text of config.json
            "tensors": "arrays",  # the model's, by their Hugging Face names
            "block_size": "int",
            "codebook": "codebook",
            "double_quant": "bool",
            "adapters": "arrays",  # M.A and M.B of each module M
            "alpha": "float64",
            "rslora": "bool",
            "dropout": "float64",
            "seed": "uint64",
            "ids": "ints",
            "targets": "ints",
            "lengths": "ints",
            "samples": "ints",
            "max_norm": "float64",
        }
        | _ADAMW,
        {
            "losses": "float32",
            "loss": "float64",
            "gradients": "arrays",
            "norm": "float64",
            "adapters": "arrays",
        },
        steps={"values": "arrays"},
    ),  # gradients before clipping, adapters after a first update
}
