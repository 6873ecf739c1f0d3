"""The shape of a Llama-family model, read from a Hugging Face config.json."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nf4.errors import InputError

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")

# What transformers takes for a key that config.json leaves out.
_HEAD_DIM = {"qwen3": 128}
_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
_MAX_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
_SLIDING_WINDOW = {"mistral": 4096, "qwen2": 4096, "qwen3": 4096}
_MAX_WINDOW_LAYERS = 28

_MAX_LAYERS = 1000  # far above any model; beyond it the file is wrong


@dataclass(frozen=True)
class RopeConfig:
    """The rotary embedding: theta, the variant, and its parameters (unused ones keep their defaults)."""

    theta: float
    type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True)
class LlamaConfig:
    """A model of the Llama family; sliding_window holds one entry a layer, None where attention is full."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    attention_bias: bool  # the bias of o_proj
    mlp_bias: bool
    qk_norm: bool
    sliding_window: tuple[int | None, ...]
    rope: RopeConfig

    @classmethod
    def from_dict(cls, config_json: Mapping[str, Any], where: str) -> "LlamaConfig":
        """Read a config.json; `where` names the file in errors.

        Raises InputError for an unknown architecture or RoPE variant and for missing or absurd values.
        """
        read = _Reader(config_json, where)
        kind = config_json.get("model_type")
        if kind not in MODEL_TYPES:
            raise InputError(
                f"{where}: model_type {kind!r} is not supported; it must be one of {', '.join(MODEL_TYPES)}"
            )
        act = config_json.get("hidden_act", "silu")
        if act != "silu":
            raise InputError(f"{where}: hidden_act {act!r} is not supported; it must be 'silu'")
        hidden, heads = read.count("hidden_size"), read.count("num_attention_heads")
        layers = read.count("num_hidden_layers")
        if layers > _MAX_LAYERS:
            raise InputError(f"{where}: num_hidden_layers is {layers}; it must be at most {_MAX_LAYERS}")
        kv_heads = read.count(
            "num_key_value_heads",
            heads if "num_key_value_heads" in config_json else _KV_HEADS.get(kind, heads),
        )
        head_dim = read.count("head_dim", _HEAD_DIM.get(kind, hidden // heads))
        if heads % kv_heads:
            raise InputError(
                f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        if head_dim % 2:
            raise InputError(f"{where}: head_dim {head_dim} is odd; rotary embeddings need an even one")
        max_positions = read.count("max_position_embeddings", _MAX_POSITIONS[kind])
        attention_bias = read.flag("attention_bias") and kind in ("llama", "qwen3")
        return cls(
            model_type=kind,
            vocab_size=read.count("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.count("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=read.positive("rms_norm_eps", 1e-6),
            max_position_embeddings=max_positions,
            tie_word_embeddings=read.flag("tie_word_embeddings"),
            qkv_bias=attention_bias or kind == "qwen2",
            attention_bias=attention_bias,
            mlp_bias=read.flag("mlp_bias") and kind == "llama",
            qk_norm=kind == "qwen3",
            sliding_window=_windows(read, kind, layers),
            rope=_rope(read, head_dim, max_positions),
        )


class _Reader:
    """Checked access to the values of one JSON object."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def count(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise InputError(f"{self.where}: {key} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise InputError(f"{self.where}: {key} is {value!r}; it must be a positive integer")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise InputError(f"{self.where}: {key} is missing")
        number = _positive(value)
        if number is None:
            raise InputError(f"{self.where}: {key} is {value!r}; it must be a positive number")
        return number

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        if value is None:
            value = default
        if not isinstance(value, bool):
            raise InputError(f"{self.where}: {key} is {value!r}; it must be true or false")
        return value


def _positive(value: Any) -> float | None:
    """The float64 nearest to a JSON number; None unless it is one, positive and finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return number if 0 < number < math.inf else None


def _windows(read: _Reader, kind: str, layers: int) -> tuple[int | None, ...]:
    values = read.values
    none: tuple[int | None, ...] = (None,) * layers
    if kind == "llama" or ("sliding_window" in values and values["sliding_window"] is None):
        return none
    if kind == "mistral":
        return (read.count("sliding_window", _SLIDING_WINDOW[kind]),) * layers
    if not read.flag("use_sliding_window"):
        return none
    window = read.count("sliding_window", _SLIDING_WINDOW[kind])
    types = values.get("layer_types")
    if types is None:
        first = values.get("max_window_layers")
        first = _MAX_WINDOW_LAYERS if first is None else first
        if isinstance(first, bool) or not isinstance(first, int):
            raise InputError(f"{read.where}: max_window_layers is {first!r}; it must be an integer")
        return tuple(window if i >= first else None for i in range(layers))
    if (
        not isinstance(types, list)
        or len(types) != layers
        or set(types) - {"full_attention", "sliding_attention"}
    ):
        raise InputError(
            f"{read.where}: layer_types must be 'full_attention' or 'sliding_attention', {layers} times"
        )
    return tuple(window if t == "sliding_attention" else None for t in types)


def _rope(read: _Reader, head_dim: int, max_positions: int) -> RopeConfig:
    where, values = read.where, read.values
    objects = (values.get(key) for key in ("rope_parameters", "rope_scaling"))
    scaling: Any = next((found for found in objects if found is not None and found != {}), {})
    if not isinstance(scaling, Mapping):
        raise InputError(f"{where}: rope_parameters is {scaling!r}; it must be an object")
    part = _Reader(scaling, f"{where} (rope_parameters)")
    kinds = (scaling.get(key) for key in ("rope_type", "type"))
    kind = next((found for found in kinds if found is not None), "default")
    if kind not in ROPE_TYPES:
        raise InputError(
            f"{where}: rope_type {kind!r} is not supported; it must be one of {', '.join(ROPE_TYPES)}"
        )
    # What stands in two places is checked in both, though only one of them is used (NF4-15.3).
    for reader in (part, read):
        partial = reader.values.get("partial_rotary_factor")
        if partial is not None and _positive(partial) != 1:
            raise InputError(
                f"{reader.where}: partial_rotary_factor {partial!r} is not supported; it must be 1"
            )
    theta = part.positive("rope_theta", read.positive("rope_theta", 10000.0))
    if kind == "default":
        return RopeConfig(theta)
    if kind == "dynamic" and head_dim == 2:
        raise InputError(f"{where}: rope_type 'dynamic' needs a head_dim above 2")
    if kind in ("linear", "dynamic"):
        return RopeConfig(theta, kind, factor=part.positive("factor"))

    # As in transformers, a value outside the RoPE parameters wins; the model's own length is the last resort.
    original = part.count("original_max_position_embeddings", max_positions)
    original = read.count("original_max_position_embeddings", original)
    if kind == "llama3":
        low, high = part.positive("low_freq_factor"), part.positive("high_freq_factor")
        if high <= low:
            raise InputError(f"{part.where}: high_freq_factor {high} must be above low_freq_factor {low}")
        return RopeConfig(
            theta, kind, factor=part.positive("factor"), original_max_position_embeddings=original,
            low_freq_factor=low, high_freq_factor=high,
        )  # fmt: skip

    def optional(key: str) -> float | None:
        return None if scaling.get(key) is None else part.positive(key)

    factor = part.positive("factor", max_positions / original)
    if kind == "yarn":
        return RopeConfig(
            theta, kind, factor=factor, original_max_position_embeddings=original,
            attention_factor=optional("attention_factor"),
            beta_fast=optional("beta_fast") or 32.0, beta_slow=optional("beta_slow") or 1.0,
            mscale=optional("mscale"), mscale_all_dim=optional("mscale_all_dim"),
            truncate=part.flag("truncate", True),
        )  # fmt: skip

    def factors(key: str) -> tuple[float, ...]:
        found = scaling.get(key)
        numbers = [_positive(f) for f in found] if isinstance(found, list) else []
        positive = tuple(number for number in numbers if number is not None)
        if not len(positive) == len(numbers) == head_dim // 2:
            raise InputError(f"{part.where}: {key} must be a list of {head_dim // 2} positive numbers")
        return positive

    return RopeConfig(
        theta, kind, factor=factor, original_max_position_embeddings=original,
        attention_factor=optional("attention_factor"),
        short_factor=factors("short_factor"), long_factor=factors("long_factor"),
    )  # fmt: skip
