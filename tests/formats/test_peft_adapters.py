"""Adapters: written for PEFT, read from PEFT, refused when they would silently do something else; merging."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from nf4.errors import InputError
from nf4.formats.bitsandbytes import write_quantized
from nf4.formats.checkpoint import QuantizeOptions, open_checkpoint
from nf4.formats.files import SafetensorsFile, SafetensorsWriter, TensorSpec
from nf4.formats.merge import write_merged
from nf4.formats.peft import TRAINED_ON, linear_shapes, load_adapter, read_trained_on, save_adapter
from nf4.lora import LoRA, init_lora
from nf4.model.config import LlamaConfig
from nf4.tensor import dequantize, quantize

Build = Callable[..., Path]
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG = LlamaConfig.from_dict(
    {
        "model_type": "llama",
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
    },
    "config.json",
)


def adapters(
    targets: tuple[str, ...] = TARGETS,
    rank: int = 4,
    alpha: float = 10,
    rslora: bool = False,
    dtype: Any = np.float32,
) -> dict[str, LoRA]:
    generator = np.random.default_rng(0)
    made = {}
    for name, (out, inner) in linear_shapes(CONFIG).items():
        if name.rpartition(".")[2] in targets:
            made[name] = init_lora(name, inner, out, rank, alpha, 0.05, 7, rslora, dtype)
            made[name].B[...] = generator.standard_normal((out, rank)) * 0.1
    return made


def assert_same(left: dict[str, LoRA], right: dict[str, LoRA]) -> None:
    assert left.keys() == right.keys()
    for name, one in left.items():
        other = right[name]
        np.testing.assert_array_equal(one.A, other.A, strict=True)
        np.testing.assert_array_equal(one.B, other.B, strict=True)
        assert (one.scale, one.dropout, one.stream) == (other.scale, other.dropout, other.stream)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=str)
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "down_proj")], ids=str)
@pytest.mark.parametrize(("rank", "alpha"), [(4, 10), (3, 16), (1, 0.5)])
def test_round_trip(
    dtype: Any, rslora: bool, targets: tuple[str, ...], rank: int, alpha: float, tmp_path: Path
) -> None:
    made = adapters(targets, rank, alpha, rslora, dtype)
    save_adapter(tmp_path / "a", made, base="some/model", rslora=rslora)
    assert_same(load_adapter(tmp_path / "a", CONFIG), made)
    options = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert options["peft_type"] == "LORA"
    assert options["r"] == rank
    assert options["lora_alpha"] == alpha
    assert options["use_rslora"] is rslora
    assert sorted(options["target_modules"]) == sorted(targets)
    assert options["base_model_name_or_path"] == "some/model"


def test_mixed_ranks_round_trip(tmp_path: Path) -> None:
    made = adapters()
    for name in list(made):
        if "layers.1." in name and "q_proj" in name:
            made[name] = init_lora(name, 32, 32, 2, 3, 0.05, 7)
    save_adapter(tmp_path, made, base="m")
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    assert options["rank_pattern"] == {"model.layers.1.self_attn.q_proj": 2}
    assert options["alpha_pattern"] == {"model.layers.1.self_attn.q_proj": 3}
    assert_same(load_adapter(tmp_path, CONFIG), made)


def test_some_layers_of_some_modules_round_trip(tmp_path: Path) -> None:
    made = adapters()
    del made["model.layers.0.mlp.up_proj"]
    save_adapter(tmp_path, made, base="m")
    assert_same(load_adapter(tmp_path, CONFIG), made)


def test_saving_replaces_and_refuses_nothing_to_save(tmp_path: Path) -> None:
    save_adapter(tmp_path, adapters(rank=2), base="m")
    (tmp_path / "training_log.jsonl").write_text("{}")
    save_adapter(tmp_path, adapters(rank=4), base="m")
    assert_same(load_adapter(tmp_path, CONFIG), adapters(rank=4))
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(InputError, match="no adapter"):
        save_adapter(tmp_path / "none", {}, base="m")
    assert not (tmp_path / "none").exists()


def test_an_adapter_knows_what_it_was_trained_on(tmp_path: Path) -> None:
    save_adapter(tmp_path, adapters(), base="somewhere")
    assert read_trained_on(tmp_path) is None
    for options in (QuantizeOptions(), QuantizeOptions(128, "int4", False)):
        save_adapter(tmp_path, adapters(), base="somewhere", trained_on=options)
        assert read_trained_on(tmp_path) == options


@pytest.mark.parametrize(
    "facts", ["{}", '{"block_size": "64", "codebook": "nf4", "double_quant": true}', "nf4"]
)
def test_a_strange_trained_on_is_refused(facts: str, tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path / "adapter_model.safetensors", {}, {TRAINED_ON: facts}):
        pass
    with pytest.raises(InputError, match=r"adapter_model.safetensors: nf4.trained_on"):
        read_trained_on(tmp_path)


def edit(directory: Path, drop: str | None = None, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    options = json.loads(path.read_text()) | changes
    options.pop(drop, None)
    path.write_text(json.dumps(options))


def tensors_of(directory: Path) -> dict[str, Any]:
    file = SafetensorsFile(directory / "adapter_model.safetensors")
    return {name: file.read(name) for name in file.entries}


def rewrite(directory: Path, tensors: dict[str, Any]) -> None:
    specs = {name: TensorSpec(value.dtype, value.shape) for name, value in tensors.items()}
    with SafetensorsWriter(directory / "adapter_model.safetensors", specs) as writer:
        for name, value in tensors.items():
            writer.write(name, value)


def test_other_spellings_are_read(tmp_path: Path) -> None:
    made = adapters()
    save_adapter(tmp_path, made, base="m")
    for targets in ("all-linear", r".*\.(self_attn|mlp)\..*_proj"):
        edit(tmp_path, target_modules=targets)
        assert_same(load_adapter(tmp_path, CONFIG), made)
    rewrite(tmp_path, {k.replace(".weight", ".default.weight"): v for k, v in tensors_of(tmp_path).items()})
    assert_same(load_adapter(tmp_path, CONFIG), made)
    edit(tmp_path, rank_pattern={"q_proj": 4}, r=99, alpha_pattern={r"layers\.0\..*": 2.0})
    with pytest.raises(InputError, match="this model and r need"):
        load_adapter(tmp_path, CONFIG)
    edit(tmp_path, r=4)
    loaded = load_adapter(tmp_path, CONFIG)
    assert loaded["model.layers.0.mlp.up_proj"].scale == 0.5
    assert loaded["model.layers.1.mlp.up_proj"].scale == 2.5


def test_layers_to_transform_is_read(tmp_path: Path) -> None:
    made = {name: lora for name, lora in adapters().items() if "layers.1." in name}
    save_adapter(tmp_path, made, base="m")
    with pytest.raises(InputError, match=r"no tensors for, such as 'model\.layers\.0"):
        load_adapter(tmp_path, CONFIG)
    edit(tmp_path, layers_to_transform=[1])
    assert_same(load_adapter(tmp_path, CONFIG), made)


Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def change_tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    return lambda directory: rewrite(directory, change(tensors_of(directory)))


def change_options(drop: str | None = None, **changes: Any) -> Callable[[Path], None]:
    return lambda directory: edit(directory, drop, **changes)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json"),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "is missing"),
    "empty": (change_tensors(lambda t: {}), "holds no tensors"),
    "half a pair": (change_tensors(lambda t: {k: v for k, v in t.items() if k != Q_A}), "needs both A and B"),
    "a module missing": (
        change_tensors(lambda t: {k: v for k, v in t.items() if "layers.1.mlp.up" not in k}),
        "promises 1 modules",
    ),
    "unknown tensor": (change_tensors(lambda t: t | {"lm_head.weight": t[Q_A]}), "isn't part of a LoRA"),
    "head": (
        change_tensors(lambda t: t | {Q_A.replace("model.layers.0.self_attn.q_proj", "lm_head"): t[Q_A]}),
        "adapts 'lm_head'",
    ),
    "layer of a larger model": (
        change_tensors(lambda t: t | {Q_A.replace("layers.0", "layers.9"): t[Q_A]}),
        "layers.9",
    ),
    "both names": (change_tensors(lambda t: t | {Q_A.replace("A.", "A.default."): t[Q_A]}), "two lora_A"),
    "other shape": (change_tensors(lambda t: t | {Q_A: np.ones((4, 48), np.float32)}), "another model"),
    "other dtype": (change_tensors(lambda t: t | {Q_A: np.ones((4, 32), np.int8)}), "dtype I8"),
    "NaN": (change_tensors(lambda t: t | {Q_A: np.full((4, 32), np.nan, np.float32)}), "NaN"),
    "rank of config": (change_options(r=8), "this model and r need"),
    "rank missing": (change_options("r"), "r is None"),
    "rank zero": (change_options(r=0), "r is 0"),
    "alpha missing": (change_options("lora_alpha"), "lora_alpha is None"),
    "alpha text": (change_options(lora_alpha="16"), "lora_alpha"),
    "alpha no float holds": (change_options(lora_alpha=10**400), "lora_alpha"),
    "dropout": (change_options(lora_dropout=1.5), "lora_dropout"),
    "rslora": (change_options(use_rslora="yes"), "use_rslora"),
    "targets missing": (change_options("target_modules"), "target_modules is missing"),
    "targets too few": (change_options(target_modules=["q_proj", "v_proj"]), "leaves it out"),
    "targets number": (change_options(target_modules=3), "neither a string"),
    "targets regex": (change_options(target_modules="("), "regular expression"),
    "pattern regex": (change_options(rank_pattern={"(": 3}), "regular expression"),
    "dora": (change_options(use_dora=True), "use_dora"),
    "other type": (change_options(peft_type="IA3"), "IA3"),
    "no type": (change_options("peft_type"), "peft_type"),
    "saved modules": (change_options(modules_to_save=["lm_head"]), "modules_to_save"),
    "biases": (change_options(bias="all"), "bias"),
    "pissa": (change_options(init_lora_weights="pissa"), "pissa"),
    "hostile weights": (
        lambda d: (d / "adapter_model.safetensors").write_bytes(b"\xff" * 64),
        "header claims",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_adapter_is_refused(name: str, tmp_path: Path) -> None:
    save_adapter(tmp_path, adapters(), base="m")
    damage, message = BAD[name]
    damage(tmp_path)
    with pytest.raises(InputError) as error:
        load_adapter(tmp_path, CONFIG)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_merge(dtype: Any, onto: Any, tiny_model: Build, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model(tmp_path / "m", dtype=dtype))
    made = adapters(("q_proj", "down_proj"))
    write_merged(source, made, tmp_path / "out", onto=onto, options=QuantizeOptions(block_size=32))
    merged = open_checkpoint(tmp_path / "out")
    assert merged.names() == source.names()
    for name in source.names():
        value = source.read(name)
        linear = name.removesuffix(".weight") in linear_shapes(CONFIG)
        wide = value.astype(np.float64)
        if onto == "dequantized" and linear:
            wide = dequantize(quantize(value, 32, "nf4", True)).astype(np.float64)
        lora = made.get(name.removesuffix(".weight"))
        if lora is not None:
            wide = wide + lora.scale * (lora.B.astype(np.float64) @ lora.A)
        read = merged.read(name)
        assert read.dtype == value.dtype
        step = float(ml_dtypes.finfo(value.dtype).eps) / 2 + 1e-6  # one rounding, and the float32 sums
        assert np.abs(read.astype(np.float64) - wide).max() <= step * np.abs(wide).max()


def test_merge_onto_a_4_bit_model(tiny_model: Build, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model(tmp_path / "m"))
    write_quantized(source, tmp_path / "q", QuantizeOptions())
    four = open_checkpoint(tmp_path / "q")
    write_merged(four, adapters(), tmp_path / "a", onto="dequantized")
    write_merged(source, adapters(), tmp_path / "b", onto="dequantized")
    for name in source.names():
        np.testing.assert_array_equal(
            open_checkpoint(tmp_path / "a").read(name), open_checkpoint(tmp_path / "b").read(name)
        )
    assert "quantization_config" not in open_checkpoint(tmp_path / "a").config
    with pytest.raises(InputError, match="give the original model"):
        write_merged(four, adapters(), tmp_path / "c", onto="original")
    with pytest.raises(InputError, match="another model"):
        write_merged(
            source,
            {"model.layers.7.mlp.up_proj": adapters()["model.layers.0.mlp.up_proj"]},
            tmp_path / "c",
            onto="original",
        )
    assert not (tmp_path / "c").exists()


def test_scale_survives_for_any_alpha_and_rank(tmp_path: Path) -> None:
    for rank in (1, 3, 7, 64):
        for alpha in (1, 16, 0.1, 33.3):
            for rslora in (False, True):
                made = adapters(("q_proj",), rank, alpha, rslora)
                save_adapter(tmp_path, made, base="m", rslora=rslora)
                for name, lora in load_adapter(tmp_path, CONFIG).items():
                    assert math.isclose(lora.scale, made[name].scale, rel_tol=1e-15)
