"""The vectors of chapter 9: adapters, the LoRA layer forward and backward, a whole step of one.

What has a tolerance is worked out from the decoded weights by generate.exact, not by the reference.
"""

import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.conform import reference
from nf4.conform.generate import exact, make
from nf4.conform.generate.exact import numbers
from nf4.conform.values import NAMES
from nf4.conform.vectors import Vector
from nf4.floats import BFLOAT16, narrow
from nf4.random import drop_threshold, keep_mask, stream_of, uniform
from nf4.tensor import QuantizedTensor, dequantize, quantize

Array = NDArray[Any]

Q_PROJ = "model.layers.0.self_attn.q_proj"


def vectors() -> Iterator[Vector]:
    """Yield the vectors of adapters and of layers."""
    yield from _init_adapter()
    yield from _forward()
    yield from _backward()
    yield from _lora_step()


def _init_adapter() -> Iterator[Vector]:
    def init(
        slug: str, seed: int, size: tuple[int, int], comment: str, flags: str = "InitBound", **more: Any
    ) -> Vector:
        fields = {
            "seed": np.array([seed], np.uint64),
            "name": more.pop("name", Q_PROJ),
            "in_features": size[0],
            "rank": size[1],
            "dtype": more.pop("dtype", "float32"),
        }
        return make("init_adapter", f"init-{slug}", "9.3", comment, fields, flags=flags, **more)

    yield init("small", 0, (32, 4), "A [4, 32] in binary32.")
    yield init("one", 0, (1, 1), "One element, with the bound 1.")
    yield init("odd", 3, (7, 3), "A bound that is not a power of two, and a draw that ends within a block.")
    yield init("wide", 1 << 63, (300, 1), "Rank 1.", "InitBound SeedTruncated")
    yield init(
        "other-name",
        0,
        (32, 4),
        "Another module, other values.",
        "StreamHash",
        name="model.layers.1.mlp.down_proj",
    )
    yield init("bfloat16", 0, (32, 4), "A in bfloat16.", "InitBound TruncatedConversion", dtype="bfloat16")
    yield init(
        "rounded-twice",
        _seed_rounded_twice(24, 4),
        (24, 4),
        "An element whose product, rounded to binary32, is a tie of bfloat16, and the product itself is not.",
        "InitRoundedOnce",
        dtype="bfloat16",
    )
    for slug, size, dtype in (
        ("rank-0", (8, 0), "float32"),
        ("in-0", (0, 2), "float32"),
        ("float16", (8, 2), "float16"),
    ):
        refused = f"A of [{size[1]}, {size[0]}] in {dtype}."
        yield init(f"refused-{slug}", 0, size, "Not an adapter.", "", dtype=dtype, refused=refused)


def _seed_rounded_twice(in_features: int, rank: int) -> int:
    """The first seed under which rounding A to bfloat16 by way of binary32 shows."""
    bound = np.float64(np.float32(1 / math.sqrt(in_features)))
    for seed in range(1 << 16):
        exactly = (uniform(seed, stream_of(Q_PROJ), rank * in_features) * 2.0 - 1.0) * bound  # of 48 bits
        once = narrow(exactly.astype(np.float32), BFLOAT16)
        # The neighbours in binary32 towards and away from 0 tell on which side of a tie the product lies.
        bits = exactly.astype(np.float32).view(np.uint32)
        tie = (bits & 0xFFFF) == 0x8000
        up = np.abs(exactly) > np.abs(exactly.astype(np.float32))
        down = np.abs(exactly) < np.abs(exactly.astype(np.float32))
        even = once.view(np.uint16) == bits >> 16  # the tie went towards 0
        if np.any(tie & ((up & even) | (down & ~even))):
            return seed
    raise AssertionError("no such seed")


class Layer:
    """A LoRA layer with its inputs, as fields and as the float64 matrices that its clauses speak of."""

    def __init__(
        self,
        slug: str,
        *,
        shape: tuple[int, int] = (12, 16),
        rank: int = 4,
        alpha: float = 8.0,
        rslora: bool = False,
        dtype: str = "float32",
        adapter_dtype: str = "float32",
        codebook: str = "nf4",
        block_size: int = 64,
        double_quant: bool = False,
        bias: bool = False,
        zero_b: bool = False,
        dropout: float = 0.0,
        seed: int = 7,
        lengths: tuple[int, ...] = (5,),
        samples: tuple[int, ...] = (0,),
    ) -> None:
        out, into = shape
        rows = sum(lengths)
        self.x = numbers(f"{slug}.x", rows, into)
        self.source = numbers(f"{slug}.weight", out, into, scale=0.1, dtype=dtype)
        self.q: QuantizedTensor = quantize(self.source, block_size, codebook, double_quant)
        self.A = numbers(f"{slug}.A", rank, into, scale=0.2, dtype=adapter_dtype)
        self.B = numbers(f"{slug}.B", out, rank, scale=0.0 if zero_b else 0.1, dtype=adapter_dtype)
        self.bias = numbers(f"{slug}.bias", out) if bias else None
        self.dout = numbers(f"{slug}.dout", rows, out)
        stream = stream_of(Q_PROJ)
        self.mask = np.concatenate(
            [
                keep_mask(seed, stream, sample, n * into, dropout).reshape(n, into)
                for n, sample in zip(lengths, samples, strict=True)
            ]
        )
        self.kept = 1 - Fraction(drop_threshold(dropout), 65536)  # 1 - q
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.settings: dict[str, Any] = {
            "shape": list(shape),
            "dtype": dtype,
            "block_size": block_size,
            "codebook": codebook,
            "A": self.A,
            "B": self.B,
            "adapter_dtype": adapter_dtype,
            "rank": rank,
            "alpha": np.array([alpha]),
            "rslora": rslora,
            "dropout": np.array([dropout]),
            "seed": np.array([seed], np.uint64),
            "stream": np.array([stream], np.uint32),
            "lengths": list(lengths),
            "samples": list(samples),
        }
        self.fields = {"x": self.x, "codes": self.q.codes, "absmax": self.q.absmax, **self.settings}
        if self.bias is not None:
            self.fields["bias"] = self.bias
        self.weight = dequantize(self.q)
        self.steps: dict[str, Any] = {"weight": self.weight, "kept": self.mask.astype(np.uint8)}
        self.dropped = np.where(self.mask, self.x.astype(np.float64) / float(self.kept), 0.0)
        self.z = exact.matmul(self.dropped, self.A.T)

    def y(self) -> NDArray[np.float64]:
        """Y of NF4-9.2, [T, out]."""
        y = exact.matmul(self.x, self.weight.T) + self.scale * exact.matmul(self.z, self.B.T)
        return y if self.bias is None else y + self.bias

    def gradients(self, dout: Array) -> dict[str, NDArray[np.float64]]:
        """dx [T, in], dA [rank, in] and dB [out, rank] of NF4-9.5."""
        dz = self.scale * exact.matmul(dout, self.B)
        return {
            "dx": exact.matmul(dout, self.weight)
            + np.where(self.mask, exact.matmul(dz, self.A) / float(self.kept), 0.0),
            "dA": exact.matmul(dz.T, self.dropped),
            "dB": self.scale * exact.matmul(dout.T, self.z),
        }


def _single(found: dict[str, NDArray[np.float64]]) -> dict[str, Array]:
    return {name: value.astype(np.float32) for name, value in found.items()}


def _forward() -> Iterator[Vector]:
    layout = "AdapterTransposed ScaleMissing"

    def forward(slug: str, clauses: str, comment: str, flags: str, **options: Any) -> Vector:
        layer = Layer(f"forward-{slug}", **options)
        output = {"y": layer.y().astype(np.float32)}
        return make(
            "lora_forward",
            f"forward-{slug}",
            clauses,
            comment,
            layer.fields,
            flags=flags,
            output=output,
            steps=layer.steps,
        )

    yield forward("plain", "9.1 9.2 1.8", "Rank 4, alpha 8, a weight that was float32.", layout)
    yield forward(
        "square",
        "9.1 9.2",
        "Matrices that stay of their shape transposed.",
        "AdapterTransposed WeightTransposed",
        shape=(8, 8),
        rank=8,
        lengths=(8,),
        block_size=32,
    )
    yield forward("bias", "9.2", "With a bias.", "BiasOmitted", bias=True)
    yield forward(
        "bfloat16",
        "9.2",
        "A weight that was bfloat16 is rounded to it on decoding.",
        "WeightNotRounded",
        dtype="bfloat16",
    )
    yield forward(
        "float16",
        "9.2",
        "A weight that was float16 is rounded to it on decoding.",
        "WeightNotRounded",
        dtype="float16",
    )
    yield forward(
        "bfloat16-adapter",
        "9.1 9.2",
        "A and B in bfloat16; Z is not rounded to it.",
        "IntermediateRounded",
        adapter_dtype="bfloat16",
        dtype="bfloat16",
    )
    yield forward("rslora", "9.1 9.2", "s = alpha / sqrt(r).", "ScaleRule", rslora=True, rank=3)
    yield forward("alpha", "9.1", "An alpha that is not a whole number.", "ScaleRule", rank=3, alpha=0.7)
    yield forward(
        "zero-b", "9.2", "B is 0, as at the start of a run.", "WeightTransposed", zero_b=True, shape=(16, 16)
    )
    yield forward(
        "fp4",
        "9.2",
        "A weight in fp4, its blocks across rows.",
        "BlocksRestartAtRows",
        codebook="fp4",
        shape=(9, 10),
        block_size=32,
    )
    yield forward(
        "dropout",
        "9.2 9.4",
        "Dropout of one sequence; the weight sees X whole.",
        "LaneOrder DropoutOnWeight",
        dropout=0.1,
    )
    yield forward(
        "dropout-rare",
        "9.4",
        "p = 0.99: 1 - q is not 1 - p.",
        "DropoutScale",
        dropout=0.99,
        alpha=256.0,
        lengths=(16,),
        shape=(8, 32),
        samples=(3,),
    )
    yield forward(
        "dropout-small",
        "9.4",
        "p below 2^-17 drops nothing and divides by 1.",
        "",
        dropout=7e-6,
        shape=(8, 32),
    )
    packed: dict[str, Any] = {"shape": (7, 10), "rank": 2, "block_size": 32, "dropout": 0.4, "bias": True}
    yield forward(
        "packed",
        "9.4",
        "Three packed sequences, whose masks start anew and end within a block.",
        "MaskRestart MaskPacked",
        lengths=(2, 1, 3),
        samples=(5, 6, 1_000_000),
        **packed,
    )
    yield forward(
        "same-sample",
        "9.4",
        "A sequence alone has the mask it has among others.",
        "MaskRestart",
        lengths=(3,),
        samples=(1_000_000,),
        **packed,
    )
    plain = Layer("forward-refused").fields
    for slug, change, why in (
        ("dropout", {"dropout": np.array([1.0])}, "p is 1."),
        ("alpha", {"alpha": np.array([math.inf])}, "alpha is infinite."),
        ("rank", {"rank": 0, "A": plain["A"][:0], "B": plain["B"][:, :0]}, "The rank is 0."),
        (
            "float16-adapter",
            {
                "adapter_dtype": "float16",
                "A": plain["A"].astype(np.float16),
                "B": plain["B"].astype(np.float16),
            },
            "A and B are float16.",
        ),
    ):
        flags = "DropoutRange" if slug == "dropout" else ""
        yield make(
            "lora_forward",
            f"forward-refused-{slug}",
            "9.1",
            "Not an adapter.",
            plain | change,
            flags=flags,
            refused=why,
        )
    yield from _refused_rows("lora_forward", "forward", plain)


def _refused_rows(operation: str, slug: str, plain: dict[str, Any]) -> Iterator[Vector]:
    """Of a layer of 12 outputs and a sequence of 5 rows: none, one without rows, a bias too short."""
    arrays = {name: plain[name] for name in ("x", "dout") if name in plain}
    none: dict[str, Any] = {name: array[:0] for name, array in arrays.items()}
    p = {"dropout": np.array([0.1])}
    empty = "EmptySequenceAccepted"
    no_rows: dict[str, Any] = {"lengths": [5, 0], "samples": [0, 1], **p}
    no_sequence: dict[str, Any] = {"lengths": [], "samples": [], **none}
    for name, clauses, change, flags, why in (
        ("length-0", "9.2 9.4", no_rows, empty, "A sequence has no rows."),
        ("no-sequence", "9.2", no_sequence, empty, "There is no sequence."),
        ("sample", "1.4 9.4", {"samples": [-1], **p}, "NegativeAccepted", "The sample is negative."),
        ("bias", "12.5 9.2", {"bias": numbers("bias", 1)}, "LengthAccepted", "The bias has one element."),
    ):
        yield make(
            operation,
            f"{slug}-refused-{name}",
            clauses,
            "Not a layer.",
            plain | change,
            flags=flags,
            refused=why,
        )


def _backward() -> Iterator[Vector]:
    def backward(slug: str, comment: str, flags: str, **options: Any) -> Vector:
        layer = Layer(f"backward-{slug}", **options)
        output = _single(layer.gradients(layer.dout))
        fields = layer.fields | {"dout": layer.dout}
        return make(
            "lora_backward",
            f"backward-{slug}",
            "9.5",
            comment,
            fields,
            flags=flags,
            output=output,
            steps=layer.steps,
        )

    yield backward("plain", "Rank 4, alpha 8.", "ScaleMissing")
    yield backward(
        "square",
        "Matrices that stay of their shape transposed.",
        "AdapterTransposed WeightTransposed",
        shape=(8, 8),
        rank=8,
        lengths=(8,),
        block_size=32,
    )
    yield backward("bias", "A bias has no part in the gradients.", "", bias=True)
    yield backward(
        "rslora",
        "A weight and adapters in bfloat16, s = alpha / sqrt(r).",
        "ScaleRule WeightNotRounded",
        dtype="bfloat16",
        adapter_dtype="bfloat16",
        rslora=True,
        rank=3,
    )
    yield backward("zero-b", "B is 0: A gets no gradient yet, B does.", "", zero_b=True)
    yield backward(
        "dropout",
        "The mask of the forward pass, in dA, dB and dX.",
        "MaskNotInBackward LaneOrder",
        dropout=0.3,
    )
    yield backward(
        "dropout-rare",
        "p = 0.99: 1 - q is not 1 - p.",
        "DropoutScale MaskNotInBackward",
        dropout=0.99,
        alpha=256.0,
        lengths=(16,),
        shape=(8, 32),
        samples=(3,),
    )
    yield backward(
        "packed",
        "Packed sequences, whose masks start anew.",
        "MaskRestart MaskPacked MaskNotInBackward",
        shape=(7, 10),
        rank=2,
        block_size=32,
        dropout=0.4,
        lengths=(2, 1, 3),
        samples=(5, 6, 1_000_000),
    )
    plain = Layer("backward-refused")
    yield from _refused_rows("lora_backward", "backward", {**plain.fields, "dout": plain.dout})


def _lora_step() -> Iterator[Vector]:
    def step(slug: str, comment: str, flags: str, targets: list[int], **options: Any) -> Vector:
        constants = {
            "lr": 1e-2,
            "beta1": 0.9,
            "beta2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.0,
            "max_norm": 1.0,
        }
        constants |= {name: options.pop(name) for name in list(options) if name in constants}
        tolerance = options.pop("tolerance", None)
        # The first update moves by the sign of a gradient: none may be so near 0 that a tolerance turns it.
        for attempt in count():
            layer = Layer(f"step-{slug}-{attempt}", **options)
            value, dlogits = exact.cross_entropy(layer.y(), targets)
            found = layer.gradients(dlogits)
            if all(_smallest(found[name]) > 3e-4 for name in ("dA", "dB")):
                break
        gradients = [found["dA"], found["dB"]]
        norm = math.sqrt(math.fsum(float(x) ** 2 for g in gradients for x in g.reshape(-1)))
        c = constants["max_norm"] / (norm + 1e-6)
        factor = c if constants["max_norm"] > 0 and c < 1 else 1.0
        updated = {}
        for name, p, g in (("A", layer.A, found["dA"]), ("B", layer.B, found["dB"])):
            updated[name] = reference.adamw(
                p=p.reshape(-1),
                dtype=NAMES[p.dtype],
                g=(g * factor).astype(np.float32),
                m=np.zeros(p.size, np.float32),
                v=np.zeros(p.size, np.float32),
                shape=list(p.shape),
                updates=0,
                **{name: constants[name] for name in ("lr", "beta1", "beta2", "eps", "weight_decay")},
            )["p"]
        fields = {
            "x": layer.x,
            **layer.settings,
            "weight": layer.source,
            "double_quant": options.get("double_quant", False),
            "targets": targets,
            **{name: np.array([value]) for name, value in constants.items()},
        }
        output = {"loss": np.array([value]), **_single(found), "norm": np.array([norm]), **updated}
        return make(
            "lora_step",
            f"step-{slug}",
            "3.1 3.2 3.3 3.4 3.5 4.1 4.2 9.1 9.2 9.4 9.5 10.1 10.2 10.3 10.4 10.5 10.7 10.9",
            comment,
            fields,
            output=output,
            flags=flags,
            steps=layer.steps,
            tolerance=tolerance,
        )

    yield step(
        "double",
        "Six rows through a double-quantized NF4 weight [24, 32], with dropout, clipping and decay.",
        "BiasCorrection ScaleRule MaskNotInBackward",
        [3, 23, 0, 17, 8, 11],
        shape=(24, 32),
        double_quant=True,
        dropout=0.1,
        weight_decay=0.1,
        lengths=(2, 4),
        samples=(8, 9),
    )
    yield step(
        "bfloat16",
        "A weight and adapters in bfloat16, rsLoRA, no clipping.",
        "WeightNotRounded ScaleRule",
        [1, 5, 11, 0],
        dtype="bfloat16",
        adapter_dtype="bfloat16",
        rslora=True,
        max_norm=0.0,
        lengths=(4,),
        double_quant=True,
        tolerance={"A": 2**-7, "B": 2**-7},
    )
    yield step(
        "start",
        "The first step of a run: B is 0, some rows have no target, the codebook is fp4.",
        "IgnoredCounted",
        [-100, 5, 2, -100],
        codebook="fp4",
        zero_b=True,
        lengths=(1, 3),
        samples=(0, 1),
    )


def _smallest(g: NDArray[np.float64]) -> float:
    """The smallest magnitude of g above 0, relative to the largest; 1 where all are 0."""
    size = np.abs(g[g != 0])
    return float(size.min() / size.max()) if size.size else 1.0
