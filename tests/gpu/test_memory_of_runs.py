"""The plan of a run's memory, by arithmetic: what each setting saves, what is said where it does not fit."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from nf4.errors import InputError
from nf4.formats.peft import linear_shapes
from nf4.model.config import LlamaConfig
from nf4_gpu.arena import Arena
from nf4_gpu.model import generate
from nf4_gpu.model.generate import why_not
from nf4_gpu.model.llama import check_supported
from nf4_gpu.model.weights import AdapterShape, Form
from nf4_gpu.train import adamw, plan
from nf4_gpu.train.bench import ROWS
from nf4_gpu.train.models import config_of
from nf4_gpu.train.plan import Settings
from small_models import tiny_config

GIB = 1 << 30


def plan_of(config: LlamaConfig, settings: Settings, rank: int = 16, **device: Any) -> plan.Plan:
    adapters = {name: AdapterShape(rank, 2.0, 0.0, 0) for name in linear_shapes(config)}
    forms: list[dict[str, Form]] = [{} for _ in range(config.num_hidden_layers)]
    for name in linear_shapes(config):
        forms[int(name.split(".")[2])][name] = Form(64, 256)
    return plan.make(Arena(), config, adapters, forms, settings, **device)


@pytest.mark.parametrize(("number", "most"), list(enumerate((0.55, 2.2, 5.4, 6.7, 9.2))))
def test_what_the_measured_runs_take(number: int, most: float) -> None:
    """In GiB, with cuBLAS's workspace of 32 MiB beside it."""
    row = ROWS[number]
    found = plan_of(config_of(row.model), Settings(row.batch, row.tokens, row.checkpointing))
    assert found.total + (32 << 20) <= most * GIB
    assert sum(found.use.values()) == found.total
    assert re.fullmatch(
        r"device memory: [\d.]+ GiB \(weights [\d.]+, adapters [\d.]+, states [\d.]+, activations [\d.]+, "
        r"buffers [\d.]+\)",
        found.describe(),
    )


def test_each_setting_saves_what_it_is_for() -> None:
    config = config_of("1.2B")
    base = Settings(4, 1024)
    whole = plan_of(config, base)
    saving = {
        "activations": replace(base, checkpointing=True),
        "states": replace(base, optimizer_budget=16 << 20),
        "weights": replace(base, weights_budget=200 << 20),
    }
    for use, settings in saving.items():
        found = plan_of(config, settings)
        assert found.use[use] < 0.7 * whole.use[use], use
        for other in saving.keys() - {use}:
            assert found.use[other] == whole.use[other], (use, other)
    kept = [plan_of(config, replace(base, checkpointing=True, kept=n)).total for n in (0, 4, 15)]
    assert kept == sorted(set(kept))
    assert kept[-1] == whole.total


def test_states_are_split_by_the_budget() -> None:
    count = 1_000_000
    whole = adamw.STATE_BYTES * count
    assert adamw.split(count, None) == adamw.split(count, whole) == (16, 0)
    for budget in (600_000, 2_000_000, 5_000_000, whole - 1):
        resident, turns = adamw.split(count, budget)
        taken = (resident + turns) * adamw.STATE_BYTES * -(-count // 16)
        assert 1 <= turns <= 3
        assert taken <= budget * 1.01
        optimizer = adamw.Optimizer(arena := Arena(), count, budget)
        assert arena.use["states"] <= budget
        assert sum(n for _, n in optimizer.segments) == count
    with pytest.raises(InputError, match=r"--optimizer-budget: 0.1 MiB are too few"):
        adamw.split(count, 100_000)


def test_a_budget_for_weights_has_room_for_two_layers() -> None:
    with pytest.raises(
        InputError, match=r"--weights-budget: 0.01 GiB are too few; two layers take 0.0\d GiB"
    ):
        plan_of(config_of("1.2B"), Settings(1, 64, weights_budget=10 << 20))


@pytest.mark.parametrize(
    ("free", "words"),
    [
        (9.5, "it fits with --checkpointing"),
        (8.4, "it fits with --checkpointing --optimizer-budget 64M"),
        (7.0, "it fits with --checkpointing --optimizer-budget 64M --batch-size 2"),
        (4.2, "--batch-size 1 --weights-budget 1G"),
        (1.0, "no setting makes it fit: take a smaller model"),
    ],
)
def test_what_does_not_fit_is_told_the_nearest_that_does(free: float, words: str) -> None:
    config = config_of("8B")
    sizes: list[int] = []

    def total(settings: Settings) -> int:
        sizes.append(plan_of(config, settings).total)
        return sizes[-1]

    with pytest.raises(InputError, match=re.escape(words)):
        plan.check_fits(total, Settings(4, 2048), int(free * GIB), "device memory: ...")
    if "fits with" in words:
        assert sizes[-1] <= free * GIB < min(sizes[:-1])


def test_what_fits_is_let_through() -> None:
    plan.check_fits(lambda settings: 5, Settings(1, 8), 5, "")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 36}, "hidden_size is 36"),
        ({"intermediate_size": 100}, "intermediate_size is 100"),
        ({"head_dim": 12}, "head_dim is 12"),
        ({"head_dim": 264}, "head_dim is 264; on the GPU it is at most 256"),
        ({"hidden_size": 16392}, "at most 16384"),
    ],
)
def test_sizes_that_the_kernels_do_not_take(changes: dict[str, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_supported(tiny_config(**changes))


def test_sizes_that_generation_does_not_take() -> None:
    assert why_not(config_of("8B"), 99 << 10) is None
    assert "multiples of 32" in (why_not(tiny_config(intermediate_size=72), 227 << 10) or "")
    assert "shared memory" in (why_not(tiny_config(intermediate_size=1 << 17), 227 << 10) or "")
    for queries, reason in ((32, "32 query heads of 64 a key head are too many"), (16, None)):
        heads = {"num_attention_heads": queries, "num_key_value_heads": 1, "head_dim": 64}
        assert why_not(tiny_config(**heads), 227 << 10) == reason


def test_thread_blocks_for_adapters_are_those_that_others_can_spare() -> None:
    def of(narrow: int, groups: int, processors: int = 132) -> int:
        return generate._narrow_blocks(generate._Launch(0, 0, 1, groups, 0, narrow), 16, processors)

    assert of(0, 256) == 0
    assert of(16, 256) == of(32, 1792) == 4  # 256 and 1792 groups end no sooner on 131 than on 128
    assert of(48, 384) == 6  # two warps a row, though 384 groups would be done sooner on 128
    assert of(16, 20) == 16  # a row each, where there is room
    assert of(300, 5, processors=2) == 1


def test_passes_are_padded_to_few_sizes() -> None:
    sizes = {plan.padded(n, 8192) for n in range(1, 8193)}
    assert len(sizes) == 16
    assert all(size % 64 == 0 for size in sizes)
    assert all(n <= plan.padded(n, 8192) < n + 512 for n in range(1, 8193))
    assert plan.padded(100, 128) == 128
    assert np.all([plan.padded_rows(n, 8192) >= n for n in range(8193)])
