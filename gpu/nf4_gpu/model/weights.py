"""A model's weights on the device: how a layer's are grouped, stored, and written out ahead of use.

A group is the linear layers that read the same input: one product serves them. Of each the buffer holds
[out + narrow, in + narrow] in bfloat16: W; beside it s B, its ranks in columns of their own; below it A. So
x with x A^T beside it times the rows of W, and dy with s dy B beside it times the columns, are the layer
with its adapter.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from nf4.blockwise import block_count
from nf4.codebooks import Codebook
from nf4.errors import InputError
from nf4.floats import BFLOAT16, narrow
from nf4.lora import LoRA
from nf4.model.config import LlamaConfig
from nf4.nested import NestedAbsmax
from nf4.tensor import QuantizedTensor
from numpy.typing import NDArray

from nf4_gpu.arena import Arena, round_up
from nf4_gpu.device import AHEAD, IN, MAIN, Device, Mark
from nf4_gpu.matrix import Matrix

GROUPS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
PARTS = {"attention": ("qkv", "o"), "mlp": ("gate_up", "down")}
"""The groups whose written weights share a buffer: while one is computed, the next is written."""

SOURCE = "model/weights.cu"
_TABLES = 64 << 10  # bytes for values of codebooks and 8-bit maps
_VECTORS = 2048  # of eight elements, that a thread block writes: as there
_JOB = np.dtype(
    [(name, "<u8") for name in ("to", "from", "absmax", "nested_absmax", "offset", "values", "map")]
    + [
        (name, "<i4")
        for name in ("kind", "first", "pitch", "rows", "columns", "block_shift", "nested_shift", "ranks")
    ]
    + [("width", "<i4"), ("start", "<i4"), ("wide", "<i4"), ("scale", "<f4")]
)
_WEIGHT, _COPY, _ROWS_OF_A, _COLUMNS_OF_B = range(4)


@dataclass(frozen=True)
class Adapter:
    """One module's LoRA: its place in the group's narrow columns, and in the vector of all parameters."""

    name: str
    rank: int
    start: int  # the first of its columns
    scale: float
    dropout: float
    stream: int
    a: int  # elements before A [rank, in]
    b: int  # and before B [out, rank]


@dataclass(frozen=True)
class Module:
    """One linear layer of a group: out features from a row on."""

    name: str
    outputs: int
    row: int
    adapter: Adapter | None


@dataclass(frozen=True)
class Group:
    """Linear layers with the same input. slot: columns that the ranks of each adapted one have."""

    key: str
    inputs: int
    modules: tuple[Module, ...]
    slot: int

    @property
    def outputs(self) -> int:
        """Features of all of them."""
        return sum(module.outputs for module in self.modules)

    @property
    def adapters(self) -> list[Adapter]:
        """Those that there are."""
        return [module.adapter for module in self.modules if module.adapter is not None]

    @property
    def narrow(self) -> int:
        """Columns of x A^T, of all the adapters."""
        return self.slot * len(self.adapters)

    def buffer(self, address: int) -> Matrix:
        """Where it is written out."""
        rows, columns = self.outputs + self.narrow, self.inputs + self.narrow
        return Matrix(address, rows, columns, round_up(columns, 64), BFLOAT16)


@dataclass(frozen=True)
class AdapterShape:
    """What a plan needs to know of an adapter before there is one."""

    rank: int
    scale: float
    dropout: float
    stream: int


def shapes_of(adapters: Mapping[str, LoRA]) -> dict[str, AdapterShape]:
    """Return the shapes of adapters by module."""
    return {
        name: AdapterShape(lora.A.shape[0], lora.scale, lora.dropout, lora.stream)
        for name, lora in adapters.items()
    }


@dataclass(frozen=True)
class Form:
    """How a weight is stored: block_size 0 for bfloat16; nested: block size of double quantization, or 0."""

    block_size: int
    nested: int

    def sizes(self, n: int) -> dict[str, int]:
        """Return the bytes of each array of a weight of n elements, in the order they lie in."""
        if not self.block_size:
            return {"from": 2 * n}
        blocks = block_count(n, self.block_size)
        if not self.nested:
            return {"from": n // 2, "absmax": 4 * blocks}
        return {
            "from": n // 2,
            "absmax": blocks,
            "nested_absmax": 4 * block_count(blocks, self.nested),
            "offset": 4,
        }


def form_of(value: Any) -> Form:
    """Return how a weight will be stored. Double quantization in odd blocks is undone."""
    if not isinstance(value, QuantizedTensor):
        return Form(0, 0)
    nested = value.absmax.block_size if isinstance(value.absmax, NestedAbsmax) else 0
    return Form(value.block_size, nested if nested & (nested - 1) == 0 else 0)


def groups_of(
    config: LlamaConfig, adapters: Mapping[str, AdapterShape]
) -> tuple[list[dict[str, Group]], int]:
    """Return the groups of each layer by key, and the number of adapters' parameters."""
    hidden, dim = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    outputs = {
        "q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": hidden,
        "gate_proj": config.intermediate_size, "up_proj": config.intermediate_size, "down_proj": hidden,
    }  # fmt: skip
    inputs = {"qkv": hidden, "o": queries, "gate_up": hidden, "down": config.intermediate_size}
    layers, count = [], 0
    for i in range(config.num_hidden_layers):
        groups = {}
        for key, targets in GROUPS.items():
            block = "mlp" if key in PARTS["mlp"] else "self_attn"
            names = [f"model.layers.{i}.{block}.{target}" for target in targets]
            found = [(name, adapters[name]) for name in names if name in adapters]
            slot = round_up(max((shape.rank for _, shape in found), default=0), 8)
            places = {}
            for number, (name, shape) in enumerate(found):  # the A of a group lie together
                places[name] = (number * slot, count)
                count += shape.rank * inputs[key]
            modules, row = [], 0
            for name, target in zip(names, targets, strict=True):
                adapter = None
                if name in places:
                    shape, (start, a) = adapters[name], places[name]
                    adapter = Adapter(
                        name, shape.rank, start, shape.scale, shape.dropout, shape.stream, a, count
                    )
                    count += shape.rank * outputs[target]
                modules.append(Module(name, outputs[target], row, adapter))
                row += outputs[target]
            groups[key] = Group(key, inputs[key], tuple(modules), slot)
        layers.append(groups)
    return layers, count


class Weights:
    """The linear weights of all layers, where they are stored and where they are written out.

    The first `resident` layers stay on the device; the others lie in pinned host memory, and take turns in
    two places of the device.
    """

    def __init__(
        self,
        arena: Arena,
        layers: Sequence[dict[str, Group]],
        forms: Sequence[Mapping[str, Form]],
        resident: int,
        wide: bool,
        parameters: int,
    ) -> None:
        self.layers, self.forms, self.resident = layers, forms, resident
        self._wide, self._parameters = wide, parameters
        self._sizes = [self._size(i) for i in range(len(layers))]
        paged = self._sizes[resident:]
        self._places = [arena.take("weights", size) for size in self._sizes[:resident]]
        turns = [arena.take("weights", max(paged)) for _ in range(min(2, len(paged)))]
        self._places += [turns[i % 2] for i in range(len(paged))]
        self.buffers: list[dict[str, Matrix]] = []
        sizes = {
            part: max(sum(groups[key].buffer(0).nbytes for key in keys) for groups in layers)
            for part, keys in PARTS.items()
        }
        self.written_bytes = sum(sizes.values())
        self._written = {part: 0 for part in PARTS}
        self._part_sizes = sizes
        self._tables = arena.take("buffers", _TABLES)
        self._jobs: dict[tuple[int, str], tuple[int, int, int]] = {}
        self._job_memory = arena.take("buffers", _JOB.itemsize * sum(self._most_jobs(g) for g in layers))
        self._host: list[NDArray[np.uint8] | None] = [None] * len(layers)
        self._device: Device | None = None

    def write_at(self, address: int) -> None:
        """Settle where weights are written out: written_bytes from an address on."""
        for part, size in self._part_sizes.items():
            self._written[part] = address
            address += size
        self.buffers = []
        for groups in self.layers:
            found = {}
            for part, keys in PARTS.items():
                at = self._written[part]
                for key in keys:
                    found[key] = groups[key].buffer(at)
                    at += found[key].nbytes
            self.buffers.append(found)

    def load(self, device: Device, params: Mapping[str, Any]) -> None:
        """Copy the weights to their places, and what the kernel is told of each."""
        self._device = device
        tables: dict[bytes, int] = {}
        used = 0

        def table(values: NDArray[np.float32]) -> int:
            nonlocal used
            key = values.tobytes()
            if key not in tables:
                if used + len(key) > _TABLES:
                    raise InputError(
                        f"more than {_TABLES} bytes of different codebooks and 8-bit maps in one model; "
                        "quantize the model anew:  nf4 quantize"
                    )
                tables[key] = self._tables + used
                _send(device, self._tables + used, np.frombuffer(key, np.uint8))
                used += round_up(len(key), 256)
            return tables[key]

        at = self._job_memory
        self.sources: list[dict[str, dict[str, int]]] = []
        """By layer and module: where its arrays lie, its codebook's values, the 8-bit map."""
        for i, groups in enumerate(self.layers):
            block = np.zeros(self._sizes[i], np.uint8)
            if i >= self.resident:
                block = self._host[i] = device.allocate_pinned(self._sizes[i])
            sources: dict[str, dict[str, int]] = {}
            offset = 0
            for module in _modules(groups):
                value = params[f"{module.name}.weight"]
                form = self.forms[i][module.name]
                arrays = _arrays(value, form)
                sources[module.name] = {}
                for name, size in form.sizes(module.outputs * _inputs(groups, module)).items():
                    block[offset : offset + size] = arrays[name][:size]
                    sources[module.name][name] = self._places[i] + offset
                    offset += round_up(size, 16)
                if form.block_size:
                    sources[module.name]["values"] = table(_codebook_values(value.codebook))
                    sources[module.name]["block_shift"] = form.block_size.bit_length() - 1
                if form.nested:
                    sources[module.name]["map"] = table(np.asarray(value.absmax.map, np.float32))
                    sources[module.name]["nested_shift"] = form.nested.bit_length() - 1
            self.sources.append(sources)
            if i < self.resident:
                _send(device, self._places[i], block)
            for part, keys in PARTS.items():
                jobs, blocks = [], 0
                for key in keys:
                    for job in self._group_jobs(i, groups[key], sources):
                        job["first"] = blocks
                        blocks += -(-int(job["rows"]) * (int(job["columns"]) // 8) // _VECTORS)
                        jobs.append(job)
                packed = np.array(jobs, _JOB)
                _send(device, at, packed.view(np.uint8))
                self._jobs[i, part] = (at, len(jobs), blocks)
                at += packed.nbytes

    def write(self, layer: int, part: str) -> None:
        """Launch the writing of a part of a layer, whose weights are in place, on the current stream."""
        assert self._device is not None
        jobs, count, blocks = self._jobs[layer, part]
        self._device.launch(SOURCE, "write_weights", (blocks,), 256, (jobs, count), DTYPE=2)

    def fetch(self, layer: int) -> None:
        """Copy a layer from the host to its place, on the current stream."""
        assert self._device is not None
        host = self._host[layer]
        assert host is not None
        self._device.copy(self._places[layer], host.ctypes.data, host.nbytes)

    @property
    def nbytes(self) -> int:
        """The bytes of all layers as they are stored."""
        return sum(self._sizes)

    def settle(self, layer: int) -> None:
        """Bring a layer to its place, on the current stream, unless it stays there."""
        if layer >= self.resident:
            self.fetch(layer)

    def place(self, layer: int) -> int:
        """Return the address that a layer's stored weights have while they are on the device."""
        return self._places[layer]

    def _size(self, i: int) -> int:
        return sum(
            round_up(size, 16)
            for module in _modules(self.layers[i])
            for size in self.forms[i][module.name]
            .sizes(module.outputs * _inputs(self.layers[i], module))
            .values()
        )

    def _most_jobs(self, groups: Mapping[str, Group]) -> int:
        return 3 * sum(1 for _ in _modules(groups))

    def _group_jobs(
        self, layer: int, group: Group, sources: Mapping[str, Mapping[str, int]]
    ) -> Iterator[Any]:
        buffer = self.buffers[layer][group.key]
        element = 4 if self._wide else 2
        for module in group.modules:
            job = np.zeros((), _JOB)
            rows = buffer.part(slice(module.row, module.row + module.outputs), slice(0, group.inputs))
            job["to"], job["pitch"] = rows.address, rows.pitch
            job["rows"], job["columns"] = rows.rows, rows.columns
            for name, value in sources[module.name].items():
                job[name] = value
            job["kind"] = _WEIGHT if job["values"] else _COPY
            yield job
            adapter = module.adapter
            if group.narrow:  # zeros where there is no adapter
                job = np.zeros((), _JOB)
                rows = buffer.part(
                    slice(module.row, module.row + module.outputs), slice(group.inputs, buffer.columns)
                )
                job["kind"], job["to"], job["pitch"] = _COLUMNS_OF_B, rows.address, rows.pitch
                job["rows"], job["columns"] = module.outputs, group.narrow
                if adapter is not None:
                    job["from"], job["wide"] = self._parameters + adapter.b * element, self._wide
                    job["ranks"], job["start"], job["scale"] = adapter.rank, adapter.start, adapter.scale
                yield job
            if adapter is not None:
                job = np.zeros((), _JOB)
                first = group.outputs + adapter.start
                rows = buffer.part(slice(first, first + group.slot))
                job["kind"], job["to"], job["pitch"] = _ROWS_OF_A, rows.address, rows.pitch
                job["rows"], job["columns"] = group.slot, buffer.columns
                job["from"], job["wide"] = self._parameters + adapter.a * element, self._wide
                job["ranks"], job["width"] = adapter.rank, group.inputs
                yield job


class Ahead:
    """Writes out the parts of layers in the order they will be used, each as soon as its buffer is free."""

    def __init__(self, device: Device, weights: Weights, visits: Sequence[tuple[int, str]]) -> None:
        self._device, self._weights = device, weights
        self._queues = {part: [layer for layer, p in visits if p == part] for part in PARTS}
        self._order = list(dict.fromkeys(layer for layer, _ in visits))
        self._written: dict[str, tuple[int, Mark] | None] = dict.fromkeys(PARTS)
        self._fetched: dict[int, Mark] = {}
        self._held: dict[int, int] = {}  # by place: the layer fetched last
        self._read: dict[int, Mark] = {}  # by place: its last writing out
        start = device.mark()
        for stream in (AHEAD, IN):
            with device.on(stream):
                device.wait(start)
        for part in PARTS:
            self._next(part, None)

    def use(self, layer: int, part: str) -> None:
        """Let MAIN wait until a part of a layer is written."""
        written = self._written[part]
        assert written is not None
        assert written[0] == layer
        self._device.wait(written[1])

    def done(self, layer: int, part: str) -> None:
        """Let the part be overwritten once MAIN has come this far."""
        written = self._written[part]
        assert written is not None
        assert written[0] == layer
        self._next(part, self._device.mark())

    def finish(self) -> None:
        """Let MAIN wait for all that was begun."""
        for stream in (AHEAD, IN):
            with self._device.on(stream):
                mark = self._device.mark()
            self._device.wait(mark)

    def _next(self, part: str, free: Mark | None) -> None:
        if not self._queues[part]:
            self._written[part] = None
            return
        layer = self._queues[part].pop(0)
        self._fetch(layer)
        with self._device.on(AHEAD):
            if free is not None:
                self._device.wait(free)
            if layer in self._fetched:
                self._device.wait(self._fetched[layer])
            self._weights.write(layer, part)
            mark = self._device.mark()
        self._read[self._weights.place(layer)] = mark
        self._written[part] = (layer, mark)
        position = self._order.index(layer)
        if all(layer not in queue for queue in self._queues.values()):  # its place is free after this
            for following in self._order[position + 1 : position + 3]:
                if self._weights.place(following) == self._weights.place(layer):
                    self._fetch(following)

    def _fetch(self, layer: int) -> None:
        """Begin to copy a layer to its place, unless it is there or always was."""
        place = self._weights.place(layer)
        if layer < self._weights.resident or self._held.get(place) == layer:
            return
        with self._device.on(IN):
            if place in self._read:
                self._device.wait(self._read[place])
            self._weights.fetch(layer)
            self._fetched[layer] = self._device.mark()
        self._held[place] = layer


def _modules(groups: Mapping[str, Group]) -> Iterator[Module]:
    for group in groups.values():
        yield from group.modules


def _inputs(groups: Mapping[str, Group], module: Module) -> int:
    return next(group.inputs for group in groups.values() if module in group.modules)


def _arrays(value: Any, form: Form) -> dict[str, NDArray[np.uint8]]:
    """The bytes of a weight's arrays."""
    if not isinstance(value, QuantizedTensor):
        return {"from": _bytes(narrow(np.asarray(value, np.float32), BFLOAT16))}
    absmax = value.absmax
    if isinstance(absmax, NestedAbsmax):
        if form.nested:
            return {
                "from": _bytes(value.codes),
                "absmax": _bytes(absmax.codes),
                "nested_absmax": _bytes(absmax.absmax),
                "offset": _bytes(np.asarray(absmax.offset, np.float32).reshape(1)),
            }
        from nf4.nested import decode_nested

        absmax = decode_nested(absmax)
    return {"from": _bytes(value.codes), "absmax": _bytes(absmax)}


def _bytes(array: Any) -> NDArray[np.uint8]:
    if not isinstance(array, np.ndarray):
        array = array.get()  # a device array
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _codebook_values(codebook: Codebook) -> NDArray[np.float32]:
    return np.asarray(codebook.values, np.float32)


def _send(device: Device, to: int, block: NDArray[np.uint8]) -> None:
    """Copy to the device and wait, so that the block may go."""
    with device.on(MAIN):
        device.copy(to, block.ctypes.data, block.nbytes)
    device.synchronize()
