"""The vectors of chapter 15: layers, attention, rotations, the update, and whole steps of small models."""

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.conform.generate import make
from nf4.conform.generate.exact import numbers
from nf4.conform.generate.lora import Layer
from nf4.conform.vectors import Vector
from nf4.exact import grid, ops
from nf4.floats import DTYPES
from nf4.model.config import LlamaConfig
from nf4.model.llama import TARGETS, parameter_shapes
from nf4.random import drop_threshold

Array = NDArray[Any]
Float32 = NDArray[np.float32]
Fields = dict[str, Any]


def vectors() -> Iterator[Vector]:
    """Yield the vectors of layers, attention, rotations, sums, clipping, rates and steps."""
    yield from _linear()
    yield from _linear_backward()
    yield from _attention()
    yield from _tables()
    yield from _gradients()
    yield from _clip()
    yield from _rates()
    yield from _steps()
    yield from _refused_steps()


def _floats(*values: float) -> Float32:
    return np.array(values, np.float32)


# Linear layers

PACKED: Fields = {
    "shape": (6, 10),
    "rank": 2,
    "block_size": 32,
    "dropout": 0.3,
    "alpha": 3.0,
    "lengths": (2, 1, 3),
    "samples": (5, 6, 1_000_000),
}


def _layer_steps(layer: Layer) -> Fields:
    """weight, kept, z and e of NF4-15.1."""
    dropout = float(layer.settings["dropout"][0])
    c = np.float32(layer.scale * (65536 / (65536 - drop_threshold(dropout))))
    z = c * grid.product(np.where(layer.mask, layer.x, np.float32(0)), layer.A.astype(np.float32).T)
    e = c * grid.product(layer.dout, layer.B.astype(np.float32))
    return {**layer.steps, "z": z, "e": e}


def _linear() -> Iterator[Vector]:
    def linear(slug: str, comment: str, flags: str, **options: Any) -> Vector:
        layer = Layer(f"exact-linear-{slug}", **({"shape": (6, 10), "lengths": (3,)} | options))
        steps = {name: step for name, step in _layer_steps(layer).items() if name != "e"}
        return make(
            "exact_linear", f"exact-linear-{slug}", "15.1", comment, layer.fields, flags=flags, steps=steps
        )

    yield linear("plain", "Rank 4, alpha 8: c is 2.", "ScaleMissing AdapterTransposed ProductOrder")
    yield linear(
        "bias",
        "A bias, an alpha that is no power of two.",
        "BiasLast BiasOmitted ScaleAfterB",
        bias=True,
        alpha=3.0,
    )
    yield linear(
        "bfloat16",
        "A weight and adapters in bfloat16, rsLoRA.",
        "WeightNotRounded IntermediateRounded ScaleRule ScaleAfterB",
        dtype="bfloat16",
        adapter_dtype="bfloat16",
        rslora=True,
        rank=3,
    )
    yield linear(
        "dropout",
        "Packed sequences with dropout: c is RN of alpha / r times 65536 / 45875.",
        "DropoutDivides FactorRoundedTwice DropoutOnWeight MaskRestart MaskPacked ScaleAfterB",
        bias=True,
        **PACKED,
    )
    yield linear(
        "dropout-rare",
        "p = 0.99.",
        "DropoutScale",
        dropout=0.99,
        lengths=(6,),
        shape=(4, 32),
        block_size=32,
        rank=2,
    )
    yield linear("dropout-small", "p below 2^-17 drops nothing: c is RN(s).", "", dropout=7e-6, alpha=3.0)
    layer = Layer("exact-linear-refused", shape=(6, 10), lengths=(3,))
    infinite, huge = layer.x.copy(), layer.x.copy()
    infinite[1, 3], huge[1, 3] = np.inf, 3e38
    broken = layer.A.copy()
    broken[0, 3] = 3e38
    empty: Fields = {"lengths": [3, 0], "samples": [0, 1], "dropout": np.array([0.3])}
    none: Fields = {"lengths": [], "samples": [], "x": layer.x[:0]}
    one: Fields = {"bias": _floats(1)}
    for slug, fields, why, flags in (
        ("infinity", {"x": infinite}, "x has an infinity.", "NonFiniteAccepted"),
        ("z", {"x": huge, "A": broken}, "Z is infinite, and the operand of a product.", ""),
        ("alpha", {"alpha": np.array([1e300])}, "c is infinite, and so is Z.", ""),
        ("rank", {"rank": 0, "A": layer.A[:0], "B": layer.B[:, :0]}, "The rank is 0.", ""),
        ("rows", {"lengths": [2]}, "There are three rows, and sequences of two.", ""),
        ("length-0", empty, "A sequence has no rows.", "EmptySequenceAccepted"),
        ("no-sequence", none, "There is no sequence.", "EmptySequenceAccepted"),
        ("sample", {"samples": [-1]}, "The sample is negative.", "NegativeAccepted"),
        ("bias", one, "The bias has one element, and there are six outputs.", "LengthAccepted"),
    ):
        yield make(
            "exact_linear",
            f"exact-linear-refused-{slug}",
            "15.1 14.1",
            "Not a layer.",
            layer.fields | fields,
            flags=flags,
            refused=why,
        )


def _linear_backward() -> Iterator[Vector]:
    def backward(slug: str, comment: str, flags: str, layer: Layer) -> Vector:
        fields = layer.fields | {"dout": layer.dout}
        return make(
            "exact_linear_backward",
            f"exact-linear-backward-{slug}",
            "15.1",
            comment,
            fields,
            flags=flags,
            steps=_layer_steps(layer),
        )

    def of(slug: str, **options: Any) -> Layer:
        return Layer(f"exact-linear-backward-{slug}", **({"shape": (6, 10), "lengths": (3,)} | options))

    yield backward("plain", "Rank 4, alpha 8.", "ScaleMissing ProductOrder", of("plain"))
    yield backward("alpha", "c is 3/4.", "ScaleAfterB", of("alpha", alpha=3.0, bias=True))
    yield backward(
        "bfloat16",
        "A weight and adapters in bfloat16.",
        "WeightNotRounded",
        of("bfloat16", dtype="bfloat16", adapter_dtype="bfloat16"),
    )
    yield backward(
        "dropout",
        "Three packed sequences, each with its dA and dB.",
        "DropoutDivides FactorRoundedTwice GradientByBatch MaskNotInBackward MaskPacked MaskRestart",
        of("dropout", **PACKED),
    )
    infinite = of("dropped-infinite", **PACKED)
    column = int(np.argwhere(~infinite.mask & (np.arange(10) > 2))[0, 1])
    infinite.x[:, column], infinite.A[:, column], infinite.B[...] = 1e-30, 3e38, infinite.B * _floats(900)
    yield backward(
        "dropped-infinite",
        "A column of the product of E and A is infinite: what drops out of it is +0 all the same.",
        "DroppedMultiplied",
        infinite,
    )
    infinite = of("x-infinite", **PACKED)
    infinite.x[tuple(np.argwhere(~infinite.mask)[1])] = np.inf
    yield backward(
        "x-infinite",
        "X is infinite where it is dropped: forward refuses it, backward does not meet it.",
        "DroppedMultiplied",
        infinite,
    )
    plain = of("refused")
    fields = plain.fields | {"dout": plain.dout}
    empty = {"lengths": [0, 3], "samples": [0, 1]}
    for slug, change, flags, why in (
        ("nan", {"dout": _floats(*[np.nan] * 18)}, "NonFiniteAccepted", "dout has a NaN."),
        ("infinity", {"x": infinite.x[:3]}, "NonFiniteAccepted", "x has an infinity."),
        ("length-0", empty, "EmptySequenceAccepted", "A sequence has no rows."),
        ("bias", {"bias": _floats(1, 2, 3)}, "LengthAccepted", "The bias has three elements, not six."),
    ):
        yield make(
            "exact_linear_backward",
            f"exact-linear-backward-refused-{slug}",
            "15.1 14.1",
            "Not a gradient." if slug == "nan" else "Not a layer.",
            fields | change,
            flags=flags,
            refused=why,
        )


# Attention


def _heads(slug: str, lengths: list[int], kv: int, group: int, dim: int, window: int | None = None) -> Fields:
    """Fields of exact_attention, with a gradient."""
    rows = sum(lengths)
    fields: Fields = {
        "dout": numbers(f"{slug}.dout", rows, kv * group * dim),
        "q": numbers(f"{slug}.q", rows, kv * group * dim, scale=3),
        "k": numbers(f"{slug}.k", rows, kv * dim, scale=3),
        "v": numbers(f"{slug}.v", rows, kv * dim),
        "lengths": lengths,
        "kv_heads": kv,
        "group": group,
        "head_dim": dim,
    }
    return fields if window is None else fields | {"window": window}


def _attention_steps(fields: Fields) -> Fields:
    """p and e of NF4-15.2, sequence after sequence and key-value head after key-value head."""
    kv, group, dim = fields["kv_heads"], fields["group"], fields["head_dim"]
    c = np.float32(1 / np.sqrt(np.float64(dim)))
    steps: dict[str, list[Float32]] = {"p": [], "e": []}
    for start, stop in pairwise([0, *np.cumsum(fields["lengths"])]):
        n = stop - start
        behind = np.arange(n)[:, None] - np.arange(n)
        hidden = (behind < 0) | (behind >= fields.get("window", n))
        for head in range(kv):
            q, dout = (
                fields[name][start:stop]
                .reshape(n, kv, group, dim)[:, head]
                .transpose(1, 0, 2)
                .reshape(-1, dim)
                for name in ("q", "dout")
            )
            k, v = (fields[name][start:stop].reshape(n, kv, dim)[:, head] for name in ("k", "v"))
            z = c * grid.product(q, k.T)
            p = ops.softmax(np.where(np.tile(hidden, (group, 1)), np.float32(-np.inf), z))
            steps["p"].append(p)
            steps["e"].append(c * ops.softmax_backward(grid.product(dout, v.T), p))
    return {name: np.concatenate([array.reshape(-1) for array in arrays]) for name, arrays in steps.items()}


def _attention() -> Iterator[Vector]:
    def both(slug: str, comment: str, flags: str, backward_flags: str, fields: Fields) -> Iterator[Vector]:
        forward = {name: value for name, value in fields.items() if name != "dout"}
        with np.errstate(over="ignore"):
            steps = _attention_steps(fields)
        name = "exact_attention"
        yield make(
            name, f"exact-attention-{slug}", "15.2", comment, forward, flags=flags, steps={"p": steps["p"]}
        )
        slug = f"exact-attention-backward-{slug}"
        yield make(f"{name}_backward", slug, "15.2", comment, fields, flags=backward_flags, steps=steps)

    order = "ProductOrder ScaleIntoQuery"
    groups = _heads("attention-groups", [3, 1, 4], 2, 2, 6)
    for name in "kv":  # what comes later has coarser grids
        groups[name] *= _floats(1, 4, 16, 1, 1, 4, 16, 64)[:, None]
    yield from both(
        "groups",
        "Two key-value heads of two query heads each, of sequences of 3, 1 and 4.",
        f"{order} CausalGrid HeadGrouping SequencesMixed ScoreScaleInFloat32",
        f"{order} CausalGrid HeadGrouping SequencesMixed GroupsSummed ScoreScaleLate ScoreScaleInFloat32",
        groups,
    )
    yield from both(
        "window",
        "A window of two positions.",
        f"{order} WindowInclusive SoftmaxReciprocal",
        f"{order} WindowInclusive ScoreScaleLate",
        _heads("attention-window", [5], 1, 2, 2, window=2),
    )
    yield from both(
        "window-1",
        "A window of one position: each sees itself alone.",
        "WindowInclusive",
        "WindowInclusive",
        _heads("attention-window-1", [3], 1, 2, 4, window=1),
    )
    hidden = _heads("attention-hidden", [2, 3], 1, 1, 4)
    hidden["q"][2], hidden["k"][4] = 2.0**70, 2.0**70
    yield from both("hidden-infinite", "A score that is hidden overflows.", "MaskAdded", "MaskAdded", hidden)
    small = _heads("attention-refused", [2], 1, 1, 2)
    del small["dout"]
    overflow, infinite = small["q"].copy(), small["v"].copy()
    overflow[1], infinite[1] = 3e38, np.inf
    flags = dict.fromkeys(("overflow", "infinity"), "NonFiniteAccepted")
    flags["no-sequence"] = "EmptySequenceAccepted"
    for slug, change, why in (
        ("overflow", {"q": overflow, "k": np.abs(overflow)}, "The greatest score of a row is infinite."),
        ("infinity", {"v": infinite}, "v has an infinity."),
        ("window", {"window": 0}, "The window is 0."),
        ("length-0", {"lengths": [2, 0]}, "A sequence has no rows."),
        ("no-sequence", {"lengths": [], **dict.fromkeys("qkv", _floats())}, "There is no sequence."),
        ("rows", {"lengths": [3]}, "There are two rows, and a sequence of three."),
        ("heads", {"group": 2}, "The rows of q have one head."),
    ):
        yield make(
            "exact_attention",
            f"exact-attention-refused-{slug}",
            "15.2 14.1",
            "Not an attention.",
            small | change,
            flags=flags.get(slug, ""),
            refused=why,
        )


# Rotations

YARN: Fields = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3: Fields = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG: Fields = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": 4,
    "short_factor": [1.0, 1.05, 1.3],
    "long_factor": [1.0, 2.7, 4.1],
}


def _tables() -> Iterator[Vector]:
    def table(
        slug: str,
        comment: str,
        flags: str,
        rope: Fields,
        dim: int,
        length: int,
        positions: int = 8,
        **more: Any,
    ) -> Vector:
        fields = {"rope": json.dumps(rope), "head_dim": dim, "max_positions": positions, "length": length}
        return make("rotation_table", f"rotation-{slug}", "15.3", comment, fields, flags=flags, **more)

    def scaled(**scaling: Any) -> Fields:
        return {"rope_theta": 500.0, "rope_scaling": scaling}

    in_float32 = "AngleInFloat32 FrequencyInFloat32"
    yield table("default", "No rope type, no theta: 10000.", in_float32, {}, 8, 7)
    yield table("one", "One position: an angle of 0.", "", {"rope_theta": 500000.0}, 4, 1)
    yield table("theta-integer", "A theta without a fraction.", in_float32, {"rope_theta": 1000000}, 6, 9)
    yield table(
        "float64-misses",
        "The last position has a cosine so near to the middle of two float32 that float64 misses it.",
        "AngleInFloat64",
        {"rope_theta": 5.1236},
        4,
        33,
    )
    parameters = {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}, "rope_theta": 7.0}
    yield table(
        "parameters", "theta of rope_parameters goes before the one outside.", in_float32, parameters, 4, 5
    )
    linear = scaled(type="linear", factor=3.0)
    yield table("linear", "Its type under the older key.", f"RopeScalingIgnored {in_float32}", linear, 6, 6)
    dynamic = scaled(rope_type="dynamic", factor=2.5)
    yield table("dynamic-short", "Within the model's length: theta stays.", "", dynamic, 6, 5)
    yield table(
        "dynamic-long", "Beyond it theta grows.", "RopeScalingIgnored RopeLengthIgnored", dynamic, 6, 11
    )
    yield table(
        "dynamic-huge",
        "A factor of 1e300, within the model's length: theta stays.",
        "DynamicGrowth",
        scaled(rope_type="dynamic", factor=1e300),
        6,
        5,
    )
    yield table(
        "dynamic-exact",
        "F - 1 is no float64: theta stays all the same.",
        "DynamicGrowth",
        scaled(rope_type="dynamic", factor=1e16 + 2),
        6,
        8,
    )
    yield table(
        "llama3", "Pairs kept, blended and divided.", "RopeScalingIgnored", scaled(**LLAMA3), 12, 5, 64
    )
    yarn, tiny = scaled(**YARN), "TableZeroSign"
    yield table("yarn", "m is 0.1 ln 4 + 1.", "RopeScalingIgnored FactorRounded", yarn, 12, 5, 64)
    for slug, comment, flags, change in (
        ("factor", "m is given.", "FactorRounded", {"attention_factor": 1.3}),
        ("mscale", "m is a quotient.", "FactorRounded", {"mscale": 1.5, "mscale_all_dim": 0.7}),
        ("one-mscale", "One mscale alone is not looked at.", "FactorRounded", {"mscale": 1.5}),
        (
            "betas",
            "Betas of its own, bounds not rounded.",
            "",
            {"truncate": False, "beta_fast": 4, "beta_slow": 1.5},
        ),
        ("step", "a is b.", "", {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False}),
        ("below-1", "A factor below 1: m is 1.", "", {"factor": 0.5}),
        ("no-factor", "F is the quotient of the lengths.", "", {"factor": None}),
        ("tiny-m", "What is not zero rounds to a zero of its sign.", tiny, {"attention_factor": 1e-300}),
        ("subnormal-m", "Subnormal entries.", "FactorRounded", {"attention_factor": 1e-43}),
    ):
        yield table(f"yarn-{slug}", comment, f"RopeScalingIgnored {flags}", scaled(**YARN | change), 8, 4, 48)
    nulls = {"partial_rotary_factor": None, "rope_type": None, "original_max_position_embeddings": None}
    yield table(
        "nulls",
        "A key of value null is absent, here and outside of the object.",
        "RopeScalingIgnored",
        {
            "rope_parameters": YARN | nulls | {"type": "yarn", "rope_theta": None, "mscale": None},
            "rope_theta": 500.0,
            "original_max_position_embeddings": 16,
            "partial_rotary_factor": 1,
        },
        8,
        4,
        48,
    )
    yield table(
        "empty-parameters",
        "Where rope_parameters is empty, rope_scaling counts.",
        "RopeScalingIgnored",
        {"rope_parameters": {}, "rope_scaling": {"type": "linear", "factor": 3}},
        6,
        4,
    )
    longrope = scaled(**LONG)
    yield table(
        "longrope-short", "Up to L, short_factor.", "RopeScalingIgnored FactorRounded", longrope, 6, 4
    )
    yield table(
        "longrope-long",
        "Beyond L, long_factor.",
        "RopeScalingIgnored FactorRounded",
        {**longrope, "original_max_position_embeddings": 3},
        6,
        4,
    )
    yield table(
        "longrope-length",
        "P is beyond L, the sequence is not.",
        "RopeLengthIgnored",
        {"rope_theta": 500.0, "rope_scaling": LONG | {"attention_factor": 1.1}},
        6,
        3,
    )
    yield table(
        "longrope-one",
        "L is 1; as m is given, nothing is divided by its logarithm.",
        "",
        scaled(**LONG | {"original_max_position_embeddings": 1, "attention_factor": 1.1}),
        6,
        2,
    )
    key = "original_max_position_embeddings"
    for slug, rope, dim, length, why in (
        ("type", scaled(rope_type="spiral"), 4, 2, "The rope type is not known."),
        ("theta", {"rope_theta": -1.0}, 4, 2, "theta is negative."),
        ("odd", {}, 3, 2, "head_dim is odd."),
        ("length", {}, 4, 0, "The sequence has no position."),
        ("dynamic", dynamic, 2, 2, "d - 2 is 0."),
        (
            "llama3",
            scaled(**LLAMA3 | {"high_freq_factor": 1.0}),
            4,
            2,
            "high_freq_factor is not above the other.",
        ),
        ("longrope", longrope, 4, 2, "The lists are not of two factors."),
        ("divided", scaled(**LONG | {"original_max_position_embeddings": 1}), 6, 2, "ln L is 0."),
        ("yarn", {"rope_theta": 1.0, "rope_scaling": YARN}, 4, 2, "ln theta is 0."),
        ("angle", scaled(rope_type="linear", factor=1e-6), 4, 2, "An angle is above 2^16."),
        ("factor", scaled(**YARN | {"attention_factor": 1e6}), 4, 2, "m is above 2^16."),
        ("mscale", scaled(**YARN | {"mscale": -1.0}), 4, 2, "mscale is negative, though it is not used."),
        ("point", scaled(**YARN | {key: 8192.0}), 4, 2, "L is written with a point."),
        ("inner-length", {key: 32, **scaled(**YARN | {key: 0})}, 4, 2, "L in the object is 0."),
        ("outer-length", {key: -1, **scaled(**YARN)}, 4, 2, "L outside of the object is negative."),
        (
            "outer-theta",
            {"rope_theta": 0.0, "rope_parameters": {"rope_theta": 500.0}},
            4,
            2,
            "theta outside of the object is 0.",
        ),
        (
            "partial",
            {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": None}},
            4,
            2,
            "partial_rotary_factor outside of the object is 1/2.",
        ),
        (
            "outer-partial",
            {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 1.0}},
            4,
            2,
            "partial_rotary_factor outside of the object is 1/2, though that in it is 1.",
        ),
        ("boolean", scaled(rope_type="linear", factor=True), 4, 2, "The factor is no number."),
        ("truncate", scaled(**YARN | {"truncate": 0}), 4, 2, "truncate is neither true nor false."),
    ):
        yield table(f"refused-{slug}", "Not a rotation.", "", rope, dim, length, refused=why)


# The update


def _gradients() -> Iterator[Vector]:
    def gradient(slug: str, comment: str, flags: str, gradients: Float32, count: int, **more: Any) -> Vector:
        fields = {"gradients": gradients, "count": count}
        slug = f"exact-gradient-{slug}"
        return make("exact_gradient", slug, "15.6", comment, fields, flags=flags, **more)

    def drawn(count: int) -> Float32:
        spread = np.ldexp(_floats(1), -np.arange(count * 5) % 4 * 7)
        return (numbers(f"exact-gradient-{count}", count * 5) * spread).astype(np.float32)

    sequential = "GradientSequential"
    for count, flags in (
        *((1, ""), (2, ""), (3, ""), (4, sequential)),
        *((n, f"{sequential} GradientHalves") for n in (5, 6, 7)),
    ):
        yield gradient(f"of-{count}", f"{count} arrays.", flags, drawn(count), count)
    yield gradient("of-none", "Arrays without elements.", "", _floats(), 3)
    yield gradient(
        "infinite", "Sums that overflow, and what is infinite.", "", _floats(3e38, 1, 3e38, np.inf), 2
    )
    yield gradient("refused-count", "Not gradients.", "", _floats(1), 0, refused="There is no gradient.")
    yield gradient(
        "refused-rest", "Not gradients.", "", _floats(1, 2, 3), 2, refused="3 is not a multiple of 2."
    )


def _clip() -> Iterator[Vector]:
    def clip(
        slug: str, comment: str, flags: str, gradients: dict[str, Array], max_norm: float, **more: Any
    ) -> Vector:
        fields = {"gradients": gradients, "max_norm": np.array([max_norm])}
        return make("exact_clip", f"exact-clip-{slug}", "15.7", comment, fields, flags=flags, **more)

    drawn = {
        f"model.layers.{name}.weight": numbers(f"exact-clip.{name}", *shape, scale=scale)
        for name, shape, scale in (
            ("10.mlp.up_proj.lora_A", (3, 4), 0.9),
            ("2.mlp.up_proj.lora_A", (12,), 0.1),
            ("2.mlp.up_proj.lora_B", (2, 2, 3), 0.5),
            ("2.self_attn.q_proj.lora_A", (1, 9), 0.8),
            ("2.self_attn.q_proj.lora_B", (7, 1), 0.2),
        )
    }
    yield clip("drawn", "Arrays of any shapes.", "NormOrder NormOfAll", drawn, 1.0)
    yield clip("below", "A norm below max_norm: nothing changes.", "ClipAlways NormOfAll", drawn, 1000.0)
    yield clip("zero", "A max_norm of 0 clips nothing.", "ClipZero", drawn, 0.0)
    yield clip("infinite-limit", "Nor does one that is infinite.", "", drawn, np.inf)
    one = {"a": _floats(3, 4)}
    yield clip(
        "epsilon", "c is max_norm / (norm + 1e-6), below 1 at a norm of max_norm.", "ClipEpsilon", one, 5.0
    )
    yield clip(
        "ties",
        "Squares that the grid of the largest loses.",
        "GridMissing",
        {"a": _floats(1, *[2.0**-21] * 6)},
        1.0,
    )
    yield clip("zeros", "A norm of 0.", "", {"a": _floats(0, -0.0), "b": _floats()}, 1.0)
    yield clip("none", "No arrays.", "", {}, 1.0)
    large = {"a": _floats(3e38, 3e38), "b": _floats(1e-40)}
    yield clip("large", "A norm beyond the range of float32.", "FlushSubnormal", large, 1e38)
    for slug, gradients, max_norm, flags, why in (
        ("nan", {"a": _floats(1, np.nan)}, 1.0, "NonFiniteAccepted", "A gradient has a NaN."),
        (
            "infinity",
            {"a": _floats(1), "b": _floats(-np.inf)},
            1.0,
            "NonFiniteAccepted",
            "A gradient is infinite.",
        ),
        ("negative", one, -1.0, "", "max_norm is negative."),
        ("limit-nan", one, math.nan, "", "max_norm is a NaN."),
        ("bfloat16", {"a": _floats(1).astype(DTYPES["bfloat16"])}, 1.0, "", "The gradient is bfloat16."),
    ):
        yield clip(f"refused-{slug}", "Not a gradient.", flags, gradients, max_norm, refused=why)


def _rates() -> Iterator[Vector]:
    def rate(
        slug: str, comment: str, flags: str, at: tuple[int, int, int], schedule: str, lr: float, **more: Any
    ) -> Vector:
        step, steps, warmup = at
        fields = {"step": step, "steps": steps, "warmup": warmup, "schedule": schedule, "lr": np.array([lr])}
        slug = f"exact-rate-{slug}"
        return make("exact_learning_rate", slug, "15.8", comment, fields, flags=flags, **more)

    lr = 2e-4
    yield rate("warm", "A warm-up of 7 steps.", "RateInFloat64", (3, 50, 7), "constant", 1e-3)
    yield rate("warm-start", "The first step of a warm-up.", "", (0, 50, 7), "cosine", lr)
    yield rate("constant", "lr itself.", "", (40, 50, 7), "constant", lr)
    yield rate("linear", "5/7 of lr, rounded once.", "RateInFloat64", (2, 7, 0), "linear", 0.7)
    yield rate("linear-after", "After a warm-up.", "ScheduleSpan RateInFloat64", (13, 31, 2), "linear", 0.3)
    yield rate("linear-end", "At the end of the run.", "", (9, 9, 0), "linear", lr)
    yield rate("cosine-half", "A cosine of 0: half of lr.", "", (5, 10, 0), "cosine", lr)
    yield rate("cosine-quarter", "A cosine of -1/2.", "RateInFloat64", (2, 3, 0), "cosine", lr)
    yield rate(
        "cosine-tie",
        "Three quarters of lr are a tie of two float64.",
        "",
        (3, 9, 0),
        "cosine",
        float.fromhex("0x1.0000000000002p+0"),
    )
    yield rate(
        "cosine-tie-odd",
        "A tie that goes the other way.",
        "",
        (1, 3, 0),
        "cosine",
        float.fromhex("0x1.5555555555556p-3"),
    )
    yield rate(
        "cosine-drawn",
        "No rational cosine.",
        "RateInFloat64 ScheduleSpan",
        (123, 1000, 10),
        "cosine",
        0.3,
    )
    yield rate("cosine-near-end", "1 + cos cancels.", "RateInFloat64", (9998, 10000, 100), "cosine", 1e-3)
    yield rate("cosine-past", "Past the end the cosine rises.", "", (14, 10, 0), "cosine", lr)
    yield rate("warm-all", "A warm-up as long as the run.", "", (10, 10, 10), "cosine", lr)
    yield rate("zero", "An lr of -0 has rates of +0.", "", (2, 10, 0), "constant", -0.0)
    yield rate("smallest", "Half of the smallest subnormal is a tie.", "", (5, 10, 0), "cosine", 5e-324)
    for slug, at, schedule, value, why in (
        ("schedule", (0, 1, 0), "step", lr, "The schedule is not known."),
        ("nan", (0, 1, 0), "constant", math.nan, "lr is a NaN."),
        ("infinite", (0, 1, 0), "constant", math.inf, "lr is infinite."),
        ("negative", (0, 1, 0), "constant", -lr, "lr is negative."),
        ("step", (-1, 1, 0), "linear", lr, "The step is negative."),
    ):
        yield rate(f"refused-{slug}", "Not a rate.", "", at, schedule, value, refused=why)


# Whole steps

SIZES: Fields = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
TINY: Fields = {
    "vocab_size": 9,
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 2,
}
MODULES = tuple(
    f"model.layers.{i}.{'self_attn' if target in TARGETS[:4] else 'mlp'}.{target}"
    for i in range(2)
    for target in TARGETS
)


def _step_fields(
    slug: str,
    kind: str,
    lengths: list[int],
    modules: tuple[str, ...] = MODULES,
    *,
    dtype: str = "float32",
    adapter_dtype: str = "float32",
    a_dtype: str | None = None,
    rank: int = 2,
    ignored: tuple[int, ...] = (),
    **options: Any,
) -> Fields:
    """Fields of exact_step; options that are no fields belong to config.json."""
    rates = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "max_norm": 1.0}
    fields: Fields = {
        "block_size": 32,
        "codebook": "nf4",
        "double_quant": False,
        "alpha": 3.0,
        "rslora": False,
        "dropout": 0.0,
        "seed": 7,
        "samples": list(range(5, 5 + len(lengths))),
    } | rates
    fields |= {name: options.pop(name) for name in list(options) if name in fields}
    for name in (*rates, "alpha", "dropout"):
        fields[name] = np.array([fields[name]])
    fields["seed"] = np.array([fields["seed"]], np.uint64)
    config = {"model_type": kind, **SIZES, **options}
    shapes = parameter_shapes(LlamaConfig.from_dict(config, slug))
    tokens = sum(lengths)
    drawn = numbers(f"{slug}.tokens", 2, tokens) * _floats(0.5) + _floats(0.5)
    ids, targets = np.floor(drawn * np.float32(config["vocab_size"])).astype(int).tolist()
    adapters = {}
    for module in modules:
        out, into = shapes[f"{module}.weight"]
        for side, shape, own in (
            ("A", (rank, into), a_dtype or adapter_dtype),
            ("B", (out, rank), adapter_dtype),
        ):
            adapters[f"{module}.{side}"] = numbers(f"{slug}.{module}.{side}", *shape, dtype=own)
    return {
        "config": json.dumps(config),
        "tensors": {name: _parameter(f"{slug}.{name}", shape, dtype) for name, shape in shapes.items()},
        "adapters": adapters,
        "ids": ids,
        "targets": [-100 if i in ignored else target for i, target in enumerate(targets)],
        "lengths": lengths,
        **fields,
    }


def _parameter(slug: str, shape: tuple[int, ...], dtype: str) -> Array:
    """A norm's weights near 1, others of either sign."""
    around = np.float32(1 if "norm" in slug.rsplit(".", 2)[-2] else 0)
    scale = 0.3 if around else 0.8
    return (numbers(slug, *shape, scale=scale) + around).astype(DTYPES[dtype])


def _steps() -> Iterator[Vector]:
    def step(slug: str, comment: str, flags: str, traced: bool = False, **more: Any) -> Vector:
        fields = _step_fields(f"exact-step-{slug}", **more)
        clauses = "15.9 15.4 15.5 15.6 15.7 15.1 15.2 15.3"
        return make("exact_step", f"exact-step-{slug}", clauses, comment, fields, flags=flags, traced=traced)

    order = "ProductOrder ScaleIntoQuery GroupsSummed CausalGrid SharedInputOrder FusedProjections"
    yield step(
        "llama",
        "All seven adapters of two layers, biases, a head of its own, dropout, three sequences.",
        f"{order} ResidualFirst BiasLast PositionsPacked SequencesMixed MaskPacked GradientByBatch"
        " LossScaleLate IgnoredCounted LossPerMicroBatch DropoutDivides ScaleAfterB NormOfAll HeadGrouping",
        kind="llama",
        lengths=[2, 1, 3],
        ignored=(3,),
        dropout=0.3,
        double_quant=True,
        attention_bias=True,
        mlp_bias=True,
        traced=True,
    )
    yield step(
        "qwen3",
        "Norms of q and k, a tied head, everything in bfloat16, rsLoRA, no clipping, weight decay.",
        f"{order} NormAfterRotation NormOfAllHeads WeightNotRounded BfloatRoundedTwice",
        kind="qwen3",
        lengths=[3, 1],
        ignored=(0,),
        dtype="bfloat16",
        adapter_dtype="bfloat16",
        rslora=True,
        max_norm=0.0,
        weight_decay=0.1,
        tie_word_embeddings=True,
        traced=True,
    )
    yield step(
        "mistral",
        "A window, fp4, adapters on q_proj and down_proj of the second layer alone.",
        "WindowInclusive",
        kind="mistral",
        lengths=[5],
        modules=(MODULES[7], MODULES[13]),
        dtype="float16",
        codebook="fp4",
        sliding_window=2,
    )
    yield step(
        "qwen2",
        "Biases of q, k and v; a window in the second layer; a rotation by llama3.",
        "WindowOfAllLayers RopeScalingIgnored WindowInclusive BiasLast",
        kind="qwen2",
        lengths=[4, 3],
        modules=MODULES[::3],
        dtype="float16",
        ignored=(3,),
        use_sliding_window=True,
        sliding_window=2,
        max_window_layers=1,
        rope_scaling=LLAMA3,
    )
    yield step(
        "six-sequences",
        "Six sequences, one of them without a target, whose gradients are added in pairs.",
        "GradientSequential GradientHalves GradientByBatch LossPerMicroBatch PositionsPacked",
        kind="llama",
        lengths=[2, 1, 3, 2, 2, 1],
        ignored=(0, 8, 9),
        num_hidden_layers=1,
        modules=MODULES[:4],
        dtype="bfloat16",
        dropout=0.1,
    )
    yield step(
        "adapter-dtypes",
        "A in bfloat16, B in float32: each is updated in its own.",
        "",
        kind="llama",
        lengths=[2, 1],
        modules=MODULES[:1],
        a_dtype="bfloat16",
        weight_decay=0.1,
        dtype="bfloat16",
        num_hidden_layers=1,
        **TINY,
    )
    for name, module in (("gate", MODULES[11]), ("v", MODULES[9]), ("o", MODULES[10])):
        yield step(
            f"lowest-{name}",
            f"The lowest adapter is that of {module.rpartition('.')[2]}, the only one.",
            "",
            kind="llama",
            lengths=[2, 2],
            modules=(module,),
            dtype="bfloat16",
            **TINY,
        )


def _refused_steps() -> Iterator[Vector]:
    fields = _step_fields(
        "exact-step-refused",
        "llama",
        [2, 1],
        MODULES[:1],
        dtype="bfloat16",
        rank=1,
        num_hidden_layers=1,
        **TINY,
    )
    tensors, adapters = fields["tensors"], fields["adapters"]
    module = MODULES[0]
    norm = "model.layers.0.post_attention_layernorm.weight"
    huge = tensors[norm].copy()
    huge[:] = 3e38
    lost = {name: tensor for name, tensor in tensors.items() if name != norm}
    for slug, change, flags, why in (
        ("overflow", {"tensors": {**tensors, norm: huge}}, "NonFiniteAccepted", "Activations overflow."),
        ("no-target", {"targets": [-100] * 3}, "", "There is no target."),
        ("target", {"targets": [1, 11, 0]}, "", "Target 11 is not in the vocabulary."),
        ("token", {"ids": [1, -1, 0]}, "", "Token -1 is not in the vocabulary."),
        ("lengths", {"lengths": [2, 2]}, "", "The sequences have four rows, and there are three."),
        ("samples", {"samples": [0]}, "", "Two sequences have one sample."),
        ("sample", {"samples": [0, -1]}, "NegativeAccepted", "A sample is negative."),
        ("length-0", {"lengths": [2, 0, 1], "samples": [0, 1, 2]}, "", "A sequence has no tokens."),
        ("tensor", {"tensors": lost}, "", "A norm is missing."),
        ("no-adapter", {"adapters": {}}, "", "There is no adapter."),
        ("half-adapter", {"adapters": {f"{module}.A": adapters[f"{module}.A"]}}, "", "B is missing."),
        (
            "adapter",
            {"adapters": {name.replace("q_proj", "x_proj"): a for name, a in adapters.items()}},
            "",
            "There is no layer of that name.",
        ),
        ("dropout", {"dropout": np.array([1.0])}, "DropoutRange", "p is 1."),
        ("max-norm", {"max_norm": np.array([-1.0])}, "", "max_norm is negative."),
        ("block-size", {"block_size": 96}, "", "The block size is 96."),
    ):
        yield make(
            "exact_step",
            f"exact-step-refused-{slug}",
            "15.9",
            "Not a step.",
            fields | change,
            flags=flags,
            refused=why,
        )
