"""Errors, bins and perplexity of quantized weights, against their plain definitions; and what is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nf4.codebooks import CODEBOOKS
from nf4.errors import InputError
from nf4.evidence import compare, plots
from nf4.evidence.grids import QUANTIZERS
from nf4.evidence.quality import Quality, judge
from nf4.evidence.weights import masses, normal_data, scaled_histogram, weights_of
from nf4.formats.bitsandbytes import write_quantized
from nf4.formats.checkpoint import QuantizeOptions, load_model, open_checkpoint
from nf4.tensor import quantize
from nf4.train.step import evaluate
from safetensors.numpy import save_file

PROSE = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    directory = tiny_model(tmp_path_factory.mktemp("evidence") / "tiny")
    (directory / "prose.txt").write_text(PROSE)
    return directory


def silent(name: str, done: int, total: int) -> None:
    """Hear nothing."""


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_figures_are_those_of_the_definitions(quantizer: str) -> None:
    x = np.random.default_rng(2).standard_normal((70, 1001)).astype(np.float32)
    rounded = QUANTIZERS[quantizer].round(x, 128)
    error = np.abs(x.astype(np.float64) - rounded.values)
    figures = compare.measure(x, quantizer, 128).figures()
    assert figures["bits_per_weight"] == pytest.approx(8 * rounded.nbytes / x.size)
    assert figures["relative_rms_error"] == pytest.approx(np.linalg.norm(error) / np.linalg.norm(x), rel=1e-6)
    assert figures["relative_mean_error"] == pytest.approx(error.sum() / np.abs(x).sum(), rel=1e-6)
    assert figures["max_error"] == pytest.approx(error.max() / np.sqrt(np.mean(x.astype(np.float64) ** 2)))


def test_kinds_and_layers_add_up_to_all(model: Path) -> None:
    part = compare.compare(weights_of(model), [("nf4", 64)], silent)
    row = part["results"][0]
    assert part["tensors"] == 14
    assert sorted(row["kinds"]) == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"
    ]  # fmt: skip
    assert list(row["layers"]) == ["0", "1"]
    source = open_checkpoint(model)
    weights = [source.read(w.name) for w in weights_of(model)]
    quantized = [quantize(w, 64) for w in weights]  # type: ignore[arg-type]
    assert row["weights"] == sum(q.size for q in quantized)
    assert row["bits_per_weight"] == 8 * sum(q.nbytes for q in quantized) / row["weights"]
    # Between the least and the greatest of its kinds, and of its layers.
    for parts in (row["kinds"], row["layers"]):
        errors = [figures["relative_rms_error"] for figures in parts.values()]
        assert min(errors) < row["relative_rms_error"] < max(errors)


def test_a_model_rounded_here_is_the_model_quantized(model: Path) -> None:
    base = load_model(model, quantize=None)
    examples = compare.windows(model, model / "prose.txt", 0)
    for name, options in (
        ("nf4-dq", QuantizeOptions()),
        ("fp4", QuantizeOptions(codebook="fp4", double_quant=False)),
    ):
        rounded = judge(compare.rounded_model(base, name, 64), examples).figures()
        loaded = load_model(model, quantize=options)
        assert rounded["loss"] == pytest.approx(evaluate(loaded, examples, batch_size=2, threads=2), rel=1e-6)
    assert judge(base, examples).figures()["loss"] == pytest.approx(
        evaluate(base, examples, batch_size=2, threads=2), rel=1e-6
    )


def test_perplexity_and_hits_come_from_the_logits(model: Path) -> None:
    base = load_model(model, quantize=None)
    examples = compare.windows(model, model / "prose.txt", 0)
    found = judge(base, examples).figures()
    losses, hits = [], []
    for example in examples:
        logits = base.logits(example.ids).astype(np.float64)
        at = np.arange(len(example.ids))
        keep = example.targets >= 0
        probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        losses.append(-np.log(probabilities[at, example.targets])[keep])
        hits.append((logits.argmax(1) == example.targets)[keep])
    assert found["loss"] == pytest.approx(np.concatenate(losses).mean(), rel=1e-9)
    assert found["accuracy"] == np.concatenate(hits).mean()
    assert found["perplexity"] == math.exp(found["loss"])


def test_differences_are_paired_by_window() -> None:
    tokens = np.array([10.0, 10.0, 20.0])
    full = Quality(tokens, np.array([10.0, 30.0, 20.0]), np.array([5.0, 1.0, 9.0]))
    worse = Quality(tokens, full.losses + 0.1 * tokens, full.hits - 0.2 * tokens)
    found = worse.against(full)
    assert found["loss_increase"] == pytest.approx(0.1)
    assert found["loss_increase_error"] == pytest.approx(0, abs=1e-12)  # every window agrees
    assert found["points_lost"] == pytest.approx(20)
    more = np.array([1.0, 3.0, 4.0])
    uneven = Quality(tokens, full.losses + more, full.hits)
    rest = more - 0.2 * tokens
    expected = math.sqrt(3 / 2 * float(rest @ rest)) / 40
    assert uneven.against(full)["loss_increase_error"] == pytest.approx(expected)


def test_windows_are_spread_over_the_text(model: Path) -> None:
    every = compare.windows(model, model / "prose.txt", 0)
    some = compare.windows(model, model / "prose.txt", 300)
    assert sum(map(len, every)) == len(PROSE) - 1
    assert len(some) == round(300 / 128)
    assert all(any(np.array_equal(example.ids, e.ids) for e in every) for example in some)


def test_masses_count_each_element_once(model: Path) -> None:
    book = CODEBOOKS["fp4"]
    x = np.random.default_rng(4).standard_normal(4097).astype(np.float32)
    path = model / "odd.safetensors"
    save_file({"w": x.reshape(1, -1)}, path)
    q = quantize(x, 64, book)
    codes = np.stack([q.codes >> 4, q.codes & 15], 1).reshape(-1)[: x.size]
    expected = [np.mean(codes == code) for code in book.codes]
    assert masses(weights_of(path), book, 64) == pytest.approx(expected)


def test_the_histogram_leaves_out_what_is_its_blocks_absmax() -> None:
    data = normal_data(1, 1 << 16)
    counts = scaled_histogram([data], 64, np.linspace(-1, 1, 41))
    assert counts.sum() == pytest.approx(63 / 64)
    x = data.read().reshape(-1, 64)
    scaled = x / np.abs(x).max(1, keepdims=True)
    inside = scaled[np.abs(scaled) < 1]
    assert counts == pytest.approx(np.histogram(inside, np.linspace(-1, 1, 41))[0] / x.size, abs=1e-4)


def test_what_there_is_nothing_to_compare_on(tmp_path: Path, model: Path, tiny_model: Any) -> None:
    write_quantized(open_checkpoint(model), tmp_path / "four", QuantizeOptions())
    with pytest.raises(InputError, match="is nf4 already; give the original weights"):
        weights_of(tmp_path / "four")
    save_file({"bias": np.ones(3, np.float32)}, tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="holds no matrix"):
        weights_of(tmp_path / "none.safetensors")
    save_file({"w": np.full((2, 2), np.inf, np.float32)}, tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match=r"bad\.safetensors: tensor 'w' holds NaN or infinity"):
        weights_of(tmp_path / "bad.safetensors")[0].read()
    with pytest.raises(InputError, match="no such model"):
        weights_of(tmp_path / "nowhere")


def test_pictures_are_written(tmp_path: Path, model: Path) -> None:
    weights = weights_of(model)
    pairs = [("nf4", 64), ("nf4", 128), ("int4", 64), ("int4", 128)]
    results = compare.compare(weights, pairs, silent)["results"]
    plots.draw_histogram(tmp_path / "a.png", weights, 64, "tiny")
    plots.draw_error_against_bits(tmp_path / "b.png", results, "tiny")
    plots.draw_error_by_layer(tmp_path / "c.png", results, 64, "tiny")
    plots.draw_grid(tmp_path / "d.png", weights, 64, "tiny")
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG"), path
        assert path.stat().st_size > 5000
    json.dumps(results)
