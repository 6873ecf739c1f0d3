"""The vectors of models and adapters: directories, GGUF, 4-bit models, LoRA adapters, merged weights."""

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.conform.generate import exact, make
from nf4.conform.generate.exact import numbers
from nf4.conform.generate.files import Header, in_file, to_json
from nf4.conform.vectors import Vector
from nf4.floats import BFLOAT16, DTYPES
from nf4.formats.bitsandbytes import weight_tensors
from nf4.tensor import quantize

Array = NDArray[Any]


def vectors() -> Iterator[Vector]:
    """Yield the vectors of models, of adapters and of both merged."""
    yield from _read_model()
    yield from _read_gguf()
    yield from _quantize_model()
    yield from _read_adapter()
    yield from _merge()


# Two heads of 4, so that the rows of q can be out of order, and little else.
CONFIG: Header = {
    "model_type": "llama",
    "vocab_size": 3,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
LAYER = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (3, 4),
    f"{LAYER}input_layernorm.weight": (4,),
    f"{LAYER}post_attention_layernorm.weight": (4,),
    f"{LAYER}self_attn.q_proj.weight": (8, 4),
    f"{LAYER}self_attn.k_proj.weight": (4, 4),
    f"{LAYER}self_attn.v_proj.weight": (4, 4),
    f"{LAYER}self_attn.o_proj.weight": (4, 8),
    f"{LAYER}mlp.gate_proj.weight": (6, 4),
    f"{LAYER}mlp.up_proj.weight": (6, 4),
    f"{LAYER}mlp.down_proj.weight": (4, 6),
    "model.norm.weight": (4,),
}
SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def _model() -> dict[str, Array]:
    return {name: numbers(name, *shape, scale=0.5, dtype="bfloat16") for name, shape in SHAPES.items()}


def _directory(tensors: Mapping[str, Array], **config: Any) -> dict[str, bytes]:
    return {"config.json": to_json(CONFIG | config), "model.safetensors": in_file(tensors)}


def _sharded(tensors: Mapping[str, Array]) -> tuple[dict[str, bytes], Header]:
    """The files of two shards but the index, and its weight_map."""
    names = list(tensors)
    halves = names[:6], names[6:]
    files = {
        shard: in_file({n: tensors[n] for n in half}) for shard, half in zip(SHARDS, halves, strict=True)
    }
    weight_map = {n: shard for shard, half in zip(SHARDS, halves, strict=True) for n in half}
    return {"config.json": to_json(CONFIG), **files}, weight_map


def _indexed(files: Mapping[str, bytes], weight_map: Header) -> dict[str, bytes]:
    return {**files, "model.safetensors.index.json": to_json({"metadata": {}, "weight_map": weight_map})}


def _four_bit(tensors: Mapping[str, Array], double_quant: bool) -> dict[str, Array]:
    """The tensors with those of the linear layers in 4 bits."""
    found: dict[str, Array] = {}
    for name, value in tensors.items():
        if "_proj." in name:
            found |= weight_tensors(name, quantize(value, 64, "nf4", double_quant))
        else:
            found[name] = value
    return found


def _read_model() -> Iterator[Vector]:
    def read(slug: str, files: Mapping[str, bytes], comment: str, flags: str = "", **more: Any) -> Vector:
        return make("read_model", f"model-{slug}", "8.1", comment, {"files": files}, flags=flags, **more)

    def refuse(slug: str, files: Mapping[str, bytes], comment: str, flags: str) -> Vector:
        return read(slug, files, comment, flags, refused=comment)

    model = _model()
    head = numbers("lm_head", 3, 4, dtype="bfloat16")
    yield read(
        "plain",
        _directory({**model, "lm_head.weight": head}, tie_word_embeddings=False),
        "One file, with a head.",
        "",
    )
    yield read(
        "tied",
        _directory({**model, "lm_head.weight": head}),
        "A tied head that is stored a second time is not read.",
        "TiedHead",
    )
    bits = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    yield read(
        "four-bit",
        _directory(_four_bit(model, False), quantization_config=bits),
        "Linear layers in 4 bits.",
        "WeightNotRounded",
    )
    files, weight_map = _sharded(model)
    yield read("shards", _indexed(files, weight_map), "Two shards and their index.", "")
    yield refuse(
        "shard-missing",
        _indexed({n: f for n, f in files.items() if n != SHARDS[1]}, weight_map),
        "A shard is missing.",
        "MissingShard",
    )
    yield refuse(
        "tensor-missing",
        _indexed(files, weight_map | {"lm_head.weight": SHARDS[0]}),
        "The index names a tensor that its shard lacks.",
        "IndexUnchecked",
    )
    fewer = {n: shard for n, shard in weight_map.items() if n != "model.norm.weight"}
    yield refuse(
        "tensor-unnamed",
        _indexed(files, fewer),
        "A shard has a tensor that the index does not name.",
        "IndexUnchecked",
    )
    turned = weight_map | {"model.norm.weight": SHARDS[0]}
    yield refuse(
        "tensor-elsewhere",
        _indexed(files, turned),
        "A tensor lies in another shard than the index says.",
        "IndexUnchecked",
    )
    outside = weight_map | {"model.norm.weight": "../model.safetensors"}
    yield refuse(
        "shard-outside",
        _indexed(files, outside),
        "The index names a file of another directory.",
        "MissingShard",
    )
    lacking = {n: v for n, v in model.items() if "up_proj" not in n}
    yield refuse(
        "weight-missing",
        _directory(lacking),
        "A weight that the config asks for is in no file.",
        "WeightMissing",
    )
    yield refuse(
        "weight-extra",
        _directory({**model, f"{LAYER}self_attn.q_proj.bias": head[0]}),
        "A bias the config does not ask for.",
        "WeightMissing",
    )
    wide = {**model, "model.norm.weight": head.reshape(-1)[:5]}
    yield refuse(
        "weight-shape", _directory(wide), "A weight of another shape than the config's.", "WeightMissing"
    )
    broken = {**model, "model.norm.weight": np.full(4, np.nan, BFLOAT16)}
    yield refuse("weight-nan", _directory(broken), "A NaN in a weight.", "NonFiniteAccepted")
    yield refuse(
        "no-weights",
        {"config.json": to_json(CONFIG)},
        "Neither model.safetensors nor an index.",
        "MissingShard",
    )
    yield refuse("no-config", {"model.safetensors": in_file(model)}, "No config.json.", "")
    gptq = {"quant_method": "gptq", "bits": 4}
    yield refuse(
        "gptq",
        _directory(model, quantization_config=gptq),
        "Another method of quantization.",
        "QuantTypeIgnored",
    )


GGUF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "blk.0.attn_norm.weight": f"{LAYER}input_layernorm.weight",
    "blk.0.ffn_norm.weight": f"{LAYER}post_attention_layernorm.weight",
    "blk.0.attn_q.weight": f"{LAYER}self_attn.q_proj.weight",
    "blk.0.attn_k.weight": f"{LAYER}self_attn.k_proj.weight",
    "blk.0.attn_v.weight": f"{LAYER}self_attn.v_proj.weight",
    "blk.0.attn_output.weight": f"{LAYER}self_attn.o_proj.weight",
    "blk.0.ffn_gate.weight": f"{LAYER}mlp.gate_proj.weight",
    "blk.0.ffn_up.weight": f"{LAYER}mlp.up_proj.weight",
    "blk.0.ffn_down.weight": f"{LAYER}mlp.down_proj.weight",
    "output_norm.weight": "model.norm.weight",
}


def _gguf(
    arch: str,
    tensors: Iterable[tuple[str, Array]],
    *,
    version: int = 3,
    keys: Iterable[str] = (),
    overlap: int = 0,
) -> bytes:
    """A GGUF file of float32 and float16 tensors under GGUF's names; keys are given once more."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    counts = {
        "block_count": 1,
        "context_length": 32,
        "embedding_length": 4,
        "feed_forward_length": 6,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.key_length": 4,
    }
    reals = {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e8}
    fields = [text("general.architecture") + struct.pack("<I", 8) + text(arch)]
    fields += [text(f"{arch}.{key}") + struct.pack("<II", 4, counts[key]) for key in (*counts, *keys)]
    fields += [text(f"{arch}.{key}") + struct.pack("<If", 6, value) for key, value in reals.items()]
    infos, data, count = b"", b"", 0
    for name, value in tensors:
        data += bytes(-len(data) % 32)
        kind = {"float32": 0, "float16": 1}[value.dtype.name]
        infos += text(name) + struct.pack(f"<I{value.ndim}Q", value.ndim, *reversed(value.shape))
        infos += struct.pack("<IQ", kind, max(len(data) - overlap, 0))
        data += value.tobytes()
        count += 1
    head = b"GGUF" + struct.pack("<IQQ", version, count, len(fields)) + b"".join(fields) + infos
    return head + bytes(-len(head) % 32) + data


def _read_gguf() -> Iterator[Vector]:
    def read(slug: str, file: bytes, comment: str, flags: str, **more: Any) -> Vector:
        return make(
            "read_model", f"gguf-{slug}", "8.9", comment, {"files": {"model.gguf": file}}, flags=flags, **more
        )

    def refuse(slug: str, file: bytes, comment: str, flags: str) -> Vector:
        return read(slug, file, comment, flags, refused=comment)

    stored = {
        theirs: numbers(
            ours, *SHAPES[ours], scale=0.5, dtype="float16" if len(SHAPES[ours]) == 2 else "float32"
        )
        for theirs, ours in GGUF_NAMES.items()
    }
    llama = _gguf("llama", stored.items())
    yield read(
        "llama", llama, "The rows of q and k are put back into halves; the head is tied.", "RopeInterleaved"
    )
    head = numbers("gguf.head", 3, 4, dtype="float16")
    yield read(
        "head",
        _gguf("llama", {**stored, "output.weight": head}.items()),
        "A head of its own.",
        "RopeInterleaved",
    )
    biases = {f"blk.0.attn_{q}.bias": numbers(f"gguf.{q}", n) for q, n in (("q", 8), ("k", 4), ("v", 4))}
    yield read(
        "qwen2",
        _gguf("qwen2", {**stored, **biases}.items()),
        "The rows of qwen2 are not interleaved.",
        "",
    )
    scaled = np.array([1.0, 8.0], np.float32)  # waves of 2 pi and 2 pi 10^4 positions, of 8192
    yield read(
        "rope-freqs",
        _gguf("llama", {**stored, "rope_freqs.weight": scaled}.items()),
        "rope_freqs of llama3 scaling by 8.",
        "",
    )
    other = np.array([2.0, 3.5], np.float32)
    yield refuse(
        "rope-freqs-other",
        _gguf("llama", {**stored, "rope_freqs.weight": other}.items()),
        "rope_freqs of no llama3 scaling.",
        "RopeFreqsDropped",
    )
    yield refuse(
        "architecture", _gguf("gemma", stored.items()), "An architecture that is none of the three.", ""
    )
    yield refuse("cut", llama[:-40], "A file that ends within a tensor.", "OffsetsUnchecked")
    lacking = {name: value for name, value in stored.items() if "ffn_up" not in name}
    yield refuse("weight-missing", _gguf("llama", lacking.items()), "A weight is missing.", "WeightMissing")
    norm = ("output_norm.weight", stored["output_norm.weight"])
    two = (norm, ("token_embd.weight", stored["token_embd.weight"]))
    for slug, file, comment, flag in (
        ("version", _gguf("llama", two, version=1), "Version 1.", ""),
        ("magic", llama.replace(b"GGUF", b"GGML", 1), "Not a GGUF file.", ""),
        ("key-twice", _gguf("llama", two, keys=["block_count"]), "A key twice.", "DuplicateKeys"),
        ("tensor-twice", _gguf("llama", (norm, norm)), "A tensor twice.", "DuplicateKeys"),
        (
            "tensor-unknown",
            _gguf("llama", (*two, ("blk.0.ffn_gate_inp.weight", norm[1]))),
            "A tensor of a mixture.",
            "",
        ),
        ("overlap", _gguf("llama", stored.items(), overlap=16), "Tensors that overlap.", "OverlapAccepted"),
        ("header-cut", llama[:200], "A file that ends within its header.", "HeaderUnchecked"),
    ):
        yield refuse(slug, file, comment, flag)


def _quantize_model() -> Iterator[Vector]:
    def write(
        slug: str,
        files: Mapping[str, bytes],
        comment: str,
        flags: str,
        codebook: str,
        double_quant: bool,
        **more: Any,
    ) -> Vector:
        fields = {"files": files, "block_size": 64, "codebook": codebook, "double_quant": double_quant}
        return make("quantize_model", f"quantize-{slug}", "8.6 8.3 8.4", comment, fields, flags=flags, **more)

    model = _model()
    head = numbers("lm_head", 3, 4, dtype="bfloat16")
    yield write(
        "nf4",
        _directory({**model, "lm_head.weight": head}, tie_word_embeddings=False),
        "NF4; the head stays.",
        "HeadQuantized Alignment",
        "nf4",
        False,
    )
    yield write("double", _directory(model), "Double-quantized NF4.", "HeadQuantized Alignment", "nf4", True)
    yield write("fp4", _directory(model), "FP4.", "HeadQuantized QuantTypeIgnored", "fp4", False)
    for codebook in ("int4", "fp4-e2m1"):
        comment = f"bitsandbytes has no {codebook}."
        yield write(
            f"refused-{codebook}",
            _directory(model),
            comment,
            "CodebookUnwritable",
            codebook,
            False,
            refused=comment,
        )
    bits = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    four = _directory(_four_bit(model, False), quantization_config=bits)
    yield write(
        "refused-twice",
        four,
        "A model that is 4-bit already.",
        "",
        "nf4",
        False,
        refused="It is 4-bit already.",
    )
    broken = {**model, f"{LAYER}mlp.up_proj.weight": np.full((6, 4), np.inf, BFLOAT16)}
    yield write(
        "refused-infinite",
        _directory(broken),
        "A weight that is infinite.",
        "NonFiniteAccepted",
        "nf4",
        False,
        refused="A weight is infinite.",
    )


def _adapter(modules: Mapping[str, int], *, dtype: str = "float32", name: str = "weight") -> dict[str, Array]:
    """The tensors of an adapter: the rank by module, such as self_attn.q_proj."""
    tensors: dict[str, Array] = {}
    for module, rank in modules.items():
        out, into = SHAPES[f"{LAYER}{module}.weight"]
        for side, shape in (("A", (rank, into)), ("B", (out, rank))):
            tensors[f"base_model.model.{LAYER}{module}.lora_{side}.{name}"] = numbers(
                f"adapter.{module}.{side}", *shape, dtype=dtype
            )
    return tensors


def _read_adapter() -> Iterator[Vector]:
    base = {"config.json": to_json(CONFIG)}
    options: Header = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "down_proj"],
    }
    two = {"self_attn.q_proj": 2, "mlp.down_proj": 2}

    def files(tensors: Mapping[str, Array], **change: Any) -> dict[str, bytes]:
        config = {key: value for key, value in (options | change).items() if value is not ...}
        return {"adapter_config.json": to_json(config), "adapter_model.safetensors": in_file(tensors)}

    def read(slug: str, given: Mapping[str, bytes], comment: str, flags: str, **more: Any) -> Vector:
        fields = {"files": given, "model": base}
        return make("read_adapter", f"adapter-{slug}", "8.7 9.1 9.6", comment, fields, flags=flags, **more)

    good = _adapter(two)
    swapped = "AdapterTransposed"
    yield read("plain", files(good), "q_proj and down_proj, r 2 and alpha 4: the scale is 2.", "ScaleRule")
    yield read(
        "default",
        files(_adapter(two, name="default.weight")),
        "The names of PEFT's default adapter.",
        "AdapterNames",
    )
    yield read("rslora", files(good, use_rslora=True), "The scale is 4 / sqrt(2).", "ScaleRule")
    yield read("bfloat16", files(_adapter(two, dtype="bfloat16")), "An adapter in bfloat16.", "")
    yield read("float16", files(_adapter(two, dtype="float16")), "An adapter in float16.", "")
    patterns = {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {f"{LAYER}self_attn.q_proj": 7}}
    three = _adapter({"self_attn.q_proj": 2, "mlp.down_proj": 3})
    yield read(
        "patterns", files(three, **patterns), "Other ranks and alphas for some modules.", "PatternIgnored"
    )
    yield read(
        "patterns-rslora",
        files(three, use_rslora=True, **patterns),
        "Patterns first, then the square root.",
        "PatternIgnored ScaleRule",
    )
    yield read(
        "expression", files(good, target_modules=r".*\.(q|down)_proj"), "Targets as a regular expression.", ""
    )
    every = {name.removeprefix(LAYER).removesuffix(".weight"): 1 for name in SHAPES if "_proj." in name}
    yield read(
        "all-linear", files(_adapter(every), target_modules="all-linear", r=1), "All seven linear layers.", ""
    )

    def refuse(slug: str, given: Mapping[str, bytes], comment: str, flags: str) -> Vector:
        return read(f"refused-{slug}", given, comment, flags, refused=comment)

    yield refuse("empty", files({}), "An adapter without tensors.", "EmptyAdapter")
    yield refuse(
        "missing",
        files(_adapter({"self_attn.q_proj": 2})),
        "A module that target_modules promise is missing.",
        "ModuleMissing",
    )
    yield refuse(
        "extra",
        files(_adapter({**two, "mlp.up_proj": 2})),
        "A module that target_modules do not name.",
        "ModuleMissing",
    )
    half = {name: value for name, value in good.items() if "q_proj.lora_B" not in name}
    yield refuse("half", files(half), "A module without its B.", "ModuleMissing")
    turned = {
        name: np.ascontiguousarray(value.T) if "down_proj.lora_A" in name else value
        for name, value in good.items()
    }
    yield refuse("shape", files(turned), "A matrix A that is [in, r].", swapped)
    yield refuse(
        "rank",
        files(_adapter({"self_attn.q_proj": 3, "mlp.down_proj": 3})),
        "Matrices of another rank than r.",
        "ShapeUnchecked",
    )
    deep = {name.replace("layers.0", "layers.1"): value for name, value in good.items()}
    yield refuse("layer", files(deep), "A layer that the model does not have.", "ModuleMissing")
    embedding = {
        "base_model.model.model.embed_tokens.lora_embedding_A": numbers("adapter.e.A", 2, 3),
        "base_model.model.model.embed_tokens.lora_embedding_B": numbers("adapter.e.B", 4, 2),
    }
    targets = ["q_proj", "down_proj", "embed_tokens"]
    yield refuse(
        "embedding",
        files({**good, **embedding}, target_modules=targets),
        "An adapter of the embedding.",
        "EmbeddingAdapted",
    )
    head = {
        "base_model.model.lm_head.lora_A.weight": numbers("adapter.head.A", 2, 4),
        "base_model.model.lm_head.lora_B.weight": numbers("adapter.head.B", 3, 2),
    }
    yield refuse(
        "head",
        files({**good, **head}, target_modules=["q_proj", "down_proj", "lm_head"]),
        "An adapter of the head.",
        "EmbeddingAdapted",
    )
    broken = {name: value.copy() for name, value in good.items()}
    next(iter(broken.values()))[0, 0] = np.nan
    yield refuse("nan", files(broken), "A NaN in an adapter.", "NonFiniteAccepted")
    for slug, change in (
        ("dora", {"use_dora": True}),
        ("saved", {"modules_to_save": ["lm_head"]}),
        ("biases", {"bias": "all"}),
        ("lora-bias", {"lora_bias": True}),
        ("fan-in", {"fan_in_fan_out": True}),
        ("pissa", {"init_lora_weights": "pissa"}),
    ):
        key, value = next(iter(change.items()))
        yield refuse(
            slug, files(good, **change), f"{key} is {json.dumps(value)}: not plain LoRA.", "OptionsIgnored"
        )
    for key in ("peft_type", "r", "lora_alpha", "target_modules"):
        yield refuse(
            f"no-{key.replace('_', '-')}", files(good, **{key: ...}), f"{key} is missing.", "AdapterDefaults"
        )
    yield refuse("other-kind", files(good, peft_type="IA3"), "An adapter of another kind.", "OptionsIgnored")


def _merge() -> Iterator[Vector]:
    def merged(
        slug: str, comment: str, flags: str, dtype: str, A: Array, B: Array, scale: float, **more: Any
    ) -> Vector:
        weight = numbers(f"merge.{slug}", len(B), A.shape[1], scale=more.pop("size", 1.0), dtype=dtype)
        with np.errstate(over="ignore"):
            y = (
                (weight.astype(np.float64) + scale * exact.matmul(B, A))
                .astype(np.float32)
                .astype(DTYPES[dtype])
            )
        fields = {
            "weight": weight,
            "shape": list(weight.shape),
            "dtype": dtype,
            "A": A,
            "B": B,
            "rank": len(A),
            "scale": np.array([scale]),
        }
        output = None if "refused" in more else {"y": y}
        bound = more.pop("bound", {"float32": 1e-5, "float16": 2**-10, "bfloat16": 2**-7}[dtype])
        if output is not None:
            more["tolerance"] = {"y": bound}
        return make("merge", f"merge-{slug}", "8.8", comment, fields, flags=flags, output=output, **more)

    A, B = numbers("merge.A", 3, 8), numbers("merge.B", 6, 3)
    yield merged("float32", "A scale that is no power of two.", "", "float32", A, B, 8 / math.sqrt(3))
    square = numbers("merge.square", 4, 4), numbers("merge.square.B", 4, 4)
    yield merged(
        "square",
        "Matrices that stay of their shape transposed.",
        "AdapterTransposed",
        "float32",
        *square,
        2.0,
    )
    # Sixteenths: their sums of products are exact, so the one rounding is all there is.
    coarse = np.round(A * 16) / np.float32(16), np.round(B * 16) / np.float32(16)
    for dtype in ("bfloat16", "float16"):
        yield merged(
            dtype,
            f"Sums that are exact, rounded once to {dtype}.",
            "TruncatedConversion" + " MergedInLowPrecision" * (dtype == "bfloat16"),
            dtype,
            *coarse,
            0.5,
            bound=0.0,
        )
    zero = np.zeros_like(B)
    yield merged("nothing", "A B of zeros changes nothing.", "", "bfloat16", A, zero, 2.0)
    large = np.full((1, 2), 300, np.float32), np.full((2, 1), 300, np.float32)
    yield merged(
        "infinite",
        "A merged float16 weight that is infinite.",
        "NonFiniteAccepted",
        "float16",
        *large,
        1.0,
        refused="A merged weight is infinite.",
    )
