"""`nf4 generate`, `nf4 eval` and `nf4 merge`: what they answer, and every refusal."""

import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nf4 import bundled
from nf4.cli.generate import pieces
from nf4.cli.merge import drift
from nf4.formats.checkpoint import QuantizeOptions, load_model, open_checkpoint
from nf4.formats.peft import load_adapter
from nf4.model.llama import Llama
from safetensors.numpy import load_file, save_file

Run = Callable[..., str]
RunJson = Callable[..., dict[str, Any]]


def test_generate_continues_the_prompt_with_the_likeliest_tokens(
    model: Path, run: Run, run_json: RunJson
) -> None:
    answer = run_json("generate", model, "--prompt", "It was", "--max-tokens", 9)
    assert answer.keys() == {"prompt", "text", "prompt_tokens", "tokens", "weights", "seconds"}
    assert answer["prompt_tokens"] == 6
    assert answer["weights"] == "as stored"
    llama, tokenizer = load_model(model, quantize=None), open_checkpoint(model).tokenizer()
    ids = tokenizer.encode("It was")
    for token in answer["tokens"]:
        assert token == int(llama.logits(np.asarray(ids, np.int32))[-1].argmax())
        ids.append(token)
    assert run("generate", model, "--prompt", "It was", "--max-tokens", 9) == "It was" + answer["text"] + "\n"


def test_generate_samples_by_the_seed(model: Path, run_json: RunJson) -> None:
    def sample(seed: int) -> list[int]:
        arguments = ("--temperature", 1.5, "--top-k", 50, "--top-p", 0.9, "--max-tokens", 12, "--seed", seed)
        return list(run_json("generate", model, "--prompt", "a", *arguments)["tokens"])

    assert sample(3) == sample(3)
    assert len({tuple(sample(seed)) for seed in range(3)}) > 1


def test_generate_with_an_adapter_runs_on_nf4_unless_told_otherwise(
    model: Path, adapter: Path, run_json: RunJson
) -> None:
    common = ("generate", model, "--prompt", "The", "--max-tokens", 2)
    assert run_json(*common, "--adapter", adapter)["weights"] == "nf4, block 64, double-quantized"
    assert run_json(*common, "--adapter", adapter, "--codebook", "none")["weights"] == "as stored"
    assert run_json(*common, "--codebook", "int4", "--no-double-quant")["weights"] == "int4, block 64"


def test_an_adapter_runs_on_what_it_was_trained_on(
    model: Path, run: Run, run_json: RunJson, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("In the beginning. " * 60)
    out = tmp_path / "out"
    flags = ("--codebook", "int4", "--block-size", 32, "--no-double-quant", "--steps", 1, "--seq-len", 32)
    run("finetune", model, tmp_path / "text.txt", "--out", out, *flags)
    common = ("generate", model, "--prompt", "The", "--max-tokens", 1, "--adapter", out)
    assert run_json(*common)["weights"] == "int4, block 32"
    assert (
        run_json(*common, "--codebook", "nf4", "--double-quant")["weights"]
        == "nf4, block 32, double-quantized"
    )
    merged = run_json("merge", model, out, tmp_path / "merged", "--onto", "dequantized")
    assert merged["trained_on"] == {"block_size": 32, "codebook": "int4", "double_quant": False}
    assert merged["drift"]["max_abs"] < 1e-4


def test_lora_on_a_model_that_is_not_quantized(
    model: Path, run: Run, run_json: RunJson, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("In the beginning. " * 60)
    flags = (
        "--codebook",
        "none",
        "--steps",
        2,
        "--lr",
        0.01,
        "--seq-len",
        32,
        "--eval-data",
        tmp_path / "text.txt",
    )
    tuned = run_json("finetune", model, tmp_path / "text.txt", "--out", tmp_path / "out", *flags)
    plain = run_json("eval", model, tmp_path / "text.txt", "--seq-len", 32)
    assert plain["weights"] == "as stored"
    assert tuned["eval_before"] == pytest.approx(plain["loss"], rel=1e-5)
    after = run_json("eval", model, tmp_path / "text.txt", "--seq-len", 32, "--adapter", tmp_path / "out")
    assert after["weights"] == "as stored"
    assert after["loss"] == pytest.approx(tuned["eval_after"], rel=1e-5)
    common = ("generate", model, "--prompt", "The", "--max-tokens", 1, "--adapter", tmp_path / "out")
    assert run_json(*common, "--codebook", "nf4")["weights"].startswith("nf4")
    merged = run_json("merge", model, tmp_path / "out", tmp_path / "merged", "--onto", "dequantized")
    assert merged["trained_on"]["codebook"] == "none"
    assert merged["drift"]["max_abs"] < 1e-4
    assert "on unquantized weights" in run(
        "merge", model, tmp_path / "out", tmp_path / "again", "--onto", "original"
    )
    same = [load_file(tmp_path / name / "model.safetensors") for name in ("merged", "again")]
    assert all(np.array_equal(same[0][name], same[1][name]) for name in same[0])


def test_generate_stops_at_the_models_last_position(model: Path, run: Run, run_json: RunJson) -> None:
    answer = run_json("generate", model, "--prompt", "x" * 120, "--max-tokens", 50, "--temperature", 1)
    assert len(answer["tokens"]) <= 8
    assert "128 positions" in run("generate", model, "--prompt", "x" * 128, exit_code=2)


def test_pieces_hold_back_an_unfinished_character(model: Path) -> None:
    tokenizer = open_checkpoint(model).tokenizer()
    ids = tokenizer.encode("é時")
    got = list(pieces(iter(ids), tokenizer.encode("a"), tokenizer))
    assert "".join(got) == "é時"
    assert "�" not in "".join(got)
    assert "".join(pieces(iter(ids[:-1]), tokenizer.encode("a"), tokenizer)) == "é�"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prompt", ""],
        ["--prompt", "a", "--temperature", "-1"],
        ["--prompt", "a", "--top-p", "0"],
        ["--prompt", "a", "--max-tokens", "0"],
        ["--prompt", "a", "--codebook", "nf5"],
        ["--prompt", "a", "--codebook", "nf4", "--block-size", "7"],
        [],
    ],
)
def test_generate_refuses(model: Path, run: Run, arguments: list[str]) -> None:
    run("generate", model, *arguments, exit_code=2)


def test_eval_agrees_with_the_model_itself(model: Path, prose: Path, run: Run, run_json: RunJson) -> None:
    answer = run_json("eval", model, prose, "--seq-len", 100)
    assert answer.keys() == {
        "model", "adapter", "data", "weights", "seq_len", "tokens", "bytes",
        "loss", "perplexity", "bits_per_byte", "seconds",
    }  # fmt: skip
    llama, ids = load_model(model, quantize=None), prose.read_bytes()
    tokens = np.asarray(open_checkpoint(model).tokenizer().encode(ids.decode()), np.int32)
    assert len(tokens) == len(ids)  # byte-level
    total = 0.0
    for start in range(0, len(tokens) - 1, 100):
        part, targets = tokens[start : start + 100], tokens[start + 1 : start + 101]
        logits = llama.logits(part[: len(targets)]).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        total -= log_p[np.arange(len(targets)), targets].sum()
    count = len(tokens) - 1
    assert (answer["tokens"], answer["bytes"]) == (count, count)
    assert answer["loss"] == pytest.approx(total / count, rel=1e-5)
    assert answer["perplexity"] == pytest.approx(math.exp(answer["loss"]))
    assert answer["bits_per_byte"] == pytest.approx(answer["loss"] / math.log(2))
    assert "perplexity" in run("eval", model, prose)


def test_eval_with_an_adapter_and_on_completions_only(
    tmp_path: Path, model: Path, adapter: Path, prose: Path, run_json: RunJson
) -> None:
    plain, adapted = run_json("eval", model, prose), run_json("eval", model, prose, "--adapter", adapter)
    assert adapted["loss"] != plain["loss"]
    assert adapted["adapter"] == str(adapter)
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "One and one is", "completion": " two"}) + "\n")
    answer, whole = run_json("eval", model, data), run_json("eval", model, data, "--loss-on", "all")
    assert answer["tokens"] == len(" two") + 1  # and the end
    assert answer["tokens"] < whole["tokens"]


def test_eval_refuses(tmp_path: Path, model: Path, prose: Path, run: Run) -> None:
    assert "128" in run("eval", model, prose, "--seq-len", 129, exit_code=2)
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    assert "UTF-8" in run("eval", model, tmp_path / "bad.txt", exit_code=2)
    (tmp_path / "none.txt").write_bytes(b"")
    assert "empty" in run("eval", model, tmp_path / "none.txt", exit_code=2)
    assert "nowhere" in run("eval", model, tmp_path / "nowhere.txt", exit_code=2)


def test_eval_that_is_nan_is_a_failed_check(
    tmp_path: Path, tiny_model: Callable[..., Path], prose: Path, run: Run
) -> None:
    source = tiny_model(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][:] = np.float32(3e38)  # finite, but no logit is
    save_file(tensors, source / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "loss" in run("eval", source, prose, exit_code=1)


def test_adapters_that_do_not_fit_are_refused(
    tmp_path: Path, tiny_model: Callable[..., Path], model: Path, adapter: Path, run: Run
) -> None:
    other = tiny_model(tmp_path / "other", intermediate_size=48)
    assert "another model" in run("generate", other, "--prompt", "a", "--adapter", adapter, exit_code=2)
    hollow = tmp_path / "hollow"
    shutil.copytree(adapter, hollow)
    save_file({}, hollow / "adapter_model.safetensors")
    assert "no tensors" in run("generate", model, "--prompt", "a", "--adapter", hollow, exit_code=2)
    assert "nowhere" in run(
        "generate", model, "--prompt", "a", "--adapter", tmp_path / "nowhere", exit_code=2
    )


def test_a_tokenizer_for_another_vocabulary_is_refused(
    tmp_path: Path, tiny_model: Callable[..., Path], prose: Path, run: Run
) -> None:
    other = tiny_model(tmp_path / "other", vocab_size=200, eos_token_id=None)
    assert "vocabulary" in run("eval", other, prose, exit_code=2)


@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_merge_reports_the_drift_of_the_logits(
    tmp_path: Path, model: Path, adapter: Path, run: Run, run_json: RunJson, onto: str
) -> None:
    answer = run_json("merge", model, adapter, tmp_path / "out", "--onto", onto)
    assert answer.keys() == {"model", "adapter", "output", "onto", "trained_on", "prompts", "drift"}
    assert answer["onto"] == onto
    found = answer["drift"]
    base = load_model(model, quantize=QuantizeOptions())
    trained = Llama(base.config, base.params, load_adapter(adapter, base.config))
    merged, tokenizer = load_model(tmp_path / "out", quantize=None), open_checkpoint(model).tokenizer()
    ids = [np.asarray(tokenizer.encode(prompt), np.int32) for prompt in answer["prompts"]]
    difference = [np.abs(trained.logits(row) - merged.logits(row)) for row in ids]
    assert found["positions"] == sum(map(len, ids))
    assert found["max_abs"] == pytest.approx(max(map(np.max, difference)), rel=1e-3, abs=1e-6)
    # Onto the weights that training saw nothing moves but the last bits; onto the original ones it does.
    if onto == "dequantized":
        assert found["max_abs"] < 1e-4
        assert 0 <= found["mean_kl"] + 1e-12 < 1e-8
    else:
        assert found["mean_kl"] > 1e-6


def test_merge_in_words(tmp_path: Path, model: Path, adapter: Path, run: Run) -> None:
    words = run("merge", model, adapter, tmp_path / "out", "--onto", "original")
    assert "onto the original weights" in words
    assert "KL" in words


def test_merge_refuses(tmp_path: Path, model: Path, adapter: Path, run: Run) -> None:
    run("merge", model, adapter, tmp_path / "out", exit_code=2)  # --onto is for the user to choose
    assert "nowhere" in run(
        "merge", model, tmp_path / "nowhere", tmp_path / "out", "--onto", "original", exit_code=2
    )
    run("quantize", model, tmp_path / "four")
    assert "original" in run(
        "merge", tmp_path / "four", adapter, tmp_path / "out", "--onto", "original", exit_code=2
    )
    assert os.listdir(tmp_path) == ["four"]
    assert "isn't empty" in run("merge", model, adapter, tmp_path / "four", "--onto", "original", exit_code=2)


def test_drift_is_that_of_the_definition() -> None:
    a = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]], np.float32))
    b = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]], np.float32))
    found = drift(a, b + np.float32(3))
    kl = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert found["mean_kl"] == pytest.approx(kl / 2, abs=1e-6)
    assert found["max_kl"] == pytest.approx(kl, abs=1e-6)
    assert found["max_abs"] == pytest.approx(3 + math.log(2), rel=1e-6)
    assert found["same_top"] == 0.5


@pytest.mark.parametrize(
    "command", ["quantize", "dequantize", "inspect", "generate", "eval", "merge", "bench"]
)
def test_every_command_has_help(run: Run, command: str) -> None:
    assert "Usage:" in run(command, "--help")


def test_as_a_program(tmp_path: Path, model: Path) -> None:
    def nf4(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from nf4.cli import main; main()", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    done = nf4("quantize", model, tmp_path / "four")
    assert (done.returncode, "bits each" in done.stdout) == (0, True)
    assert "quantizing: 20 of 20 tensors" in done.stderr  # plain lines: this is no terminal
    assert (
        json.loads(nf4("inspect", tmp_path / "four", "--json").stdout)["total"]["quantized"]["tensors"] == 14
    )
    refused = nf4("inspect", tmp_path / "nowhere")
    assert refused.returncode == 2
    assert refused.stderr.startswith("nf4: ")
    assert "Traceback" not in refused.stderr
    assert refused.stdout == ""


def test_the_bundled_model_is_the_default_and_nf4_hardly_hurts_it(tmp_path: Path, run_json: RunJson) -> None:
    answer = run_json("generate", "--prompt", "hacker: ", "--max-tokens", 20)
    assert len(answer["text"]) == 20  # a character a token
    text = tmp_path / "part.txt"
    text.write_bytes(bundled.HELDOUT_TEXT.read_bytes()[:4000])
    exact = run_json("eval", bundled.MODEL, text)
    rounded = run_json("eval", bundled.MODEL, text, "--codebook", "nf4")
    assert exact["loss"] < 2.0  # it has learned to write: a uniform guess is 5.5
    assert 0 < rounded["loss"] - exact["loss"] < 0.05
