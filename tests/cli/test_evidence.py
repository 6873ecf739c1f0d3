"""`nf4 compare`, `plan`, `plot` and `explore`: what they answer and write, and what they refuse."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from nf4 import bundled
from nf4.cli import main
from nf4.cli.compare import shown_size
from nf4.evidence.grids import QUANTIZERS
from nf4.evidence.weights import weights_of
from safetensors.numpy import save_file

Run = Callable[..., str]
RunJson = Callable[..., dict[str, Any]]


def test_compare_leaves_a_directory_with_something_in_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says so before it reads a weight."""
    monkeypatch.delattr("nf4.cli.compare.weights_of")
    (tmp_path / "mine").write_text("kept")
    result = CliRunner().invoke(
        main, ["compare", "--block-size", "64", "--tokens", "64", "--out", str(tmp_path)]
    )
    assert result.exit_code == 2
    assert f"{tmp_path}: the output directory isn't empty" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_compare_a_model_with_a_text(
    model: Path, prose: Path, run_json: RunJson, run: Run, tmp_path: Path
) -> None:
    flags = ("--block-size", 64, "--block-size", 128, "--out", tmp_path / "out")
    report = run_json("compare", model, "--data", prose, *flags)
    part = report["parts"][str(model)]
    assert [(r["quantizer"], r["block_size"]) for r in part["results"]] == [
        (name, size) for name in QUANTIZERS for size in (64, 128)
    ]
    assert part["full_precision"]["perplexity"] > 1
    for row in part["results"]:
        assert 0.05 < row["relative_rms_error"] < 0.2
        assert abs(row["loss_increase"]) < 1
        assert row["perplexity"] == pytest.approx(
            part["full_precision"]["perplexity"] * np.exp(row["loss_increase"]), rel=1e-9
        )
    assert json.loads((tmp_path / "out/compare.json").read_text())["parts"] == report["parts"]
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {"histogram.png", "error-bits.png", "error-layers.png"}
    words = run("compare", model, "--data", prose, "--quantizer", "nf4", "--quantizer", "int4", *flags[:4])
    for expected in ("full precision: perplexity", "by kind of tensor", "RMS error %, by block size", "int4"):
        assert expected in words
    assert "bof4" not in words


def test_compare_one_file_of_matrices(run_json: RunJson, run: Run, prose: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    weights = {"some.0.weight": generator.standard_normal((64, 64)).astype(np.float16)}
    save_file(weights, tmp_path / "w.safetensors")
    report = run_json("compare", tmp_path / "w.safetensors", "--block-size", 32, "--out", tmp_path / "out")
    part = report["parts"][str(tmp_path / "w.safetensors")]
    assert part["full_precision"] is None
    assert part["results"][0]["kinds"].keys() == {"some"}
    assert not (tmp_path / "out/error-layers.png").exists()
    assert "needs a whole model" in run("compare", tmp_path / "w.safetensors", "--data", prose, exit_code=2)


def test_compare_without_a_model_takes_the_bundled_one_and_normal_data(run_json: RunJson) -> None:
    report = run_json(
        "compare", "--block-size", 64, "--quantizer", "nf4", "--quantizer", "bof4", "--tokens", 1024
    )
    model, normal = report["parts"].values()
    assert list(report["parts"]) == [str(bundled.MODEL), "normal data"]
    nf4, bof4 = (row["relative_rms_error"] for row in normal["results"])
    assert nf4 == pytest.approx(0.09198, rel=2e-3)
    assert bof4 < 0.98 * nf4
    assert model["full_precision"]["tokens"] == 1024
    assert 0 < model["results"][0]["loss_increase"] < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block-size", "48"], "block size 48"),
        (["--quantizer", "nf5"], "nf5"),
        (["nowhere"], "no such model"),
        (["--data", "x.txt"], "without MODEL"),
    ],
)
def test_compare_refuses(run: Run, arguments: list[str], message: str) -> None:
    assert message in run("compare", *arguments, exit_code=2)


def test_compare_says_when_weights_were_quantized_before(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = [replace(weight, stored="Q4_1") for weight in weights_of(model)]
    monkeypatch.setattr("nf4.cli.compare.weights_of", lambda path: stored)
    flags = ["--block-size", "64", "--quantizer", "nf4", "--json"]
    result = CliRunner().invoke(main, ["compare", str(model), *flags])
    assert result.exit_code == 0
    assert "stored as Q4_1: the errors are those of quantizing them a second time" in result.stderr
    monkeypatch.undo()
    assert "stored as" not in CliRunner().invoke(main, ["compare", str(model), *flags]).stderr


def test_kinds_are_shown_at_64_or_the_smallest_there_is() -> None:
    assert shown_size([32, 64, 128]) == 64
    assert shown_size([128, 256]) == 128


def test_plan_by_parameters(run_json: RunJson, run: Run) -> None:
    paper = ("--batch-size", 1, "--seq-len", 512, "--rank", 64, "--adapter-dtype", "bfloat16")
    answer = run_json("plan", "--params", "70B", "--gpu", 48, *paper)
    assert answer["model"] == "Llama 2 70B"
    training = answer["phases"]["training, checkpointing"]["NF4, double"]
    assert training["total"] == sum(training["parts"].values())
    # Without double quantization it would not fit.
    assert answer["holds"]["training, checkpointing"] == {
        "16 bits": False,
        "NF4": False,
        "NF4, double": True,
    }
    assert answer["smallest_card_gb"]["training"]["NF4, double"] == 80
    assert answer["stored"]["16 bits"] == 2 * answer["parameters"]
    assert [way["change"] for way in answer["ways_to_fit"]] == ["double quantization", "--checkpointing"]
    words = run("plan", "--params", "70b", "--gpu", 48, *paper)
    assert "48 GB train double-quantized NF4 on one sequence of up to" in words
    assert "--checkpointing: 50.6 GB, fits" in words
    words = run("plan", "--params", "70B", "--gpu", 16)
    assert "not even for one sequence" in words
    assert "--weights-budget 843M: 4.8 GB, fits" in words
    assert "take a larger card" in run("plan", "--params", "70B", "--gpu", 4)
    assert "fits 12 GB as it is" in run("plan", "--params", "7B", "--gpu", 12)
    assert "none is large enough" in run("plan", "--params", "405B")


def test_plan_of_a_model_on_disk(model: Path, run_json: RunJson, run: Run, tmp_path: Path) -> None:
    answer = run_json("plan", model, "--device", "cpu", "--threads", 3)
    assert answer["run"]["source"] == 4  # stored in float32
    assert answer["run"]["context"] == 128  # the model's positions
    assert answer["run"]["seq_len"] == 128
    assert "smallest_card_gb" not in answer
    config = tmp_path / "config.json"
    config.write_text((model / "config.json").read_text().replace('"float32"', '"bfloat16"'))
    other = run_json("plan", config, "--device", "cpu", "--threads", 3)
    assert other["run"]["source"] == 2
    assert other["parameters"] == answer["parameters"]
    words = run("plan", model, "--device", "cpu")
    assert "32 bits" in words
    assert "smallest card" not in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a MODEL or a number of parameters"),
        (["--params", "seven"], "--params seven"),
        (["--params", "5"], "--params 5"),
        (["--params", "7B", "--gpu", "0"], "--gpu 0"),
        (["--params", "7B", "--gpu", "8", "--device", "cpu"], "--gpu is for"),
        (["--params", "7B", "--block-size", "7"], "block size 7"),
        (["nowhere"], "no such model"),
    ],
)
def test_plan_refuses(run: Run, arguments: list[str], message: str) -> None:
    assert message in run("plan", *arguments, exit_code=2)


def test_plot_grid(
    model: Path, run_json: RunJson, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = run_json("plot", "grid", model, "--out", tmp_path / "grid.png")
    for shares in answer["masses"].values():
        assert len(shares) == 16
        assert sum(shares) == pytest.approx(1)
    assert min(answer["masses"]["normal"]) > 0.055
    assert min(answer["masses"]["normal in blocks"]) < 0.018
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("nf4.evidence.plots.draw_grid", lambda *a: None)  # it has been drawn
    assert "1/16 is 6.25" in run("plot", "grid", "--out", tmp_path / "other.png")
    assert "no such model" in run("plot", "grid", "nowhere", exit_code=2)
    assert "block size 1" in run("plot", "grid", "--block-size", 1, exit_code=2)
    assert "pie" in run("plot", "pie", exit_code=2)


def test_explore_writes_one_page(model: Path, run_json: RunJson, run: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    answer = run_json("explore", model, "--out", page)
    assert answer["bytes"] == page.stat().st_size
    kinds = [name.split(".")[-2] for name in answer["tensors"]]
    assert sorted(kinds) == sorted(set(kinds))
    assert len(kinds) == 7
    name = "model.layers.1.mlp.up_proj.weight"
    assert run_json("explore", model, "--tensor", name, "--out", page)["tensors"] == [name]
    assert "nf4 inspect" in run("explore", model, "--tensor", "nothing", "--out", page, exit_code=2)
    assert "open it in a browser" in run("explore", "--out", page)
