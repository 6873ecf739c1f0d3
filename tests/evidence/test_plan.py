"""The memory planned: exact where it is counted, within a tenth of what runs take and of the paper."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nf4.evidence import plan
from nf4.floats import BFLOAT16, FLOAT32
from nf4.formats.checkpoint import LINEAR_WEIGHT, QuantizeOptions, load_model
from nf4.formats.peft import linear_shapes
from nf4.model.config import LlamaConfig
from nf4.model.llama import Llama
from nf4.tensor import QuantizedTensor
from nf4.train.adamw import AdamW
from nf4.train.finetune import FinetuneOptions, new_adapters
from nf4_gpu.arena import Arena
from nf4_gpu.model.weights import AdapterShape, Form
from nf4_gpu.train import plan as planning

PAPER = plan.Run(batch_size=1, seq_len=512, rank=64, adapter=2)
"""Adapters of rank 64 in bfloat16 on all linear layers, as in arXiv 2305.14314."""


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 4096])
def test_weights_adapters_and_states_are_counted_to_the_byte(
    tmp_path: Path, tiny_model: Callable[..., Path], double_quant: bool, block_size: int
) -> None:
    path = tiny_model(tmp_path / "model", tie_word_embeddings=double_quant)
    options = QuantizeOptions(block_size=block_size, double_quant=double_quant)
    base = load_model(path, quantize=options)
    form = plan.DOUBLE if double_quant else plan.NF4
    run = plan.Run(rank=3, block_size=block_size)
    parts = plan.training(base.config, plan.CPU, run, form, checkpointing=False)
    linear = [v for n, v in base.params.items() if LINEAR_WEIGHT.fullmatch(n)]
    quantized = [v for v in linear if isinstance(v, QuantizedTensor)]
    assert len(quantized) == len(linear)
    assert parts[plan.WEIGHTS] == sum(q.codes.nbytes for q in quantized)
    assert parts[plan.CONSTANTS] == sum(q.absmax.nbytes for q in quantized)
    rest = [v for v in base.params.values() if not isinstance(v, QuantizedTensor)]
    assert parts[plan.REST] == sum(v.nbytes for v in rest)
    adapters = new_adapters(base, FinetuneOptions(model="", data="", out="", rank=3))
    optimizer = AdamW(Llama(base.config, base.params, adapters).trainable("lora"))
    assert parts[plan.ADAPTERS] == sum(p.nbytes for p in optimizer.params.values())
    assert parts[plan.STATES] == sum(s.nbytes for s in [*optimizer.m.values(), *optimizer.v.values()])
    stored = sum(q.nbytes for q in quantized) + sum(2 * v.size for v in rest)
    assert plan.stored(base.config, run, form) == stored
    full = plan.training(base.config, plan.CPU, run, plan.UNQUANTIZED, checkpointing=False)
    assert full[plan.WEIGHTS] == sum(4 * q.size for q in quantized)
    assert plan.parameter_count(base.config) == sum(q.size for q in quantized) + sum(v.size for v in rest)


SHAPES: dict[str, dict[str, Any]] = {
    "deep": {"vocab_size": 300, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10,
             "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64},
    "wide": {"vocab_size": 16000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 3,
             "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64,
             "tie_word_embeddings": False},
}  # fmt: skip
# Its samples of text are stopped at once: they take time and no memory to speak of.
PROGRAM = """
import sys
from nf4.bench.machine import peak_bytes
from nf4.cli import main
from nf4.train import finetune
finetune._SAMPLE_SECONDS = 0
main(sys.argv[1:], standalone_mode=False)
print(peak_bytes())
"""


@pytest.mark.parametrize(
    ("shape", "flags"),
    [
        ("deep", ["--batch-size", "4", "--seq-len", "256", "--threads", "2"]),
        (
            "wide",
            ["--batch-size", "2", "--seq-len", "320", "--threads", "2", "--checkpointing", "--rank", "32"],
        ),
    ],
)
def test_a_run_on_the_cpu_takes_what_was_planned(
    tmp_path: Path, shape: str, flags: list[str], tiny_model: Callable[..., Path]
) -> None:
    tiny_model(tmp_path / "model", **SHAPES[shape], max_position_embeddings=512)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    arguments = [
        "finetune",
        str(tmp_path / "model"),
        str(tmp_path / "text.txt"),
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments, "--steps", "1", "--eval-sequences", "4", *flags],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "2"},
    )
    peak = int(done.stdout.split()[-1])
    numbers = {flag: int(value) for flag, value in pairwise(flags) if value.isdigit()}
    config = LlamaConfig.from_dict(json.loads((tmp_path / "model/config.json").read_text()), shape)
    run = plan.Run(
        batch_size=numbers["--batch-size"],
        seq_len=numbers["--seq-len"],
        rank=numbers.get("--rank", 8),
        source=4,
        threads=2,
    )
    planned = plan.total(plan.training(config, plan.CPU, run, plan.DOUBLE, "--checkpointing" in flags))
    assert peak > 3e8  # else it would be a test of Python's own memory
    assert planned == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    ("size", "inference", "training"),
    [(7e9, 5.048, 6.9), (13e9, 10, 11.3), (33e9, 21, 24.7), (65e9, 41, 45.0)],
)
def test_the_papers_figures(size: float, inference: float, training: float) -> None:
    """Figures of arXiv 2305.14314: the model (5,048 MB of 7B in its text), and training at 1 x 512.

    Both without the context of CUDA, of which the paper says nothing.
    """
    _, config = plan.family_shape(size)
    parts = plan.inference(config, plan.CUDA, replace(PAPER, context=2048), plan.DOUBLE)
    assert (plan.total(parts) - parts[plan.RUNTIME]) / 1e9 == pytest.approx(inference, rel=0.1)
    parts = plan.training(config, plan.CUDA, PAPER, plan.DOUBLE, checkpointing=True)
    assert (plan.total(parts) - parts[plan.RUNTIME]) / 1e9 == pytest.approx(training, rel=0.07)


def test_the_two_sentences_everyone_quotes() -> None:
    _, seventy = plan.family_shape(70e9)
    assert plan.holds(48, plan.training(seventy, plan.CUDA, PAPER, plan.DOUBLE, checkpointing=True))
    assert not plan.holds(48, plan.training(seventy, plan.CUDA, PAPER, plan.DOUBLE, checkpointing=False))
    assert not plan.holds(48, plan.training(seventy, plan.CUDA, PAPER, plan.UNQUANTIZED, checkpointing=True))
    assert 1024 <= plan.longest_sequence(seventy, PAPER, 48) < 4096
    _, seven = plan.family_shape(7e9)
    assert plan.holds(12, plan.training(seven, plan.CUDA, PAPER, plan.DOUBLE, checkpointing=True))
    assert not plan.holds(12, plan.training(seven, plan.CUDA, PAPER, plan.UNQUANTIZED, checkpointing=True))


def test_the_longest_sequence_is_where_it_stops_fitting() -> None:
    _, config = plan.family_shape(8e9)
    longest = plan.longest_sequence(config, PAPER, 24)

    def fits(tokens: int) -> bool:
        one = replace(PAPER, seq_len=tokens)
        return plan.holds(24, plan.training(config, plan.CUDA, one, plan.DOUBLE, checkpointing=True))

    assert longest % 64 == 0
    assert fits(longest)
    assert not fits(longest + 64)
    assert plan.longest_sequence(config, PAPER, 1) == 0


def test_ways_to_fit_go_on_until_it_fits_or_nothing_is_left() -> None:
    _, config = plan.family_shape(7e9)
    asked = plan.Run(batch_size=8, seq_len=2048, rank=64)
    assert plan.ways_to_fit(config, asked, 200) == []
    ways = plan.ways_to_fit(config, asked, 8)
    assert [way.change for way in ways[:3]] == [
        "double quantization", "--checkpointing", "--adapter-dtype bfloat16"
    ]  # fmt: skip
    assert [way.holds for way in ways] == [False] * (len(ways) - 1) + [True]
    sizes = [way.bytes for way in ways]
    assert sizes == sorted(sizes, reverse=True)
    hopeless = plan.ways_to_fit(config, asked, 1)
    assert [way.change for way in hopeless[-2:]] == ["--optimizer-budget 64M", "--weights-budget 201M"]
    assert not hopeless[-1].holds


def test_more_of_anything_takes_more() -> None:
    _, config = plan.family_shape(1e9)
    run = plan.Run()

    def size(run: plan.Run, form: str = plan.DOUBLE, checkpointing: bool = False) -> int:
        return plan.total(plan.training(config, plan.CUDA, run, form, checkpointing))

    least = size(run, checkpointing=True)
    assert least < size(run) < size(run, plan.NF4) < size(run, plan.UNQUANTIZED)
    for more in ({"batch_size": 8}, {"seq_len": 512}, {"rank": 16}, {"block_size": 32}):
        assert size(replace(run, **more)) > size(run), more
    cpu = [
        plan.total(plan.training(config, plan.CPU, replace(run, threads=n), plan.DOUBLE, False))
        for n in (1, 4)
    ]
    assert cpu[0] < cpu[1]  # each thread has buffers of its own


@pytest.mark.parametrize(
    ("parameters", "name", "billions"),
    [
        (7e9, "LLaMA 7B", 6.738),
        (8e9, "Llama 3 8B", 8.030),
        (13e9, "LLaMA 13B", 13.016),
        (33e9, "LLaMA 33B", 32.529),
        (65e9, "LLaMA 65B", 65.286),
        (70e9, "Llama 2 70B", 68.977),
        (405e9, "Llama 3.1 405B", 405.85),
        (1e9, "Llama 3.2 1B", 1.2358),
        (1.7e9, "SmolLM2 1.7B", 1.711),
        (135e6, "SmolLM2 135M", 0.1345),
    ],
)
def test_shapes_of_published_models(parameters: float, name: str, billions: float) -> None:
    found, config = plan.family_shape(parameters)
    assert found == name
    assert plan.parameter_count(config) / 1e9 == pytest.approx(billions, rel=1e-3)


def test_sizes_between_published_models_are_made_to_fit() -> None:
    for parameters in (20e9, 120e9, 600e6, 1e12):
        name, config = plan.family_shape(parameters)
        assert "heads wide" in name
        assert plan.parameter_count(config) == pytest.approx(parameters, rel=0.05)


def test_a_card_is_as_large_as_it_is_sold() -> None:
    parts = {plan.WEIGHTS: 12 << 30}
    assert plan.holds(12, parts)
    assert plan.smallest_card(parts) == 12
    assert plan.smallest_card({plan.WEIGHTS: (12 << 30) + 1}) == 16
    assert plan.smallest_card({plan.WEIGHTS: 1 << 50}) is None
    assert np.all(np.diff(list(plan.CARDS)) > 0)


@pytest.mark.parametrize(
    ("parameters", "batch_size", "seq_len", "rank", "checkpointing"),
    [
        (135e6, 1, 512, 16, False),
        (135e6, 8, 512, 16, False),
        (1e9, 4, 1024, 16, False),
        (1e9, 4, 1024, 16, True),
        (7e9, 4, 256, 8, False),
        (7e9, 1, 512, 64, True),
        (8e9, 4, 2048, 16, True),
        (70e9, 1, 512, 64, True),
    ],
)
def test_the_layout_of_the_trainer_on_a_gpu(
    parameters: float, batch_size: int, seq_len: int, rank: int, checkpointing: bool
) -> None:
    _, config = plan.family_shape(parameters)
    laid_out = layout(config, rank, planning.Settings(batch_size, seq_len, checkpointing=checkpointing))
    run = plan.Run(batch_size=batch_size, seq_len=seq_len, rank=rank)
    parts = plan.training(config, plan.CUDA, run, plan.DOUBLE, checkpointing)
    assert plan.total(parts) - parts[plan.RUNTIME] == pytest.approx(laid_out, rel=0.05)


def test_the_layout_of_a_run_that_is_paged() -> None:
    """What the last ways say is what the trainer takes with these budgets."""
    _, config = plan.family_shape(13e9)
    run = plan.Run(batch_size=1, seq_len=256, rank=8, adapter=4)
    states, weights = plan.ways_to_fit(config, run, 1)[-2:]
    budgets = [int(way.change.split()[1].removesuffix("M")) << 20 for way in (states, weights)]
    paged = planning.Settings(1, 256, checkpointing=True, optimizer_budget=budgets[0])
    for way, settings in ((states, paged), (weights, replace(paged, weights_budget=budgets[1]))):
        taken = layout(config, 8, settings, np.dtype(BFLOAT16)) + plan.CUDA.runtime
        assert way.bytes == pytest.approx(taken, rel=0.05)


def layout(
    config: LlamaConfig, rank: int, settings: planning.Settings, adapters: np.dtype[Any] = FLOAT32
) -> int:
    """The bytes that the trainer on a GPU lays out, double-quantized NF4."""
    modules = list(linear_shapes(config))
    shapes = {module: AdapterShape(rank, 1.0, 0.0, 0) for module in modules}
    forms = [
        {module: Form(64, 256) for module in modules if module.startswith(f"model.layers.{i}.")}
        for i in range(config.num_hidden_layers)
    ]
    return planning.make(Arena(), config, shapes, forms, settings, adapter_dtype=adapters).total
