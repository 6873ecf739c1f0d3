"""Training and generation of small models, emulated and on the GPU: near the reference, same bits any way.

The bounds are bfloat16's. Its roundings, of inputs, products and gradients of every layer, are each of at
most 2^-8; in models as small and as random as these they average out little.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import nf4
import numpy as np
import pytest
from devices import EMULATED, GPU, LATE, device_of, error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nf4.errors import InputError
from nf4.floats import BFLOAT16
from nf4.model import generate as reference
from nf4.model.llama import Llama
from nf4.train.engine import FastEngine, MicroBatch
from nf4.train.step import train_step
from nf4_gpu.model.generate import generate
from nf4_gpu.model.llama import Network
from nf4_gpu.model.weights import Ahead
from nf4_gpu.train import run
from nf4_gpu.train.engine import GpuEngine
from nf4_gpu.train.plan import Settings
from small_models import build, examples

LOSS = 0.004  # of the first step, relative to the reference's
LATER = 0.02  # after some steps, whose updates are as good as a sign where gradients are small
GRADIENTS = 0.06  # of all of them together: the norm of the difference over the norm
GRADIENT = 0.12  # of one matrix
LOGITS = 0.06
STEPS, RATE, CLIP, DECAY, SEED = 3, 1e-2, 1.0, 0.01, 3
LENGTHS = (20, 7, 11)
ROPE_LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
ROPE_LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "attention_factor": 1.0,
             "original_max_position_embeddings": 10, "short_factor": [1.0] * 4,
             "long_factor": [2.0, 3.0, 4.0, 5.0]}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, biases, a head of its own": {
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False,
    },
    "llama, as many key heads": {"num_key_value_heads": 4},
    "llama3's rope": {"vocab_size": 64, "rope_parameters": ROPE_LLAMA3},
    "longrope": {"rope_parameters": ROPE_LONG},
    "mistral, a window": {"kind": "mistral", "sliding_window": 6},
    "qwen2, a window in some layers": {
        "kind": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
    },
    "qwen3": {"kind": "qwen3", "head_dim": 16},
    "rank 3": {"rank": 3},
    "rank 40, dropout": {"rank": 40, "dropout": 0.2},
    "dropout": {"dropout": 0.3},
    "some targets": {"targets": ("v_proj", "up_proj", "down_proj")},
    "one target of the upper layer": {"targets": ("q_proj",), "layers": (1,)},
    "bfloat16 adapters": {"adapter_dtype": BFLOAT16},
    "heads of 64": {"hidden_size": 64, "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1},
}  # fmt: skip


@dataclass(frozen=True)
class Ran:
    """What some steps left."""

    losses: list[float]
    norms: list[float]
    evaluated: float
    gradients: dict[str, Any]  # of the first step
    bits: bytes


def micro_batches(model: Llama, lengths: Sequence[int], step: int, count: int = 2) -> list[MicroBatch]:
    return [
        (
            examples(lengths, model.config.vocab_size, seed=10 * step + i, ignored=0.3),
            [100 * step + 10 * i + k for k in range(len(lengths))],
        )
        for i in range(count)
    ]


def train(
    device: Any,
    settings: Settings | None = None,
    *,
    record: bool = True,
    lengths: Sequence[int] = LENGTHS,
    steps: int = STEPS,
    **model: Any,
) -> Ran:
    """Make steps on a device."""
    found = build(**model)
    engine = GpuEngine(
        found, settings or Settings(len(lengths), max(lengths)), max_grad_norm=CLIP, weight_decay=DECAY,
        seed=SEED, device=device, record=record,
    )  # fmt: skip
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        update = engine.step(micro_batches(found, lengths, step), RATE)
        losses.append(update.loss)
        norms.append(update.norm)
        if step == 0:
            gradients = engine.gradients()
    evaluated = engine.evaluate(examples(lengths, found.config.vocab_size, seed=99))
    engine.store()
    arrays = [*engine.optimizer.params.values(), *engine.optimizer.m.values(), *engine.optimizer.v.values()]
    return Ran(losses, norms, evaluated, gradients, b"".join(array.tobytes() for array in arrays))


def train_by_reference(*, lengths: Sequence[int] = LENGTHS, steps: int = STEPS, **model: Any) -> Ran:
    """Make the same steps by the reference, in float32."""
    found = build(**model)
    engine = FastEngine(
        found, "lora", batch_size=len(lengths), max_grad_norm=CLIP, weight_decay=DECAY, checkpointing=False,
        seed=SEED, threads=1,
    )  # fmt: skip
    first = train_step(
        found, micro_batches(found, lengths, 0), train="lora", checkpointing=False, seed=SEED, threads=1
    )
    gradients = {name: gradient.copy() for name, gradient in first.grads.items()}
    updates = [engine.step(micro_batches(found, lengths, step), RATE) for step in range(steps)]
    evaluated = engine.evaluate(examples(lengths, found.config.vocab_size, seed=99))
    return Ran([u.loss for u in updates], [u.norm for u in updates], evaluated, gradients, b"")


def check_near(found: Ran, expected: Ran) -> None:
    assert found.losses[0] == pytest.approx(expected.losses[0], rel=LOSS)
    assert found.losses == pytest.approx(expected.losses, rel=LATER)
    assert found.evaluated == pytest.approx(expected.evaluated, rel=LATER)
    assert found.norms[0] == pytest.approx(expected.norms[0], rel=GRADIENTS)
    assert found.gradients.keys() == expected.gradients.keys()
    together = [
        np.concatenate([ran.gradients[name].ravel() for name in expected.gradients])
        for ran in (found, expected)
    ]
    assert error(*together) < GRADIENTS
    for name, gradient in expected.gradients.items():
        assert error(found.gradients[name], gradient) < GRADIENT, name


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_near_the_references(device: Any, name: str) -> None:
    check_near(train(device, **MODELS[name]), train_by_reference(**MODELS[name]))


@pytest.mark.parametrize("kind", [EMULATED, GPU])
def test_losses_and_gradients_of_drawn_models(kind: str, request: pytest.FixtureRequest) -> None:
    device = device_of(kind, request)
    drawn = st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
            "hidden_size": st.sampled_from([32, 48, 96]),
            "intermediate_size": st.sampled_from([32, 88]),
            "num_attention_heads": st.sampled_from([2, 4]),
            "num_key_value_heads": st.sampled_from([1, 2]),
            "num_hidden_layers": st.integers(1, 3),
            "tie_word_embeddings": st.booleans(),
            "vocab_size": st.integers(20, 130),
            "rank": st.integers(1, 20),
            "dropout": st.sampled_from([0.0, 0.1]),
            "seed": st.integers(0, 1000),
            "lengths": st.lists(st.integers(1, 90), min_size=1, max_size=4).filter(lambda n: sum(n) >= 20),
        }
    )
    options = st.tuples(st.booleans(), st.integers(0, 1))

    @settings(
        max_examples=4 if kind == EMULATED else 20, deadline=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(model=drawn, options=options)
    def check(model: dict[str, Any], options: tuple[bool, int]) -> None:
        lengths = model["lengths"]
        chosen = Settings(len(lengths), max(lengths), *options)
        found, expected = train(device, chosen, steps=2, **model), train_by_reference(steps=2, **model)
        check_near(found, expected)

    check()


WAYS: dict[str, dict[str, Any]] = {
    "launched one by one": {"record": False},
    "checkpointed": {"checkpointing": True},
    "checkpointed, one layer kept": {"checkpointing": True, "kept": 1},
    "states paged": {"optimizer_budget": 8000},
    "states paged, checkpointed": {"optimizer_budget": 14000, "checkpointing": True},
    "weights paged": {"weights_budget": 11000},
    "weights paged, checkpointed": {"weights_budget": 14000, "checkpointing": True, "kept": 2},
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "model",
    [{"num_hidden_layers": 4}, {"num_hidden_layers": 4, "dropout": 0.2, "layers": (1, 2, 3)}],
    ids=str,
)
def test_the_same_bits_any_way(model: dict[str, Any], late: bool, request: pytest.FixtureRequest) -> None:
    """Recorded or not, checkpointed or not, paged or not; emulated also with streams as late as may be."""
    kind = LATE if late else EMULATED
    expected = train(device_of(kind, request), steps=3, **model).bits
    for name, way in WAYS.items():
        given_settings = {key: value for key, value in way.items() if key != "record"}
        settings = Settings(len(LENGTHS), max(LENGTHS), **given_settings)
        found = train(device_of(kind, request), settings, record=way.get("record", True), **model)
        assert found.bits == expected, name


def test_the_same_bits_any_way_on_the_gpu(request: pytest.FixtureRequest) -> None:
    shapes: list[dict[str, Any]] = [
        {"num_hidden_layers": 4, "dropout": 0.2, "layers": (1, 2, 3)},
        {"num_hidden_layers": 4, "hidden_size": 256, "head_dim": 64, "intermediate_size": 640, "rank": 16},
    ]
    for model in shapes:
        lengths = (300, 140, 200) if "hidden_size" in model else LENGTHS
        base = Settings(len(lengths), max(lengths))
        expected = train(device_of(GPU, request), base, lengths=lengths, steps=4, **model).bits
        for name, way in WAYS.items():
            options = {key: value for key, value in way.items() if key != "record"}
            options |= {
                key: value * 75
                for key, value in options.items()
                if "budget" in key and "hidden_size" in model
            }
            settings = Settings(len(lengths), max(lengths), **options)
            found = train(
                device_of(GPU, request),
                settings,
                record=way.get("record", True),
                lengths=lengths,
                steps=4,
                **model,
            )
            assert found.bits == expected, name


def test_a_wait_that_is_missing_shows(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Emulated streams do as little as they are made to: without the wait for weights they are not there."""
    expected = train(device_of(LATE, request), steps=1).bits
    monkeypatch.setattr(Ahead, "use", lambda self, layer, part: None)
    assert train(device_of(LATE, request), steps=1).bits != expected


def test_steps_go_on_from_what_was_stored(device: Any) -> None:
    """The states of an engine, given to another, go on to the same bits."""
    model = build()
    plan = Settings(len(LENGTHS), max(LENGTHS))
    options: dict[str, Any] = {"max_grad_norm": CLIP, "weight_decay": DECAY, "seed": SEED, "device": device}
    whole = GpuEngine(model, plan, **options)
    for step in range(4):
        whole.step(micro_batches(model, LENGTHS, step), RATE)
    whole.store()
    half = build()
    engine = GpuEngine(half, plan, **options)
    for step in range(2):
        engine.step(micro_batches(half, LENGTHS, step), RATE)
    engine.store()
    states = {
        name: {key: array.copy() for key, array in getattr(engine.optimizer, name).items()}
        for name in ("params", "m", "v")
    }
    other = build(seed=5)
    resumed = GpuEngine(Llama(half.config, half.params, other.adapters), plan, **options)
    for key, array in states["params"].items():
        resumed.optimizer.params[key][...] = array
    resumed.optimizer.restore(2, states["m"], states["v"])
    resumed.load()
    for step in range(2, 4):
        resumed.step(micro_batches(half, LENGTHS, step), RATE)
    resumed.store()
    for name in ("params", "m", "v"):
        for key, array in getattr(whole.optimizer, name).items():
            assert getattr(resumed.optimizer, name)[key].tobytes() == array.tobytes(), (name, key)


def test_a_step_that_is_not_finite_changes_nothing(device: Any) -> None:
    model = build()
    engine = GpuEngine(
        model, Settings(3, 20), max_grad_norm=CLIP, weight_decay=DECAY, seed=SEED, device=device
    )
    engine.step(micro_batches(model, LENGTHS, 0), RATE)
    engine.store()
    before = {key: array.tobytes() for key, array in engine.optimizer.params.items()}
    name = next(iter(engine.optimizer.params))
    engine.optimizer.params[name].reshape(-1)[3] = np.nan
    engine.load()
    update = engine.step(micro_batches(model, LENGTHS, 1), RATE)
    assert not np.isfinite(update.loss)
    assert not np.isfinite(update.norm)
    engine.store()
    after = {key: array.tobytes() for key, array in engine.optimizer.params.items()}
    assert {key for key in before if after[key] != before[key]} == {name}
    assert engine.optimizer.steps == 1


@pytest.mark.parametrize(
    ("ids", "targets", "words"),
    [([1, 61], [1, 2], "token id 61 is outside"), ([1, 2], [1, 99], "target 99 is outside")],
)
def test_ids_outside_the_vocabulary_are_refused(
    device: Any, ids: list[int], targets: list[int], words: str
) -> None:
    model = build()
    engine = GpuEngine(
        model, Settings(1, 8), max_grad_norm=CLIP, weight_decay=DECAY, seed=SEED, device=device
    )
    example = examples([2], 61)[0]
    bad = type(example)(np.array(ids, np.int32), np.array(targets, np.int32))
    with pytest.raises(InputError, match=words):
        engine.step([([bad], [0])], RATE)
    with pytest.raises(InputError, match="no target token"):
        engine.step([([type(example)(example.ids, np.full(2, -100, np.int32))], [0])], RATE)


def test_models_that_the_engine_does_not_take_are_refused(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(model: Llama) -> None:
        device = device_of("emulated", request)
        GpuEngine(model, Settings(2, 8), max_grad_norm=CLIP, weight_decay=DECAY, seed=SEED, device=device)

    with pytest.raises(InputError, match="no adapters"):
        start(build(targets=()))
    uneven = build()
    lora = uneven.adapters["model.layers.1.self_attn.k_proj"]
    lora.A, lora.B = lora.A[:3], lora.B[:, :3].copy()
    with pytest.raises(InputError, match=r"differ in rank \(.*q_proj of 4, .*k_proj of 3, .*v_proj of 4\)"):
        start(uneven)
    monkeypatch.setattr("nf4_gpu.model.weights._TABLES", 64)
    with pytest.raises(InputError, match="quantize the model anew"):
        start(build())


@pytest.mark.parametrize("kind", [LATE, GPU])
def test_an_interrupted_step_leaves_nothing_behind(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the midst of a pass, launched and then recorded: the steps after it have the same bits."""
    found = []
    for interrupted in (False, True):
        model = build(num_hidden_layers=4)
        engine = GpuEngine(
            model, Settings(3, 20), max_grad_norm=CLIP, weight_decay=DECAY, seed=SEED,
            device=device_of(kind, request),
        )  # fmt: skip
        bits: list[Any] = []
        for step in range(3):
            batches = micro_batches(model, LENGTHS, step, count=1)
            if interrupted and step < 2:  # the third replays
                with monkeypatch.context() as patched:
                    patched.setattr(Network, "_attention_backward", interrupt)
                    with pytest.raises(KeyboardInterrupt):
                        engine.step(batches, RATE)
            if step:
                bits.append(engine.evaluate(examples(LENGTHS, model.config.vocab_size, seed=99)))
            bits.append(engine.step(batches, RATE))
        engine.store()
        found.append((bits, [array.tobytes() for array in engine.optimizer.params.values()]))
    assert found[0] == found[1]


def interrupt(*arguments: Any) -> None:
    raise KeyboardInterrupt


@contextmanager
def shared_memory(device: Any, nbytes: int | None) -> Iterator[None]:
    """Let a device have less shared memory a thread block."""
    before = device.shared_memory
    device.shared_memory = nbytes or before
    yield
    device.shared_memory = before


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        *(("llama", memory) for memory in (None, 112 << 10, 99 << 10, 64 << 10)),
        *(
            (name, None)
            for name in (
                "llama, biases, a head of its own", "mistral, a window", "qwen3", "longrope",
                "rank 40, dropout",
            )
        ),
    ],
)  # fmt: skip
def test_generation_is_near_the_references(device: Any, name: str, memory: int | None) -> None:
    check_generation(device, build(**MODELS[name]), memory)


def test_generation_with_weights_of_many_rows(request: pytest.FixtureRequest) -> None:
    """Each thread block of a GPU takes more groups of rows than its warps have on their way at a time."""
    device = device_of("cuda", request)
    for memory in (None, 112 << 10, 99 << 10):
        check_generation(device, build(hidden_size=64, intermediate_size=16384), memory)


@pytest.mark.parametrize("processors", [None, 40])
@pytest.mark.parametrize("block_size", [32, 64])
def test_generation_with_columns_of_many_spans(device: Any, block_size: int, processors: int | None) -> None:
    """Every part of a span of 256 columns, spans in part, and more of them than warps.

    processors: as the device has, of which the emulated one has so few that one thread block makes all of
    x A^T; or so many that each row has a thread block.
    """
    device.processors = processors or device.processors
    model = build(
        hidden_size=288,
        intermediate_size=1376,
        num_hidden_layers=1,
        targets=("down_proj",),
        block_size=block_size,
    )
    ids = np.arange(4)
    for memory in (None, 99 << 10, 64 << 10):  # each cut that there is
        with shared_memory(device, memory):
            decoder = run.decoder(model, 3, 4, device)
            caches = model.new_cache(), decoder.new_cache()
            for part in (ids[:3], ids[3:]):
                expected = model.logits(part, caches[0], last=True)
                found = decoder.logits(part, caches[1], last=True)
            assert error(found, expected) < 0.02


def test_generation_with_weights_of_two_kinds(device: Any) -> None:
    """The adapters' part is made where rows wait for it: a launch without such rows may end before it."""
    model = build(targets=("q_proj", "gate_proj", "down_proj"))
    for name in ("self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"):
        weight = f"model.layers.1.{name}.weight"
        quantized: Any = model.params[weight]
        model.params[weight] = nf4.dequantize(quantized)
    check_generation(device, model, None)
    launches = run.decoder(model, 20, 40, device)._launches[1]
    narrow = {key: [launch.narrow for launch in found] for key, found in launches.items()}
    assert narrow == {"qkv": [4, 0], "o": [0], "gate_up": [4, 0], "down": [4]}


def check_generation(device: Any, model: Llama, memory: int | None) -> None:
    vocabulary = model.config.vocab_size
    with shared_memory(device, memory):
        decoder = run.decoder(model, 20, 40, device)
        ids = np.random.default_rng(1).integers(0, vocabulary, 21)
        caches = model.new_cache(), decoder.new_cache()
        for part in (ids[:9], *(ids[i : i + 1] for i in range(9, 21))):
            expected = model.logits(part, caches[0], last=True)
            assert error(decoder.logits(part, caches[1], last=True), expected) < LOGITS
        # The likeliest tokens: made on the device one after the other, and one by one from the logits.
        ahead = list(generate(decoder, [1, 2, 3], 12))
        assert ahead == list(reference.generate(decoder, [1, 2, 3], 12))
        drawn = list(generate(decoder, [1, 2, 3], 12, temperature=0.8, top_k=20, seed=4))
        assert drawn == list(generate(decoder, [1, 2, 3], 12, temperature=0.8, top_k=20, seed=4))
        assert list(generate(decoder, [1, 2, 3], 12, stop_ids={ahead[2]})) == ahead[: ahead.index(ahead[2])]


def test_generation_with_paged_weights(device: Any) -> None:
    from nf4_gpu.train.engine import Inference

    model = build(num_hidden_layers=4)
    found = []
    for budget in (None, 11000):
        plan = Settings(1, 20, positions=40, training=False, weights_budget=budget)
        decoder = Inference(model, plan, device=device, decode=True).decoder
        assert decoder is not None
        found.append(list(generate(decoder, [5, 6, 7, 8], 10)))
    assert found[0] == found[1]


def test_generation_refuses_what_is_too_long_or_foreign(device: Any) -> None:
    model = build()
    decoder = run.decoder(model, 6, 8, device)
    with pytest.raises(InputError, match="a prompt of 9 tokens"):
        decoder.logits(np.arange(9))
    with pytest.raises(InputError, match="token id 61 is outside"):
        decoder.logits(np.array([61]))
    with pytest.raises(InputError, match="no tokens"):
        list(generate(decoder, [], 3))
    with pytest.raises(InputError, match="no tokens"):
        decoder.logits(np.array([], np.int64))
    with pytest.raises(InputError, match=r"top_p is 1\.5"):
        next(generate(decoder, [1], 3, top_p=1.5))
    assert len(list(generate(decoder, [1, 2, 3], 6))) == 6  # the last one is given to nobody
    with pytest.raises(InputError, match="7 tokens after 3 are more than the 8 positions"):
        list(generate(decoder, [1, 2, 3], 7))
    cache = decoder.new_cache()
    decoder.logits(np.arange(6), cache)
    for _ in range(2):
        decoder.logits(np.array([1]), cache)
    with pytest.raises(InputError, match="more than the 8 positions"):
        decoder.logits(np.array([1]), cache)


def test_evaluation_is_near_the_references(device: Any) -> None:
    model = build(tie_word_embeddings=False)
    drawn = examples([30, 3, 64, 1, 12, 33], 61, seed=8, ignored=0.2)
    engine = FastEngine(
        model,
        "lora",
        batch_size=2,
        max_grad_norm=CLIP,
        weight_decay=DECAY,
        checkpointing=False,
        seed=0,
        threads=1,
    )
    assert run.evaluate(model, drawn, device) == pytest.approx(engine.evaluate(drawn), rel=LOSS)
