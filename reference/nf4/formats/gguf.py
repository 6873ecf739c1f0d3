"""GGUF models: their metadata as a config.json, their tensors dequantized under Hugging Face names."""

import math
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import gguf.quants
import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from nf4.errors import InputError
from nf4.formats.files import read_bytes

if TYPE_CHECKING:  # tokenizers is only needed by those who ask for one
    from nf4.formats.tokenizer import Tokenizer

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
ROPE_FREQUENCIES = "rope_freqs.weight"  # how llama.cpp stores the "llama3" RoPE scaling

# The tensors that need no arithmetic to be read; all others come as float32.
F32: np.dtype[Any] = np.dtype(np.float32)
PLAIN: dict[GGMLQuantizationType, np.dtype[Any]] = {
    GGMLQuantizationType.F32: F32,
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
STRING, ARRAY = 8, 9
CHUNK = 1 << 20  # values dequantized at a time: gguf's own arithmetic takes several copies


class GgufTensor(NamedTuple):
    """Where a tensor lies: its type, its shape in NumPy's order, and its first byte in the file."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    nbytes: int


class _Header:
    """Reads a GGUF header in order, refusing whatever goes beyond the file's end."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path = path
        self._file = file
        self._size = os.fstat(file.fileno()).st_size

    def bytes(self, count: int) -> bytes:
        if count > self._size:
            raise InputError(
                f"{self._path}: a length of {count} bytes in its header is more than the file has"
            )
        found = self._file.read(count)
        if len(found) < count:
            raise InputError(f"{self._path}: ends in the middle of its header; it is truncated")
        return found

    def scalar(self, form: str) -> Any:
        return struct.unpack(form, self.bytes(struct.calcsize(form)))[0]

    def string(self) -> str:
        raw = self.bytes(self.scalar("<Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{self._path}: the string {raw[:40]!r} in its header isn't UTF-8") from None

    def value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            inner, count = self.scalar("<I"), self.scalar("<Q")
            if inner == STRING:
                if count > self._size:
                    raise InputError(
                        f"{self._path}: {key!r} claims {count} strings, more than the file has bytes"
                    )
                return [self.string() for _ in range(count)]
            if inner in SCALARS:
                dtype = np.dtype(SCALARS[inner])
                return np.frombuffer(self.bytes(count * dtype.itemsize), dtype).tolist()
            raise InputError(f"{self._path}: {key!r} is an array of the unknown type {inner}")
        if kind not in SCALARS:
            raise InputError(f"{self._path}: {key!r} has the unknown type {kind}")
        return self.scalar(SCALARS[kind])

    def metadata(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.string()
            if key in found:
                raise InputError(f"{self._path}: the key {key!r} occurs twice")
            found[key] = self.value(self.scalar("<I"), key)
        return found

    def tensors(self, count: int, metadata: Mapping[str, Any]) -> dict[str, GgufTensor]:
        found: dict[str, GgufTensor] = {}
        for _ in range(count):
            name, rank = self.string(), self.scalar("<I")
            where = f"{self._path}: tensor {name!r}"
            if name in found:
                raise InputError(f"{where} occurs twice")
            if not 1 <= rank <= 4:
                raise InputError(f"{where} has {rank} dimensions; GGUF allows 1 to 4")
            sizes = [self.scalar("<Q") for _ in range(rank)]
            kind, offset = self.scalar("<I"), self.scalar("<Q")
            if kind not in GGML_QUANT_SIZES:
                raise InputError(f"{where} has the unknown type {kind}")
            block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            if sizes[0] % block:
                raise InputError(
                    f"{where} has rows of {sizes[0]} values, not a multiple of its block of {block}"
                )
            total = math.prod(sizes) // block * nbytes
            found[name] = GgufTensor(GGMLQuantizationType(kind), tuple(reversed(sizes)), offset, total)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise InputError(f"{self._path}: general.alignment {alignment!r} isn't a power of two")
        data = -(-self._file.tell() // alignment) * alignment
        end, before = data, "the header"
        for name, tensor in sorted(found.items(), key=lambda item: item[1].start):
            start = data + tensor.start
            if start < end:
                raise InputError(f"{self._path}: tensor {name!r} overlaps {before}")
            end, before = start + tensor.nbytes, f"tensor {name!r}"
            if end > self._size:
                raise InputError(
                    f"{self._path}: tensor {name!r} ends at byte {end}, but the file has {self._size}; "
                    "it is truncated"
                )
            found[name] = tensor._replace(start=start)
        return found


class GgufCheckpoint:
    """A GGUF file of the llama, qwen2 or qwen3 architecture as a Checkpoint (NF4-8.9).

    F32, F16 and BF16 tensors are read as they are, quantized ones as float32. Raises InputError on broken
    files, other architectures, and what config.json can't express.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                header = _Header(self.path, file)
                if header.bytes(4) != b"GGUF":
                    raise InputError(f"{self.path}: doesn't begin with GGUF; not a GGUF file")
                version = header.scalar("<I")
                if version not in (2, 3):
                    raise InputError(
                        f"{self.path}: GGUF version {version} isn't 2 or 3, little-endian; convert it again"
                    )
                tensor_count, key_count = header.scalar("<Q"), header.scalar("<Q")
                self.metadata = header.metadata(key_count)
                tensors = header.tensors(tensor_count, self.metadata)
        except OSError as error:
            raise InputError(f"{self.path}: can't be read ({error.strerror})") from None
        self._arch = str(self.metadata.get("general.architecture"))
        if self.metadata.get("general.type", "model") != "model" or self._arch not in ARCHITECTURES:
            raise InputError(
                f"{self.path}: a {self.metadata.get('general.type', 'model')} of architecture "
                f"{self._arch!r}; only "
                f"models of {', '.join(ARCHITECTURES)} can be read"
            )
        frequencies = tensors.pop(ROPE_FREQUENCIES, None)
        self._tensors = {self._rename(name): tensor for name, tensor in tensors.items()}
        self.config = self._config(frequencies)

    def _rename(self, name: str) -> str:
        match = NAME.fullmatch(name)
        if match:
            layer, module, kind = match.groups()
            if layer is None and module in OUTER:
                return f"{OUTER[module]}.{kind}"
            if layer is not None and module in INNER:
                return f"model.layers.{int(layer)}.{INNER[module]}.{kind}"
        raise InputError(f"{self.path}: tensor {name!r} is none of a {self._arch} model this can run")

    def _get(self, key: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
        value = self.metadata.get(f"{self._arch}.{key}", default)
        if value is None or not isinstance(value, kinds) or isinstance(value, bool):
            raise InputError(f"{self.path}: metadata {self._arch}.{key} is {value!r}, not a number")
        return value

    def _number(self, key: str, default: float | None = None) -> float:
        """A float32 of the metadata as the shortest decimal that gives it, as it was in config.json."""
        return float(str(np.float32(self._get(key, (int, float), default))))

    def _config(self, frequencies: GgufTensor | None) -> dict[str, Any]:
        embedding = self._tensors.get("model.embed_tokens.weight")
        if embedding is None:
            raise InputError(f"{self.path}: tensor 'token_embd.weight' is missing")
        hidden, heads = self._get("embedding_length", int), self._get("attention.head_count", int)
        head_dim = self._get("attention.key_length", int, hidden // max(heads, 1))
        if self._get("rope.dimension_count", int, head_dim) != head_dim:
            raise InputError(f"{self.path}: RoPE over a part of each head can't be run")
        config: dict[str, Any] = {
            "architectures": [ARCHITECTURES[self._arch]],
            "model_type": self._arch,
            "vocab_size": embedding.shape[0],
            "hidden_size": hidden,
            "intermediate_size": self._get("feed_forward_length", int),
            "num_hidden_layers": self._get("block_count", int),
            "num_attention_heads": heads,
            "num_key_value_heads": self._get("attention.head_count_kv", int, heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": self._get("context_length", int),
            "rope_theta": self._number("rope.freq_base", 10000.0),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "attention_bias": self._arch != "qwen2"
            and "model.layers.0.self_attn.q_proj.bias" in self._tensors,
            "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in self._tensors,
            "torch_dtype": "float32",
        }
        scaling = self._scaling(frequencies, config)
        if scaling is not None:
            config["rope_scaling"] = scaling
        for key in ("bos", "eos"):
            token = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
            if isinstance(token, int):
                config[f"{key}_token_id"] = token
        return config

    def _scaling(self, frequencies: GgufTensor | None, config: Mapping[str, Any]) -> dict[str, Any] | None:
        if frequencies is not None:
            return self._llama3(frequencies, config)
        kind = self.metadata.get(f"{self._arch}.rope.scaling.type", "none")
        if kind == "none":
            return None
        if kind == "linear":
            return {"rope_type": "linear", "factor": self._number("rope.scaling.factor")}
        if kind == "yarn":
            return {
                "rope_type": "yarn",
                "factor": self._number("rope.scaling.factor"),
                "original_max_position_embeddings": self._get("rope.scaling.original_context_length", int),
            }
        raise InputError(
            f"{self.path}: RoPE scaling {kind!r} can't be run; use the Hugging Face directory of the model"
        )

    def _llama3(self, tensor: GgufTensor, config: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters of "llama3" scaling; the file only holds what they make of each frequency."""
        stored = self._values(tensor).reshape(-1).astype(np.float64)
        factor, low, high, original = float(stored.max(initial=1.0)), 1.0, 4.0, 8192  # those of every Llama 3
        theta, dim = config["rope_theta"], config["head_dim"]
        waves = 2 * np.pi * theta ** (np.arange(0, dim, 2) / dim)  # [head_dim / 2]
        smooth = np.clip((original / waves - low) / (high - low), 0.0, 1.0)
        made = 1 / ((1 - smooth) / factor + smooth)
        if stored.shape != made.shape or not np.allclose(stored, made, rtol=1e-4, atol=0):
            raise InputError(
                f"{self.path}: {ROPE_FREQUENCIES} isn't the RoPE scaling of Llama 3; use the Hugging "
                "Face directory"
            )
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }

    def names(self) -> list[str]:
        """The names of the parameters, sorted."""
        return sorted(self._tensors)

    def _tensor(self, name: str) -> GgufTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise InputError(f"{self.path}: there is no tensor {name!r}") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter."""
        return self._tensor(name).shape

    def dtype(self, name: str) -> str:
        """GGUF's type of a parameter: F32, Q4_1 and so on."""
        return self._tensor(name).kind.name

    def value_dtype(self, name: str) -> np.dtype[Any]:
        """The dtype of the values: float32 for every quantized type."""
        return PLAIN.get(self._tensor(name).kind, F32)

    def read(self, name: str) -> NDArray[Any]:
        """Read one parameter; the rows of q and k in the order Hugging Face keeps them."""
        value = self._values(self._tensor(name))
        if self._arch == "llama" and (match := re.search(r"\.([qk])_proj\.", name)):
            heads = self.config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
            if value.shape[0] % (2 * heads):
                raise InputError(
                    f"{self.path}: {name!r} has {value.shape[0]} rows, which {heads} heads can't share"
                )
            # llama.cpp interleaves the two halves that RoPE turns against each other.
            pairs = value.reshape(heads, -1, 2, *value.shape[1:])  # [heads, head_dim / 2, 2, in]
            value = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(value.shape)
        return value

    def _values(self, tensor: GgufTensor) -> NDArray[Any]:
        if tensor.kind in PLAIN:
            return (
                read_bytes(self.path, tensor.start, tensor.nbytes)
                .view(PLAIN[tensor.kind])
                .reshape(tensor.shape)
            )
        block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
        values = np.empty(math.prod(tensor.shape), np.float32)
        step = CHUNK // block
        blocks = values.size // block
        for first in range(0, blocks, step):
            count = min(step, blocks - first)
            raw = read_bytes(self.path, tensor.start + first * block_bytes, count * block_bytes)
            try:
                part = gguf.quants.dequantize(raw.reshape(1, -1), tensor.kind)  # it goes row by row
            except NotImplementedError:
                raise InputError(
                    f"{self.path}: the type {tensor.kind.name} can't be dequantized; use another file"
                ) from None
            values[first * block : (first + count) * block] = part.reshape(-1)
        return values.reshape(tensor.shape)

    def tokenizer(self) -> "Tokenizer":
        """The tokenizer in the metadata, checked against the model's vocabulary."""
        from nf4.formats.tokenizer import tokenizer_from_gguf

        return tokenizer_from_gguf(self.metadata, self.config["vocab_size"], str(self.path))
