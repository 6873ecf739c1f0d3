"""LoRA adapters in the files that PEFT reads and writes."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nf4.errors import InputError
from nf4.formats.checkpoint import QuantizeOptions
from nf4.formats.files import (
    SafetensorsFile,
    SafetensorsWriter,
    TensorSpec,
    parse_json,
    read_json,
    write_json,
)
from nf4.lora import LoRA
from nf4.model.config import LlamaConfig
from nf4.random import stream_of

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
TRAINED_ON = "nf4.trained_on"
TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.(?:default\.)?weight")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# What changes the adapter's meaning, and the only values under which it is plain LoRA.
PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "arrow_config": (None,),
    "monteclora_config": (None,),
    "kasa_config": (None,),
    # The others (pissa, olora, loftq, ...) belong to a base model whose weights were changed with them.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def linear_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """The linear modules of a model's layers: {"model.layers.0.self_attn.q_proj": (out, in), ...}."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = {
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {
        f"model.layers.{i}.{module}": shape
        for i in range(config.num_hidden_layers)
        for module, shape in shapes.items()
    }


def save_adapter(
    directory: str | Path,
    adapters: Mapping[str, LoRA],
    *,
    base: str,
    rslora: bool = False,
    trained_on: QuantizeOptions | None = None,
) -> None:
    """Write adapter_model.safetensors and adapter_config.json, each atomically, for PEFT to load (NF4-8.7).

    directory: made if it doesn't exist; the two files in it are replaced. base: the name or path of the
    base model; rslora: whether the scale is alpha / sqrt(r); trained_on: how the base was quantized, kept
    in the metadata of the safetensors file, where PEFT does not look. Raises InputError if there are no
    adapters or the disk refuses.
    """
    if not adapters:
        raise InputError(f"{directory}: there is no adapter to save")
    directory = Path(directory)
    ranks = {name: lora.A.shape[0] for name, lora in adapters.items()}
    alphas = {name: _alpha(lora, rslora) for name, lora in adapters.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "lora_dropout": next(iter(adapters.values())).dropout,
        "target_modules": _targets(adapters),
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "inference_mode": True,
    }
    tensors: dict[str, NDArray[Any]] = {}
    for name, lora in adapters.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = lora.A
        tensors[f"base_model.model.{name}.lora_B.weight"] = lora.B
    specs = {name: TensorSpec(value.dtype, value.shape) for name, value in tensors.items()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{directory}: can't be made ({error.strerror})") from None
    metadata = {"format": "pt"} | ({TRAINED_ON: json.dumps(asdict(trained_on))} if trained_on else {})
    with SafetensorsWriter(directory / WEIGHTS, specs, metadata) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
    write_json(directory / CONFIG, config)


def _alpha(lora: LoRA, rslora: bool) -> int | float:
    """The alpha that gives this scale; whole numbers, which PEFT expects, come back whole."""
    rank = lora.A.shape[0]
    alpha = lora.scale * (math.sqrt(rank) if rslora else rank)
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * max(1.0, abs(alpha)) else alpha


def _targets(names: Iterable[str]) -> list[str]:
    """The modules' last names where these cover every layer alike, else the whole names."""
    layers: dict[str, set[str]] = {}
    for name in names:
        layers.setdefault(name.rpartition(".")[2], set()).add(name.split(".")[2])
    if len({frozenset(found) for found in layers.values()}) == 1:
        return sorted(layers)
    return sorted(names)


def read_trained_on(directory: str | Path) -> QuantizeOptions | None:
    """How the base was quantized that an adapter was trained on; None if its file does not say (NF4-8.7).

    Raises InputError if the file is missing or broken, or says something else.
    """
    file = SafetensorsFile(Path(directory) / WEIGHTS)
    if TRAINED_ON not in file.metadata:
        return None
    facts = parse_json(file.metadata[TRAINED_ON], f"{file.path}: {TRAINED_ON}")
    kinds = {field.name: type(field.default) for field in fields(QuantizeOptions)}
    if {name: type(value) for name, value in facts.items()} != kinds:
        raise InputError(f"{file.path}: {TRAINED_ON} is {facts}; it must have {', '.join(kinds)}")
    return QuantizeOptions(**facts)


def load_adapter(directory: str | Path, config: LlamaConfig) -> dict[str, LoRA]:
    """Read a PEFT LoRA adapter for a model: {"model.layers.0.self_attn.q_proj": LoRA, ...} (NF4-8.7).

    Raises InputError, naming the file and the tensor or the option, when it isn't plain LoRA, has no
    tensors, lacks some of those its target_modules promise, or has the shapes of another model.
    """
    directory = Path(directory)
    where = directory / CONFIG
    options = read_json(where)
    _check_plain(options, where)
    if not (directory / WEIGHTS).exists():
        raise InputError(f"{directory}: {WEIGHTS} is missing; adapters in .bin files can't be read")
    file = SafetensorsFile(directory / WEIGHTS)
    found: dict[str, dict[str, str]] = {}
    for key in file.entries:
        match = TENSOR.fullmatch(key)
        if not match:
            raise InputError(f"{file.path}: tensor {key!r} isn't part of a LoRA adapter of linear layers")
        if match[2] in found.setdefault(match[1], {}):
            raise InputError(f"{file.path}: module {match[1]!r} has two lora_{match[2]}")
        found[match[1]][match[2]] = key
    if not found:
        raise InputError(
            f"{file.path}: holds no tensors; this adapter was saved empty, train or save it again"
        )
    shapes = linear_shapes(config)
    _check_modules(found, shapes, options, where, file.path)
    return {
        module: _read(file, module, keys, shapes[module], options, where)
        for module, keys in sorted(found.items(), key=lambda item: list(shapes).index(item[0]))
    }


def _check_plain(options: dict[str, Any], where: Path) -> None:
    if options.get("peft_type") != "LORA":
        raise InputError(
            f"{where}: peft_type is {options.get('peft_type')!r}; only LORA adapters can be read"
        )
    for key, plain in PLAIN.items():
        if key in options and options[key] not in plain:
            raise InputError(
                f"{where}: {key} is {options[key]!r}; only plain LoRA can be read, merge it in PEFT first"
            )


def _check_modules(
    found: Mapping[str, Any], shapes: Mapping[str, Any], options: dict[str, Any], where: Path, weights: Path
) -> None:
    """The modules with tensors are those of the model that target_modules selects."""
    for module in found:
        if module not in shapes:
            raise InputError(
                f"{weights}: adapts {module!r}, which isn't a linear layer of this model; it is for another"
            )
    promised = {name for name in shapes if _selects(options, name, where)}
    for module in found:
        if module not in promised:
            raise InputError(
                f"{weights}: adapts {module!r}, but target_modules in {where.name} leaves it out"
            )
    missing = sorted(promised - found.keys())
    if missing:
        raise InputError(
            f"{weights}: target_modules in {where.name} promises {len(missing)} modules it has no "
            "tensors for, such as "
            f"{missing[0]!r}; it is incomplete or for another model"
        )


def _selects(options: dict[str, Any], name: str, where: Path) -> bool:
    """Whether PEFT's target_modules, layers_to_transform and exclude_modules select this module."""
    layers = options.get("layers_to_transform")
    if layers is not None and int(name.split(".")[2]) not in (
        layers if isinstance(layers, list) else [layers]
    ):
        return False
    if options.get("exclude_modules") and _matches(
        options["exclude_modules"], name, where, "exclude_modules"
    ):
        return False
    if not options.get("target_modules"):
        raise InputError(f"{where}: target_modules is missing; name the modules the adapter is for")
    return options["target_modules"] == "all-linear" or _matches(
        options["target_modules"], name, where, "target_modules"
    )


def _matches(targets: Any, name: str, where: Path, key: str) -> bool:
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, name) is not None
        except re.error as error:
            raise InputError(f"{where}: {key} {targets!r} isn't a regular expression ({error})") from None
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise InputError(f"{where}: {key} {targets!r} is neither a string nor a list of strings")
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _pattern(options: dict[str, Any], key: str, name: str, default: Any, where: Path) -> Any:
    """The value that PEFT's rank_pattern or alpha_pattern gives a module."""
    patterns = options.get(key) or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{where}: {key} {patterns!r} isn't an object")
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except re.error as error:
            raise InputError(f"{where}: {key} has {pattern!r}, not a regular expression ({error})") from None
    return default


def _read(
    file: SafetensorsFile,
    module: str,
    keys: Mapping[str, str],
    shape: tuple[int, int],
    options: dict[str, Any],
    where: Path,
) -> LoRA:
    if keys.keys() != {"A", "B"}:
        raise InputError(
            f"{file.path}: module {module!r} has only lora_{next(iter(keys))}, and needs both A and B"
        )
    rank = _pattern(options, "rank_pattern", module, options.get("r"), where)
    alpha = _pattern(options, "alpha_pattern", module, options.get("lora_alpha"), where)
    dropout, rslora = options.get("lora_dropout", 0.0), options.get("use_rslora", False)
    if type(rank) is not int or rank < 1:
        raise InputError(f"{where}: r is {rank!r} for {module!r}; it must be a positive integer")
    # Not math.isfinite: JSON has integers that no float64 holds.
    if type(alpha) not in (int, float) or not abs(alpha) <= float(np.finfo(np.float64).max):
        raise InputError(f"{where}: lora_alpha is {alpha!r} for {module!r}; it must be a number")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise InputError(f"{where}: lora_dropout is {dropout!r}; it must be at least 0 and less than 1")
    if not isinstance(rslora, bool):
        raise InputError(f"{where}: use_rslora is {rslora!r}; it must be true or false")
    A = _factor(file, keys["A"], (rank, shape[1]))
    B = _factor(file, keys["B"], (shape[0], rank))
    if A.dtype != B.dtype:
        A, B = A.astype(np.float32), B.astype(np.float32)
    scale = alpha / math.sqrt(rank) if rslora else alpha / rank
    return LoRA(A, B, scale, float(dropout), stream_of(module))


def _factor(file: SafetensorsFile, key: str, shape: tuple[int, int]) -> NDArray[Any]:
    """One matrix, as float32 or bfloat16."""
    entry = file.entry(key)
    if entry.shape != shape:
        raise InputError(
            f"{file.path}: tensor {key!r} has shape {list(entry.shape)}, and this model and r need "
            f"{list(shape)}; "
            "the adapter is for another model"
        )
    if entry.dtype not in ("F32", "F16", "BF16"):
        raise InputError(
            f"{file.path}: tensor {key!r} has dtype {entry.dtype}; an adapter must be F32, F16 or BF16"
        )
    value = file.read(key)
    if not np.isfinite(value).all():
        raise InputError(f"{file.path}: tensor {key!r} holds NaN or infinity; the training diverged")
    return value if value.dtype == BFLOAT16 else value.astype(np.float32, copy=False)
