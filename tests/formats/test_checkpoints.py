"""Model directories: read whatever their layout, refused when broken, quantized, dequantized and loaded."""

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from nf4.codebooks import Codebook
from nf4.errors import InputError
from nf4.formats.bitsandbytes import load_tensor, save_tensor, write_dequantized, write_quantized
from nf4.formats.checkpoint import QuantizeOptions, load_model, open_checkpoint
from nf4.formats.files import SafetensorsFile, SafetensorsWriter, ShardedWriter, TensorSpec
from nf4.tensor import QuantizedTensor, dequantize, quantize

Build = Callable[..., Path]
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def tensors_of(directory: Path) -> dict[str, Any]:
    file = SafetensorsFile(directory / "model.safetensors")
    return {name: file.read(name) for name in file.entries}


def rewrite(directory: Path, tensors: dict[str, Any]) -> None:
    specs = {name: TensorSpec(value.dtype, value.shape) for name, value in tensors.items()}
    with SafetensorsWriter(directory / "model.safetensors", specs) as writer:
        for name, value in tensors.items():
            writer.write(name, value)


def shard(directory: Path) -> None:
    tensors = tensors_of(directory)
    specs = {name: TensorSpec(value.dtype, value.shape) for name, value in tensors.items()}
    with ShardedWriter(directory, specs, max_shard_bytes=20_000) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
    (directory / "model.safetensors").unlink()


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_shards_read_as_one_file(tiny_model: Build, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "m")
    tensors = tensors_of(source)
    shard(source)
    assert len(list(source.glob("model-*.safetensors"))) > 2
    checkpoint = open_checkpoint(source)
    assert checkpoint.names() == sorted(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(checkpoint.read(name), value, strict=True)
        assert checkpoint.shape(name) == value.shape
        assert checkpoint.dtype(name) == "F32"


def break_shard(directory: Path) -> str:
    sorted(directory.glob("model-*"))[0].unlink()
    return "is missing"


def break_index_absent_tensor(directory: Path) -> str:
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.absent.weight"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    return "no tensor 'model.absent.weight'"


def break_index_leaves_out(directory: Path) -> str:
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][Q_PROJ]
    index.write_text(json.dumps(content))
    return "doesn't name tensor"


def break_index_path(directory: Path) -> str:
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][Q_PROJ] = "../../etc/passwd"
    index.write_text(json.dumps(content))
    return "'../../etc/passwd' is missing"


def break_index_type(directory: Path) -> str:
    edit_json(directory / "model.safetensors.index.json", weight_map={Q_PROJ: 3})
    return "isn't a file name"


def break_index_empty(directory: Path) -> str:
    edit_json(directory / "model.safetensors.index.json", weight_map={})
    return "weight_map is missing or empty"


@pytest.mark.parametrize(
    "damage",
    [
        break_shard,
        break_index_absent_tensor,
        break_index_leaves_out,
        break_index_path,
        break_index_type,
        break_index_empty,
    ],
)
def test_broken_shards_are_refused(damage: Callable[[Path], str], tiny_model: Build, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "m")
    shard(source)
    message = damage(source)
    with pytest.raises(InputError) as error:
        open_checkpoint(source)
    assert message in str(error.value)


def test_what_is_no_model_is_refused(tiny_model: Build, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello")
    source = tiny_model(tmp_path / "m")
    (source / "model.safetensors").unlink()
    for path, message in (
        ("none", "no such model"),
        ("empty", "config.json"),
        ("text", "not a GGUF"),
        ("m", "neither"),
    ):
        with pytest.raises(InputError, match=message):
            open_checkpoint(tmp_path / path)
    for config in ({"quant_method": "gptq"}, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "awq"):
        edit_json(source / "config.json", quantization_config=config)
        with pytest.raises(InputError, match="can't be read unless"):
            open_checkpoint(source)


def test_unknown_architecture_is_refused_before_any_work(tiny_model: Build, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "m", model_type="bert")
    for work in (
        lambda: load_model(source, quantize=None),
        lambda: write_quantized(open_checkpoint(source), tmp_path / "out", QuantizeOptions()),
        lambda: write_dequantized(open_checkpoint(source), tmp_path / "out", None),
    ):
        with pytest.raises(InputError, match="bert"):
            work()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [Q_PROJ, "model.norm.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_a_weight_is_refused_by_name(
    name: str, value: float, tiny_model: Build, tmp_path: Path
) -> None:
    source = tiny_model(tmp_path / "m")
    tensors = tensors_of(source)
    tensors[name].reshape(-1)[17] = value
    rewrite(source, tensors)
    for work in (
        lambda: load_model(source, quantize=QuantizeOptions()),
        lambda: load_model(source, quantize=None),
        lambda: write_quantized(open_checkpoint(source), tmp_path / "out", QuantizeOptions()),
    ):
        with pytest.raises(InputError) as error:
            work()
        assert name in str(error.value)
        assert "17" in str(error.value)
    assert {p.name for p in tmp_path.iterdir()} == {"m"}


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float16), BFLOAT16], ids=str)
@pytest.mark.parametrize("options", [QuantizeOptions(), QuantizeOptions(128, "fp4", False)], ids=str)
def test_quantize_then_dequantize(
    dtype: Any, options: QuantizeOptions, tiny_model: Build, tmp_path: Path
) -> None:
    source = tiny_model(tmp_path / "m", dtype=dtype)
    tensors = tensors_of(source)
    seen: list[tuple[str, int, int]] = []
    write_quantized(open_checkpoint(source), tmp_path / "q", options, lambda *progress: seen.append(progress))
    assert seen[0][1:] == (0, len(tensors))
    assert seen[-1][1:] == (len(tensors), len(tensors))
    four = open_checkpoint(tmp_path / "q")
    config = four.config["quantization_config"]
    assert config["bnb_4bit_quant_type"] == options.codebook
    assert config["bnb_4bit_use_double_quant"] is options.double_quant
    assert config["bnb_4bit_compute_dtype"] == dtype.name
    assert four.names() == sorted(tensors)
    for name, value in tensors.items():
        read = four.read(name)
        assert four.shape(name) == value.shape
        if value.ndim == 2 and "embed" not in name:
            wanted = quantize(value, options.block_size, options.codebook, options.double_quant)
            assert read == wanted
            assert four.dtype(name) == options.codebook
        else:
            np.testing.assert_array_equal(read, value, strict=True)
    write_dequantized(four, tmp_path / "d", None)
    plain = open_checkpoint(tmp_path / "d")
    assert "quantization_config" not in plain.config
    assert plain.config["torch_dtype"] == dtype.name
    for name in tensors:
        read = four.read(name)
        wanted_values = dequantize(read) if isinstance(read, QuantizedTensor) else read
        assert plain.read(name).tobytes() == wanted_values.tobytes()
    for directory in ("q", "d"):
        assert (tmp_path / directory / "tokenizer.json").read_bytes() == (
            source / "tokenizer.json"
        ).read_bytes()


def test_dequantize_into_another_dtype(tiny_model: Build, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "m")
    write_dequantized(open_checkpoint(source), tmp_path / "half", np.dtype(np.float16))
    half = open_checkpoint(tmp_path / "half")
    assert half.config["torch_dtype"] == "float16"
    np.testing.assert_array_equal(
        half.read(Q_PROJ), tensors_of(source)[Q_PROJ].astype(np.float16), strict=True
    )
    tensors = tensors_of(source)
    tensors[Q_PROJ][0, 0] = 1e5
    rewrite(source, tensors)
    with pytest.raises(InputError, match="q_proj"):
        write_dequantized(open_checkpoint(source), tmp_path / "over", np.dtype(np.float16))
    assert not (tmp_path / "over").exists()


def test_quantize_refuses(tiny_model: Build, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model(tmp_path / "m"))
    for codebook in ("int4", "fp4-e2m1"):
        with pytest.raises(InputError, match="choose one of nf4, fp4"):
            write_quantized(source, tmp_path / "q", QuantizeOptions(codebook=codebook))
    with pytest.raises(InputError, match="33"):
        write_quantized(source, tmp_path / "q", QuantizeOptions(block_size=33))
    write_quantized(source, tmp_path / "q", QuantizeOptions())
    before = sorted((p.name, p.read_bytes()) for p in (tmp_path / "q").iterdir())
    with pytest.raises(InputError, match="isn't empty"):
        write_quantized(source, tmp_path / "q", QuantizeOptions())
    assert before == sorted((p.name, p.read_bytes()) for p in (tmp_path / "q").iterdir())
    with pytest.raises(InputError, match="4-bit already"):
        write_quantized(open_checkpoint(tmp_path / "q"), tmp_path / "again", QuantizeOptions())
    assert not (tmp_path / "again").exists()


def test_load_model(tiny_model: Build, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "m", dtype=BFLOAT16)
    tensors = tensors_of(source)
    plain = load_model(source, quantize=None)
    four = load_model(source, quantize=QuantizeOptions())
    write_quantized(open_checkpoint(source), tmp_path / "q", QuantizeOptions())
    stored = load_model(tmp_path / "q", quantize=None)
    for name, value in tensors.items():
        assert plain.params[name].dtype == np.float32
        np.testing.assert_array_equal(plain.params[name], value.astype(np.float32))
        if value.ndim == 2 and "embed" not in name:
            assert four.params[name] == stored.params[name] == quantize(value, double_quant=True)
        else:
            np.testing.assert_array_equal(four.params[name], plain.params[name])
            np.testing.assert_array_equal(stored.params[name], plain.params[name])


def test_a_tied_head_stored_twice_is_left_out(tiny_model: Build, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "m")
    tensors = tensors_of(source)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    rewrite(source, tensors)
    names = set(load_model(source, quantize=None).params)
    assert names == set(tensors) - {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}


# --- one 4-bit weight
# ---------------------------------------------------------------------------------------------

STATE = "weight.quant_state.bitsandbytes__nf4"


def stored_weight(tmp_path: Path, double: bool = True) -> tuple[Path, dict[str, Any]]:
    x = np.random.default_rng(0).standard_normal((6, 50)).astype(np.float32)
    path = tmp_path / "w.safetensors"
    save_tensor(quantize(x, 64, "nf4", double), path)
    file = SafetensorsFile(path)
    return path, {name: file.read(name) for name in file.entries}


def write(path: Path, tensors: dict[str, Any]) -> None:
    specs = {name: TensorSpec(value.dtype, value.shape) for name, value in tensors.items()}
    with SafetensorsWriter(path, specs) as writer:
        for name, value in tensors.items():
            writer.write(name, value)


def state(tensors: dict[str, Any], drop: str | None = None, **changes: Any) -> dict[str, Any]:
    fields = json.loads(tensors[STATE].tobytes()) | changes
    fields.pop(drop, None)
    return tensors | {STATE: np.frombuffer(json.dumps(fields).encode(), np.uint8)}


@pytest.mark.parametrize("codebook", ["nf4", "fp4", "fp4-e2m1", "int4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(6, 50), (7, 3), (5,), (), (0,), (3, 0)], ids=str)
def test_one_tensor_round_trip(codebook: str, double: bool, shape: tuple[int, ...], tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal(shape).astype(BFLOAT16)
    q = quantize(x, 32, codebook, double)
    save_tensor(q, tmp_path / "w")
    assert load_tensor(tmp_path / "w") == q
    assert dequantize(load_tensor(tmp_path / "w")).shape == shape


def test_a_codebook_no_reader_knows_is_not_written(tmp_path: Path) -> None:
    mine = Codebook("mine", np.linspace(-1, 1, 16, dtype=np.float32))
    with pytest.raises(InputError, match="'mine' can't be stored"):
        quantize(np.ones(8, np.float32), codebook=mine).save(tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("storage", [np.int8, np.float16, ml_dtypes.bfloat16, np.float32], ids=str)
def test_any_quant_storage(storage: Any, tmp_path: Path) -> None:
    path, tensors = stored_weight(tmp_path)
    wanted = load_tensor(path)
    codes = tensors["weight"].reshape(-1)[:148]  # 6 x 50 is 150 bytes, which float32 doesn't divide
    tensors = state(tensors, shape=[2, 148])
    tensors["weight"] = codes.view(storage).reshape(-1, 1)
    write(path, tensors)
    assert load_tensor(path).codes.tobytes() == wanted.codes.tobytes()[:148]


def test_the_stored_map_is_used(tmp_path: Path) -> None:
    path, tensors = stored_weight(tmp_path, double=False)
    before = dequantize(load_tensor(path))
    tensors["weight.quant_map"] = tensors["weight.quant_map"] * np.float32(0.5)
    write(path, tensors)
    np.testing.assert_array_equal(dequantize(load_tensor(path)), before * np.float32(0.5))


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "no weight": (without("weight"), "not the tensor 'weight'"),
    "no state": (without(STATE), "belongs to no NF4 or FP4 weight"),
    "no absmax": (without("weight.absmax"), "'weight.absmax' is missing"),
    "no map": (without("weight.quant_map"), "'weight.quant_map' is missing"),
    "no nested map": (without("weight.nested_quant_map"), "is missing"),
    "unknown part": (lambda t: t | {"weight.SCB": np.ones(3, np.float32)}, "weight.SCB"),
    "two states": (lambda t: t | {STATE.replace("nf4", "fp4"): t[STATE]}, "more than one"),
    "unknown codebook": (lambda t: without(STATE)(t) | {STATE.replace("nf4", "af4"): t[STATE]}, "af4"),
    "other quant_type": (lambda t: state(t, quant_type="fp4"), "name says 'nf4'"),
    "unknown key": (lambda t: state(t, extra=1), "['extra']"),
    "missing key": (lambda t: state(t, drop="blocksize"), "['blocksize']"),
    "bad dtype": (lambda t: state(t, dtype="float64"), "float64"),
    "bad shape": (lambda t: state(t, shape=[-6, -50]), "from 0 to 2^48"),
    "huge shape": (lambda t: state(t, shape=[2**40, 2**40]), "bytes of codes"),
    "other shape": (lambda t: state(t, shape=[6, 60]), "150 bytes of codes"),
    "bad block size": (lambda t: state(t, blocksize=48), "isn't one of"),
    "nested block size": (lambda t: state(t, nested_blocksize=64), "isn't 256"),
    "boolean block size": (lambda t: state(t, blocksize=True), "isn't one of"),
    "other block size": (lambda t: state(t, blocksize=128), "weight.absmax"),
    "bad nested dtype": (lambda t: state(t, nested_dtype="float16"), "nested_dtype"),
    "bad offset": (lambda t: state(t, nested_offset=1e300), "nested_offset"),
    "offset no number": (lambda t: state(t, nested_offset="0.1"), "nested_offset"),
    "state not JSON": (lambda t: t | {STATE: np.arange(9, dtype=np.uint8)}, "not valid JSON"),
    "NaN absmax": (
        lambda t: t | {"weight.nested_absmax": np.full_like(t["weight.nested_absmax"], np.nan)},
        "holds nan",
    ),
    "bfloat16 absmax": (
        lambda t: t | {"weight.nested_absmax": t["weight.nested_absmax"].astype(BFLOAT16)},
        "is BF16",
    ),
    "short map": (lambda t: t | {"weight.quant_map": t["weight.quant_map"][:8]}, "not F32 of 16"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_weight_is_refused(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGED[name]
    path, tensors = stored_weight(tmp_path)
    write(path, damage(tensors))
    with pytest.raises(InputError) as error:
        load_tensor(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_flat_state_with_nested_parts_is_refused(tmp_path: Path) -> None:
    path, tensors = stored_weight(tmp_path, double=False)
    write(path, tensors | {"weight.nested_absmax": np.ones(1, np.float32)})
    with pytest.raises(InputError, match="has nested_absmax"):
        load_tensor(path)


# --- memory
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("work", ["quantize", "dequantize"])
def test_streaming_takes_less_than_three_of_the_largest_tensor(
    work: str, tiny_model: Build, tmp_path: Path
) -> None:
    source = tiny_model(
        tmp_path / "m",
        hidden_size=512,
        head_dim=128,
        intermediate_size=4096,
        vocab_size=1024,
        num_hidden_layers=3,
    )
    largest = 4096 * 512 * 4
    assert (source / "model.safetensors").stat().st_size > 10 * largest
    if work == "dequantize":
        write_quantized(open_checkpoint(source), tmp_path / "q", QuantizeOptions())
        source = tmp_path / "q"
    else:
        shutil.rmtree(tmp_path / "q", ignore_errors=True)
        quantize(np.ones(64, np.float32))  # tables are made on first use
    tracemalloc.start()
    try:
        if work == "quantize":
            write_quantized(open_checkpoint(source), tmp_path / "out", QuantizeOptions())
        else:
            write_dequantized(open_checkpoint(source), tmp_path / "out", None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * largest
