"""The 4-bit checkpoints of bitsandbytes and transformers: how a quantized weight lies in safetensors."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.blockwise import BLOCK_SIZES, check_block_size
from nf4.codebooks import CODEBOOKS, Codebook
from nf4.errors import InputError
from nf4.floats import DTYPES
from nf4.formats.checkpoint import (
    LINEAR_WEIGHT,
    Checkpoint,
    Progress,
    QuantizeOptions,
    check_finite,
    parameter_names,
    quantize_weight,
)
from nf4.formats.files import SafetensorsFile, SafetensorsWriter, TensorSpec, parse_json
from nf4.formats.writing import DTYPE_NAMES, dtype_key, model_dtype, write_model
from nf4.model.config import LlamaConfig
from nf4.nested import NESTED_BLOCK_SIZE, NestedAbsmax
from nf4.ranks import ALONE, Ranks
from nf4.tensor import QuantizedTensor, dequantize

STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__([^.]+)")
PART = re.compile(r"(?:.*\.)?weight\..+")
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
FLAT_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
NESTED_KEYS = {"nested_blocksize", "nested_dtype", "nested_offset"}
WRITABLE = ("nf4", "fp4")  # bitsandbytes knows no other codebook
U8, F32 = np.dtype(np.uint8), np.dtype(np.float32)


@dataclass(frozen=True)
class QuantState:
    """The JSON object stored beside a 4-bit weight (NF4-8.4); nested fields are None unless nested."""

    quant_type: str
    blocksize: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    nested_blocksize: int | None
    nested_offset: np.float32 | None

    @classmethod
    def parse(cls, text: bytes, quant_type: str, where: str) -> "QuantState":
        """Check every field. Raises InputError naming `where`, the field and its value."""
        fields = parse_json(text, where)
        nested = bool(fields.keys() & NESTED_KEYS)
        wanted = FLAT_KEYS | NESTED_KEYS if nested else FLAT_KEYS
        if fields.keys() != wanted:
            odd = sorted(fields.keys() ^ wanted)
            raise InputError(f"{where}: its keys must be {sorted(wanted)}; missing or unknown: {odd}")
        if fields["quant_type"] != quant_type:
            raise InputError(
                f"{where}: quant_type is {fields['quant_type']!r}, but the tensor's name says {quant_type!r}"
            )
        if not isinstance(fields["dtype"], str) or fields["dtype"] not in DTYPES:
            raise InputError(f"{where}: dtype {fields['dtype']!r} isn't one of {', '.join(DTYPES)}")
        shape = fields["shape"]
        if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**48 for size in shape):
            raise InputError(f"{where}: shape {shape!r} isn't a list of integers from 0 to 2^48 - 1")
        size = fields["blocksize"]
        if type(size) is not int or size not in BLOCK_SIZES:
            raise InputError(f"{where}: blocksize {size!r} isn't one of {', '.join(map(str, BLOCK_SIZES))}")
        offset = None
        if nested:
            size = fields["nested_blocksize"]
            if type(size) is not int or size != NESTED_BLOCK_SIZE:
                raise InputError(f"{where}: nested_blocksize {size!r} isn't {NESTED_BLOCK_SIZE}")
            if fields["nested_dtype"] != "float32":
                raise InputError(f"{where}: nested_dtype {fields['nested_dtype']!r} isn't float32")
            value = fields["nested_offset"]
            if type(value) not in (int, float) or not abs(value) <= float(np.finfo(np.float32).max):
                raise InputError(f"{where}: nested_offset {value!r} isn't a finite float32")
            offset = np.float32(value)
        return cls(
            quant_type,
            fields["blocksize"],
            DTYPES[fields["dtype"]],
            tuple(shape),
            fields.get("nested_blocksize"),
            offset,
        )

    def dump(self) -> bytes:
        """The JSON text, UTF-8, of a length that doesn't depend on nested_offset's value."""
        fields: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": DTYPE_NAMES[self.dtype],
            "shape": list(self.shape),
        }
        if self.nested_offset is None:
            return json.dumps(fields).encode()
        fields |= {"nested_blocksize": self.nested_blocksize, "nested_dtype": "float32"}
        # 17 decimals give every float32 back, and always 23 characters: the header of a file that is still to
        # be computed needs the lengths. An absmax is not negative, so neither is the mean.
        return (json.dumps(fields)[:-1] + f', "nested_offset": {float(self.nested_offset):.17e}}}').encode()


def group_names(names: Iterable[str], where: str) -> dict[str, list[str]]:
    """Find the 4-bit weights among tensor names: {weight name: the names of its parts}.

    Raises InputError on a part whose weight or state is missing, and on parts nobody knows.
    """
    present = set(names)
    groups: dict[str, list[str]] = {}
    for name in present:
        match = STATE.fullmatch(name)
        if match:
            weight = match[1]
            if weight in groups:
                raise InputError(f"{where}: tensor {weight!r} has more than one quant_state")
            keys = [weight, *(f"{weight}.{part}" for part in PARTS)]
            groups[weight] = [key for key in keys if key in present] + [name]
            if weight not in present:
                raise InputError(f"{where}: there is {name!r}, but not the tensor {weight!r} itself")
    known = {key for keys in groups.values() for key in keys}
    for name in sorted(present - known):
        if PART.fullmatch(name):
            raise InputError(
                f"{where}: tensor {name!r} belongs to no NF4 or FP4 weight; 8-bit and others can't be read"
            )
    return groups


class StoredWeight:
    """A 4-bit weight in one or more safetensors files: its state parsed and checked, its data read on demand.

    `files` maps each of the weight's tensor names to the file that holds it. Raises InputError.
    """

    def __init__(self, name: str, files: Mapping[str, SafetensorsFile]) -> None:
        self._name = name
        self._files = files
        key = next(key for key in files if STATE.fullmatch(key))
        match = STATE.fullmatch(key)
        assert match is not None
        file = files[key]
        self._where = f"{file.path}: tensor {name!r}"
        if match[2] not in CODEBOOKS:
            raise InputError(
                f"{self._where}: quantized as {match[2]!r}, which isn't one of {', '.join(CODEBOOKS)}"
            )
        self._expect(key, "U8", None)
        self.state = QuantState.parse(file.read(key).tobytes(), match[2], f"{file.path}: tensor {key!r}")
        self._check()

    def _expect(self, key: str, dtype: str, size: int | None) -> None:
        if key not in self._files:
            raise InputError(f"{self._where}: its part {key!r} is missing")
        entry = self._files[key].entry(key)
        count = math.prod(entry.shape)
        if entry.dtype != dtype or (size is not None and count != size):
            raise InputError(
                f"{self._files[key].path}: tensor {key!r} is {entry.dtype} of {count} values, not {dtype} of "
                f"{'any number' if size is None else size}"
            )

    def _check(self) -> None:
        state, name = self.state, self._name
        size = math.prod(state.shape)
        blocks = -(-size // state.blocksize)
        entry = self._files[name].entry(name)
        # quant_storage only changes the dtype under which the same bytes are stored.
        if entry.stop - entry.start != (size + 1) // 2:
            raise InputError(
                f"{self._where}: {entry.stop - entry.start} bytes of codes, but shape "
                f"{list(state.shape)} needs "
                f"{(size + 1) // 2}"
            )
        self._expect(f"{name}.quant_map", "F32", 16)
        self._expect(f"{name}.absmax", "F32" if state.nested_blocksize is None else "U8", blocks)
        if state.nested_blocksize is None:
            for part in ("nested_absmax", "nested_quant_map"):
                if f"{name}.{part}" in self._files:
                    raise InputError(f"{self._where}: has {part}, but its quant_state has no nested_offset")
        else:
            self._expect(f"{name}.nested_absmax", "F32", -(-blocks // state.nested_blocksize))
            self._expect(f"{name}.nested_quant_map", "F32", 256)

    def _part(self, name: str) -> NDArray[Any]:
        value = self._files[name].read(name).reshape(-1)
        if value.dtype == F32 and not np.isfinite(value).all():
            at = int(np.argmin(np.isfinite(value)))
            raise InputError(
                f"{self._files[name].path}: tensor {name!r} holds {value[at]} at {at}; it is damaged"
            )
        return value

    def read(self) -> QuantizedTensor:
        """Read the weight. The maps are those stored with it (NF4-8.5)."""
        state, name = self.state, self._name
        entry = self._files[name].entry(name)
        codes = self._files[name].read(name).reshape(-1).view(U8)
        assert codes.size == entry.stop - entry.start
        values = self._part(f"{name}.quant_map")
        own = CODEBOOKS[state.quant_type]
        same = own.values.tobytes() == values.tobytes()
        absmax: NDArray[np.float32] | NestedAbsmax = self._part(f"{name}.absmax")
        if state.nested_blocksize is not None and state.nested_offset is not None:
            absmax = NestedAbsmax(
                codes=self._part(f"{name}.absmax"),
                absmax=self._part(f"{name}.nested_absmax"),
                offset=state.nested_offset,
                map=self._part(f"{name}.nested_quant_map"),
                block_size=state.nested_blocksize,
            )
        return QuantizedTensor(
            codes=codes,
            absmax=absmax,
            shape=state.shape,
            dtype=state.dtype,
            block_size=state.blocksize,
            codebook=own if same else Codebook(state.quant_type, values),
        )


def weight_specs(
    name: str, shape: tuple[int, ...], dtype: np.dtype[Any], block_size: int, codebook: str, nested: bool
) -> dict[str, TensorSpec]:
    """The tensors a weight will take in a file, before it is quantized (NF4-8.4)."""
    blocks = -(-math.prod(shape) // block_size)
    state = QuantState(
        codebook,
        block_size,
        dtype,
        shape,
        NESTED_BLOCK_SIZE if nested else None,
        np.float32(0) if nested else None,
    )
    specs = {
        name: TensorSpec(U8, ((math.prod(shape) + 1) // 2, 1)),
        f"{name}.absmax": TensorSpec(U8 if nested else F32, (blocks,)),
        f"{name}.quant_map": TensorSpec(F32, (16,)),
        f"{name}.quant_state.bitsandbytes__{codebook}": TensorSpec(U8, (len(state.dump()),)),
    }
    if nested:
        specs[f"{name}.nested_absmax"] = TensorSpec(F32, (-(-blocks // NESTED_BLOCK_SIZE),))
        specs[f"{name}.nested_quant_map"] = TensorSpec(F32, (256,))
    return specs


def weight_tensors(name: str, q: QuantizedTensor) -> dict[str, NDArray[Any]]:
    """The tensors a quantized weight takes in a file: those weight_specs announced (NF4-8.4).

    Raises InputError for a codebook of another name than the four, which no reader could tell.
    """
    if q.codebook.name not in CODEBOOKS:
        raise InputError(
            f"codebook {q.codebook.name!r} can't be stored; a file names one of {', '.join(CODEBOOKS)}"
        )
    nested = q.absmax if isinstance(q.absmax, NestedAbsmax) else None
    state = QuantState(
        q.codebook.name,
        q.block_size,
        np.dtype(q.dtype),
        q.shape,
        nested.block_size if nested else None,
        nested.offset if nested else None,
    )
    tensors: dict[str, NDArray[Any]] = {
        name: q.codes.reshape(-1, 1),
        f"{name}.absmax": q.absmax.codes if isinstance(q.absmax, NestedAbsmax) else q.absmax,
        f"{name}.quant_map": q.codebook.values,
        f"{name}.quant_state.bitsandbytes__{q.codebook.name}": np.frombuffer(state.dump(), U8),
    }
    if nested:
        tensors[f"{name}.nested_absmax"] = nested.absmax
        tensors[f"{name}.nested_quant_map"] = nested.map
    return tensors


def save_tensor(q: QuantizedTensor, path: str | Path, name: str = "weight") -> None:
    """Save one quantized tensor under its name as a safetensors file (NF4-8.4)."""
    tensors = weight_tensors(name, q)
    specs = {name: TensorSpec(value.dtype, value.shape) for name, value in tensors.items()}
    with SafetensorsWriter(path, specs) as writer:
        for part, value in tensors.items():
            writer.write(part, value)


def load_tensor(path: str | Path) -> QuantizedTensor:
    """Load what save_tensor saved, or a bitsandbytes layer's state of the same names. Raises InputError."""
    file = SafetensorsFile(path)
    groups = group_names(file.entries, str(file.path))
    if groups.keys() != {"weight"}:
        raise InputError(f"{file.path}: needs one quantized tensor named 'weight', and has {sorted(groups)}")
    return StoredWeight("weight", dict.fromkeys(groups["weight"], file)).read()


def write_quantized(
    src: Checkpoint,
    dst: str | Path,
    options: QuantizeOptions,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Write a model as a 4-bit directory that transformers loads, tensor by tensor (NF4-8.6).

    The linear layers are quantized; embeddings, norms, biases and the head keep their values and dtypes.
    Ranks share the layers; the directory is that of rank 0, and its bytes are those that one process writes.
    Raises InputError, before any work, for a codebook bitsandbytes doesn't have, a source that is 4-bit
    already, and an output that exists; later for NaN or infinity in a weight. Nothing is left behind then.
    """
    if options.codebook not in WRITABLE:
        raise InputError(
            f"codebook {options.codebook!r} has no place in a bitsandbytes checkpoint; "
            f"choose one of {', '.join(WRITABLE)}"
        )
    check_block_size(options.block_size)
    LlamaConfig.from_dict(src.config, str(src.path))
    names = parameter_names(src)
    specs: dict[str, TensorSpec] = {}
    for name in names:
        if src.dtype(name) in CODEBOOKS:
            raise InputError(f"{src.path}: tensor {name!r} is 4-bit already; run `nf4 dequantize` first")
        shape, dtype = src.shape(name), src.value_dtype(name)
        if LINEAR_WEIGHT.fullmatch(name):
            nested = options.double_quant
            specs |= weight_specs(name, shape, dtype, options.block_size, options.codebook, nested)
        else:
            specs[name] = TensorSpec(dtype, shape)
    dtype_name = model_dtype(src)
    config = src.config | {
        dtype_key(src.config): dtype_name,
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": options.codebook,
            "bnb_4bit_use_double_quant": options.double_quant,
            "bnb_4bit_compute_dtype": dtype_name,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": ["lm_head"],
        },
    }

    def tensors(name: str) -> dict[str, NDArray[Any]]:
        value = src.read(name)
        assert not isinstance(value, QuantizedTensor)
        if LINEAR_WEIGHT.fullmatch(name):
            return weight_tensors(name, quantize_weight(src, name, value, options))
        check_finite(src, name, value)
        return {name: value}

    write_model(src, dst, config, specs, tensors, progress, ranks)


def write_dequantized(
    src: Checkpoint, dst: str | Path, dtype: np.dtype[Any] | None, progress: Progress | None = None
) -> None:
    """Write a 4-bit, GGUF or plain model as plain safetensors, tensor by tensor (NF4-4, NF4-8.6).

    dtype: of every tensor; None keeps the one each has, or was quantized from. Raises InputError for an
    output that exists, and for values that dtype can't hold. Nothing is left behind then.
    """
    LlamaConfig.from_dict(src.config, str(src.path))
    specs = {
        name: TensorSpec(dtype or src.value_dtype(name), src.shape(name)) for name in parameter_names(src)
    }
    config = {key: value for key, value in src.config.items() if key != "quantization_config"}
    config[dtype_key(src.config)] = DTYPE_NAMES[dtype] if dtype else model_dtype(src)

    def tensors(name: str) -> dict[str, NDArray[Any]]:
        value = src.read(name)
        if isinstance(value, QuantizedTensor):
            value = dequantize(value, specs[name].dtype)
        with np.errstate(over="ignore"):  # refused below, by name
            value = value.astype(specs[name].dtype, copy=False)
        check_finite(src, name, value)
        return {name: value}

    write_model(src, dst, config, specs, tensors, progress)
