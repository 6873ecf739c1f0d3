"""The operations of chapter 15 on the reference: layers, attention, rotations, and a whole exact step."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4 import random
from nf4.conform.reference.training import check_counts, linear_layer, scalar, token_rows
from nf4.errors import InputError
from nf4.exact import attention, linear
from nf4.exact.llama import ExactLlama
from nf4.exact.tables import rotation
from nf4.floats import DTYPES, FLOAT32
from nf4.formats.files import parse_json
from nf4.lora import LoRA, Workspace
from nf4.model.attention import Heads
from nf4.model.config import LlamaConfig
from nf4.model.llama import TARGETS, Batch, Llama, check_params
from nf4.tensor import QuantizedTensor, quantize
from nf4.train.adamw import AdamW, clip_grad_norm
from nf4.train.data import Example
from nf4.train.exact import ExactEngine
from nf4.train.schedule import learning_rate
from nf4.train.shares import PairwiseSum
from nf4.train.step import make_batch

Array = NDArray[Any]
Float32 = NDArray[np.float32]
Outputs = dict[str, Any]
Scalar = Any


def exact_linear(x: Float32, **layer: Any) -> Outputs:
    """Return y [T, out] of x [T, in] and the fields of a layer (NF4-15.1)."""
    module, dropout = linear_layer(**layer)
    rows = token_rows(x, layer["shape"][1], dropout)
    y = np.empty((len(rows), layer["shape"][0]), np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        linear.forward([module], rows, dropout, [y], Workspace())
    return {"y": y}


def exact_linear_backward(x: Float32, dout: Float32, **layer: Any) -> Outputs:
    """Return dx [T, in], and dA [sequences, rank, in] and dB [sequences, out, rank] (NF4-15.1)."""
    module, dropout = linear_layer(**layer)
    rows, space = token_rows(x, layer["shape"][1], dropout), Workspace()
    douts = token_rows(dout, layer["shape"][0], dropout)
    dA, dB = (
        np.empty((len(dropout.lengths), *sizes), np.float32)
        for sizes in ((layer["rank"], layer["shape"][1]), (layer["shape"][0], layer["rank"]))
    )
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        cache = linear.project(module, rows, None, dropout, space)
        dx = linear.backward([module], [douts], [cache], rows, dropout, dropout.lengths, space, [(dA, dB)])
    return {"dx": dx, "dA": dA, "dB": dB}


def exact_attention(
    q: Float32,
    k: Float32,
    v: Float32,
    lengths: list[int],
    kv_heads: int,
    group: int,
    head_dim: int,
    window: int | None = None,
) -> Outputs:
    """Return y [T, kv_heads * group * head_dim] (NF4-15.2)."""
    heads, (q, k, v) = _heads((q, k, v), lengths, (kv_heads, group, head_dim), window)
    y = attention.attend(q, k, v, tuple(lengths), heads, window, Workspace(), np.empty_like(q))
    return {"y": y}


def exact_attention_backward(
    dout: Float32,
    q: Float32,
    k: Float32,
    v: Float32,
    lengths: list[int],
    kv_heads: int,
    group: int,
    head_dim: int,
    window: int | None = None,
) -> Outputs:
    """Return dq, dk and dv, of the shapes of q, k and v (NF4-15.2)."""
    heads, (q, k, v, dout) = _heads((q, k, v, dout), lengths, (kv_heads, group, head_dim), window)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        found = attention.attend_backward(dout, q, k, v, tuple(lengths), heads, window, Workspace())
    return dict(zip(("dq", "dk", "dv"), found, strict=True))


def rotation_table(rope: str, head_dim: int, max_positions: int, length: int) -> Outputs:
    """Return cos and sin [length, head_dim / 2] of a sequence (NF4-15.3)."""
    one = {"vocab_size": 1, "hidden_size": 1, "intermediate_size": 1, "num_hidden_layers": 1}
    own = {"num_attention_heads": 1, "head_dim": head_dim, "max_position_embeddings": max_positions}
    config = LlamaConfig.from_dict(
        parse_json(rope, "rope") | {"model_type": "llama", "num_key_value_heads": 1} | one | own, "rope"
    )
    if length < 1:
        raise InputError(f"a sequence has {length} positions; it must have one at least")
    cos, sin = rotation(config, (length,))
    return {"cos": cos, "sin": sin}


def exact_gradient(gradients: Float32, count: int) -> Outputs:
    """Return sum [n] of gradients [count, n] (NF4-15.6)."""
    if count < 1 or gradients.size % count:
        raise InputError(f"{gradients.size} elements are no {count} gradients")
    pairwise = PairwiseSum()
    with np.errstate(over="ignore", invalid="ignore"):
        for gradient in gradients.reshape(count, -1):
            pairwise.add(gradient.copy())
        return {"sum": pairwise.total()}


def exact_clip(gradients: dict[str, Array], max_norm: Scalar) -> Outputs:
    """Return norm float64 [1], before clipping, and gradients, after it (NF4-15.7)."""
    for name, gradient in gradients.items():
        if gradient.dtype != FLOAT32:
            raise InputError(f"the gradient {name!r} is {gradient.dtype}; it must be float32 (NF4-10.7)")
    clipped = {name: gradient.copy() for name, gradient in gradients.items()}
    return {"norm": np.array([_clip(clipped, scalar(max_norm))]), "gradients": clipped}


def exact_learning_rate(step: int, steps: int, warmup: int, schedule: str, lr: Scalar) -> Outputs:
    """Return lr float64 [1] of a step (NF4-15.8)."""
    peak = scalar(lr)
    if not 0 <= peak < math.inf or min(step, steps, warmup) < 0:
        raise InputError(f"the rate {peak}, step {step}, {steps} steps and a warm-up of {warmup} don't fit")
    rate = learning_rate(step, steps=steps, lr=abs(peak), schedule=schedule, warmup=warmup)  # -0 is 0
    return {"lr": np.array([rate])}


def exact_step(
    config: str,
    tensors: dict[str, Array],
    block_size: int,
    codebook: str,
    double_quant: bool,
    adapters: dict[str, Array],
    alpha: Scalar,
    rslora: bool,
    dropout: Scalar,
    seed: Scalar,
    ids: list[int],
    targets: list[int],
    lengths: list[int],
    samples: list[int],
    max_norm: Scalar,
    lr: Scalar,
    beta1: Scalar,
    beta2: Scalar,
    eps: Scalar,
    weight_decay: Scalar,
) -> Outputs:
    """Return losses [T], loss, gradients before clipping, norm and adapters after an update (NF4-15.9).

    Its steps are the values of NF4-15.4 and NF4-15.5 by their names there.
    """
    shape = LlamaConfig.from_dict(parse_json(config, "config"), "config")
    params = _quantized(shape, tensors, (block_size, codebook, double_quant))
    loras = _adapters(adapters, scalar(alpha), rslora, scalar(dropout))
    model = Llama(shape, params, loras)
    examples = _examples(ids, targets, lengths, samples)
    engine = ExactEngine(
        model,
        batch_size=1,
        max_grad_norm=scalar(max_norm),
        weight_decay=0.0,
        checkpointing=True,
        seed=scalar(seed),
        threads=1,
    )
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        loss, gradients = engine.gradients([(examples, samples)])
        losses, values = _traced(model, make_batch(examples, samples), scalar(seed))
        clipped = {name: gradient.copy() for name, gradient in gradients.items()}
        norm = _clip(clipped, scalar(max_norm))
        rates = {"betas": (scalar(beta1), scalar(beta2)), "eps": scalar(eps)}
        optimizer = AdamW(model.trainable("lora"), weight_decay=scalar(weight_decay), **rates)
        optimizer.step(clipped, scalar(lr))
    return {
        "losses": losses,
        "loss": np.array([loss]),
        "gradients": {_short(name): gradient for name, gradient in gradients.items()},
        "norm": np.array([norm]),
        "adapters": {_short(name): array for name, array in optimizer.params.items()},
        "steps": {"values": values},
    }


def _heads(
    arrays: tuple[Float32, ...], lengths: list[int], sizes: tuple[int, int, int], window: int | None
) -> tuple[Heads, list[Float32]]:
    """The heads, and q, k, v and the gradient, if it is there, as rows."""
    heads = Heads(*sizes)
    if min(*sizes, min(lengths, default=0), 1 if window is None else window) < 1:
        raise InputError(
            f"{heads}, lengths {lengths} and window {window}: each must be at least 1, and a length be there"
        )
    queries, keys = heads.kv_heads * heads.group * heads.dim, heads.kv_heads * heads.dim
    rows = []
    for name, array, columns in zip("qkvd", arrays, (queries, keys, keys, queries), strict=False):
        if array.size != sum(lengths) * columns:
            raise InputError(f"{name} has {array.size} elements; it must have {sum(lengths)} x {columns}")
        rows.append(array.reshape(-1, columns))
    return heads, rows


def _quantized(
    config: LlamaConfig, tensors: dict[str, Array], options: tuple[int, str, bool]
) -> dict[str, Array | QuantizedTensor]:
    """The parameters of a model, the weights of its linear layers in 4 bits (NF4-8.6)."""
    check_params(config, tensors)
    block_size, codebook, double_quant = options
    params: dict[str, Array | QuantizedTensor] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise InputError(f"{name} is {tensor.dtype}; choose one of {', '.join(DTYPES)}")
        if name.rsplit(".", 2)[-2] in TARGETS and name.endswith(".weight"):
            params[name] = quantize(tensor, block_size, codebook, double_quant=double_quant)
        else:
            params[name] = tensor
    return params


def _adapters(arrays: dict[str, Array], alpha: float, rslora: bool, dropout: float) -> dict[str, LoRA]:
    """The adapters by module, of copies of their arrays (NF4-9.1)."""
    if not math.isfinite(alpha):
        raise InputError(f"alpha is {alpha}; it must be a finite number")
    random.drop_threshold(dropout)
    found = {}
    for module in {name.rpartition(".")[0]: None for name in arrays}:
        if {name for name in arrays if name.startswith(f"{module}.")} != {f"{module}.A", f"{module}.B"}:
            raise InputError(f"the adapter of {module!r} must have an A and a B")
        A, B = arrays[f"{module}.A"].copy(), arrays[f"{module}.B"].copy()
        if A.ndim != 2 or not len(A) or {A.dtype, B.dtype} - {FLOAT32, DTYPES["bfloat16"]}:
            raise InputError(f"the adapter of {module!r} has A {A.dtype} {A.shape} and B {B.dtype} {B.shape}")
        scale = alpha / (math.sqrt(len(A)) if rslora else len(A))
        found[module] = LoRA(A, B, scale, dropout, random.stream_of(module))
    return found


def _examples(ids: list[int], targets: list[int], lengths: list[int], samples: list[int]) -> list[Example]:
    fits = len(ids) == len(targets) == sum(lengths) and len(samples) == len(lengths)
    if not fits or min(lengths, default=0) < 1:
        raise InputError(
            f"{len(ids)} ids, {len(targets)} targets, sequences of {lengths} and samples {samples} don't fit"
        )
    check_counts(samples=samples)
    cuts = np.cumsum(lengths)[:-1]
    parts = (np.split(np.array(tokens, np.int32), cuts) for tokens in (ids, targets))
    return [Example(own, wanted) for own, wanted in zip(*parts, strict=True)]


def _traced(model: Llama, batch: Batch, seed: int) -> tuple[Float32, dict[str, Array]]:
    """The losses of the rows of a batch, and the values on the way by name."""
    values: dict[str, Array] = {}

    def keep(name: str, array: Array) -> None:
        values[name] = array.copy()

    scale = 1.0 / int((batch.targets != -100).sum())
    losses, _ = ExactLlama(model).losses_and_gradients(
        batch, scale=scale, checkpointing=False, seed=seed, trace=keep
    )
    return losses, values


def _short(name: str) -> str:
    """M.A or M.B of an array's name in an adapter's file."""
    return name.replace(".lora_", ".").removesuffix(".weight")


def _clip(gradients: dict[str, Array], max_norm: float) -> float:
    norm = clip_grad_norm(gradients, max_norm)
    if not math.isfinite(norm):
        raise InputError(f"the norm of the gradients is {norm}; the run has diverged")
    return norm
