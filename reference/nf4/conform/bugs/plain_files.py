"""The correct port whole: to the numbers of the other modules, the files of chapter 8.

Whether a file is sound is left to the reference; what is in it is worked out here, a method a step.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nf4.conform import reference
from nf4.conform.bugs.plain_codec import Array, Outputs, dtype_of
from nf4.conform.bugs.plain_step import PlainStep
from nf4.errors import InputError
from nf4.formats.files import DTYPE_NAMES
from nf4.formats.files import DTYPES as FILE_DTYPES

Files = Mapping[str, bytes]
Tensors = dict[str, Array]

STATE = ".quant_state.bitsandbytes__"


class Plain(PlainStep):
    """A port (NF4-13.3) written from the specification, for clarity, not from the reference.

    The methods named as operations are its port; those before them are the steps, each the work of the clause
    it names. InputError refuses an input.
    """

    # Steps: what is refused

    accepted = ""
    """A regular expression for the messages of the reference's refusals that this port does not make."""

    def sound(self, function: Callable[..., Outputs], **fields: Any) -> Outputs | None:
        """What the reference makes of files, or None where it refuses what this port accepts."""
        try:
            return function(**fields)
        except InputError as error:
            if self.accepted and re.search(self.accepted, str(error)):
                return None
            raise

    def check_storage(self, codes: Array) -> None:
        """Codes may have any dtype and shape (NF4-8.5)."""

    def check_size(self, shape: list[int]) -> None:
        """A weight may be without elements (NF4-12.4)."""

    def check_adapter_name(self, name: str) -> None:
        """Names with .default are read, too (NF4-8.7)."""

    # Steps: what is read and written

    def stored_values(self, stored: Array, codebook: str) -> Array:
        """The codebook of a weight is the one stored with it (NF4-8.5)."""
        return stored

    def parameters(self, tensors: Tensors, files: Files) -> Tensors:
        """The parameters of a model: a tied head is none (NF4-8.1)."""
        return tensors

    def half_rows(self, rows: Array, heads: int) -> Array:
        """The rows of q and k of GGUF's llama, which the reference has put back into halves (NF4-8.9)."""
        return rows

    def unquantized(self, tensors: Tensors, block_size: int, codebook: str) -> Tensors:
        """A quantized model's tensors, of which embedding and head stay as they are (NF4-8.6)."""
        return tensors

    def written_codebook(self, codebook: str) -> str:
        """The codebook a model is quantized with (NF4-8.6)."""
        return codebook

    def laid_out(self, tensors: Tensors) -> list[str]:
        """The order of tensors in a file (NF4-8.3)."""
        return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))

    def pattern(self, patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
        """The rank or alpha of a module after rank_pattern or alpha_pattern (NF4-8.7)."""
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return otherwise

    # Operations

    def read_tensor(self, file: bytes, name: str) -> Outputs:
        """The decoded weight (NF4-8.2, NF4-8.4, NF4-8.5)."""
        if self.sound(reference.read_tensor, file=file, name=name) is None:
            return {"y": {}}
        return {"y": {name: self._stored_weight(tensors_of(file), name, lambda dtype: dtype)}}

    def _stored_weight(self, tensors: Tensors, name: str, dtype: Callable[[str], str]) -> Array:
        """A 4-bit weight of a sound file, decoded to what dtype makes of its own."""
        key = next(key for key in tensors if key.startswith(name + STATE))
        state = json.loads(tensors[key].tobytes())
        self.check_storage(tensors[name])
        self.check_size(state["shape"])
        values = self.stored_values(tensors[f"{name}.quant_map"], key.removeprefix(name + STATE))
        scales = tensors[f"{name}.absmax"]
        if "nested_offset" in state:
            offset = np.array([state["nested_offset"]], np.float32)
            nested = tensors[f"{name}.nested_absmax"], offset, tensors[f"{name}.nested_quant_map"]
            scales = self._absmax(scales, *nested)
        codes, kind = tensors[name].reshape(-1).view(np.uint8), dtype_of(dtype(state["dtype"]))
        flat = self.decoded(codes, scales, state["shape"], kind, state["blocksize"], values)
        return flat.reshape(state["shape"])

    def write_tensor(self, name: str, **fields: Any) -> Outputs:
        """The file of a quantized tensor (NF4-8.3, NF4-8.4)."""
        written = self.sound(reference.write_tensor, name=name, **fields)
        return {"file": b"" if written is None else self._laid(tensors_of(written["file"]))}

    def _laid(self, tensors: Tensors) -> bytes:
        """The file of tensors in the order of this port."""
        return file_of({name: tensors[name] for name in self.laid_out(tensors)})

    def read_model(self, files: Files) -> Outputs:
        """The parameters of a model (NF4-8.1, NF4-8.9)."""
        read = self.sound(reference.read_model, files=files)
        if read is None:
            return {"tensors": {}}
        tensors = dict(read["tensors"])
        for file in files.values():
            if b"llama.block_count" in file:  # GGUF
                for name, value in tensors.items():
                    if re.search(r"\.[qk]_proj\.", name):
                        tensors[name] = self.half_rows(value, len(value) // _head_size(file))
        stored: Tensors = {}
        for path, file in files.items():
            if path.endswith(".safetensors"):
                stored |= tensors_of(file)
        for name in {key.partition(STATE)[0] for key in stored if STATE in key}:
            tensors[name] = self._stored_weight(stored, name, self.layer_dtype)
        return {"tensors": self.parameters(tensors, files)}

    def quantize_model(self, files: Files, block_size: int, codebook: str, double_quant: bool) -> Outputs:
        """The files of a 4-bit model (NF4-8.6)."""
        book = self.written_codebook(codebook)
        fields = {"block_size": block_size, "double_quant": double_quant, "codebook": book}
        written = self.sound(reference.quantize_model, files=files, **fields)
        if written is None:
            return {"files": {}}
        return {
            "files": {
                path: self._laid(self.unquantized(tensors_of(file), block_size, book))
                if path.endswith(".safetensors")
                else file
                for path, file in written["files"].items()
            }
        }

    def read_adapter(self, files: Files, model: Files) -> Outputs:
        """The matrices and the scales of an adapter (NF4-8.7, NF4-9.6)."""
        read = self.sound(reference.read_adapter, files=files, model=model)
        if read is None:
            return {"tensors": {}, "scales": {}}
        options = json.loads(files["adapter_config.json"])
        for name in tensors_of(files["adapter_model.safetensors"]):
            self.check_adapter_name(name)
        scales = {}
        for module in read["scales"]:
            rank = self.pattern(options.get("rank_pattern"), module, options["r"])
            alpha = self.pattern(options.get("alpha_pattern"), module, options["lora_alpha"])
            scales[module] = np.array([self.scale(rank, alpha, options.get("use_rslora", False))])
        return {"tensors": read["tensors"], "scales": scales}


def tensors_of(file: bytes) -> Tensors:
    """The tensors of a sound safetensors file (NF4-8.2)."""
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = np.frombuffer(file[start:stop], FILE_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def file_of(tensors: Tensors) -> bytes:
    """A safetensors file of these tensors, in their order (NF4-8.3)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, value in tensors.items():
        offsets, dtype = [start, start + value.nbytes], DTYPE_NAMES[value.dtype]
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": offsets}
        start += value.nbytes
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(value.tobytes() for value in tensors.values())


def _head_size(gguf: bytes) -> int:
    """The size of a head, an uint32 of a GGUF file's metadata."""
    key = b"llama.attention.key_length"
    start = gguf.index(key) + len(key) + 4  # after the type
    return int.from_bytes(gguf[start : start + 4], "little")
