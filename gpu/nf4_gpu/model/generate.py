"""Generation on the device: a prompt in one pass, then a token at a time from recorded launches."""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from nf4.errors import InputError
from nf4.floats import BFLOAT16
from nf4.model import generate as reference
from nf4.model.config import LlamaConfig
from nf4.model.llama import FINAL_NORM
from numpy.typing import NDArray

from nf4_gpu.arena import Arena, round_up
from nf4_gpu.device import Device
from nf4_gpu.matrix import Matrix
from nf4_gpu.model import ops
from nf4_gpu.model.llama import Network, Pass
from nf4_gpu.model.weights import GROUPS

SOURCE, VECTOR = "model/generate.cu", "model/vector.cu"
_CODES, _BF16 = range(2)  # KIND
_PLAIN, _NORM, _SWIGLU = range(3)  # PROLOGUE
_GROUP = {_CODES: 16, _BF16: 32}  # rows that a thread block takes at a time
_SPAN = {_CODES: 256, _BF16: 1024}  # columns that the vector is padded to
_WARPS, _RESIDENT = 8, 2  # of rows in bfloat16: warps of a thread block, and thread blocks at a time
_STAGES, _STAGE = 2, 16 * 256 // 2  # of a warp's ring of codes, and the bytes of one
_STATIC = 3072  # bytes of shared memory at most that a product has beside what it is given
_MOST_STATIC = 48 << 10  # that a kernel can have
_CHUNK = 64  # keys whose scores attention keeps at a time
_PARTS = 16  # of the positions that attention takes side by side
_BLOCKS = 128  # of take_likeliest
_LOG2E = 1.4426950408889634
_ROWS = np.dtype(
    [(n, "<u8") for n in ("from", "absmax", "nested_absmax", "offset", "values", "map", "bias", "b", "y")]
    + [(n, "<i4") for n in ("rows", "first", "block_shift", "nested_shift", "ranks", "start", "wide")]
    + [("scale", "<f4")]
)
_NARROW = np.dtype([("from", "<u8"), ("ranks", "<i4"), ("start", "<i4"), ("wide", "<i4"), ("unused", "<i4")])


@dataclass(frozen=True)
class _Launch:
    """Rows of one kind: addresses and counts of their jobs and adapters, and the rows of these."""

    kind: int
    jobs: int
    count: int
    groups: int
    adapters: int = 0
    narrow: int = 0
    small_blocks: bool = False  # whether some rows are in blocks of 32


class Cache:
    """Where a sequence stands: how many positions the keys and values on the device are of."""

    def __init__(self) -> None:
        self.length = 0


class Decoder:
    """A network's forward pass for one sequence at a time. positions: the most it may have."""

    def __init__(self, arena: Arena, network: Network, positions: int) -> None:
        config = network.config
        self.network, self.positions = network, positions
        width = config.num_key_value_heads * config.head_dim
        queries = config.num_attention_heads * config.head_dim
        size = 2 * positions * width
        need = 2 * config.num_hidden_layers * round_up(size, 256)
        address, room = network.spare
        at = address if room >= need else arena.take("buffers", need)
        self._caches = []
        for _ in range(config.num_hidden_layers):
            pair = [Matrix(at + i * round_up(size, 256), positions, width, width, BFLOAT16) for i in range(2)]
            at += 2 * round_up(size, 256)
            self._caches.append((pair[0], pair[1]))
        floats = {
            "x": config.hidden_size, "qkv": queries + 2 * width, "mixed": queries,
            "gate_up": 2 * config.intermediate_size,
            "z": max(64, *(group.narrow for groups in network.layers for group in groups.values())),
            "logits": network.padded,
        }  # fmt: skip
        self._at = {name: arena.take("buffers", 4 * count) for name, count in floats.items()}
        group = config.num_attention_heads // config.num_key_value_heads
        partial = 4 * config.num_key_value_heads * _PARTS * group * (config.head_dim + 2)
        for name, nbytes in {
            "partial": partial, "counters": 4 * config.num_key_value_heads, "best": 8 * _BLOCKS, "counter": 4,
            "token": 4, "position": 4, "ready": 8, "tokens": 4 * (positions + 1), "rows": 4 * positions,
        }.items():  # fmt: skip
            self._at[name] = arena.take("buffers", nbytes)
        # Of each layer, every group has a job a module and one an adapter; and the head has one.
        modules = sum(len(targets) for targets in GROUPS.values())
        self._job_memory = arena.take("buffers", _ROWS.itemsize * (modules * config.num_hidden_layers + 1))
        self._narrow_memory = arena.take("buffers", _NARROW.itemsize * modules * config.num_hidden_layers)

    def load(self, device: Device) -> None:
        """Tell the kernels what the network, which is loaded, has where."""
        self._device = device
        network, config = self.network, self.network.config
        self._heads = network.heads
        jobs: list[Any] = []
        narrow: list[Any] = []
        self._launches: list[dict[str, list[_Launch]]] = []
        size = network.adapter_dtype.itemsize
        for i, groups in enumerate(network.layers):
            found: dict[str, list[_Launch]] = {}
            for key, group in groups.items():
                rows: dict[tuple[int, int, int], list[Any]] = {}
                target = {"qkv": "qkv", "o": "x", "gate_up": "gate_up", "down": "x"}[key]
                first = len(narrow)
                for module in group.modules:
                    job = np.zeros((), _ROWS)
                    for name, address in network.weights.sources[i][module.name].items():
                        job[name] = address
                    kind = _CODES if job["values"] else _BF16
                    job["rows"], job["y"] = module.outputs, self._at[target] + 4 * module.row
                    bias = network.bias(i, key)
                    job["bias"] = bias + 2 * module.row if bias else 0
                    adapter = module.adapter
                    if adapter is not None:
                        job["b"], job["ranks"] = network.parameters + adapter.b * size, adapter.rank
                        job["start"], job["scale"], job["wide"] = adapter.start, adapter.scale, size == 4
                        a = network.parameters + adapter.a * size
                        narrow.append(np.array((a, adapter.rank, adapter.start, size == 4, 0), _NARROW))
                    rows.setdefault((kind, int(job["values"]), int(job["map"])), []).append(job)
                ranks = sum(int(part["ranks"]) for part in narrow[first:])
                at = self._narrow_memory + first * _NARROW.itemsize
                # Each launch makes z anew; there is but one where all the weights are of one kind. One whose
                # rows don't wait for z makes none: it could set `ready` to 0 before all of z is counted.
                found[key] = [
                    self._add(jobs, kind, part, at, ranks if any(job["b"] for job in part) else 0)
                    for (kind, _, _), part in rows.items()
                ]
            self._launches.append(found)
        head = np.zeros((), _ROWS)
        head["from"], head["rows"], head["y"] = network.table.address, config.vocab_size, self._at["logits"]
        self._head = self._add(jobs, _BF16, [head], 0, 0)
        self._put("", np.array(jobs, _ROWS), self._job_memory)
        if narrow:
            self._put("", np.array(narrow, _NARROW), self._narrow_memory)
        places = [network.angles.places(p, p + 1) for p in range(self.positions)]
        self._put("rows", np.concatenate(places))
        self._pinned = device.allocate_pinned(4 * (self.positions + 1)).view(np.int32)
        self._logits = device.allocate_pinned(4 * config.vocab_size).view(np.float32)
        self._inputs = device.allocate_pinned(network.inputs.nbytes).view(np.int32)
        self._steps: dict[bool, Callable[[], None]] = {}
        self._stepped: set[bool] = set()

    def _add(self, jobs: list[Any], kind: int, part: list[Any], adapters: int, narrow: int) -> _Launch:
        first, groups = self._job_memory + len(jobs) * _ROWS.itemsize, 0
        for job in part:
            job["first"] = groups
            groups += -(-int(job["rows"]) // _GROUP[kind])
            jobs.append(job)
        small = any(int(job["block_shift"]) < 6 for job in part)
        return _Launch(kind, first, len(part), groups, adapters, narrow, small)

    # ---- a sequence --------------------------------------------------------------------------------------

    def prompt(self, ids: NDArray[np.integer[Any]], cache: Cache) -> None:
        """Launch the prompt: its keys and values into the cache, and the logits after it."""
        network, device = self.network, self._device
        n = len(ids)
        if n == 0:
            raise InputError("the prompt has no tokens; give at least one")
        limits = network.limits
        if n > min(limits.tokens, self.positions):
            raise InputError(
                f"a prompt of {n} tokens is more than the {min(limits.tokens, self.positions)} planned for"
            )
        self._check(ids)
        targets = np.full(n, -1, np.int32)
        targets[-1] = 0
        device.synchronize()  # the block may be on its way
        shape = Pass(min(round_up(n, 64), limits.tokens), min(64, limits.rows))
        network.inputs.fill(self._inputs, shape, [(ids.astype(np.int32), targets, 0)], network.angles)
        device.copy(network.inputs.at("ids"), self._inputs.ctypes.data, network.inputs.nbytes)
        x = network.prompt(shape, n, self._caches)
        last = network.inputs.at("index")
        self._embed(x, last)
        self._multiply_head()
        cache.length = n
        self._pinned[0] = n - 1
        device.copy(self._at["position"], self._pinned.ctypes.data, 4)

    def token(self, token: int, cache: Cache) -> None:
        """Launch one token: its keys and values to the cache, and the logits after it."""
        device = self._device
        if cache.length >= self.positions:
            raise InputError(f"a sequence of more than the {self.positions} positions planned for")
        self._check(np.array([token]))
        device.synchronize()
        self._pinned[:2] = token, cache.length
        device.copy(self._at["token"], self._pinned.ctypes.data, 4)
        device.copy(self._at["position"], self._pinned.ctypes.data + 4, 4)
        self._step(likeliest=False)
        cache.length += 1

    def logits(
        self, ids: NDArray[np.integer[Any]], cache: Cache | None = None, last: bool = False
    ) -> NDArray[np.float32]:
        """Return the logits after ids, [1, vocabulary], which follow what the cache holds, as Llama does."""
        cache = Cache() if cache is None else cache
        if cache.length == 0:
            self.prompt(np.asarray(ids), cache)
        else:
            for token in ids:
                self.token(int(token), cache)
        return self._fetch()[None]

    def new_cache(self) -> Cache:
        """Return the cache of a new sequence; the one before is then no longer used."""
        return Cache()

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.network.config

    def likeliest(self, ids: list[int], count: int) -> Iterator[int]:
        """Yield the likeliest continuation, token by token; the next is begun before one is given out."""
        device, cache, n = self._device, Cache(), len(ids)
        if n + count - 1 > self.positions:
            raise InputError(
                f"{count} tokens after {n} are more than the {self.positions} positions planned for"
            )
        self.prompt(np.array(ids), cache)
        if count:
            self._likeliest()
        for i in range(count):
            at = n + i
            device.copy(self._pinned.ctypes.data + 4 * at, self._at["tokens"] + 4 * at, 4)
            arrived = device.mark()
            if i + 1 < count:
                self._step(likeliest=True)
            device.reached(arrived)
            yield int(self._pinned[at])

    def timeline(self, device: Any) -> list[dict[str, Any]]:
        """Return what a token launches and how long each takes, on a Timed device that is the decoder's."""
        rows: list[dict[str, Any]] = device.measured(lambda: self._launch(likeliest=True))
        return rows

    def bytes_read(self) -> int:
        """Return the bytes of weights that a token reads: codes, scales, and the head."""
        weights = self.network.weights
        return weights.nbytes + self.network.table.nbytes

    # ---- launches ----------------------------------------------------------------------------------------

    def _step(self, *, likeliest: bool) -> None:
        if likeliest in self._steps:
            self._steps[likeliest]()
        elif likeliest in self._stepped:
            self._steps[likeliest] = self._device.record(lambda: self._launch(likeliest))
            self._steps[likeliest]()
        else:
            self._stepped.add(likeliest)
            self._launch(likeliest)

    def _launch(self, likeliest: bool) -> None:
        network = self.network
        config = network.config
        self._embed(network.embedding, self._at["token"])
        for i in range(config.num_hidden_layers):
            prefix = f"model.layers.{i}."
            network.weights.settle(i)
            norm = self._norm(f"{prefix}input_layernorm.weight")
            self._group(i, "qkv", _NORM, "x", norm, config.hidden_size)
            self._attend(i)
            width = config.num_attention_heads * config.head_dim
            self._group(i, "o", _PLAIN, "mixed", (0, 0.0), width, add=True)
            norm = self._norm(f"{prefix}post_attention_layernorm.weight")
            self._group(i, "gate_up", _NORM, "x", norm, config.hidden_size)
            self._group(i, "down", _SWIGLU, "gate_up", (0, 0.0), config.intermediate_size, add=True)
        self._multiply_head()
        if likeliest:
            self._likeliest()

    def _group(
        self,
        i: int,
        key: str,
        prologue: int,
        x: str,
        norm: tuple[int, float],
        columns: int,
        add: bool = False,
    ) -> None:
        for launch in self._launches[i][key]:
            self._multiply(launch, prologue, x, norm, columns=columns, add=add)

    def _multiply_head(self) -> None:
        table, columns = self.network.table, self.network.config.hidden_size
        self._multiply(self._head, _NORM, "x", self._norm(FINAL_NORM), pitch=table.pitch, columns=columns)

    def _multiply(
        self,
        launch: _Launch,
        prologue: int,
        x: str,
        norm: tuple[int, float],
        *,
        columns: int,
        pitch: int | None = None,
        add: bool = False,
    ) -> None:
        kind, device = launch.kind, self._device
        shared = 2 * round_up(columns, _SPAN[kind])
        warps, resident = _WARPS, _RESIDENT
        defines = {"DTYPE": ops.BFLOAT16, "KIND": kind, "PROLOGUE": prologue}
        if kind == _CODES:
            cut = _cut(columns, device.shared_memory)
            assert cut is not None  # as why_not said
            warps, table_row, shared = cut
            resident = 1
            defines |= {
                "WARPS": warps,
                "TABLE_ROW": table_row,
                "HALVES": int(columns % 64 != 0 or launch.small_blocks),
            }
        narrow_blocks = _narrow_blocks(launch, warps, resident * device.processors)
        most = max(resident * device.processors - narrow_blocks, 1)
        device.launch_early(
            VECTOR,
            "multiply_vector",
            (narrow_blocks + min(launch.groups, most),),
            32 * warps,
            (
                launch.jobs, launch.count, launch.groups, launch.adapters, launch.narrow, narrow_blocks,
                self._at[x], columns, pitch or columns, norm[0], np.float32(norm[1]), self._at["z"],
                self._at["ready"], add,
            ),
            shared=shared,
            **defines,
        )  # fmt: skip

    def _attend(self, i: int) -> None:
        heads, (keys, values) = self._heads[i], self._caches[i]
        weights = (0, 0)
        eps = 0.0
        if heads.query_norm is not None and heads.key_norm is not None:
            weights, eps = (heads.query_norm.weight, heads.key_norm.weight), heads.query_norm.eps
        self._device.launch_early(
            SOURCE,
            "attend_token",
            (heads.keys, _PARTS),
            128,
            (
                self._at["qkv"], keys.address, values.address, self._at["position"], self._at["rows"],
                heads.cosines, heads.sines, heads.window, np.float32(_LOG2E / math.sqrt(heads.dim)), *weights,
                np.float32(eps), self._at["mixed"], self._at["partial"], self._at["counters"],
            ),
            **self._defines(),
        )  # fmt: skip

    def _embed(self, table: Matrix, token: int) -> None:
        width = self.network.config.hidden_size
        arguments = (table.address, table.pitch, token, width, self._at["x"])
        self._device.launch(
            SOURCE, "embed_token", (-(-width // 256),), 256, arguments,
            **self._defines(),
        )  # fmt: skip

    def _likeliest(self) -> None:
        at = self._at
        arguments = (
            at["logits"], self.network.config.vocab_size, at["token"], at["tokens"], at["position"],
            at["best"], at["counter"],
        )  # fmt: skip
        self._device.launch_early(
            SOURCE, "take_likeliest", (_BLOCKS,), 256, arguments,
            **self._defines(),
        )  # fmt: skip

    def _defines(self) -> dict[str, int]:
        config = self.network.config
        return {
            "DTYPE": ops.BFLOAT16,
            "GROUP": config.num_attention_heads // config.num_key_value_heads,
            "DIM": config.head_dim,
            "QK_NORM": int(config.qk_norm),
        }

    def _norm(self, name: str) -> tuple[int, float]:
        return self.network.small(name), self.network.config.rms_norm_eps

    def _check(self, ids: NDArray[np.integer[Any]]) -> None:
        vocabulary = self.network.config.vocab_size
        bad = (ids < 0) | (ids >= vocabulary)
        if bad.any():
            raise InputError(
                f"token id {ids[np.argmax(bad)]} is outside the model's vocabulary of {vocabulary}; "
                "is this the model's own tokenizer?"
            )

    def _fetch(self) -> NDArray[np.float32]:
        self._device.copy(self._logits.ctypes.data, self._at["logits"], self._logits.nbytes)
        self._device.synchronize()
        return self._logits.copy()

    def _put(self, name: str, array: NDArray[Any], address: int = 0) -> None:
        array = np.ascontiguousarray(array)
        self._device.copy(address or self._at[name], array.ctypes.data, array.nbytes)
        self._device.synchronize()


def why_not(config: LlamaConfig, shared_memory: int) -> str | None:
    """Return why the kernels don't take a model where thread blocks have so many bytes, if they don't."""
    width, inner, hidden = (
        config.num_attention_heads * config.head_dim,
        config.intermediate_size,
        config.hidden_size,
    )
    group = config.num_attention_heads // config.num_key_value_heads
    if hidden % 32 or inner % 32 or width % 32:
        return "the widths must be multiples of 32"
    if 4 * (group * (5 * config.head_dim + _CHUNK + 3) + config.head_dim) >= _MOST_STATIC:  # attend_token's
        return f"{group} query heads of {config.head_dim} a key head are too many"
    if _cut(max(hidden, inner, width), shared_memory) is None or 2 * round_up(hidden, 1024) > shared_memory:
        return f"the widths are too large for {shared_memory} bytes of shared memory"
    return None


def _narrow_blocks(launch: _Launch, warps: int, most: int) -> int:
    """Return how many of the thread blocks make z: with two warps a row, for the others wait for it.

    And all that would not let the others end sooner.
    """
    if launch.narrow == 0:
        return 0
    others = max(most - 1, 1)
    needed = -(-launch.groups // -(-launch.groups // others))
    return max(1, min(max(most - needed, 2 * launch.narrow // warps), launch.narrow, most // 4))


def _cut(columns: int, shared_memory: int) -> tuple[int, int, int] | None:
    """Return a product's warps, the bytes of a row of its table, and the shared memory that it then takes.

    columns: of the vector; shared_memory: bytes that a thread block may have. None if they are too few.
    """
    for warps, table_row in ((16, 256), (8, 128), (4, 64)):
        sums = warps * 16 * (warps + 1) * 4
        vector = 2 * round_up(columns, _SPAN[_CODES])
        need = 256 * table_row + warps * _STAGES * _STAGE + vector + sums
        if need + _STATIC <= shared_memory:
            return warps, table_row, need
    return None


def generate(
    decoder: Decoder,
    ids: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Collection[int] = frozenset(),
) -> Iterator[int]:
    """Yield up to max_new_tokens token ids that continue ids, as nf4.model.generate.generate does."""
    if temperature != 0:
        yield from reference.generate(
            decoder,
            ids,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop_ids=stop_ids,
        )
        return
    reference.check_options(ids, temperature, top_k, top_p)
    for token in decoder.likeliest(ids, max_new_tokens):
        if token in stop_ids:
            return
        yield token
