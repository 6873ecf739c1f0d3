"""The runs behind the claim about fine-tuning: what they share, what is kept of them, and the summary."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from nf4.errors import InputError
from nf4.evidence import finetuning

FLAGS = ["--steps", "2", "--seq-len", "32", "--rank", "2", "--seeds", "2"]


@pytest.fixture
def model(tmp_path: Path, tiny_model: Callable[..., Path]) -> Path:
    (tmp_path / "text.txt").write_text("In the beginning was the word, and so on. " * 60)
    return tiny_model(tmp_path / "tiny", max_position_embeddings=32)


def call(path: Path, model: Path, *flags: str) -> str:
    text = str(model.parent / "text.txt")
    arguments = [str(path), "--model", str(model), "--data", text, *FLAGS, *flags]
    result = CliRunner().invoke(finetuning.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_every_variant_runs_on_every_seed_and_what_is_there_is_not_run_again(
    tmp_path: Path, model: Path
) -> None:
    path = tmp_path / "results.json"
    words = call(path, model, "--picture", str(tmp_path / "picture.png"))
    results = json.loads(path.read_text())
    assert [(run["variant"], run["seed"]) for run in results["runs"]] == [
        (variant, seed) for seed in (0, 1) for variant in finetuning.VARIANTS
    ]
    for run in results["runs"]:
        assert run["course"]["0"] == pytest.approx(run["before"], abs=1e-6)
        assert run["course"]["2"] == pytest.approx(run["after"], abs=1e-6)
    by_variant = {variant: set() for variant in finetuning.VARIANTS}
    for run in results["runs"]:
        by_variant[run["variant"]].add(run["before"])
    # The seed moves nothing before training, and each base is another one.
    assert all(len(losses) == 1 for losses in by_variant.values())
    assert len(set.union(*by_variant.values())) == len(finetuning.VARIANTS)
    assert "Int4" in words
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")

    results["runs"] = results["runs"][:-1]
    path.write_text(json.dumps(results))
    assert call(path, model).count(", seed") == 1
    assert json.loads(path.read_text())["runs"][-1]["variant"] == "Int4"
    with pytest.raises(InputError, match=r"results\.json: holds runs of .*name another file"):
        call(path, model, "--lr", "0.5")


def test_runs_differ_in_base_and_seed_alone(tmp_path: Path) -> None:
    plan = {"data": "d", "steps": 60, "lr": 1e-3, "rank": 4, "batch_size": 2, "seq_len": 64}
    made = {
        variant: finetuning.options(plan, tmp_path, tmp_path / "out", variant, 3)
        for variant in finetuning.VARIANTS
    }
    assert {(o.codebook, o.double_quant) for o in made.values()} == {
        ("none", False), ("nf4", False), ("nf4", True), ("fp4", False), ("int4", False)
    }  # fmt: skip
    fixed = {
        (o.model, o.steps, o.lr, o.rank, o.batch_size, o.seq_len, o.seed, o.block_size) for o in made.values()
    }
    assert fixed == {(str(tmp_path), 60, 1e-3, 4, 2, 64, 3, 64)}
    for options in made.values():
        options.check()


def test_the_summary_pairs_seeds() -> None:
    runs = [
        {"variant": variant, "seed": seed, "before": 3.0, "after": after}
        for variant, ends in {finetuning.FULL: (1.0, 2.0, 3.0), "NF4": (1.1, 2.1, 3.4)}.items()
        for seed, after in enumerate(ends)
    ]
    full, nf4 = finetuning.summary(runs)
    assert full["more"] == 0
    assert full["spread"] == 1
    assert nf4["more"] == pytest.approx(0.2)
    assert nf4["more_spread"] == pytest.approx(0.3**0.5 / 10**0.5)
    assert nf4["seeds"] == 3
