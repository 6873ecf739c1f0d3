"""`nf4 quantize`, `nf4 dequantize`: the round trip, its error, memory, and every refusal."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from nf4.codebooks import CODEBOOKS
from nf4.formats.checkpoint import LINEAR_WEIGHT, open_checkpoint
from nf4.formats.files import SafetensorsWriter, TensorSpec
from nf4.formats.huggingface import HuggingFaceCheckpoint
from nf4.model.config import LlamaConfig
from nf4.model.llama import parameter_shapes
from safetensors.numpy import load_file, save_file

Run = Callable[..., str]
RunJson = Callable[..., dict[str, Any]]
HALF_GAP = {name: np.diff(np.sort(CODEBOOKS[name].values)).max() / 2 for name in ("nf4", "fp4")}


def worst(original: np.ndarray[Any, Any], back: np.ndarray[Any, Any], block_size: int) -> float:
    """Return the largest error of any block, in units of the block's absmax."""
    x, y = original.astype(np.float64).reshape(-1), back.astype(np.float64).reshape(-1)
    starts = np.arange(0, x.size, block_size)
    scale = np.maximum.reduceat(np.abs(x), starts)
    return float((np.maximum.reduceat(np.abs(x - y), starts) / scale).max())


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 256])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_round_trip_stays_within_the_codebooks_error(
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    run_json: RunJson,
    codebook: str,
    block_size: int,
    dtype: Any,
) -> None:
    source = tiny_model(tmp_path / "source", dtype=dtype)
    options = ("--codebook", codebook, "--block-size", block_size, "--no-double-quant")
    answer = run_json("quantize", source, tmp_path / "four", *options)
    assert answer["bits_per_weight"] == 4 + 32 / block_size
    run_json("dequantize", tmp_path / "four", tmp_path / "back")
    before, after = (
        load_file(source / "model.safetensors"),
        load_file(tmp_path / "back" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    rounding = float(ml_dtypes.finfo(dtype).eps)
    squares = [0.0, 0.0]
    for name, x in before.items():
        assert after[name].dtype == x.dtype
        if LINEAR_WEIGHT.fullmatch(name):
            assert worst(x, after[name], block_size) <= HALF_GAP[codebook] + rounding
            squares[0] += float(((x.astype(np.float64) - after[name].astype(np.float64)) ** 2).sum())
            squares[1] += float((x.astype(np.float64) ** 2).sum())
        else:
            assert x.tobytes() == after[name].tobytes()
    assert answer["relative_rms_error"] == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-9)


def test_double_quantization_is_the_default_and_costs_an_eighth_byte(
    tmp_path: Path, model: Path, run_json: RunJson
) -> None:
    answer = run_json("quantize", model, tmp_path / "four")
    assert answer["double_quant"] is True
    assert answer.keys() == {
        "source", "output", "codebook", "block_size", "double_quant",
        "tensors", "weights", "bytes", "bits_per_weight", "relative_rms_error",
    }  # fmt: skip
    assert answer["tensors"] == 14
    assert 4.125 < answer["bits_per_weight"] < 4.7  # tiny tensors pay the most for their second level
    assert 0.05 < answer["relative_rms_error"] < 0.12
    config = json.loads((tmp_path / "four" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_use_double_quant"] is True


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dequantize_writes_the_dtype_asked_for(tmp_path: Path, model: Path, run: Run, dtype: str) -> None:
    run("quantize", model, tmp_path / "four")
    words = run("dequantize", tmp_path / "four", tmp_path / "back", "--dtype", dtype)
    assert "20 tensors" in words
    assert {x.dtype.name for x in load_file(tmp_path / "back" / "model.safetensors").values()} == {dtype}


def test_words_without_json(tmp_path: Path, model: Path, run: Run) -> None:
    words = run("quantize", model, tmp_path / "four")
    assert "bits each" in words
    assert "relative RMS error" in words


@pytest.mark.parametrize("command", ["quantize", "dequantize"])
def test_an_output_that_is_not_empty_is_refused_untouched(
    tmp_path: Path, model: Path, run: Run, command: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    assert "isn't empty" in run(command, model, tmp_path / "out", exit_code=2)
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["precious"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block-size", "48"], "48"),
        (["--block-size", "8192"], "8192"),
        (["--codebook", "int4"], "int4"),
        (["--codebook", "fp4-e2m1"], "fp4-e2m1"),
        (["--codebook", "nf3"], "nf3"),
    ],
)
def test_options_that_no_4bit_directory_can_have(
    tmp_path: Path, model: Path, run: Run, arguments: list[str], message: str
) -> None:
    assert message in run("quantize", model, tmp_path / "out", *arguments, exit_code=2)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(
    tmp_path: Path, tiny_model: Callable[..., Path], run: Run, name: str, value: float
) -> None:
    source = tiny_model(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors[name].reshape(-1)[7] = value
    save_file(tensors, source / "model.safetensors")
    words = run("quantize", source, tmp_path / "out", exit_code=2)
    assert name in words
    assert "7" in words
    assert str(value) in words
    assert os.listdir(tmp_path) == ["source"]


def test_what_is_no_model_is_refused(tmp_path: Path, run: Run) -> None:
    assert "no such model" in run("quantize", tmp_path / "nowhere", tmp_path / "out", exit_code=2)
    (tmp_path / "empty").mkdir()
    assert "config.json" in run("quantize", tmp_path / "empty", tmp_path / "out", exit_code=2)
    (tmp_path / "note.txt").write_text("hello")
    assert "not a GGUF file" in run("quantize", tmp_path / "note.txt", tmp_path / "out", exit_code=2)
    assert sorted(os.listdir(tmp_path)) == ["empty", "note.txt"]


def test_a_model_that_is_4bit_already_is_refused(tmp_path: Path, model: Path, run: Run) -> None:
    run("quantize", model, tmp_path / "four")
    assert "4-bit already" in run("quantize", tmp_path / "four", tmp_path / "again", exit_code=2)
    assert os.listdir(tmp_path) == ["four"]


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path, model: Path, run: Run) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "can't be written" in run("quantize", model, tmp_path / "file" / "out", exit_code=2)
    assert "must be a directory" in run("quantize", model, tmp_path / "file", exit_code=2)
    assert (tmp_path / "file").read_text() == "in the way"


STREAM = """
import sys
from nf4.bench.machine import peak_bytes
from nf4.cli import main
import nf4.cli.quantize, nf4.cli.dequantize
before = peak_bytes()
main(sys.argv[1:], standalone_mode=False)
print(peak_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of the process from /proc")
@pytest.mark.parametrize("command", ["quantize", "dequantize"])
def test_memory_stays_under_three_times_the_largest_tensor(
    tmp_path: Path, tiny_model: Callable[..., Path], run: Run, command: str
) -> None:
    # Ten linear weights of 24 MB in a file of 250 MB: to hold the model would take ten times the largest.
    sizes = {"hidden_size": 1024, "intermediate_size": 6144, "num_hidden_layers": 3, "head_dim": 128}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 1}
    source = tiny_model(tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | sizes
    (source / "config.json").write_text(json.dumps(config))
    shapes = parameter_shapes(LlamaConfig.from_dict(config, "the test"))
    specs = {name: TensorSpec(np.dtype(np.float32), shape) for name, shape in shapes.items()}
    with SafetensorsWriter(source / "model.safetensors", specs) as writer:
        for name, spec in specs.items():
            writer.write(name, np.random.default_rng(0).standard_normal(spec.shape, dtype=np.float32))
    if command == "dequantize":
        run("quantize", source, tmp_path / "four")
        source = tmp_path / "four"
    arguments = [command, str(source), str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", STREAM, *arguments], capture_output=True, text=True, check=True, timeout=120
    )
    largest = max(spec.nbytes for spec in specs.values())
    assert int(done.stdout.splitlines()[-1]) < 3 * largest
    if command == "quantize":
        assert len(open_checkpoint(tmp_path / "out").names()) == len(specs)


@pytest.mark.parametrize("command", ["quantize", "dequantize"])
def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, model: Path, run: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    read = HuggingFaceCheckpoint.read

    def interrupted(self: HuggingFaceCheckpoint, name: str) -> Any:
        if name == "model.layers.1.mlp.up_proj.weight":
            raise KeyboardInterrupt
        return read(self, name)

    monkeypatch.setattr(HuggingFaceCheckpoint, "read", interrupted)
    assert "interrupted" in run(command, model, tmp_path / "out", exit_code=130)
    assert os.listdir(tmp_path) == []
