"""The Llama-family model: forward, loss, and hand-written gradients of adapters or of every parameter."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nf4.errors import InputError
from nf4.lora import Dropout, LoRA, LoRACache, LoRALinear, Workspace
from nf4.model.attention import Heads, attend, attend_backward
from nf4.model.config import LlamaConfig
from nf4.model.ops import (
    IGNORED,
    add_embedding_grad,
    head_loss,
    rms_norm,
    rms_norm_backward,
    rms_norm_dweight,
    rms_scale,
    swiglu,
    swiglu_backward,
)
from nf4.model.rope import rotate, rotation
from nf4.tensor import QuantizedTensor

Array = NDArray[Any]
Train = Literal["lora", "full"]

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass
class Batch:
    """Sequences packed one after the other: no row is padding.

    ids int32 [T]; targets int32 [T], the token to predict at each position, -100 for none; lengths of the
    sequences, summing to T; samples: the index of each sequence in the whole run, which keys its dropout.
    """

    ids: NDArray[np.int32]
    targets: NDArray[np.int32]
    lengths: tuple[int, ...]
    samples: tuple[int, ...]


@dataclass
class KVCache:
    """Rotated keys, and values, of the positions seen so far: a growing array a layer, [capacity, width]."""

    length: int = 0
    keys: dict[int, Array] = field(default_factory=dict)
    values: dict[int, Array] = field(default_factory=dict)

    def extend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Append k, v [T, width] after `length` positions; returns views of all, [length + T, width]."""
        stop = self.length + len(k)
        return self._append(self.keys, layer, k)[:stop], self._append(self.values, layer, v)[:stop]

    def _append(self, store: dict[int, Array], layer: int, rows: Array) -> Array:
        stop = self.length + len(rows)
        held = store.get(layer)
        if held is None or len(held) < stop:
            grown = np.empty((max(stop, 2 * self.length, 64), rows.shape[1]), rows.dtype)
            if held is not None:
                grown[: self.length] = held[: self.length]
            held = store[layer] = grown
        held[self.length : stop] = rows
        return held


@dataclass
class Layer:
    """One layer's parameters and adapted linear layers."""

    prefix: str
    input_norm: Array
    post_norm: Array
    q_norm: Array | None
    k_norm: Array | None
    linears: dict[str, LoRALinear]  # by target name
    window: int | None

    def names(self, target: str) -> str:
        """The module's name in a checkpoint."""
        return f"{self.prefix}{_block_of(target)}.{target}"

    def adapted(self, targets: tuple[str, ...]) -> bool:
        """Whether any of the targets has an adapter."""
        return any(self.linears[t].lora is not None for t in targets)


@dataclass
class _Kept:
    """The activations of a layer that its backward needs; the cheap ones are computed again."""

    x: Array  # [T, hidden], the layer's input
    rstd: Array  # [T, 1]
    q: Array  # rotated, [T, heads * dim]
    k: Array
    v: Array
    raw: dict[str, tuple[Array, Array]]  # q and k before their norms, and 1 / rms, where there are such norms
    mixed: Array  # attention's output, [T, heads * dim]
    lse: Array  # [T, heads]
    middle: Array  # after attention's residual, [T, hidden]
    middle_rstd: Array
    gate: Array  # [T, intermediate]
    up: Array
    lora: dict[str, LoRACache]  # by target; without x


@dataclass
class _Call:
    """What one pass over a batch shares between layers; a thread has its own, so the model is re-entrant."""

    space: Workspace
    lengths: tuple[int, ...]
    tables: tuple[Array, Array]
    dropout: Dropout | None = None
    cache: KVCache | None = None
    inputs_last: bool = False  # the inputs of all layers are needed until backward


class Llama:
    """A causal language model of the Llama family with parameters named as in Hugging Face checkpoints.

    adapters: LoRA by module name, such as "model.layers.0.self_attn.q_proj". Computes in float32, or in
    float64 when the embedding is float64. Raises InputError naming a tensor that is missing, unknown or
    of the wrong shape.
    """

    def __init__(
        self,
        config: LlamaConfig,
        params: dict[str, "Array | QuantizedTensor"],
        adapters: dict[str, LoRA] | None = None,
    ) -> None:
        self.config, self.params, self.adapters = config, params, adapters or {}
        check_params(config, params)
        _check_adapters(config, self.adapters)
        self.heads = Heads(
            config.num_key_value_heads,
            config.num_attention_heads // config.num_key_value_heads,
            config.head_dim,
        )
        self.dtype = np.dtype(np.float64 if params[EMBEDDING].dtype == np.float64 else np.float32)
        self.layers = [self._layer(i) for i in range(config.num_hidden_layers)]
        with_adapters = [i for i, layer in enumerate(self.layers) if layer.adapted(TARGETS)]
        self.lowest_adapted = min(with_adapters, default=config.num_hidden_layers)
        self._spaces: list[Workspace] = []  # not in use; a step's memory serves the next, without page faults

    def vector(self, name: str) -> Array:
        """The parameter of that name, which must not be quantized. Raises InputError where it is."""
        found = self.params[name]
        if isinstance(found, QuantizedTensor):
            raise InputError(f"{name} is quantized; only the weights of linear layers and lm_head may be")
        return found

    def _layer(self, i: int) -> Layer:
        prefix = f"model.layers.{i}."
        linears = {}
        for target in TARGETS:
            name = f"{prefix}{_block_of(target)}.{target}"
            bias = self.vector(f"{name}.bias") if f"{name}.bias" in self.params else None
            linears[target] = LoRALinear(self.params[f"{name}.weight"], bias, self.adapters.get(name))
        qk = self.config.qk_norm
        return Layer(
            prefix=prefix,
            input_norm=self.vector(f"{prefix}input_layernorm.weight"),
            post_norm=self.vector(f"{prefix}post_attention_layernorm.weight"),
            q_norm=self.vector(f"{prefix}self_attn.q_norm.weight") if qk else None,
            k_norm=self.vector(f"{prefix}self_attn.k_norm.weight") if qk else None,
            linears=linears,
            window=self.config.sliding_window[i],
        )

    def trainable(self, train: Train) -> dict[str, Array]:
        """The arrays that training updates in place, by the names that loss_and_grads gives their gradients.

        Raises InputError if there is nothing to train, or a parameter to train is quantized.
        """
        if train == "lora":
            if not self.adapters:
                raise InputError("there is no LoRA adapter to train; choose target modules")
            return {
                f"{name}.lora_{side}.weight": getattr(lora, side)
                for name, lora in self.adapters.items()
                for side in ("A", "B")
            }
        if self.adapters:
            raise InputError("full-parameter training takes a model without adapters")
        found = {}
        for name, value in self.params.items():
            if isinstance(value, QuantizedTensor) or value.dtype != self.dtype:
                raise InputError(
                    f"{name} is {_kind(value)}; full-parameter training takes {self.dtype} parameters"
                )
            found[name] = value
        return found

    def loss(self, batch: Batch) -> float:
        """The sum of the token losses, in float64 (no dropout)."""
        with self._call(batch.ids, batch.targets, batch.lengths) as call:
            x = self._embed(batch.ids)
            for i in range(len(self.layers)):
                x, _ = self._forward(i, x, call, keep=False)
            rows = np.flatnonzero(batch.targets != IGNORED)
            y, _ = rms_norm(x[rows], self.vector(FINAL_NORM), self.config.rms_norm_eps)
            return head_loss(y, self._head(call), batch.targets[rows], call.space)[0]

    def new_cache(self) -> KVCache:
        """An empty cache, for logits."""
        return KVCache()

    def logits(
        self, ids: NDArray[np.integer[Any]], cache: KVCache | None = None, last: bool = False
    ) -> Array:
        """Logits of a sequence [T, vocabulary]; with a cache, `ids` follow what it holds, and it grows.

        last: only the row of the last position, [1, vocabulary].
        """
        past = 0 if cache is None else cache.length
        with self._call(ids, None, (len(ids),), past) as call:
            call.cache = cache
            x = self._embed(ids)
            for i in range(len(self.layers)):
                x, _ = self._forward(i, x, call, keep=False)
            if cache is not None:
                cache.length += len(ids)
            y, _ = rms_norm(x[-1:] if last else x, self.vector(FINAL_NORM), self.config.rms_norm_eps)
            logits: Array = y @ self._head(call).T
            return logits

    def loss_and_grads(
        self, batch: Batch, *, loss_scale: float, train: Train, checkpointing: bool, seed: int
    ) -> tuple[float, dict[str, Array]]:
        """The sum of the token losses (float64), and the gradient of loss_scale times it by trainable name.

        train: "lora" for the adapters, "full" for every parameter. checkpointing: keep only each layer's
        input and compute the rest again in backward, with the same result bit for bit. seed keys the dropout.
        """
        names = list(self.trainable(train))
        with self._call(batch.ids, batch.targets, batch.lengths) as call:
            call.inputs_last = True
            if train == "lora":
                call.dropout = Dropout(seed, batch.lengths, batch.samples)
            loss, grads = self._loss_and_grads(batch, loss_scale, train == "full", checkpointing, call)
        return loss, {name: grads[name] for name in names}

    def _loss_and_grads(
        self, batch: Batch, loss_scale: float, full: bool, checkpointing: bool, call: _Call
    ) -> tuple[float, dict[str, Array]]:
        grads: dict[str, Array] = {}
        bottom = 0 if full else self.lowest_adapted
        x = self._embed(batch.ids)
        inputs: list[Array] = []
        kept: list[_Kept] = []
        for i in range(len(self.layers)):
            keep = i >= bottom and not checkpointing
            if i >= bottom and checkpointing:
                inputs.append(x)
            x, activations = self._forward(i, x, call, keep)
            if activations is not None:
                kept.append(activations)

        # The head, only in the rows that have a target.
        rows = np.flatnonzero(batch.targets != IGNORED)
        norm = self.vector(FINAL_NORM)
        x = x[rows]
        y, rstd = rms_norm(x, norm, self.config.rms_norm_eps)
        head_name = EMBEDDING if self.config.tie_word_embeddings else HEAD
        head = self._head(call)
        dhead = np.zeros(head.shape, head.dtype) if full else None
        loss, dy = head_loss(y, head, batch.targets[rows], call.space, loss_scale, dhead)
        assert dy is not None
        if full:
            assert dhead is not None
            grads[head_name] = dhead
            grads[FINAL_NORM] = rms_norm_dweight(dy, x, rstd)
        dx = np.zeros((len(batch.ids), self.config.hidden_size), self.dtype)
        dx[rows] = rms_norm_backward(dy, x, norm, rstd)
        del x, y, dy

        for i in reversed(range(bottom, len(self.layers))):
            if checkpointing:
                _, activations = self._forward(i, inputs.pop(), call, keep=True, need_y=False)
            else:
                activations = kept.pop()
            assert activations is not None
            is_bottom = not full and i == bottom
            self._backward(self.layers[i], dx, activations, call, grads, full, is_bottom)
            del activations

        if full:
            if not self.config.tie_word_embeddings:
                grads[EMBEDDING] = np.zeros(self.vector(EMBEDDING).shape, self.dtype)
            add_embedding_grad(grads[EMBEDDING], batch.ids, dx)
        return loss, grads

    def check_batch(
        self,
        ids: NDArray[np.integer[Any]],
        targets: NDArray[np.integer[Any]] | None,
        lengths: tuple[int, ...],
    ) -> None:
        """Raise InputError for a token id or a target outside the vocabulary, or lengths that don't fit."""
        vocabulary = self.config.vocab_size
        if len(ids) == 0 or sum(lengths) != len(ids) or min(lengths) < 1:
            raise InputError(f"a batch of {len(ids)} tokens has the sequence lengths {lengths}")
        for what, values in (("token id", ids), ("target", targets)):
            if values is None:
                continue
            bad = (values < 0) | (values >= vocabulary)
            if what == "target":
                bad &= values != IGNORED
            if bad.any():
                raise InputError(
                    f"{what} {values[np.argmax(bad)]} is outside the model's vocabulary of {vocabulary}; "
                    "is this the model's own tokenizer?"
                )

    @contextmanager
    def _call(
        self,
        ids: NDArray[np.integer[Any]],
        targets: NDArray[np.integer[Any]] | None,
        lengths: tuple[int, ...],
        past: int = 0,
    ) -> Iterator[_Call]:
        """Check the batch and set up what the layers share; its memory serves the next call."""
        self.check_batch(ids, targets, lengths)
        try:
            space = self._spaces.pop()
        except IndexError:
            space = Workspace()
        yield _Call(space, lengths, rotation(self.config, lengths, self.dtype, past))
        self._spaces.append(space)

    def _embed(self, ids: NDArray[np.integer[Any]]) -> Array:
        rows: Array = self.vector(EMBEDDING)[ids]  # [T, hidden]
        return rows.astype(self.dtype, copy=False)

    def _head(self, call: _Call) -> Array:
        name = EMBEDDING if self.config.tie_word_embeddings else HEAD
        return call.space.weight(self.params[name], self.dtype)  # [vocabulary, hidden]

    def _forward(
        self, index: int, x: Array, call: _Call, keep: bool, need_y: bool = True
    ) -> tuple[Array, _Kept | None]:
        """One layer: x [T, hidden] -> its output (or x unless need_y), and if `keep`, what backward needs."""
        config, space, layer = self.config, call.space, self.layers[index]
        linears = layer.linears
        lora: dict[str, LoRACache] = {}
        # With checkpointing, and without backward, the layers share memory.
        own = str(index) if keep and need_y else ""

        def linear(target: str, rows: Array, name: str) -> Array:
            out = space.take(name, (len(rows), linears[target].weight.shape[0]), x.dtype)
            y, cache = linears[target].forward(rows, call.dropout, space, out)
            cache.x = None  # computed again, or kept elsewhere
            lora[target] = cache
            return y

        normed = space.take("normed", x.shape, x.dtype)
        _, rstd = rms_norm(x, layer.input_norm, config.rms_norm_eps, normed)
        q, k, v = (linear(f"{c}_proj", normed, f"{c}{own}") for c in "qkv")
        raw: dict[str, tuple[Array, Array]] = {}
        if layer.q_norm is not None and layer.k_norm is not None:
            by_head = (-1, config.head_dim)
            before_q, before_k = q.reshape(by_head), k.reshape(by_head)
            q_normed, q_rstd = rms_norm(before_q, layer.q_norm, config.rms_norm_eps)
            k_normed, k_rstd = rms_norm(before_k, layer.k_norm, config.rms_norm_eps)
            raw = {"q": (before_q, q_rstd), "k": (before_k, k_rstd)}
            q, k = q_normed.reshape(q.shape), k_normed.reshape(k.shape)
        rotate(q, call.tables, config.head_dim, space)
        rotate(k, call.tables, config.head_dim, space)
        if call.cache is not None:
            k, v = call.cache.extend(index, k, v)
        mixed = space.take(f"mixed{own}", q.shape, q.dtype)
        _, lse = attend(q, k, v, call.lengths, self.heads, layer.window, space, out=mixed)
        middle = linear("o_proj", mixed, f"middle{own}")
        middle += x

        _, middle_rstd = rms_norm(middle, layer.post_norm, config.rms_norm_eps, normed)
        gate, up = (linear(f"{c}_proj", normed, f"{c}{own}") for c in ("gate", "up"))
        act = swiglu(gate, up, space.take("act", gate.shape, gate.dtype))
        y = x
        if need_y:
            y = linear("down_proj", act, f"y{index if call.inputs_last else index % 2}")
            y += middle
        else:
            lora["down_proj"] = linears["down_proj"].project(act, call.dropout, space)
        if not keep:
            return y, None
        return y, _Kept(x, rstd, q, k, v, raw, mixed, lse, middle, middle_rstd, gate, up, lora)

    def _backward(
        self,
        layer: Layer,
        dy: Array,
        kept: _Kept,
        call: _Call,
        grads: dict[str, Array],
        full: bool,
        is_bottom: bool,
    ) -> None:
        """One layer's gradients into grads, and its input's over dy [T, hidden]; consumes `kept`.

        is_bottom: nothing below has anything to train, so what only serves the input's gradient is left out.
        """
        config, space = self.config, call.space

        def linear(target: str, dout: Array, rows: Array, need_dx: bool = True) -> Array | None:
            name, module, cache = layer.names(target), layer.linears[target], kept.lora[target]
            cache.x = rows
            dx, dA, dB = module.backward(dout, cache, space, need_dx)
            if full:
                grads[f"{name}.weight"] = dout.T @ rows  # [out, in]
                if module.bias is not None:
                    grads[f"{name}.bias"] = dout.sum(0, dtype=dout.dtype)
            elif dA is not None and dB is not None:
                grads[f"{name}.lora_A.weight"], grads[f"{name}.lora_B.weight"] = dA, dB
            kept.lora.pop(target)
            return dx

        def norm(name: str, dout: Array, x: Array, weight: Array, rstd: Array) -> Array:
            if full:
                grads[f"{layer.prefix}{name}.weight"] = rms_norm_dweight(dout, x, rstd)
            return rms_norm_backward(dout, x, weight, rstd)

        attention_trains = not is_bottom or layer.adapted(("q_proj", "k_proj", "v_proj", "o_proj"))
        act = swiglu(kept.gate, kept.up, space.take("act", kept.gate.shape, dy.dtype))
        dact = linear("down_proj", dy, act, attention_trains or layer.adapted(("gate_proj", "up_proj")))
        if dact is None:
            return
        swiglu_backward(dact, kept.gate, kept.up)  # kept.gate and kept.up now hold their gradients
        normed = space.take("normed", dy.shape, dy.dtype)
        rms_scale(kept.middle, layer.post_norm, kept.middle_rstd, normed)
        dnormed = _sum(
            linear("gate_proj", kept.gate, normed, attention_trains),
            linear("up_proj", kept.up, normed, attention_trains),
        )
        if dnormed is None:
            return
        dy += norm("post_attention_layernorm", dnormed, kept.middle, layer.post_norm, kept.middle_rstd)

        dmixed = linear(
            "o_proj", dy, kept.mixed, not is_bottom or layer.adapted(("q_proj", "k_proj", "v_proj"))
        )
        if dmixed is None:
            return
        dq, dk, dv = attend_backward(
            dmixed,
            kept.q,
            kept.k,
            kept.v,
            kept.mixed,
            kept.lse,
            call.lengths,
            self.heads,
            layer.window,
            space,
        )
        rotate(dq, call.tables, config.head_dim, space, inverse=True)
        rotate(dk, call.tables, config.head_dim, space, inverse=True)
        if layer.q_norm is not None and layer.k_norm is not None:
            by_head = (-1, config.head_dim)
            dq = norm(
                "self_attn.q_norm", dq.reshape(by_head), kept.raw["q"][0], layer.q_norm, kept.raw["q"][1]
            )
            dk = norm(
                "self_attn.k_norm", dk.reshape(by_head), kept.raw["k"][0], layer.k_norm, kept.raw["k"][1]
            )
            dq, dk = dq.reshape(kept.q.shape), dk.reshape(kept.k.shape)
        rms_scale(kept.x, layer.input_norm, kept.rstd, normed)
        dnormed = _sum(
            linear("q_proj", dq, normed, not is_bottom),
            linear("k_proj", dk, normed, not is_bottom),
            linear("v_proj", dv, normed, not is_bottom),
        )
        if dnormed is not None:
            dy += norm("input_layernorm", dnormed, kept.x, layer.input_norm, kept.rstd)


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every parameter, as in a Hugging Face checkpoint."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * dim, config.num_key_value_heads * dim
    linears = {
        "q_proj": (q, hidden, config.qkv_bias),
        "k_proj": (kv, hidden, config.qkv_bias),
        "v_proj": (kv, hidden, config.qkv_bias),
        "o_proj": (hidden, q, config.attention_bias),
        "gate_proj": (inner, hidden, config.mlp_bias),
        "up_proj": (inner, hidden, config.mlp_bias),
        "down_proj": (hidden, inner, config.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        for target, (out, into, bias) in linears.items():
            shapes[f"{prefix}{_block_of(target)}.{target}.weight"] = (out, into)
            if bias:
                shapes[f"{prefix}{_block_of(target)}.{target}.bias"] = (out,)
        if config.qk_norm:
            shapes[f"{prefix}self_attn.q_norm.weight"] = (dim,)
            shapes[f"{prefix}self_attn.k_norm.weight"] = (dim,)
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    shapes[FINAL_NORM] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def check_params(config: LlamaConfig, params: Mapping[str, Any]) -> None:
    """Refuse parameters that are not just those of the model, by name and shape (NF4-8.1)."""
    shapes = parameter_shapes(config)
    for name, shape in shapes.items():
        if name not in params:
            raise InputError(f"the tensor {name} is missing; its shape would be {shape}")
        if tuple(params[name].shape) != shape:
            raise InputError(
                f"the tensor {name} has the shape {tuple(params[name].shape)}; the config asks for {shape}"
            )
    extra = [name for name in params if name not in shapes]
    if extra:
        raise InputError(f"the tensor {extra[0]} does not belong to the architecture in the config")


def _check_adapters(config: LlamaConfig, adapters: Mapping[str, LoRA]) -> None:
    """Refuse an adapter that is not for a linear layer, or of another shape (NF4-9.6)."""
    shapes = parameter_shapes(config)
    for name, lora in adapters.items():
        shape = shapes.get(f"{name}.weight")
        if shape is None or name.rsplit(".", 1)[-1] not in TARGETS:
            raise InputError(f"the adapter for {name} has no such linear layer in the model")
        rank = len(lora.A)
        if lora.A.shape != (rank, shape[1]) or lora.B.shape != (shape[0], rank):
            raise InputError(
                f"the adapter for {name} has A {lora.A.shape} and B {lora.B.shape}; its weight is {shape}"
            )


def _block_of(target: str) -> str:
    return "self_attn" if target in TARGETS[:4] else "mlp"


def _sum(*parts: Array | None) -> Array | None:
    """The sum of the gradients, over the first of them; None if there are none."""
    total = parts[0]
    for part in parts[1:]:
        if total is not None and part is not None:
            total += part
    return total


def _kind(value: Any) -> str:
    return "quantized" if isinstance(value, QuantizedTensor) else str(value.dtype)
