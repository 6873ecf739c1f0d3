"""The exact model: near float64, and what must not change a bit: batches, threads, checkpointing."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from drawn import FAMILIES, batch, examples, model, wide
from hypothesis import given, settings
from hypothesis import strategies as st
from nf4.conform.vectors import SPECIFICATION
from nf4.errors import InputError
from nf4.exact.grid import NotFiniteError
from nf4.exact.llama import ExactLlama
from nf4.model.llama import Batch, Llama
from nf4.train.data import Example
from nf4.train.exact import ExactEngine
from nf4.train.step import make_batch
from numpy.typing import NDArray

Gradients = dict[str, NDArray[np.float32]]

# NF4-15.10, by layer for the gradients.
LOSS, GRADIENTS = 4e-6, 3e-5


def run(
    m: Llama, b: Batch, checkpointing: bool = False, **more: Any
) -> tuple[NDArray[np.float32], Gradients]:
    scale = 1 / int((b.targets != -100).sum())
    return ExactLlama(m).losses_and_gradients(b, scale=scale, checkpointing=checkpointing, seed=4, **more)


def check_near_float64(m: Llama, b: Batch) -> None:
    losses, gradients = run(m, b, checkpointing=True)
    count = int((b.targets != -100).sum())
    true, theirs = wide(m).loss_and_grads(b, loss_scale=1 / count, train="lora", checkpointing=True, seed=4)
    assert abs(losses.astype(np.float64).sum() - true) <= LOSS * true
    assert list(gradients) == list(theirs)
    off = sum(float(np.square(g.astype(np.float64).sum(0) - theirs[n]).sum()) for n, g in gradients.items())
    size = sum(float(np.square(g).sum()) for g in theirs.values())
    assert np.sqrt(off / size) <= GRADIENTS * (m.config.num_hidden_layers - m.lowest_adapted)


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(list(FAMILIES)),
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.sampled_from([np.float32, ml_dtypes.bfloat16]),
)
def test_it_is_near_float64(kind: str, lengths: list[int], layers: int, dropout: float, dtype: Any) -> None:
    m = model(kind, dropout=dropout, dtype=dtype, adapter_dtype=dtype, num_hidden_layers=layers)
    check_near_float64(m, batch(m.config, lengths))


@pytest.mark.parametrize("kind", FAMILIES)
def test_thirty_layers_are_near_float64(kind: str) -> None:
    m = model(kind, dropout=0.1, num_hidden_layers=30, max_window_layers=15, vocab_size=300)
    check_near_float64(m, batch(m.config, (30, 10)))


def same(one: Gradients, other: Gradients) -> bool:
    return list(one) == list(other) and all((one[name] == other[name]).all() for name in one)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("layers", [None, (1,)])
def test_checkpointing_changes_no_bit(kind: str, layers: Sequence[int] | None) -> None:
    m = model(kind, dropout=0.2, layers=layers)
    b = batch(m.config, (20, 1, 9))
    losses, gradients = run(m, b)
    again, others = run(m, b, checkpointing=True)
    assert (losses == again).all()
    assert same(gradients, others)
    shared = ExactLlama(m)  # whose memory a second call finds used
    for _ in range(2):
        found, others = shared.losses_and_gradients(
            b, scale=1 / int((b.targets != -100).sum()), checkpointing=True, seed=4
        )
        assert (found == losses).all()
        assert same(gradients, others)


@settings(deadline=None, max_examples=12)
@given(
    st.sampled_from(list(FAMILIES)),
    st.lists(st.integers(1, 20), min_size=2, max_size=5),
    st.randoms(use_true_random=False),
)
def test_a_sequence_has_the_same_bits_in_any_batch(kind: str, lengths: list[int], random: Any) -> None:
    m = model(kind, dropout=0.3)
    parts = examples(m.config, lengths)
    samples = [3 * i + 1 for i in range(len(parts))]

    def of(order: list[int]) -> tuple[NDArray[np.float32], Gradients]:
        b = make_batch([parts[i] for i in order], [samples[i] for i in order])
        return ExactLlama(m).losses_and_gradients(b, scale=0.01, checkpointing=False, seed=4)

    order = list(range(len(parts)))
    random.shuffle(order)
    losses, gradients = of(order)
    ends = np.cumsum([lengths[i] for i in order])
    for place, i in enumerate(order):
        alone, own = of([i])
        assert (alone == losses[ends[place] - lengths[i] : ends[place]]).all()
        assert all((g[0] == gradients[name][place]).all() for name, g in own.items())


def engine(m: Llama, threads: int, checkpointing: bool = False) -> ExactEngine:
    return ExactEngine(
        m,
        batch_size=2,
        max_grad_norm=1.0,
        weight_decay=0.1,
        checkpointing=checkpointing,
        seed=4,
        threads=threads,
    )


def cut(items: Sequence[Any], sizes: Sequence[int]) -> list[Sequence[Any]]:
    starts = np.cumsum([0, *sizes])
    return [items[start:stop] for start, stop in pairwise(starts)]


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_step_has_the_same_bits_on_any_threads_in_any_micro_batches(kind: str) -> None:
    lengths = (5, 30, 1, 12, 7, 7, 2)
    parts = examples(model(kind).config, lengths)
    found: list[tuple[Any, ...]] = []
    for sizes, threads in (((7,), 1), ((7,), 2), ((3, 4), 3), ((1,) * 7, 1), ((2, 5), 2)):
        m = model(kind, dropout=0.1)
        one = engine(m, threads, checkpointing=threads == 2)
        batches = list(zip(cut(parts, sizes), cut(range(10, 17), sizes), strict=True))
        updates = [one.step(batches, rate) for rate in (0.01, 0.02)]
        assert one.evaluate(parts) == engine(m, 1).evaluate(parts)
        found.append(
            (updates, one.evaluate(parts), {n: p.tobytes() for n, p in one.optimizer.params.items()})
        )
    assert all(other == found[0] for other in found)
    assert found[0][0][0].finite


def test_the_held_out_loss_is_that_of_the_rows() -> None:
    m = model("qwen3", dropout=0.5)
    b = batch(m.config, (9, 14))
    losses = ExactLlama(m).losses(b)
    for lora in m.adapters.values():
        lora.dropout = 0.0
    assert (run(m, b)[0] == losses).all()
    assert (losses[b.targets == -100] == 0).all()
    parts = examples(m.config, (9, 14))
    assert engine(m, 1).evaluate(parts) == pytest.approx(losses.sum() / (losses != 0).sum(), rel=1e-6)


def test_the_trace_has_the_names_of_the_text() -> None:
    """NF4-15.4 names every value; the lowest layer ends where nothing is left to train."""
    seen: dict[str, NDArray[Any]] = {}
    m = model("qwen3", layers=(1,), targets=("o_proj",), num_hidden_layers=3)
    b = batch(m.config, (4, 3))
    run(m, b, trace=lambda name, array: seen.update({name: array.copy()}))
    text = next(SPECIFICATION.glob("15-*.md")).read_text("utf-8")
    clauses = text[text.index("### NF4-15.4") : text.index("### NF4-15.6")]
    names = {name.rpartition(".")[2] for name in seen} - {"cos", "sin"}
    assert {name for name in names if name not in clauses} == set()
    forward = ("normed1", "q", "k", "v", "q_normed", "k_normed", "q_turned", "k_turned", "mixed", "middle")
    forward = (*forward, "normed2", "gate", "up", "act", "y")
    assert [name for name in seen if name.startswith("0.")] == [f"0.{name}" for name in forward]
    assert [name for name in seen if name.startswith("1.d")] == [
        f"1.{name}" for name in ("dy", "dact", "dgate", "dup", "dnormed2", "dmiddle")
    ]
    assert {
        f"2.{name}" for name in ("dmixed", "dq_turned", "dk_normed", "dq", "dk", "dv", "dnormed1")
    } <= set(seen)
    assert list(seen)[:3] == ["cos", "sin", "x"]
    learned = int((b.targets != -100).sum())
    assert seen["logits"].shape == seen["dlogits"].shape == (learned, m.config.vocab_size)
    assert seen["normed"].shape == seen["dnormed"].shape == (learned, m.config.hidden_size)
    assert seen["2.y"].shape == seen["x"].shape == (7, m.config.hidden_size)


def test_tracing_changes_no_bit_and_recomputation_is_not_shown() -> None:
    m = model("llama")
    b = batch(m.config, (6,))
    names: list[str] = []
    _, gradients = run(m, b, checkpointing=True, trace=lambda name, _: names.append(name))
    assert len(names) == len(set(names))
    assert same(gradients, run(m, b)[1])


@pytest.mark.parametrize("where", ["model.layers.1.input_layernorm.weight", "model.norm.weight"])
def test_a_step_that_diverges_is_refused(where: str) -> None:
    m = model("llama")
    m.vector(where)[:] = 3e38
    with pytest.raises(NotFiniteError):
        run(m, batch(m.config, (6,)))
    one = engine(m, 1)
    before = {name: p.tobytes() for name, p in one.optimizer.params.items()}
    update = one.step([(examples(m.config, (6,)), [0])], 0.1)
    assert not update.finite
    assert {name: p.tobytes() for name, p in one.optimizer.params.items()} == before
    assert one.optimizer.steps == 0


def test_what_is_refused() -> None:
    m = model("llama")
    nothing = Example(np.zeros(3, np.int32), np.full(3, -100, np.int32))
    with pytest.raises(InputError, match="no target token"):
        engine(m, 1).gradients([([nothing], [0])])
    with pytest.raises(InputError, match="target 50 is outside"):
        engine(m, 1).gradients([([Example(np.zeros(1, np.int32), np.full(1, 50, np.int32))], [0])])
