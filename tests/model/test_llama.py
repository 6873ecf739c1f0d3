"""The whole model: gradients against central differences, and what must not change its result."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from central import check_gradient, random_batch, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from nf4.errors import InputError
from nf4.model.llama import TARGETS, Batch, KVCache, Llama, Train, parameter_shapes
from nf4.tensor import quantize

families: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 3},
    "qwen2": {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 1},
    "qwen3": {"tie_word_embeddings": True},
}
ragged = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)


def grads_of(model: Llama, batch: Batch, train: Train, checkpointing: bool = False) -> Any:
    return model.loss_and_grads(batch, loss_scale=0.3, train=train, checkpointing=checkpointing, seed=4)


def check_all_gradients(model: Llama, batch: Batch, train: Train, checkpointing: bool) -> None:
    _, grads = grads_of(model, batch, train, checkpointing)
    trainable = model.trainable(train)
    assert list(grads) == list(trainable)
    for name, array in trainable.items():
        check_gradient(lambda: 0.3 * grads_of(model, batch, train)[0], array, grads[name])


@pytest.mark.parametrize("kind", families)
@settings(deadline=None, max_examples=3)
@given(lengths=ragged, tied=st.booleans(), checkpointing=st.booleans(), seed=st.integers(0, 99))
def test_gradients_of_every_parameter(
    kind: str, lengths: tuple[int, ...], tied: bool, checkpointing: bool, seed: int
) -> None:
    config = tiny_config(kind, **{"tie_word_embeddings": tied} | families[kind])
    model = tiny_model(config, seed=seed)
    check_all_gradients(model, random_batch(config, lengths, seed), "full", checkpointing)


@pytest.mark.parametrize("kind", families)
@settings(deadline=None, max_examples=4)
@given(
    lengths=ragged,
    targets=st.sets(st.sampled_from(TARGETS), min_size=1),
    layers=st.sampled_from([(0,), (1,), (0, 1)]),
    dropout=st.sampled_from([0.0, 0.3]),
    checkpointing=st.booleans(),
)
def test_gradients_of_adapters(
    kind: str,
    lengths: tuple[int, ...],
    targets: set[str],
    layers: tuple[int, ...],
    dropout: float,
    checkpointing: bool,
) -> None:
    config = tiny_config(kind, **families[kind])
    model = tiny_model(config, tuple(sorted(targets)), layers, dropout)
    check_all_gradients(model, random_batch(config, lengths), "lora", checkpointing)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_checkpointing_and_threads_change_no_bit(train: Train) -> None:
    config = tiny_config(vocab_size=300, hidden_size=32, intermediate_size=48, head_dim=16)
    model = tiny_model(config, TARGETS if train == "lora" else (), dropout=0.2, dtype=np.float32)
    batch = random_batch(config, (150, 3, 40))
    loss, grads = grads_of(model, batch, train)
    with ThreadPoolExecutor(2) as pool:
        others = list(pool.map(lambda c: grads_of(model, batch, train, c), [True, False, True, False]))
    for other_loss, other in others:
        assert other_loss == loss
        assert all(np.array_equal(grads[name], other[name]) for name in grads)
    assert all(g.dtype == np.float32 for g in grads.values())


def test_packed_is_the_sum_of_the_sequences() -> None:
    config = tiny_config(**families["llama"])
    model = tiny_model(config, TARGETS, dropout=0.3)
    batch = random_batch(config, (4, 1, 7))
    loss, grads = grads_of(model, batch, "lora")
    parts = []
    for i, (start, n) in enumerate([(0, 4), (4, 1), (5, 7)]):
        rows = slice(start, start + n)
        part = Batch(batch.ids[rows], batch.targets[rows], (n,), (batch.samples[i],))
        parts.append(grads_of(model, part, "lora"))
    assert loss == pytest.approx(sum(part[0] for part in parts), rel=1e-12)
    for name, g in grads.items():
        np.testing.assert_allclose(g, sum(part[1][name] for part in parts), rtol=1e-9, atol=1e-12)


def test_loss_is_that_of_the_logits_and_of_training() -> None:
    config = tiny_config("qwen3")
    model = tiny_model(config, TARGETS)
    batch = random_batch(config, (9,))
    logits = model.logits(batch.ids)
    at = np.flatnonzero(batch.targets != -100)
    by_hand = np.log(np.exp(logits[at]).sum(1)) - logits[at, batch.targets[at]]
    assert model.loss(batch) == pytest.approx(by_hand.sum(), rel=1e-12)
    assert grads_of(model, batch, "lora")[0] == model.loss(batch)


def test_a_batch_without_targets_has_zero_gradients() -> None:
    config = tiny_config()
    model = tiny_model(config, TARGETS)
    loss, grads = grads_of(model, random_batch(config, (3, 2), ignored=1.1), "lora")
    assert loss == 0
    assert not any(g.any() for g in grads.values())


@settings(deadline=None, max_examples=12)
@given(
    st.sampled_from(list(families)),
    st.lists(st.integers(1, 90), min_size=2, max_size=4),
    st.sampled_from(["default", "dynamic", "yarn"]),
)
def test_cache_gives_the_full_logits(kind: str, pieces: list[int], rope: str) -> None:
    # A dynamic rotation changes with the length beyond max_position_embeddings, so that one stays within.
    changes = families[kind] | {"rope_scaling": {"rope_type": rope, "factor": 2.0}}
    config = tiny_config(kind, **changes | {"max_position_embeddings": 512})
    model = tiny_model(config)
    ids = np.random.default_rng(0).integers(config.vocab_size, size=sum(pieces))
    cache = KVCache()
    rows = [model.logits(part, cache) for part in np.split(ids, np.cumsum(pieces)[:-1])]
    full = model.logits(ids)
    np.testing.assert_allclose(np.concatenate(rows), full, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(model.logits(ids, last=True), full[-1:], rtol=1e-9, atol=1e-10)


def test_quantized_weights_compute_in_float32() -> None:
    config = tiny_config(hidden_size=64, intermediate_size=64)
    model = tiny_model(config, dtype=np.float32)
    params = {n: quantize(p) if "proj" in n else p for n, p in model.params.items()}  # type: ignore[arg-type]
    adapters = tiny_model(config, TARGETS, dtype=np.float32).adapters
    batch = random_batch(config, (5, 8))
    quantized = Llama(config, params, adapters)
    loss, grads = grads_of(quantized, batch, "lora")
    assert quantized.logits(batch.ids).dtype == np.float32
    assert all(g.dtype == np.float32 and g.any() for g in grads.values())
    assert loss == pytest.approx(quantized.loss(batch), rel=1e-6)
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.q_proj\.weight is quantized"):
        Llama(config, params).trainable("full")


def test_bad_parameters_are_refused() -> None:
    config = tiny_config()
    params = tiny_model(config).params
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(InputError, match=f"{name} is missing"):
        Llama(config, {n: p for n, p in params.items() if n != name})
    with pytest.raises(InputError, match=rf"{name} has the shape \(3, 3\)"):
        Llama(config, params | {name: np.zeros((3, 3))})
    with pytest.raises(InputError, match="q_norm"):
        Llama(config, params | {"model.layers.0.self_attn.q_norm.weight": np.zeros(4)})
    adapters = tiny_model(config, ("up_proj",)).adapters
    with pytest.raises(InputError, match="no such linear"):
        Llama(config, params, {"model.layers.7.mlp.up_proj": adapters["model.layers.0.mlp.up_proj"]})
    with pytest.raises(InputError, match=r"down_proj has A \(2, 8\)"):
        Llama(config, params, {"model.layers.0.mlp.down_proj": adapters["model.layers.0.mlp.up_proj"]})


def test_bad_batches_are_refused() -> None:
    config = tiny_config()
    model = tiny_model(config)
    good = random_batch(config, (3,))
    for bad, message in [
        (Batch(np.array([1, 19, 2], np.int32), good.targets, (3,), (0,)), "token id 19"),
        (Batch(good.ids, np.array([1, -1, 2], np.int32), (3,), (0,)), "target -1"),
        (Batch(good.ids, good.targets, (2,), (0,)), "lengths"),
    ]:
        with pytest.raises(InputError, match=message):
            model.loss(bad)
    with pytest.raises(InputError, match="no LoRA adapter"):
        grads_of(model, good, "lora")
    with pytest.raises(InputError, match="without adapters"):
        grads_of(tiny_model(config, TARGETS), good, "full")


def test_parameter_shapes_of_a_known_model() -> None:
    settings = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    config = tiny_config(
        **settings, num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True
    )
    assert sum(int(np.prod(s)) for s in parameter_shapes(config).values()) == 134_515_008  # SmolLM2-135M
