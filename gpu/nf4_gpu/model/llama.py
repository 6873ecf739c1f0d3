"""The Llama family on the device: forward, loss and the adapters' gradients of packed sequences in bfloat16.

Every call launches work and waits for nothing, and writes only into memory laid out before; so a pass can be
recorded into a graph and replayed with other inputs in the same places.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from nf4.errors import InputError
from nf4.floats import BFLOAT16, FLOAT32, narrow
from nf4.lora import LoRA
from nf4.model.config import LlamaConfig
from nf4.model.llama import EMBEDDING, FINAL_NORM, HEAD
from nf4.tensor import QuantizedTensor, dequantize
from numpy.typing import NDArray

from nf4_gpu.arena import Arena, round_up
from nf4_gpu.device import MAIN, SIDE, Device, Mark
from nf4_gpu.matrix import Matrix
from nf4_gpu.model import attention, lora, mlp, ops, rope
from nf4_gpu.model.lora import Dropped, Space
from nf4_gpu.model.ops import Norm
from nf4_gpu.model.rope import Angles, Heads
from nf4_gpu.model.weights import GROUPS, PARTS, Ahead, Form, Group, Weights

LOGITS_BYTES = 512 << 20
"""Logits that exist at a time have at least so much memory: that of the written weights, if it is more."""
_SHARES_BYTES = 64 << 20  # gradients of keys and values a query head, up to which few heads keep them apart
_INT32 = np.dtype(np.int32)
_NORMS = {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"}  # by the group that reads them


@dataclass(frozen=True)
class Limits:
    """What a pass may at most be given, and how much is kept of it.

    tokens of a pass and rows with a target, padding included; sequences, with one of padding; positions of
    a sequence; kept: layers, the last ones, whose activations wait for the backward pass, while those
    before are computed again; resident: layers, the first ones, whose weights stay on the device.
    """

    tokens: int
    rows: int
    sequences: int
    positions: int
    kept: int
    resident: int
    training: bool = True


@dataclass(frozen=True)
class Pass:
    """One pass: tokens and rows of this one, padding included; and whether inputs of adapters are dropped."""

    tokens: int
    rows: int
    drop: bool = False


@dataclass
class _Kept:
    """What a layer's backward needs. rstd, middle_rstd and lse are addresses."""

    rstd: int
    qkv: Matrix
    lse: int
    mixed: Matrix
    middle: Matrix
    middle_rstd: int
    gate_up: Matrix

    def rows(self, n: int) -> "_Kept":
        part = slice(0, n)
        return _Kept(
            self.rstd,
            self.qkv.part(part),
            self.lse,
            self.mixed.part(part),
            self.middle.part(part),
            self.middle_rstd,
            self.gate_up.part(part),
        )


class Inputs:
    """The integers of a pass, in one block: where each lies on the device, and how the host fills it."""

    def __init__(self, address: int, limits: Limits, tiles: attention.Shape) -> None:
        tokens, rows = limits.tokens, limits.rows
        self._tiles, self._sequences = tiles, limits.sequences
        counts = {
            "ids": tokens, "positions": tokens, "samples": tokens, "places": tokens, "index": rows,
            "targets": rows, "forward": 4 * self.forward_tiles(tokens),
            "queries": 4 * self.backward_tiles(tokens), "keys": 4 * self.backward_tiles(tokens),
        }  # fmt: skip
        self._offsets, at = {}, 0
        for name, count in counts.items():
            self._offsets[name] = (at, count)
            at += round_up(count, 4)
        self.nbytes = 4 * at
        self._address = address

    def at(self, name: str) -> int:
        """Return the address of one of them."""
        return self._address + 4 * self._offsets[name][0]

    def forward_tiles(self, tokens: int) -> int:
        """Return the tiles of attention forward that a pass of so many tokens can have."""
        return -(-tokens // self._tiles.rows) + self._sequences

    def backward_tiles(self, tokens: int) -> int:
        """Return those backward."""
        return -(-tokens // self._tiles.back) + self._sequences

    def fill(
        self,
        block: NDArray[np.int32],
        shape: Pass,
        sequences: Sequence[tuple[NDArray[np.int32], NDArray[np.int32], int]],
        angles: Angles,
    ) -> None:
        """Write a pass into int32 [nbytes / 4]: sequences of (ids, targets, sample), padded to its shape."""

        def put(name: str, values: NDArray[Any]) -> None:
            at, count = self._offsets[name]
            assert len(values) <= count
            block[at : at + len(values)] = values

        lengths = [len(ids) for ids, _, _ in sequences]
        left = shape.tokens - sum(lengths)
        padding = np.zeros(left, np.int32)
        zeros = [padding] if left else []
        put("ids", np.concatenate([*(ids for ids, _, _ in sequences), *zeros]))
        put("positions", np.concatenate([*(angles.places(0, n) for n in lengths), *zeros]))
        put("places", np.concatenate([*(np.arange(n, dtype=np.int32) for n in lengths), *zeros]))
        samples = [np.full(len(ids), sample & 0xFFFFFFFF, np.uint32) for ids, _, sample in sequences]
        put("samples", np.concatenate([*samples, *(part.view(np.uint32) for part in zeros)]).view(np.int32))
        targets = np.concatenate([targets for _, targets, _ in sequences])
        rows = np.flatnonzero(targets >= 0).astype(np.int32)
        nothing = np.full(shape.rows - len(rows), -1, np.int32)
        put("index", np.concatenate([rows, nothing]))
        put("targets", np.concatenate([targets[rows], nothing]))
        if left:
            lengths.append(left)
        count = self.forward_tiles(shape.tokens)
        put("forward", attention.tiles(lengths, self._tiles.rows, count, late_first=True).reshape(-1))
        count, size = self.backward_tiles(shape.tokens), self._tiles.back
        put("queries", attention.tiles(lengths, size, count, late_first=True).reshape(-1))
        put("keys", attention.tiles(lengths, size, count, late_first=False).reshape(-1))


class Network:
    """A model laid out in an arena: with the base 0 as a plan, with a device and another base to be used."""

    def __init__(
        self,
        arena: Arena,
        config: LlamaConfig,
        layers: Sequence[dict[str, Group]],
        parameters: int,
        forms: Sequence[Mapping[str, Form]],
        limits: Limits,
        *,
        adapter_dtype: np.dtype[Any] = FLOAT32,
        processors: int = 132,
        capability: int = 90,
        shared_memory: int = 227 << 10,
    ) -> None:
        check_supported(config)
        self.config, self.layers, self.limits = config, layers, limits
        self.parameter_count, self.adapter_dtype = parameters, adapter_dtype
        adapted = [i for i, groups in enumerate(layers) if any(group.narrow for group in groups.values())]
        self.bottom = min(adapted, default=config.num_hidden_layers)
        self._reading: dict[int, Mark] = {}  # by address: until when another stream reads there
        self._dropout = any(a.dropout > 0 for groups in layers for g in groups.values() for a in g.adapters)
        self._shape = attention.shape_for(config.head_dim, capability, shared_memory)
        self._shared_memory = shared_memory
        self._lay_out(arena, forms, processors)

    def _lay_out(self, arena: Arena, forms: Sequence[Mapping[str, Form]], processors: int) -> None:
        config, limits, tokens = self.config, self.limits, self.limits.tokens
        hidden, inner, depth = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        queries = config.num_attention_heads * config.head_dim
        width = queries + 2 * config.num_key_value_heads * config.head_dim
        tails = {key: max(groups[key].narrow for groups in self.layers) for key in GROUPS}

        self.parameters = arena.take("adapters", self.parameter_count * self.adapter_dtype.itemsize)
        self.gradients = arena.take("adapters", 4 * self.parameter_count if limits.training else 0)
        wide = self.adapter_dtype == FLOAT32
        self.weights = Weights(arena, self.layers, forms, limits.resident, wide, self.parameters)
        self.padded = round_up(config.vocab_size, 8)
        self.table = arena.matrix("weights", self.padded, hidden)
        assert self.table.pitch == round_up(hidden, 64)
        self._small = self._take_small(arena)

        # The written weights, or logits: never both.
        logits_row = 2 * round_up(self.padded, 64)
        whole = logits_row * limits.rows
        size = max(self.weights.written_bytes, min(LOGITS_BYTES, whole), logits_row)
        self._logits_rows = _chunk(limits.rows, size // logits_row, hidden, processors)
        shared = arena.take("buffers", size)
        self.weights.write_at(shared)
        self._logits = Matrix(shared, self._logits_rows, self.padded, logits_row // 2, BFLOAT16)

        self.inputs = Inputs(0, limits, self._shape)
        self.inputs = Inputs(arena.take("buffers", self.inputs.nbytes), limits, self._shape)
        self._losses = arena.take("buffers", 4 * limits.rows)
        self._head_rstd = arena.take("buffers", 4 * limits.rows)
        self._processors = processors
        self._joined = [not self._dropout and mlp.suits(groups, tokens) for groups in self.layers]
        self._sums = None
        if any(self._joined):
            slot = max(g["down"].slot for g, joined in zip(self.layers, self._joined, strict=True) if joined)
            self._sums = mlp.take_sums(arena, tokens, inner, slot, processors, training=limits.training)
        features = max(sum(g.inputs + g.outputs for g in groups.values()) for groups in self.layers)
        blocks = max(tokens // min(lora.TILES.values()), features // lora.FEATURES) + 16
        partial, counters = lora.space_bytes(processors, blocks)
        self._space, self._side_space = (
            Space(arena.take("buffers", partial), arena.take("buffers", counters)) for _ in range(2)
        )

        tail = max(tails["qkv"], tails["gate_up"])
        self._normed = arena.matrix("activations", tokens, hidden, tail=tail)
        self._act = arena.matrix("activations", tokens, inner, tail=tails["down"])
        self._rotated = None
        if config.qk_norm:
            self._rotated = arena.matrix("activations", tokens, width)
        tail = max(tails["down"], tails["o"])
        self._dys = [arena.matrix("activations", tokens, hidden, tail=tail) for _ in range(2)]
        self._dropped = None
        if self._dropout and limits.training:
            self._dropped = arena.matrix("activations", tokens, max(queries, hidden, inner))

        def keep() -> _Kept:
            rows = [arena.take("activations", 4 * tokens) for _ in range(2)]
            return _Kept(
                rows[0],
                arena.matrix("activations", tokens, width),
                arena.take("activations", 4 * tokens * config.num_attention_heads),
                arena.matrix("activations", tokens, queries, tail=tails["o"]),
                arena.matrix("activations", tokens, hidden),
                rows[1],
                arena.matrix("activations", tokens, 2 * inner, tail=tails["gate_up"]),
            )

        kept = min(limits.kept, depth - self.bottom) if limits.training else 0
        self._first_kept = depth - kept
        self._own = {i: keep() for i in range(self._first_kept, depth)}
        self._one = keep() if self._first_kept > 0 or depth == 0 else self._own[0]
        stays = depth - self.bottom if limits.training else 0
        spare = [arena.matrix("activations", tokens, hidden) for _ in range(min(2, depth - stays))]
        self._xs = [spare[i % 2] for i in range(depth - stays)]
        self._xs += [arena.matrix("activations", tokens, hidden) for _ in range(stays)]
        self._xs.append(self._dys[1].part(columns=slice(0, hidden)))
        self._zs: list[dict[str, Matrix]] = []
        for i, groups in enumerate(self.layers):
            trains = limits.training and i >= self.bottom
            self._zs.append(
                {
                    key: arena.matrix("activations", tokens, group.narrow)
                    for key, group in groups.items()
                    if trains and group.narrow
                }
            )
        if not limits.training:
            return
        # Where there is room for them in what is used up by then, they take none of their own.
        self._dmixed = _over(self._act, queries, 0) or arena.matrix("activations", tokens, queries)
        fits = _over(self._one.gate_up, width, tails["qkv"]) is not None
        own = None if fits else arena.matrix("activations", tokens, width, tail=tails["qkv"])
        self._dqkv = []
        for i in range(self.bottom, depth):
            dqkv = own or _over(self._kept(i).gate_up, width, tails["qkv"])
            assert dqkv is not None
            self._dqkv.append(dqkv)
        self._delta = arena.take("activations", 4 * tokens * config.num_attention_heads)
        bytes_apart = 4 * tokens * queries
        few = self.inputs.backward_tiles(tokens) * config.num_key_value_heads < 2 * processors
        self._shares = None
        if few and bytes_apart <= _SHARES_BYTES and config.num_attention_heads > config.num_key_value_heads:
            self._shares = (arena.take("activations", bytes_apart), arena.take("activations", bytes_apart))
        self._lay_out_jobs(arena)

    def _kept(self, i: int) -> _Kept:
        return self._own.get(i, self._one)

    def _take_small(self, arena: Arena) -> dict[str, int]:
        """Addresses of norms (float32), biases (bfloat16) and angles (float32), by name."""
        config = self.config
        rows = Angles.rows(config, self.limits.positions)
        found = {name: arena.take("weights", 2 * rows * config.head_dim) for name in ("cosines", "sines")}
        found[FINAL_NORM] = arena.take("weights", 4 * config.hidden_size)
        for i, groups in enumerate(self.layers):
            prefix = f"model.layers.{i}."
            for name in ("input_layernorm", "post_attention_layernorm"):
                found[f"{prefix}{name}.weight"] = arena.take("weights", 4 * config.hidden_size)
            if config.qk_norm:
                for name in ("q_norm", "k_norm"):
                    found[f"{prefix}self_attn.{name}.weight"] = arena.take("weights", 4 * config.head_dim)
            for key, group in groups.items():
                if self._has_bias(key):
                    found[f"{i} {key}"] = arena.take("weights", 2 * group.outputs)
        return found

    def _has_bias(self, key: str) -> bool:
        config = self.config
        return {"qkv": config.qkv_bias, "o": config.attention_bias}.get(key, config.mlp_bias)

    def _lay_out_jobs(self, arena: Arena) -> None:
        """What the kernel of gradients is told of each part of a layer, in memory of its own."""
        self._jobs: dict[tuple[int, str], tuple[int, NDArray[np.void]]] = {}
        for i in range(self.bottom, len(self.layers)):
            for part in PARTS:
                groups = self._adapted(i, part)
                if self._dropout:
                    for group in groups:
                        for adapter in group.adapters:
                            jobs = self._input_jobs(i, group, adapter)
                            self._jobs[i, adapter.name] = (arena.take("buffers", jobs.nbytes), jobs)
                if groups:
                    jobs = np.concatenate([self._gradient_jobs(i, group) for group in groups])
                    self._jobs[i, part] = (arena.take("buffers", jobs.nbytes), jobs)

    def _adapted(self, i: int, part: str) -> list[Group]:
        """A part's groups whose gradients the kernel makes."""
        groups = (self.layers[i][key] for key in PARTS[part])
        return [group for group in groups if 0 < group.narrow <= lora.NARROWEST]

    def _made(self, i: int, key: str) -> tuple[bool, bool]:
        """Whether the kernel makes a group's gradients of A, whose input dropout changes, and those of B."""
        of_a = not self._dropout and not (self._joined[i] and key == "down")
        return of_a, not (self._joined[i] and key == "gate_up")

    def _gradient_jobs(self, i: int, group: Group) -> NDArray[np.void]:
        x, dy = self._sides(i, group.key)
        dz, z = _tail(dy, group.outputs, group), self._zs[i][group.key]
        of_a, of_b = self._made(i, group.key)
        return lora.gradient_jobs(group, x, dz, dy, z, self.gradients, of_a=of_a, of_b=of_b)

    def _input_jobs(self, i: int, group: Group, adapter: Any) -> NDArray[np.void]:
        assert self._dropped is not None
        _, dy = self._sides(i, group.key)
        dz = _tail(dy, group.outputs, group)
        return lora.input_jobs(group, adapter, self._dropped, dz, self.gradients)

    def _sides(self, i: int, key: str) -> tuple[Matrix, Matrix]:
        """A group's input and the gradient of its output, where they lie when gradients are made."""
        kept = self._kept(i)
        if key == "qkv":
            return self._normed, self._dqkv[i - self.bottom]
        if key == "o":
            return kept.mixed, self._dys[1]
        return (self._normed, kept.gate_up) if key == "gate_up" else (self._act, self._dys[0])

    # ---- loading -----------------------------------------------------------------------------------------

    def load(self, device: Device, params: Mapping[str, Any]) -> None:
        """Copy a model's parameters (but for the adapters') to their places."""
        self._device = device
        config = self.config
        self.weights.load(device, params)
        self._angles = Angles(config, self.limits.positions)
        self._send(self._small["cosines"], self._angles.cosines)
        self._send(self._small["sines"], self._angles.sines)
        for name, address in self._small.items():
            if name in params:
                self._send(address, np.asarray(_plain(params[name]), np.float32))
        for i, groups in enumerate(self.layers):
            for key, group in groups.items():
                if self._has_bias(key):
                    biases = [_plain(params[f"{module.name}.bias"]) for module in group.modules]
                    whole = narrow(np.concatenate(biases).astype(np.float32), BFLOAT16)
                    self._send(self._small[f"{i} {key}"], whole)
        tied = config.tie_word_embeddings
        head = params[EMBEDDING if tied else HEAD]
        self._send_table(head)
        self._embedding = self.table
        if not tied:  # only rows of it are read: it stays with the host
            rows, width = config.vocab_size, config.hidden_size
            self._pinned = device.allocate_pinned(2 * rows * width)
            self._pinned.view(BFLOAT16)[:] = _bf16(params[EMBEDDING]).reshape(-1)
            self._embedding = Matrix(self._pinned.ctypes.data, rows, width, width, BFLOAT16)
        for address, jobs in getattr(self, "_jobs", {}).values():
            self._send(address, jobs)
        self._heads = []
        for i in range(len(self.layers)):
            norms: list[Norm | None] = [None, None]
            if config.qk_norm:
                prefix = f"model.layers.{i}.self_attn."
                norms = [
                    Norm(self._small[f"{prefix}{n}.weight"], config.rms_norm_eps)
                    for n in ("q_norm", "k_norm")
                ]
            self._heads.append(
                Heads(
                    config.num_attention_heads,
                    config.num_key_value_heads,
                    config.head_dim,
                    self._small["cosines"],
                    self._small["sines"],
                    norms[0],
                    norms[1],
                    config.sliding_window[i] or 0,
                )
            )

    def _send_table(self, head: Any) -> None:
        """The head's rows in bfloat16; those beyond the vocabulary stay zero."""
        assert self.table.pitch == round_up(self.table.columns, 64)
        rows = _bf16(head)
        if self.table.pitch == self.table.columns:
            self._send(self.table.address, rows)
            return
        padded = np.zeros((len(rows), self.table.pitch), BFLOAT16)
        padded[:, : self.table.columns] = rows
        self._send(self.table.address, padded)

    def send_parameters(self, name: str, a: NDArray[Any], b: NDArray[Any]) -> None:
        """Copy an adapter's matrices to their places."""
        adapter = self.adapter(name)
        size = self.adapter_dtype.itemsize
        self._send(self.parameters + adapter.a * size, a.astype(self.adapter_dtype, copy=False))
        self._send(self.parameters + adapter.b * size, b.astype(self.adapter_dtype, copy=False))

    def adapter(self, name: str) -> Any:
        """Return what is known of an adapter by its module's name."""
        layer = int(name.split(".")[2])
        for group in self.layers[layer].values():
            for adapter in group.adapters:
                if adapter.name == name:
                    return adapter
        raise KeyError(name)

    def load_adapters(self, adapters: Mapping[str, LoRA]) -> None:
        """Copy all adapters to their places."""
        for name, found in adapters.items():
            self.send_parameters(name, found.A, found.B)

    def _send(self, address: int, array: NDArray[Any]) -> None:
        array = np.ascontiguousarray(array)
        with self._device.on(MAIN):
            self._device.copy(address, array.ctypes.data, array.nbytes)
        self._device.synchronize()

    @property
    def angles(self) -> Angles:
        """The positions' angles."""
        return self._angles

    @property
    def heads(self) -> list[Heads]:
        """The heads of each layer."""
        return self._heads

    @property
    def embedding(self) -> Matrix:
        """The rows of tokens, on the device or in pinned memory of the host."""
        return self._embedding

    @property
    def spare(self) -> tuple[int, int]:
        """The address and bytes of memory that a pass uses only if its gradients are wanted."""
        if not self.limits.training or self.bottom > 0 or len(self.layers) < 3:
            return 0, 0
        return self._xs[2].address, sum(x.nbytes for x in self._xs[2:-1])

    def small(self, name: str) -> int:
        """Return the address of a norm's weight, float32."""
        return self._small[name]

    def bias(self, i: int, key: str) -> int:
        """Return the address of a group's bias, bfloat16, or 0."""
        return self._small.get(f"{i} {key}", 0)

    # ---- passes ------------------------------------------------------------------------------------------

    def loss(self, shape: Pass, total: int) -> None:
        """Launch a pass over the inputs; the sum of its losses is added to the float64 at `total`."""
        x = self._forward_all(shape, keep=False)
        self._head(shape, x, total, 0)

    def prompt(self, shape: Pass, length: int, caches: Sequence[tuple[Matrix, Matrix]]) -> Matrix:
        """Launch a pass over one sequence; rotated keys, and values, go to the caches. Returns the last x."""
        self._caches, self._cached = caches, length
        try:
            return self._forward_all(shape, keep=False)
        finally:
            self._caches = None

    def loss_and_gradients(self, shape: Pass, total: int, scale: int, seed: int) -> None:
        """Launch a pass forward and backward: to the gradients is added that of the losses times a float32.

        total: the address of a float64, to which the sum of the losses is added; scale: that of the float32;
        seed: of the dropout, where the shape says that there is one.
        """
        if shape.drop and self._dropout:
            self._dropping = Dropped(self.inputs.at("samples"), self.inputs.at("places"), seed)
        try:
            x = self._forward_all(shape, keep=True)
            self._head(shape, x, total, scale)
            self._backward_all(shape)
            for mark in self._reading.values():
                self._device.wait(mark)
        finally:
            self._reading, self._dropping = {}, None

    def _forward_all(self, shape: Pass, keep: bool) -> Matrix:
        depth = len(self.layers)
        visits = [(i, part) for i in range(depth) for part in PARTS]
        self._ahead = Ahead(self._device, self.weights, visits)
        xs = [x.part(slice(0, shape.tokens)) for x in self._xs]
        if not keep:  # any two will do
            xs = [xs[i % 2] if depth > 1 else xs[i] for i in range(depth + 1)]
        ops.embed(self._device, self._embedding, self.inputs.at("ids"), xs[0])
        for i in range(depth):
            kept = (self._kept(i) if keep else self._one).rows(shape.tokens)
            self._attention_forward(i, xs[i], kept, shape, keep)
            self._mlp_forward(i, xs[i + 1], kept, shape, keep)
        self._ahead.finish()
        return xs[depth]

    def _attention_forward(
        self, i: int, x: Matrix, kept: _Kept, shape: Pass, keep: bool, again: bool = False
    ) -> None:
        device, heads = self._device, self._heads[i]
        normed = self._normed.part(slice(0, shape.tokens))
        self._claim(normed, kept.qkv, kept.mixed, kept.middle)
        self._ahead.use(i, "attention")
        projected = self._normalize(i, "qkv", x, normed, kept.rstd, keep and not again)
        self._linear(i, "qkv", normed, kept.qkv, keep, again=again, projected=projected)
        rotated = self._rotate(i, kept, shape)
        q, k, _ = attention.split(rotated, heads)
        v = attention.split(kept.qkv, heads)[2]
        if self._caches is not None:
            for cache, rows in zip(self._caches[i], (k, v), strict=True):
                part = slice(0, self._cached)
                device.copy_rows(cache.part(part), rows.part(part))
        where = self.inputs.at("forward"), self.inputs.forward_tiles(shape.tokens)
        attention.attend(device, self._shape, heads, q, k, v, where, kept.mixed, kept.lse)
        self._linear(i, "o", kept.mixed, kept.middle, keep, add=x, again=again)

    def _rotate(self, i: int, kept: _Kept, shape: Pass) -> Matrix:
        rotated = kept.qkv if self._rotated is None else self._rotated.part(slice(0, shape.tokens))
        rope.rotate(self._device, self._heads[i], kept.qkv, rotated, self.inputs.at("positions"))
        return rotated

    def _mlp_forward(self, i: int, y: Matrix | None, kept: _Kept, shape: Pass, keep: bool) -> None:
        """From kept.middle to the layer's output y; without y, only as far as backward needs it."""
        rows = slice(0, shape.tokens)
        normed, act = self._normed.part(rows), self._act.part(rows)
        if y is not None:
            self._ahead.done(i, "attention")
        self._claim(normed, kept.gate_up)
        self._ahead.use(i, "mlp")
        again = y is None
        projected = self._normalize(i, "gate_up", kept.middle, normed, kept.middle_rstd, keep and not again)
        self._linear(i, "gate_up", normed, kept.gate_up, keep, again=again, projected=projected)
        if y is None:
            return
        self._claim(act)
        self._swiglu(i, kept.gate_up, act, keep)
        self._linear(i, "down", act, y, keep, add=kept.middle, projected=self._joined[i])
        self._ahead.done(i, "mlp")

    def _projects(self, group: Group) -> bool:
        """Whether the narrow product of a group is made by the norm before it."""
        width = self.config.hidden_size
        takes = not self._dropout and 0 < group.narrow <= lora.NARROWEST
        return takes and ops.norm_projects(width, group.narrow, self._shared_memory)

    def _normalize(self, i: int, key: str, x: Matrix, normed: Matrix, rstd: int, keep: bool) -> bool:
        """The norm that a group reads; says whether it left x A^T beside it, and if so wished, kept it."""
        group, norm = self.layers[i][key], self._norm(i, _NORMS[key])
        if not self._projects(group):
            ops.rms_norm(self._device, x, norm, normed, rstd)
            return False
        rows, inputs = slice(group.outputs, group.outputs + group.narrow), slice(0, group.inputs)
        a, z = self.weights.buffers[i][key].part(rows, inputs), _tail(normed, group.inputs, group)
        copy = self._kept_z(i, key, x.rows) if keep else None
        ops.rms_norm_project(self._device, x, norm, normed.part(columns=inputs), rstd, a, z, copy)
        return True

    def _kept_z(self, i: int, key: str, tokens: int) -> Matrix | None:
        """Where a group's x A^T is kept for the backward pass, if it is."""
        kept = self._zs[i].get(key)
        return None if kept is None else kept.part(slice(0, tokens))

    def _normalize_backward(
        self,
        norm: Norm,
        x: Matrix,
        rstd: int,
        dx: Matrix,
        dy: Matrix,
        normed: Matrix,
        to: tuple[int, str],
    ) -> bool:
        """A norm's backward, from what `normed` holds, which it then is again.

        to: layer and key of the group whose output dx is the gradient of. Says whether s dx B is beside it.
        """
        i, key = to
        dn, group = normed.part(columns=slice(0, self.config.hidden_size)), self.layers[i][key]
        if not self._projects(group):
            ops.rms_norm_backward(self._device, dn, x, norm, rstd, dx, dy, normed)
            return False
        outputs, narrow = slice(0, group.outputs), slice(group.inputs, group.inputs + group.narrow)
        b, z = self.weights.buffers[i][key].part(outputs, narrow), _tail(dx, group.outputs, group)
        ops.rms_norm_backward_project(self._device, dn, x, norm, rstd, dx, dy, normed, b, z)
        return True

    def _swiglu(self, i: int, gate_up: Matrix, act: Matrix, keep: bool) -> None:
        """Act, and beside it what the adapter of down makes of it, if that is made on the way."""
        if not self._joined[i]:
            ops.swiglu(self._device, gate_up, act)
            return
        group = self.layers[i]["down"]
        inputs, rows = slice(0, group.inputs), slice(group.outputs, group.outputs + group.narrow)
        assert self._sums is not None
        mlp.swiglu_project(
            self._device,
            gate_up,
            act.part(columns=inputs),
            self.weights.buffers[i]["down"].part(rows, inputs),
            self._sums,
            _tail(act, group.inputs, group),
            self._kept_z(i, "down", act.rows) if keep else None,
        )

    def _swiglu_backward(self, i: int, gate_up: Matrix, dact: Matrix, dy: Matrix) -> None:
        """The gradients of gate and up; act over dact, or what adapters need of it and of them."""
        if not self._joined[i]:
            ops.swiglu_backward(self._device, gate_up, dact)
            return
        groups, z = self.layers[i], self._zs[i]["gate_up"]
        group, down = groups["gate_up"], groups["down"]
        outputs, narrow = slice(0, group.outputs), slice(group.inputs, group.inputs + group.narrow)
        assert self._sums is not None
        mlp.swiglu_backward_project(
            self._device,
            groups,
            gate_up,
            dact.part(columns=slice(0, down.inputs)),
            self.weights.buffers[i]["gate_up"].part(outputs, narrow),
            z.part(slice(0, dact.rows)),
            _tail(dy, down.outputs, down),
            _tail(gate_up, group.outputs, group),
            self._sums,
            self.gradients,
        )

    def _norm(self, i: int, name: str) -> Norm:
        return Norm(self._small[f"model.layers.{i}.{name}.weight"], self.config.rms_norm_eps)

    def _linear(
        self,
        i: int,
        key: str,
        x: Matrix,
        out: Matrix,
        keep: bool,
        add: Matrix | None = None,
        again: bool = False,
        projected: bool = False,
    ) -> None:
        """Out = x W^T + s z B^T + bias + add; z = x A^T is left beside x, and kept if so wished.

        again: it is kept already; projected: it is there already.
        """
        device, group, buffer = self._device, self.layers[i][key], self.weights.buffers[i][key]
        columns = group.inputs + group.narrow
        if group.narrow and not projected:
            x_alone, z = x.part(columns=slice(0, group.inputs)), _tail(x, group.inputs, group)
            copy = self._kept_z(i, key, x.rows) if keep else None
            if copy is not None and again:
                device.copy_rows(z, copy)
            elif keep and self._dropping is not None and self._dropped is not None:
                for adapter in group.adapters:
                    own = slice(adapter.start, adapter.start + group.slot)
                    rows = slice(group.outputs + adapter.start, group.outputs + adapter.start + group.slot)
                    dropped = self._dropped.part(slice(0, x.rows), slice(0, group.inputs))
                    self._dropping.rows(device, adapter, x_alone, dropped)
                    lora.project(
                        device,
                        dropped,
                        buffer.part(rows, slice(0, group.inputs)),
                        z.part(columns=own),
                        self._space,
                        across=False,
                        alpha=lora.keep_scale(adapter),
                        copy=None if copy is None else copy.part(columns=own),
                    )
            else:
                a = buffer.part(slice(group.outputs, buffer.rows), slice(0, group.inputs))
                lora.project(device, x_alone, a, z, self._space, across=False, copy=copy)
        device.multiply(
            x.part(columns=slice(0, columns)),
            buffer.part(slice(0, group.outputs), slice(0, columns)),
            out.part(columns=slice(0, group.outputs)),
            transpose_b=True,
            add=add,
            bias=self.bias(i, key),
        )

    def _head(self, shape: Pass, x: Matrix, total: int, scale: int) -> None:
        """The losses of the rows with a target; with a scale, the gradient of x into the first of dys."""
        device, config = self._device, self.config
        norm = Norm(self._small[FINAL_NORM], config.rms_norm_eps)
        index, targets = self.inputs.at("index"), self.inputs.at("targets")
        normed = self._normed.part(slice(0, shape.rows), slice(0, config.hidden_size))
        table = self.table.part(columns=slice(0, config.hidden_size))
        ops.rms_norm(device, x, norm, normed, self._head_rstd, index)
        for first in range(0, shape.rows, self._logits_rows):
            count = min(self._logits_rows, shape.rows - first)
            part = normed.part(slice(first, first + count))
            logits = self._logits.part(slice(0, count))
            device.multiply(part, table, logits, transpose_b=True)
            at = 4 * first
            ops.cross_entropy(device, logits, config.vocab_size, targets + at, scale, self._losses + at)
            if scale:
                device.multiply(logits, table, part)
        ops.add_up(device, self._losses, shape.rows, total)
        if scale:
            dy = self._dys[0].part(slice(0, shape.tokens))
            device.fill(dy.address, 0, dy.nbytes)
            ops.rms_norm_backward(device, normed, x, norm, self._head_rstd, dy, index=index)

    # ---- backward ----------------------------------------------------------------------------------------

    def _backward_all(self, shape: Pass) -> None:
        depth = len(self.layers)
        order = list(reversed(range(self.bottom, depth)))
        # What the forward pass left in the memory that layers share is that of the last of them.
        there = {*self._own, self._first_kept - 1}
        visits = [(i, part) for i in order for part in (("mlp", "attention") if i in there else PARTS)]
        self._ahead = Ahead(self._device, self.weights, visits)
        projected = False
        for i in order:
            kept = self._kept(i).rows(shape.tokens)
            if i not in there:
                self._attention_forward(
                    i, self._xs[i].part(slice(0, shape.tokens)), kept, shape, True, again=True
                )
                self._mlp_forward(i, None, kept, shape, True)
            projected = self._layer_backward(i, kept, shape, projected)
        self._ahead.finish()

    def _layer_backward(self, i: int, kept: _Kept, shape: Pass, projected: bool) -> bool:
        """From the gradient of a layer's output in the first of dys to that of its input, in the same.

        projected: beside it is s dy B of down. Returns whether that of the layer below was left, too.
        """
        device, groups = self._device, self.layers[i]
        rows = slice(0, shape.tokens)
        normed, act = self._normed.part(rows), self._act.part(rows)
        dy, dmiddle = (dy.part(rows) for dy in self._dys)
        x = self._xs[i].part(rows)
        hidden = slice(0, self.config.hidden_size)
        above = i > self.bottom
        attention_trains = above or groups["qkv"].narrow > 0 or groups["o"].narrow > 0

        self._ahead.use(i, "mlp")
        needed = attention_trains or groups["gate_up"].narrow > 0
        self._claim(act)
        self._linear_backward(i, "down", dy, act if needed else None, projected)
        if needed:
            self._claim(kept.gate_up)
            self._swiglu_backward(i, kept.gate_up, act, dy)
        else:
            ops.swiglu(device, kept.gate_up, act)
            self._gradients(i, "mlp", shape)
            self._ahead.done(i, "mlp")
            self._skip_attention(i)
            return False
        self._claim(normed)
        dx = normed if attention_trains else None
        self._linear_backward(i, "gate_up", kept.gate_up, dx, projected=self._joined[i])
        self._ahead.done(i, "mlp")
        norm = self._norm(i, _NORMS["gate_up"])
        if attention_trains:
            self._ahead.use(i, "attention")
            self._claim(dmiddle)
            projected = self._normalize_backward(
                norm, kept.middle, kept.middle_rstd, dmiddle, dy, normed, (i, "o")
            )
        else:
            ops.rms_norm(device, kept.middle, norm, normed.part(columns=hidden), kept.middle_rstd)
        self._gradients(i, "mlp", shape)
        if not attention_trains:
            self._skip_attention(i)
            return False

        dmixed = self._dmixed.part(rows)
        inside = above or groups["qkv"].narrow > 0
        self._claim(dmixed)
        self._linear_backward(i, "o", dmiddle, dmixed if inside else None, projected)
        if not inside:
            self._gradients(i, "attention", shape)
            self._ahead.done(i, "attention")
            return False
        dqkv = self._attention_backward(i, kept, dmixed, shape)
        self._claim(normed)
        self._linear_backward(i, "qkv", dqkv, normed if above else None)
        self._ahead.done(i, "attention")
        norm = self._norm(i, _NORMS["qkv"])
        projected = False
        if above:
            self._ahead.use(i - 1, "mlp")
            self._claim(dy)
            projected = self._normalize_backward(norm, x, kept.rstd, dy, dmiddle, normed, (i - 1, "down"))
        else:
            ops.rms_norm(device, x, norm, normed.part(columns=hidden), kept.rstd)
        self._gradients(i, "attention", shape)
        return projected

    def _skip_attention(self, i: int) -> None:
        self._ahead.use(i, "attention")
        self._ahead.done(i, "attention")

    def _attention_backward(self, i: int, kept: _Kept, dmixed: Matrix, shape: Pass) -> Matrix:
        heads = self._heads[i]
        rotated = kept.qkv if self._rotated is None else self._rotate(i, kept, shape)
        q, k, _ = attention.split(rotated, heads)
        v = attention.split(kept.qkv, heads)[2]
        count = self.inputs.backward_tiles(shape.tokens)
        dqkv = self._dqkv[i - self.bottom].part(slice(0, shape.tokens))
        self._claim(dqkv)
        attention.attend_backward(
            self._device,
            self._shape,
            heads,
            q,
            k,
            v,
            kept.mixed,
            dmixed,
            kept.lse,
            self._delta,
            (self.inputs.at("queries"), count),
            (self.inputs.at("keys"), count),
            dqkv,
            self._shares,
        )
        positions = self.inputs.at("positions")
        rope.rotate_backward(self._device, heads, dqkv, positions, kept.qkv, self._shares)
        return dqkv

    def _linear_backward(
        self, i: int, key: str, dy: Matrix, dx: Matrix | None, projected: bool = False
    ) -> None:
        """dx = dy W + s dy B A; s dy B is left beside dy, unless projected: it is there already."""
        device, group, buffer = self._device, self.layers[i][key], self.weights.buffers[i][key]
        dy_alone = dy.part(columns=slice(0, group.outputs))
        rows, inputs = group.outputs + group.narrow, slice(0, group.inputs)
        dropping = self._dropping
        if group.narrow and not projected:
            dz = _tail(dy, group.outputs, group)
            b = buffer.part(slice(0, group.outputs), slice(group.inputs, group.inputs + group.narrow))
            if dropping is None:
                lora.project(device, dy_alone, b, dz, self._space, across=True)
            else:
                for adapter in group.adapters:
                    own, keep = slice(adapter.start, adapter.start + group.slot), lora.keep_scale(adapter)
                    part, to = b.part(columns=own), dz.part(columns=own)
                    lora.project(device, dy_alone, part, to, self._space, across=True, alpha=keep)
        if dx is None:
            return
        dx = dx.part(columns=inputs)
        if dropping is None or not group.narrow:
            device.multiply(dy.part(columns=slice(0, rows)), buffer.part(slice(0, rows), inputs), dx)
            return
        device.multiply(dy_alone, buffer.part(slice(0, group.outputs), inputs), dx)
        assert self._dropped is not None
        for adapter in group.adapters:
            first = group.outputs + adapter.start
            dropped = self._dropped.part(slice(0, dy.rows), inputs)
            dz = dy.part(columns=slice(first, first + group.slot))
            device.multiply(dz, buffer.part(slice(first, first + group.slot), inputs), dropped)
            dropping.rows(device, adapter, dropped, dx, add=True)

    def _gradients(self, i: int, part: str, shape: Pass) -> None:
        """Add the gradients of the adapters of a layer's part, once MAIN has made what they need."""
        device, rows = self._device, slice(0, shape.tokens)
        read = []
        for key in PARTS[part]:
            group = self.layers[i][key]
            if not group.narrow:
                continue
            x, dy = (side.part(rows) for side in self._sides(i, key))
            z, dz = self._zs[i][key].part(rows), _tail(dy, group.outputs, group)
            x_alone = x.part(columns=slice(0, group.inputs))
            if self._dropping is not None:
                self._dropped_gradients(i, group, x_alone, dz, self._dropping)
            if group.narrow > lora.NARROWEST:
                inputs = self._dropping is None
                lora.wide_gradients(device, group, x_alone, dz, dy, z, self.gradients, inputs=inputs)
            else:
                read += [x, dy, z]
        if not read:
            return
        address, jobs = self._jobs[i, part]
        made = device.mark()
        with device.on(SIDE):
            device.wait(made)
            lora.gradients(device, address, jobs, shape.tokens, self._side_space)
            mark = device.mark()
        for matrix in read:
            self._reading[matrix.address] = mark

    def _dropped_gradients(self, i: int, group: Group, x: Matrix, dz: Matrix, dropping: Dropped) -> None:
        """Add the gradients of A, each adapter's from what dropout leaves of x to it."""
        device = self._device
        assert self._dropped is not None
        dropped = self._dropped.part(slice(0, x.rows), slice(0, group.inputs))
        for adapter in group.adapters:
            dropping.rows(device, adapter, x, dropped)
            if group.narrow > lora.NARROWEST:
                lora.wide_input_gradient(device, group, adapter, dropped, dz, self.gradients)
            else:
                address, jobs = self._jobs[i, adapter.name]
                lora.gradients(device, address, jobs, x.rows, self._space)

    def _claim(self, *matrices: Matrix) -> None:
        """Let MAIN wait for what still reads memory that it is about to write."""
        for matrix in matrices:
            mark = self._reading.pop(matrix.address, None)
            if mark is not None:
                self._device.wait(mark)

    _dropping: Dropped | None = None
    _caches: Sequence[tuple[Matrix, Matrix]] | None = None
    _cached = 0


def check_supported(config: LlamaConfig) -> None:
    """Raise InputError for a model whose sizes the kernels don't take."""
    for what, size in (
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("head_dim", config.head_dim),
    ):
        if size % 8:
            raise InputError(f"the model's {what} is {size}; on the GPU it must be a multiple of 8")
    if config.head_dim > 256:
        raise InputError(f"the model's head_dim is {config.head_dim}; on the GPU it is at most 256")
    if config.hidden_size > 16384:
        raise InputError(f"the model's hidden_size is {config.hidden_size}; on the GPU it is at most 16384")


def _tail(matrix: Matrix, columns: int, group: Group) -> Matrix:
    """The narrow columns beside a group's input or output."""
    return matrix.part(columns=slice(columns, columns + group.narrow))


def _chunk(rows: int, most: int, width: int, processors: int) -> int:
    """Return how many of so many rows to take at a time, at most `most`.

    The product with results of that width, in tiles of 128 x 256, shall leave few processors idle.
    """
    if rows <= most:
        return rows

    def rounds(chunk: int) -> int:
        tiles = [-(-part // 128) * -(-width // 256) for part in (chunk, rows % chunk)]
        return rows // chunk * -(-tiles[0] // processors) + -(-tiles[1] // processors)

    return min(range(most // 128 * 128, 0, -128), key=rounds, default=most)


def _over(matrix: Matrix, columns: int, tail: int) -> Matrix | None:
    """A matrix in the memory of another, which is used up, if that has room for it."""
    pitch = round_up(columns + tail, 64)
    return Matrix(matrix.address, matrix.rows, columns, pitch, BFLOAT16) if pitch <= matrix.pitch else None


def _plain(value: Any) -> NDArray[Any]:
    if isinstance(value, QuantizedTensor):
        raise InputError("a norm or bias is quantized; only the weights of linear layers and lm_head may be")
    return value if isinstance(value, np.ndarray) else value.get()


def _bf16(value: Any) -> NDArray[Any]:
    """A matrix of the embedding or head in bfloat16; a quantized one is decoded."""
    if isinstance(value, QuantizedTensor):
        return narrow(dequantize(value).astype(np.float32), BFLOAT16)
    array = _plain(value)
    return array if array.dtype == BFLOAT16 else narrow(np.asarray(array, np.float32), BFLOAT16)
