"""A port for each class of bug in chapter 8: it accepts what is refused, or does one step wrong."""
# ruff: noqa: D102  the class says what is wrong, its base what the step is

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from nf4.codebooks import CODEBOOKS
from nf4.conform.bugs.plain_codec import Array
from nf4.conform.bugs.plain_files import Files, Plain, Tensors, tensors_of
from nf4.errors import InputError

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

# Containers


class HeaderUnchecked(Plain):
    """A header that is cut, too long or no JSON is taken for one without tensors (NF4-8.2)."""

    accepted = "too few for a|its header claims|: header: not valid JSON|in the middle of its header"


class HeaderStart(Plain):
    """A header may begin with something other than { (NF4-8.2)."""

    accepted = "header doesn't begin with"


class DuplicateKeys(Plain):
    """Of two equal keys in a JSON object the last one counts, as in the safetensors library (NF4-8.2)."""

    accepted = "occurs twice"


class FieldsUnchecked(Plain):
    """The fields of an entry and its dtype, and the metadata, are not looked at (NF4-8.2)."""

    accepted = "must have exactly dtype|dtype .* isn't supported|__metadata__ must map"


class ShapeUnchecked(Plain):
    """Sizes are not looked at; of a tensor to decode they are multiplied (NF4-1.4, NF4-8.2, NF4-8.7)."""

    accepted = "isn't a list of non-negative integers|is absurd|and this model and r need"

    def counted(self, shape: list[int]) -> int:
        return math.prod(shape)


class OffsetsUnchecked(Plain):
    """Offsets are believed without the dtype, the shape and the end of the file (NF4-8.2)."""

    accepted = r"but data_offsets|aren't two ascending integers|ends at byte .* it is truncated"


class OverlapAccepted(Plain):
    """Tensors may overlap (NF4-8.2)."""

    accepted = "overlaps"


class GapsAccepted(Plain):
    """Bytes that belong to no tensor are read over (NF4-8.2)."""

    accepted = "leaves a gap|bytes follow the last tensor"


class Alignment(Plain):
    """Tensors are written in the order of their names, so that not all are aligned (NF4-8.3)."""

    def laid_out(self, tensors: Tensors) -> list[str]:
        return sorted(tensors)


# Weights


class PartsUnchecked(Plain):
    """The parts of a weight may be missing, unknown or of another length or dtype (NF4-8.5)."""

    accepted = (
        "but not the tensor|part '[^']*absmax' is missing|belongs to no NF4|more than one quant_state"
        "|but its quant_state has no|bytes of codes, but|(codes|absmax) is .* must be|is (F32|BF16|I8) of"
        "|block size .* is not supported|dtype .* is not supported|there is no codebook"
    )


class StateUnchecked(Plain):
    """Keys of a quant_state that are unknown, missing or out of range are accepted (NF4-8.5)."""

    accepted = (
        r"missing or unknown: \['(?!nested_offset)|absmax' is U8 of|isn't one of float32"
        r"|isn't a list of integers|blocksize .* isn't|nested_dtype .* isn't|nested_offset '.*' isn't"
        r"|expected a JSON object|quant_state\S*: not valid JSON"
    )


class QuantTypeIgnored(Plain):
    """Every weight is taken for NF4 (NF4-8.4 to NF4-8.6)."""

    accepted = "but the tensor's name says|quantized as|quantization .* can't be read"

    def stored_values(self, stored: Array, codebook: str) -> Array:
        return CODEBOOKS["nf4"].values

    def written_codebook(self, codebook: str) -> str:
        return "nf4" if codebook == "fp4" else codebook


class StorageRefused(Plain):
    """Codes under another dtype or shape than U8 [n, 1] are refused (NF4-8.5)."""

    def check_storage(self, codes: Array) -> None:
        if codes.dtype != np.uint8 or codes.shape[1:] != (1,):
            raise InputError(f"codes are {codes.dtype} {list(codes.shape)}; they must be uint8 [n, 1]")


class EmptyRefused(Plain):
    """A weight without elements is refused (NF4-12.4)."""

    def check_size(self, shape: list[int]) -> None:
        if math.prod(shape) == 0:
            raise InputError(f"a weight of shape {shape} has no elements; it must have some")


# Models


class MissingShard(Plain):
    """A shard that is missing leaves its weights out (NF4-8.1)."""

    accepted = "the shard .* is missing|there is neither"


class IndexUnchecked(Plain):
    """An index and its shards are not held against each other (NF4-8.1)."""

    accepted = "safetensors: there is no tensor|doesn't name tensor"


class WeightMissing(Plain):
    """Weights are not held against the config, as in transformers (NF4-8.1)."""

    accepted = "is missing; its shape would be|does not belong to the architecture|the config asks for"


class TiedHead(Plain):
    """A tied head that is stored a second time is read (NF4-8.1)."""

    def parameters(self, tensors: Tensors, files: Files) -> Tensors:
        for path, file in files.items():
            if path.endswith(".safetensors"):
                tensors |= {name: value for name, value in tensors_of(file).items() if name == HEAD}
        return tensors


class RopeInterleaved(Plain):
    """The rows of q and k of a GGUF file stay in llama.cpp's order (NF4-8.9)."""

    def half_rows(self, rows: Array, heads: int) -> Array:
        halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


class RopeFreqsDropped(Plain):
    """rope_freqs of a GGUF file are dropped, as in transformers (NF4-8.9)."""

    accepted = "isn't the RoPE scaling"


class CodebookUnwritable(Plain):
    """A model is written with a codebook that bitsandbytes does not have (NF4-8.6)."""

    accepted = "has no place in a bitsandbytes checkpoint"


class HeadQuantized(Plain):
    """The head and the embedding are quantized, too (NF4-8.6)."""

    def unquantized(self, tensors: Tensors, block_size: int, codebook: str) -> Tensors:
        for name in sorted({HEAD, EMBEDDING} & set(tensors)):
            q = self.quantize(tensors[name], block_size, codebook)
            tensors |= {name: q["codes"].reshape(-1, 1), f"{name}.absmax": q["absmax"]}
        return tensors


# Adapters and merging


class AdapterDefaults(Plain):
    """Options that an adapter's config lacks get defaults, as in PEFT (NF4-8.7)."""

    accepted = "peft_type is None|r is None|lora_alpha is None|target_modules is missing"


class AdapterNames(Plain):
    """The names with .default of PEFT's adapters are not read (NF4-8.7)."""

    def check_adapter_name(self, name: str) -> None:
        if ".default." in name:
            raise InputError(f"tensor {name!r} is not part of an adapter; its name must not have .default")


class EmptyAdapter(Plain):
    """An adapter without tensors is read, as in PEFT, and changes nothing (NF4-8.7)."""

    accepted = "holds no tensors"


class ModuleMissing(Plain):
    """The modules of an adapter are not held against target_modules (NF4-8.7)."""

    accepted = r"promises .* modules|leaves it out|has only lora_|adapts '.*layers\..*isn't a linear layer"


class EmbeddingAdapted(Plain):
    """Adapters of the embedding and of the head are read over (NF4-9.6)."""

    accepted = "isn't part of a LoRA adapter|adapts 'lm_head'"


class OptionsIgnored(Plain):
    """Options under which an adapter is not plain LoRA are not looked at (NF4-8.7)."""

    accepted = "only plain LoRA can be read|peft_type is '"


class PatternIgnored(Plain):
    """rank_pattern and alpha_pattern are not looked at (NF4-8.7)."""

    def pattern(self, patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
        return otherwise


class MergedInLowPrecision(Plain):
    """A merged weight is summed in the dtype of the weight (NF4-8.8)."""

    def merged(self, weight: Array, delta: Array) -> Array:
        short: Array = weight + delta.astype(weight.dtype)
        return short
