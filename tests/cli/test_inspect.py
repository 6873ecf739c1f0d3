"""`nf4 inspect`: every format it reads, and totals that add up to the bytes in the files."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nf4.formats.files import SafetensorsFile
from nf4.tensor import quantize
from safetensors.numpy import save_file

Run = Callable[..., str]
RunJson = Callable[..., dict[str, Any]]
ROW = {"name", "dtype", "shape", "block_size", "codebook", "double_quant", "bits_per_weight", "bytes"}


def check_sums(answer: dict[str, Any]) -> None:
    rows, total = answer["tensors"], answer["total"]
    assert all(row.keys() == ROW for row in rows)
    assert total["tensors"] == len(rows)
    assert total["parameters"] == sum(math.prod(row["shape"]) for row in rows)
    assert total["bytes"] == sum(row["bytes"] for row in rows)
    quantized = [row for row in rows if row["codebook"]]
    assert total["quantized"]["tensors"] == len(quantized)
    assert total["quantized"]["bytes"] == sum(row["bytes"] for row in quantized)


def test_plain_model(model: Path, run_json: RunJson) -> None:
    answer = run_json("inspect", model)
    check_sums(answer)
    assert answer["kind"] == "Hugging Face model"
    assert answer["model_type"] == "llama"
    entries = SafetensorsFile(model / "model.safetensors").entries
    assert answer["total"]["bytes"] == sum(entry.stop - entry.start for entry in entries.values())
    assert answer["total"]["bits_per_weight"] == 32
    assert answer["total"]["quantized"]["tensors"] == 0


@pytest.mark.parametrize("double", [True, False])
def test_4bit_model(tmp_path: Path, model: Path, run: Run, run_json: RunJson, double: bool) -> None:
    flag = "--double-quant" if double else "--no-double-quant"
    made = run_json("quantize", model, tmp_path / "four", "--block-size", 32, flag)
    answer = run_json("inspect", tmp_path / "four")
    check_sums(answer)
    part = answer["total"]["quantized"]
    assert (part["tensors"], part["parameters"], part["bytes"]) == (
        made["tensors"],
        made["weights"],
        made["bytes"],
    )
    rows = {row["name"]: row for row in answer["tensors"]}
    row = rows["model.layers.0.mlp.up_proj.weight"]
    assert (row["shape"], row["block_size"], row["codebook"], row["double_quant"]) == (
        [64, 32],
        32,
        "nf4",
        double,
    )
    assert row["dtype"] == "float32"
    assert rows["model.norm.weight"]["codebook"] is None
    assert "nf4 + double" in run("inspect", tmp_path / "four") or not double


def test_adapter(adapter: Path, run_json: RunJson, run: Run) -> None:
    answer = run_json("inspect", adapter)
    check_sums(answer)
    assert (answer["kind"], answer["r"], answer["lora_alpha"]) == ("PEFT adapter", 4, 8)
    assert answer["total"]["tensors"] == 28
    assert "lora_A" in run("inspect", adapter)


def test_one_file(tmp_path: Path, run_json: RunJson) -> None:
    save_file({"a": np.zeros((3, 5), np.float16), "b": np.zeros((), np.int64)}, tmp_path / "x.safetensors")
    answer = run_json("inspect", tmp_path / "x.safetensors")
    check_sums(answer)
    assert [(row["name"], row["dtype"], row["bytes"]) for row in answer["tensors"]] == [
        ("a", "F16", 30),
        ("b", "I64", 8),
    ]
    quantize(np.ones((10, 10), np.float32), 32, "fp4").save(tmp_path / "q.safetensors")
    answer = run_json("inspect", tmp_path / "q.safetensors")
    check_sums(answer)
    assert answer["tensors"][0]["codebook"] == "fp4"
    assert answer["total"]["bytes"] == 50 + 4 * 4


def test_gguf(tmp_path: Path, run_json: RunJson) -> None:
    import gguf

    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(0)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(40)
    embedding = gguf.quants.quantize(np.ones((40, 32), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", embedding, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    answer = run_json("inspect", path)
    check_sums(answer)
    rows = {row["name"]: row for row in answer["tensors"]}
    row = rows["model.embed_tokens.weight"]
    assert (answer["kind"], row["dtype"], row["shape"], row["block_size"]) == (
        "GGUF model",
        "Q8_0",
        [40, 32],
        32,
    )
    assert row["bytes"] == 40 * 34


def test_refusals(tmp_path: Path, run: Run) -> None:
    assert "no such model" in run("inspect", tmp_path / "nowhere", exit_code=2)
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 7 + b"\x7f{}")
    assert "header" in run("inspect", tmp_path / "x.safetensors", exit_code=2)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter_model.safetensors" in run("inspect", tmp_path, exit_code=2)


def test_layers_are_listed_in_their_order(
    tmp_path: Path, tiny_model: Callable[..., Path], run_json: RunJson
) -> None:
    answer = run_json("inspect", tiny_model(tmp_path / "deep", num_hidden_layers=11))
    norms = [row["name"] for row in answer["tensors"] if row["name"].endswith("input_layernorm.weight")]
    assert norms == [f"model.layers.{i}.input_layernorm.weight" for i in range(11)]
