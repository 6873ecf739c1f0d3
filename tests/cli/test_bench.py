"""`nf4 bench`: what it reports, on a small scale; the figures themselves are for a quiet machine."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launchers import Mpi
from nf4.bench import codec, machine, train
from nf4.cli.bench import show_cuda, show_training
from nf4.errors import InputError

Run = Callable[..., str]
RunJson = Callable[..., dict[str, Any]]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything a thousand times smaller."""
    monkeypatch.setattr(codec, "SHAPE", (64, 256))
    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "head_dim": 8,
    }
    monkeypatch.setattr(
        train, "CONFIG", train.CONFIG | sizes | {"num_attention_heads": 4, "num_key_value_heads": 2}
    )


def check_report(report: dict[str, Any], benchmark: str) -> None:
    assert report["benchmark"] == benchmark
    assert report["date"].startswith("20")
    assert report["machine"].keys() == {"cpu", "cores", "threads_allowed", "ram_bytes", "system"}
    assert report["machine"]["ram_bytes"] > 1e8
    assert {"python", "numpy", "nf4"} <= report["versions"].keys()
    assert report["against"] is None


@pytest.mark.usefixtures("small")
def test_codec_alone(run: Run, tmp_path: Path) -> None:
    words = run("bench", "--rounds", 2, "--json", tmp_path / "report.json")
    assert "quantize float32, double" in words
    report = json.loads((tmp_path / "report.json").read_text())
    check_report(report, "codec")
    assert len(report["results"]) == 6
    for row in report["results"]:
        figures = row["nf4"]
        assert figures["elements_per_second"] == pytest.approx(64 * 256 / figures["seconds"])
        assert "speed_ratio" not in row


@pytest.mark.usefixtures("small")
def test_train_alone(run: Run) -> None:
    report = json.loads(run("bench", "train", "--rounds", 1, "--json", "-"))
    check_report(report, "train")
    plain, checkpointed = report["results"]
    assert (plain["side"], checkpointed["side"]) == ("nf4", "nf4, checkpointing")
    assert plain["loss"] == pytest.approx(checkpointed["loss"], rel=1e-6)
    assert 5 < plain["loss"] < 6.5  # ln 300 = 5.7
    for row in report["results"]:
        assert row["tokens_per_second"] == pytest.approx(1024 / row["seconds"])
        assert 2e7 < row["peak_bytes"] < 1e9
        assert row["trainable"] == 2 * 8 * (4 * 32 + 2 * 32 + 2 * 16 + 3 * (32 + 64))


def test_train_on_a_model_of_ones_own(
    tmp_path: Path, tiny_model: Callable[..., Path], model: Path, run: Run
) -> None:
    own = tiny_model(tmp_path / "own", max_position_embeddings=256)
    run("quantize", own, tmp_path / "four")
    report = json.loads(run("bench", "train", "--model", tmp_path / "four", "--rounds", 1, "--json", "-"))
    assert report["model"] == str(tmp_path / "four")
    assert 4 < report["results"][0]["loss"] < 7
    assert "128 positions" in run("bench", "train", "--model", model, exit_code=2)


def test_rounds_alternate_and_the_first_is_not_counted() -> None:
    calls: list[str] = []
    sides = {name: {"op": lambda name=name: calls.append(name)} for name in ("nf4", "peer")}
    times = codec.measure(sides, 3)
    assert {name: len(found) for name, found in times["op"].items()} == {"nf4": 3, "peer": 3}
    assert calls[0:4] in (["nf4", "peer", "peer", "nf4"], ["peer", "nf4", "nf4", "peer"])


def test_summary_is_the_ratio_of_the_medians() -> None:
    row = codec.summary("op", {"nf4": [1.0, 2.0, 9.0], "peer": [8.0, 4.0, 5.0]})
    assert row["speed_ratio"] == 2.5
    assert row["nf4"]["seconds"] == 2.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["codec", "--against", "peft"], "runs against bitsandbytes"),
        (["train", "--against", "bitsandbytes"], "runs against peft"),
        (["--model", "x"], "nf4 bench train"),
        (["train", "--model", "nowhere"], "no such model"),
        (["--rounds", "0"], "0"),
        (["gemm"], "gemm"),
    ],
)
def test_refusals(run: Run, arguments: list[str], message: str) -> None:
    assert message in run("bench", *arguments, exit_code=2)


def test_a_missing_peer_is_named_with_the_way_to_install_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    words = run("bench", "--against", "bitsandbytes", "--json", tmp_path / "report.json", exit_code=2)
    assert "needs torch, bitsandbytes" in words
    assert "pip install '.[interop]'" in words
    assert os.listdir(tmp_path) == []


def test_a_training_report_shows_the_peer_in_both_its_ways(capsys: pytest.CaptureFixture[str]) -> None:
    def answer(way: str, seconds: float) -> dict[str, Any]:
        return {"way": way, "seconds": seconds, "peak_bytes": 3 << 30}

    timeline = [{"what": "product 2 x 3 x 4", "count": 5, "seconds": 0.004, "flops": 6e12}]
    step = {"seconds": 0.01, "peak_bytes": 1 << 30, "floor_seconds": 0.005, "timeline": timeline}
    token = {"tokens_per_second": 200.0, "bytes": 2e9, "timeline": timeline}
    slow = {"way": "plain", "tokens_per_second": 10.0}
    report = {
        "gpu": "a card",
        "against": "peft",
        "ceilings": {"copy_bytes_per_second": 1e12, "product_operations_per_second": 8e14},
        "results": [
            {
                "row": "small",
                "nf4": step,
                "peft": {"ways": [answer("prepared", 0.04), answer("plain", 0.03)]},
            },
            {"row": "large", "nf4": step, "peft": {"ways": [answer("plain", 0.025)]}},
            {"row": "alone", "nf4": step, "peft": None},
            {"row": "generation", "nf4": token, "peft": {"ways": [slow]}},
        ],
    }
    show_training(report)
    words = capsys.readouterr().out
    rows = {line.split("│")[0].strip(): line.split("│")[1:] for line in words.splitlines() if "│" in line}
    cells = {name: [cell.strip() for cell in row] for name, row in rows.items()}
    assert " ".join(cells["small"]) == "10.00 1.00 5.00 0.50 40.00 3.00 4.00 30.00 3.00 3.00"
    assert cells["large"][4:] == ["", "", "", "25.00", "3.00", "2.50"]
    assert cells["alone"][4:] == [""] * 6
    assert cells["generation"] == ["5.00", "", "2.00", "0.40", "", "", "", "100.00", "", "20.00"]
    assert "4.000 ms     5 x product 2 x 3 x 4, 6 TFLOP/s" in words
    show_training({**report, "against": None})
    ours = next(line for line in capsys.readouterr().out.splitlines() if "small" in line)
    assert [cell.strip() for cell in ours.split("│")] == ["small", "10.00", "1.00", "5.00", "0.50"]


def test_a_measuring_process_that_fails_says_why() -> None:
    with pytest.raises(InputError, match=r"ids\.npy"):
        machine.run_module("nf4.bench.train", ["/nowhere", "ids.npy", "--rank", "8", "--steps", "1"])


def test_a_childs_peak_memory_is_not_its_parents() -> None:
    ours = np.ones(40_000_000)
    program = "from nf4.bench.machine import peak_bytes; print(peak_bytes())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert machine.peak_bytes() > ours.nbytes
    assert 5e6 < int(done.stdout) < ours.nbytes


def test_a_gpu_that_is_not_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise ImportError("nf4_gpu needs an NVIDIA GPU")

    monkeypatch.setattr("nf4_gpu.arrays.require_gpu", none)
    for what in ("codec", "train"):
        said = run("bench", what, "--device", "cuda", exit_code=2)
        assert "--device cuda: nf4_gpu needs an NVIDIA GPU" in said


def test_the_tables_of_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    result = {"operation": "x W^T, 1 row", "double_quant": True, "of_copy": 0.7}
    times = {"seconds": {"nf4": 5e-5, "cublas": 1.6e-4, "copy": 3e-4}, "ratios": {"cublas": 3.2}}
    shape = {"shape": [8192, 28672], "copy": {"seconds": 3e-4, "bytes_per_second": 3e12}}
    call = {"operation": "dequantize", "double_quant": False, "seconds": {"nf4": 1.2e-5}}
    report = {"gpu": "a GPU", "rounds": 20, "against": None, "calls": [call]}
    show_cuda({**report, "shapes": [{**shape, "results": [{**result, **times}]}]})
    shown = capsys.readouterr().out
    assert "8192 x 28672: copy 300.0 us, 3.00 TB/s" in shown
    assert "x W^T, 1 row, double" in shown
    for figure in ("50.0", "0.700", "160.0", "3.20", "12.0"):
        assert figure in shown


def test_ranks_are_measured_beside_one(tmp_path: Path, tiny_model: Callable[..., Path], mpich: Mpi) -> None:
    model = tiny_model(tmp_path / "model", max_position_embeddings=512)
    arguments = ("bench", "train", "--model", model, "--rounds", 1, "--exact", "--json", "-")
    done = mpich.nf4(2, *arguments)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["benchmark"], report["ranks"], report["hosts"], report["exact"]) == ("ranks", 2, 1, True)
    (row,) = report["results"]
    assert row["batch"] == [8, 256]
    assert row["same_bits"]
    assert row["losses"]["one"] == row["losses"]["all"]
    assert row["speed_up"] == row["seconds"]["one"] / row["seconds"]["all"]
    assert row["overhead_seconds"] == row["seconds"]["all"] - row["seconds"]["share"]
    refused = mpich.nf4(2, "bench", "codec")
    assert refused.returncode == 2
    assert refused.stderr.count("nf4: ranks measure  nf4 bench train, without a peer") == 1
