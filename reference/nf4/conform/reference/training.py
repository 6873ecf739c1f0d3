"""The operations of chapters 9 to 11 on the reference: random numbers, LoRA, AdamW, a training step."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4 import random
from nf4.codebooks import get_codebook
from nf4.errors import InputError
from nf4.floats import BFLOAT16, DTYPES, FLOAT32
from nf4.lora import Dropout, LoRA, LoRACache, LoRALinear, init_lora
from nf4.model.ops import IGNORED, cross_entropy
from nf4.tensor import QuantizedTensor, quantize
from nf4.train import data, init
from nf4.train.adamw import AdamW, clip_grad_norm
from nf4.train.schedule import learning_rate as rate_of_step

Array = NDArray[Any]
Outputs = dict[str, Any]
Scalar = Any
"""An array of one element, as fields of uint32, uint64 and float64 come, or the number itself."""


def philox(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> Outputs:
    """Return words uint32 [4] of counter uint32 [4] and key uint32 [2] (NF4-11.1)."""
    return {"words": random.philox4x32(counter.reshape(1, 4), (int(key[0]), int(key[1]))).reshape(-1)}


def stream(name: str) -> Outputs:
    """Return stream uint32 [1] of a module's name (NF4-11.2)."""
    return {"stream": np.array([random.stream_of(name)], np.uint32)}


def uniform(seed: Scalar, stream: Scalar, sample: Scalar, n: int) -> Outputs:
    """Return y float32 [n] (NF4-11.3)."""
    check_counts(n=n)
    return {"y": random.uniform(scalar(seed), scalar(stream), n, scalar(sample))}


def keep_mask(seed: Scalar, stream: Scalar, sample: Scalar, n: int, p: Scalar) -> Outputs:
    """Return mask uint8 [n], 1 where the element is kept (NF4-11.4)."""
    check_counts(n=n)
    mask = random.keep_mask(scalar(seed), scalar(stream), scalar(sample), n, scalar(p))
    return {"mask": mask.astype(np.uint8)}


def permutation(seed: Scalar, epoch: Scalar, n: int) -> Outputs:
    """Return order uint32 [n] (NF4-11.5)."""
    check_counts(n=n)
    return {"order": random.permutation(scalar(seed), scalar(epoch), n).astype(np.uint32)}


def init_adapter(seed: Scalar, name: str, in_features: int, rank: int, dtype: str) -> Outputs:
    """Return A [rank, in_features] in dtype (NF4-9.3)."""
    lora = init_lora(name, in_features, 1, rank, 1.0, 0.0, scalar(seed), dtype=_dtype(dtype))
    return {"A": lora.A}


def init_matrix(seed: Scalar, name: str, n: int) -> Outputs:
    """Return y float32 [n] (NF4-10.10)."""
    check_counts(n=n)
    return {"y": init.normal(scalar(seed), random.stream_of(name), n)}


def lora_forward(x: Array, **layer: Any) -> Outputs:
    """Return y [T, out] of x [T, in] and the fields of a layer (NF4-9.1, NF4-9.2, NF4-9.4)."""
    linear, dropout = linear_layer(**layer)
    return {"y": linear.forward(token_rows(x, layer["shape"][1], dropout), dropout)[0]}


def lora_backward(x: Array, dout: Array, **layer: Any) -> Outputs:
    """Return dx [T, in], dA [rank, in] and dB [out, rank] of dout [T, out] (NF4-9.5)."""
    linear, dropout = linear_layer(**layer)
    _, cache = linear.forward(token_rows(x, layer["shape"][1], dropout), dropout)
    return _gradients(linear, token_rows(dout, layer["shape"][0], dropout), cache)


def adamw(
    p: Array,
    dtype: str,
    g: NDArray[np.float32],
    m: NDArray[np.float32],
    v: NDArray[np.float32],
    shape: list[int],
    updates: int,
    lr: Scalar,
    beta1: Scalar,
    beta2: Scalar,
    eps: Scalar,
    weight_decay: Scalar,
) -> Outputs:
    """Return p, m and v after one more update; updates is their number before it (NF4-10.1 to NF4-10.5)."""
    if _dtype(dtype) not in (FLOAT32, BFLOAT16):
        raise InputError(f"AdamW updates float32 or bfloat16, not {dtype}")
    check_counts(shape=shape, updates=updates)
    params = {"p": p.reshape(shape).copy()}
    optimizer = AdamW(
        params, betas=(scalar(beta1), scalar(beta2)), eps=scalar(eps), weight_decay=scalar(weight_decay)
    )
    optimizer.restore(updates, {"p": m.reshape(shape)}, {"p": v.reshape(shape)})
    with np.errstate(over="ignore", under="ignore"):
        optimizer.step({"p": g.reshape(shape)}, scalar(lr))
    return {"p": params["p"], "m": optimizer.m["p"], "v": optimizer.v["p"]}


def learning_rate(step: int, steps: int, warmup: int, schedule: str, lr: Scalar) -> Outputs:
    """Return lr float64 [1] of a step (NF4-10.6)."""
    check_counts(step=step, steps=steps, warmup=warmup)
    rate = rate_of_step(step, steps=steps, lr=scalar(lr), schedule=schedule, warmup=warmup)
    return {"lr": np.array([rate])}


def clip(gradients: dict[str, Array], max_norm: Scalar) -> Outputs:
    """Return norm float64 [1], before clipping, and gradients, after it (NF4-10.7)."""
    clipped = {name: g.copy() for name, g in gradients.items()}
    return {"norm": np.array([_clip(clipped, scalar(max_norm))]), "gradients": clipped}


def example_order(
    seed: Scalar, examples: int, first: int, count: int, batch: int, lengths: list[int] | None = None
) -> Outputs:
    """Return order uint32 [count]: the examples of the sequences from number first on (NF4-10.8)."""
    if examples < 1:
        raise InputError(f"{examples} examples can't be put in an order; there must be at least one")
    check_counts(first=first, count=count, batch=batch, lengths=lengths or [])
    order = data.ordering(
        lengths if lengths is not None else [1] * examples,
        seed=scalar(seed),
        batch_size=batch,
        group_by_length=lengths is not None,
    )
    return {"order": np.array([order(n) for n in range(first, first + count)], np.uint32)}


def held_out(seed: Scalar, examples: int) -> Outputs:
    """Return order uint32 [max(1, examples // 10)]: the examples held out, as drawn (NF4-10.8)."""
    return {"order": data.held_out(scalar(seed), examples).astype(np.uint32)}


def loss(logits: NDArray[np.float32], vocabulary: int, targets: list[int], parts: list[int]) -> Outputs:
    """Return loss float64 [1] and dlogits [T, vocabulary] of logits in parts of so many rows (NF4-10.9)."""
    check_counts(parts=parts)
    rows = logits.reshape(-1, vocabulary)
    if len(rows) != len(targets) or sum(parts) != len(targets):
        raise InputError(f"{len(rows)} rows of logits, {len(targets)} targets, parts of {sum(parts)} in all")
    wanted = np.array(targets, np.int64)
    total = 0.0
    dlogits = np.zeros_like(rows)
    count = _targets(wanted, vocabulary)
    stop = 0
    for part in parts:
        start, stop = stop, stop + part
        learned = start + np.flatnonzero(wanted[start:stop] != IGNORED)
        gradient = rows[learned]
        total += cross_entropy(gradient, wanted[learned], 1.0 / count)
        dlogits[learned] = gradient
    if not math.isfinite(total):
        raise InputError(f"the loss is {total}; the run has diverged")
    return {"loss": np.array([total / count]), "dlogits": dlogits}


def lora_step(
    x: Array,
    weight: Array,
    double_quant: bool,
    targets: list[int],
    max_norm: Scalar,
    lr: Scalar,
    beta1: Scalar,
    beta2: Scalar,
    eps: Scalar,
    weight_decay: Scalar,
    **layer: Any,
) -> Outputs:
    """Return a step of a layer whose outputs are logits: quantize, forward, loss, backward, clip, AdamW.

    dx, dA and dB are those before clipping, A and B those after the first update (NF4-3, NF4-9.2, NF4-9.5,
    NF4-10.4, NF4-10.7, NF4-10.9).
    """
    out_features, in_features = layer["shape"]
    q = quantize(
        weight.reshape(layer["shape"]), layer["block_size"], layer["codebook"], double_quant=double_quant
    )
    linear, dropout = linear_layer(quantized=q, **layer)
    y, cache = linear.forward(token_rows(x, in_features, dropout), dropout)
    loss_and_gradient = loss(y, out_features, targets, [len(y)])
    found = _gradients(linear, loss_and_gradient["dlogits"], cache)
    lora = linear.lora
    assert lora is not None
    grads = {"A": found["dA"].copy(), "B": found["dB"].copy()}
    norm = _clip(grads, scalar(max_norm))
    optimizer = AdamW(
        {"A": lora.A, "B": lora.B},
        betas=(scalar(beta1), scalar(beta2)),
        eps=scalar(eps),
        weight_decay=scalar(weight_decay),
    )
    optimizer.step(grads, scalar(lr))
    return {"loss": loss_and_gradient["loss"], **found, "norm": np.array([norm]), "A": lora.A, "B": lora.B}


def linear_layer(
    shape: list[int],
    dtype: str,
    block_size: int,
    codebook: str,
    A: Array,
    B: Array,
    adapter_dtype: str,
    rank: int,
    alpha: Scalar,
    rslora: bool,
    dropout: Scalar,
    seed: Scalar,
    stream: Scalar,
    lengths: list[int],
    samples: list[int],
    codes: NDArray[np.uint8] | None = None,
    absmax: NDArray[np.float32] | None = None,
    quantized: QuantizedTensor | None = None,
    bias: Array | None = None,
) -> tuple[LoRALinear, Dropout]:
    """The layer, its weight from codes and absmax unless it is given quantized, and what keys its masks."""
    if len(shape) != 2:
        raise InputError(f"the weight of a linear layer has the shape {shape}; it must have two dimensions")
    if _dtype(adapter_dtype) not in (FLOAT32, BFLOAT16) or rank < 1:
        raise InputError(
            f"an adapter of {adapter_dtype} and rank {rank}; it must be float32 or bfloat16 from 1 on"
        )
    if len(lengths) != len(samples) or min(lengths, default=0) < 1:
        raise InputError(
            f"sequences of {lengths} rows with samples {samples}; there must be at least one sequence, "
            "and each must have a sample and at least one row (NF4-9.2)"
        )
    check_counts(samples=samples)
    if bias is not None and bias.size != shape[0]:
        raise InputError(f"the bias has {bias.size} elements; it must have {shape[0]}, one an output")
    random.drop_threshold(scalar(dropout))
    if not math.isfinite(scalar(alpha)):
        raise InputError(f"alpha is {scalar(alpha)}; it must be a finite number")
    if quantized is None:
        assert codes is not None
        assert absmax is not None
        quantized = QuantizedTensor(
            codes, absmax, tuple(shape), _dtype(dtype), block_size, get_codebook(codebook)
        )
    scale = scalar(alpha) / (math.sqrt(rank) if rslora else rank)
    factors = A.reshape(rank, shape[1]).copy(), B.reshape(shape[0], rank).copy()
    lora = LoRA(*factors, scale, scalar(dropout), scalar(stream))
    return LoRALinear(quantized, bias, lora), Dropout(scalar(seed), tuple(lengths), tuple(samples))


def check_counts(**counts: int | list[int]) -> None:
    """Raise InputError for a size, a count or an index that is negative (NF4-1.4)."""
    for name, count in counts.items():
        if min(count if isinstance(count, list) else [count], default=0) < 0:
            raise InputError(f"{name} is {count}; no size, count or index is negative (NF4-1.4)")


def token_rows(x: Array, features: int, dropout: Dropout) -> Array:
    """x as [T, features]; raises InputError unless T is that of the sequences."""
    rows = x.reshape(-1, features)
    if len(rows) != sum(dropout.lengths):
        raise InputError(f"{len(rows)} rows, but sequences of {sum(dropout.lengths)} in all")
    return rows


def _gradients(linear: LoRALinear, dout: Array, cache: LoRACache) -> Outputs:
    dx, dA, dB = linear.backward(dout, cache)
    return {"dx": dx, "dA": dA, "dB": dB}


def _clip(grads: dict[str, Array], max_norm: float) -> float:
    norm = clip_grad_norm(grads, max_norm)
    if not math.isfinite(norm):
        raise InputError(f"the norm of the gradients is {norm}; the run has diverged")
    return norm


def _targets(targets: NDArray[np.int64], vocabulary: int) -> int:
    """The number of targets; InputError where there is none, or one outside the vocabulary."""
    learned = targets[targets != IGNORED]
    if not learned.size:
        raise InputError("the step has no target token: every target is -100; leave such sequences out")
    if learned.min() < 0 or learned.max() >= vocabulary:
        bad = learned[(learned < 0) | (learned >= vocabulary)][0]
        raise InputError(f"the target {bad} is outside the vocabulary of {vocabulary}")
    return int(learned.size)


def _dtype(name: str) -> np.dtype[Any]:
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is not supported; choose one of {', '.join(DTYPES)}")
    kind: np.dtype[Any] = DTYPES[name]
    return kind


def scalar(value: Scalar) -> Any:
    """The number in an array of one element. Raises InputError for more or fewer."""
    array = np.asarray(value)
    if array.size != 1:
        raise InputError(f"one number is expected, not {array.size}")
    return array.item()
