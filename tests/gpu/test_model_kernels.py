"""Each kernel of a model against float64 NumPy, emulated and on the GPU, at sizes that end anywhere."""

import itertools
import math
from typing import Any

import nf4
import numpy as np
import pytest
from devices import download, empty, error, upload, whole
from nf4.floats import BFLOAT16
from nf4.random import keep_mask
from nf4.train.adamw import AdamW, clip_grad_norm
from nf4_gpu.arena import Arena
from nf4_gpu.model import attention, lora, mlp, ops, rope
from nf4_gpu.model.weights import Adapter, AdapterShape, Form, Group, Module, Weights, form_of, groups_of
from nf4_gpu.train import adamw
from numpy.typing import NDArray
from small_models import tiny_config

ROUNDED = 2.0**-8  # relative, of a result that is rounded to bfloat16 once
SEVERAL = 3 * ROUNDED  # or of whose inputs some were


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def bf16(*shape: int, seed: int = 0, scale: float = 1.0) -> NDArray[Any]:
    return (scale * rng(seed).standard_normal(shape)).astype(np.float32).astype(BFLOAT16)


def wide(x: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(x).astype(np.float64)


@pytest.mark.parametrize("width", [64, 576, 1024, 4096])
def test_norms(device: Any, width: int) -> None:
    tokens = 13
    x, dn, dy = (bf16(tokens, width, seed=i) for i in range(3))
    weight = rng(3).standard_normal(width).astype(np.float32)
    norm = ops.Norm(upload(device, weight).address, 1e-5)
    on = upload(device, x, width + 8)
    y, rstd = empty(device, tokens, width, BFLOAT16, width + 16), empty(device, 1, tokens, np.float32)
    ops.rms_norm(device, on, norm, y, rstd.address)
    r = 1 / np.sqrt((wide(x) ** 2).mean(1, keepdims=True) + 1e-5)
    expected = wide(x) * r * weight
    assert error(download(device, y), expected) < ROUNDED
    assert error(download(device, rstd)[0], r[:, 0]) < 1e-6

    dx, normed = (empty(device, tokens, width, BFLOAT16) for _ in range(2))
    ops.rms_norm_backward(
        device, upload(device, dn, width + 8), on, norm, rstd.address, dx, upload(device, dy), normed
    )
    g = wide(dn) * weight
    product = (g * wide(x)).mean(1, keepdims=True)
    assert error(download(device, dx), wide(dy) + r * (g - wide(x) * product * r * r)) < ROUNDED
    assert error(download(device, normed), expected) < ROUNDED


def test_norms_make_narrow_products_where_that_is_quicker_and_fits() -> None:
    assert ops.norm_projects(2048, 48, 227 << 10)
    assert ops.norm_projects(2048, 16, 163 << 10)
    assert not ops.norm_projects(2048, 48, 99 << 10)
    assert not ops.norm_projects(4096, 16, 227 << 10)


@pytest.mark.parametrize(("width", "narrow"), [(64, 8), (576, 48), (2048, 32), (2056, 64)])
def test_norms_with_narrow_products(device: Any, width: int, narrow: int) -> None:
    tokens = 45
    x, dn, dy = (bf16(tokens, width, seed=i) for i in range(3))
    a, b = bf16(narrow, width, seed=4), bf16(width, narrow, seed=5)
    weight = rng(3).standard_normal(width).astype(np.float32)
    norm = ops.Norm(upload(device, weight).address, 1e-5)
    on = upload(device, x, width + 8)
    y, rstd = empty(device, tokens, width, BFLOAT16, width + 16), empty(device, 1, tokens, np.float32)
    z, copy = (empty(device, tokens, narrow, BFLOAT16, narrow + 8 * i) for i in range(2))
    ops.rms_norm_project(device, on, norm, y, rstd.address, upload(device, a, width + 8), z, copy)
    r = 1 / np.sqrt((wide(x) ** 2).mean(1, keepdims=True) + 1e-5)
    expected = wide(x) * r * weight
    made = download(device, y)
    assert error(made, expected) < ROUNDED
    assert error(download(device, rstd)[0], r[:, 0]) < 1e-6
    assert error(download(device, z), wide(made) @ wide(a).T) < ROUNDED
    assert download(device, copy).tobytes() == download(device, z).tobytes()

    dx, normed = empty(device, tokens, width, BFLOAT16), upload(device, dn, width + 8)
    ops.rms_norm_backward_project(
        device,
        normed,
        on,
        norm,
        rstd.address,
        dx,
        upload(device, dy),
        normed,
        upload(device, b, narrow + 8),
        z,
    )
    g = wide(dn) * weight
    product = (g * wide(x)).mean(1, keepdims=True)
    made = download(device, dx)
    assert error(made, wide(dy) + r * (g - wide(x) * product * r * r)) < ROUNDED
    assert error(download(device, normed), expected) < ROUNDED
    assert error(download(device, z), wide(made) @ wide(b)) < ROUNDED


def test_norms_of_chosen_rows(device: Any) -> None:
    x, index = bf16(5, 64), np.array([3, -1, 0], np.int32)
    weight = np.ones(64, np.float32)
    y = empty(device, 3, 64, BFLOAT16)
    norm = ops.Norm(upload(device, weight).address, 1e-6)
    rstd = empty(device, 1, 3, np.float32)
    on, chosen = upload(device, x), upload(device, index).address
    ops.rms_norm(device, on, norm, y, rstd.address, chosen)
    rows = wide(x)[[3, 0]]
    expected = rows / np.sqrt((rows**2).mean(1, keepdims=True) + 1e-6)
    found = download(device, y)
    assert error(found[[0, 2]], expected) < ROUNDED
    assert np.isfinite(wide(found[1])).all()
    # Back: a row that none was chosen of keeps what it has.
    dx = upload(device, np.zeros((5, 64), BFLOAT16))
    dn = bf16(3, 64, seed=1)
    ops.rms_norm_backward(device, upload(device, dn), on, norm, rstd.address, dx, index=chosen)
    back = wide(download(device, dx))
    assert not back[[1, 2, 4]].any()
    r = 1 / np.sqrt((rows**2).mean(1, keepdims=True) + 1e-6)
    g = wide(dn)[[0, 2]]
    assert error(back[[3, 0]], r * (g - rows * (g * rows).mean(1, keepdims=True) * r * r)) < ROUNDED


def test_swiglu(device: Any) -> None:
    tokens, inner = 5, 72
    gate_up, dact = bf16(tokens, 2 * inner, scale=3), bf16(tokens, inner, seed=1)
    on, act = upload(device, gate_up, 2 * inner + 8), empty(device, tokens, inner, BFLOAT16, inner + 16)
    ops.swiglu(device, on, act)
    gate, up = wide(gate_up[:, :inner]), wide(gate_up[:, inner:])
    s = 1 / (1 + np.exp(-gate))
    assert error(download(device, act), gate * s * up) < ROUNDED
    d = upload(device, dact, inner + 16)
    ops.swiglu_backward(device, on, d)
    expected = np.hstack([wide(dact) * up * s * (1 + gate * (1 - s)), wide(dact) * gate * s])
    assert error(download(device, on), expected) < ROUNDED
    assert error(download(device, d), gate * s * up) < ROUNDED


@pytest.mark.parametrize(
    ("tokens", "inner", "rank"), [(5, 72, 3), (100, 520, 16), (256, 256, 8), (9, 1024, 16)]
)
def test_swiglu_between_adapted_layers(device: Any, tokens: int, inner: int, rank: int) -> None:
    """act, dgate and dup as without; and beside them x A^T, s dy B and the gradients of adapters."""
    hidden, slot = 24, -(-rank // 8) * 8
    b = 2 * rank * hidden
    gate = Adapter("gate", rank, 0, 0.5, 0.0, 0, 0, b)
    up = Adapter("up", rank, slot, 1.5, 0.0, 0, rank * hidden, b + rank * inner)
    down = Adapter("down", rank, 0, 2.0, 0.0, 0, b + 2 * rank * inner, b + 3 * rank * inner)
    modules = (Module("gate", inner, 0, gate), Module("up", inner, inner, up))
    groups = {
        "gate_up": Group("gate_up", hidden, modules, slot),
        "down": Group("down", inner, (Module("down", hidden, 0, down),), slot),
    }
    assert mlp.suits(groups, tokens)
    assert not mlp.suits(groups, 2**32 // (2 * inner))
    gate_up, dact = bf16(tokens, 2 * inner, scale=3), bf16(tokens, inner, seed=1)
    a, z = bf16(slot, inner, seed=2), bf16(tokens, 2 * slot, seed=3)
    dz_down, both = bf16(tokens, slot, seed=4), bf16(2 * inner, 2 * slot, seed=5)
    arena = Arena()
    mlp.take_sums(arena, tokens + 50, inner, slot, device.processors, training=True)
    arena = Arena(device.allocate(arena.size))
    sums = mlp.take_sums(arena, tokens + 50, inner, slot, device.processors, training=True)

    on = upload(device, gate_up, 2 * inner + 8)
    act, on_z, copy = (
        empty(device, tokens, n, BFLOAT16, n + 8 * i) for i, n in enumerate((inner, slot, slot))
    )
    mlp.swiglu_project(device, on, act, upload(device, a, inner + 8), sums, on_z, copy)
    g, u = wide(gate_up[:, :inner]), wide(gate_up[:, inner:])
    s = 1 / (1 + np.exp(-g))
    made = download(device, act)
    assert error(made, g * s * u) < ROUNDED
    assert error(download(device, on_z), wide(made) @ wide(a).T) < ROUNDED
    assert download(device, copy).tobytes() == download(device, on_z).tobytes()

    before = rng(6).standard_normal(b + 4 * rank * inner).astype(np.float32)
    gradients, dz = upload(device, before), empty(device, tokens, 2 * slot, BFLOAT16, 2 * slot + 8)
    from_zero = upload(device, np.zeros_like(before))
    for into, pre in ((from_zero, upload(device, gate_up, 2 * inner + 8)), (gradients, on)):
        mlp.swiglu_backward_project(
            device, groups, pre, upload(device, dact, inner + 8), upload(device, both, 2 * slot + 8),
            upload(device, z, 2 * slot + 8), upload(device, dz_down, slot + 16), dz, sums, into.address,
        )  # fmt: skip
    d = download(device, on)
    assert error(d, np.hstack([wide(dact) * u * s * (1 + g * (1 - s)), wide(dact) * g * s])) < ROUNDED
    d, first, second = wide(d), slice(0, slot), slice(slot, 2 * slot)
    blocks = [d[:, :inner] @ wide(both)[:inner, first], d[:, inner:] @ wide(both)[inner:, second]]
    assert error(download(device, dz), np.hstack(blocks)) < ROUNDED
    expected = before.astype(np.float64)
    for adapter, dy, part in ((gate, d[:, :inner], first), (up, d[:, inner:], second)):
        db = adapter.scale * dy.T @ wide(z)[:, part][:, :rank]
        expected[adapter.b : adapter.b + db.size] += db.ravel()
    expected[down.a : down.a + rank * inner] += (wide(dz_down)[:, :rank].T @ wide(made)).ravel()
    found = download(device, gradients)[0]
    assert error(found, expected) < 1e-5
    # As if another rank had made what was there: of ranks and of micro-batches the sums are the same.
    alone, of_a = download(device, from_zero)[0], slice(down.a, down.a + rank * inner)
    assert (found[of_a] == (before + alone)[of_a]).all()
    same = np.ones(len(before), bool)
    for at, size in ((gate.b, 2 * rank * inner), (down.a, rank * inner)):
        same[at : at + size] = False
    assert (found[same] == before[same]).all()


def test_the_embedding(device: Any) -> None:
    table, ids = bf16(11, 576), np.array([10, 0, 3, 3], np.int32)
    x = empty(device, 4, 576, BFLOAT16, 640)
    ops.embed(device, upload(device, table, 576), upload(device, ids).address, x)
    assert (download(device, x).view(np.uint16) == table[ids].view(np.uint16)).all()


@pytest.mark.parametrize(("vocabulary", "padded"), [(257, 264), (64, 64), (5003, 5008)])
def test_cross_entropy(device: Any, vocabulary: int, padded: int) -> None:
    targets = np.array([3, -1, vocabulary - 1, 0, 50, 7], np.int32)
    rows = len(targets)
    logits = bf16(rows, padded, scale=3)
    on = upload(device, logits)
    scale = upload(device, np.array([0.37], np.float32)).address
    losses = empty(device, 1, rows, np.float32)
    ops.cross_entropy(device, on, vocabulary, upload(device, targets).address, scale, losses.address)
    x = wide(logits[:, :vocabulary])
    p = np.exp(x - x.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    chosen = np.arange(rows), np.maximum(targets, 0)
    expected = np.where(targets >= 0, -np.log(p[chosen]), 0)
    assert np.abs(download(device, losses)[0] - expected).max() < 1e-4
    p[chosen] -= 1
    found = download(device, on)
    assert error(found[:, :vocabulary], 0.37 * p * (targets >= 0)[:, None]) < ROUNDED
    assert not wide(found[:, vocabulary:]).any()
    assert not wide(found[1]).any()

    total = upload(device, np.array([1.5]))
    ops.add_up(device, losses.address, rows, total.address)
    assert float(download(device, total)[0, 0]) == pytest.approx(1.5 + expected.sum(), abs=1e-4)


@pytest.mark.parametrize(("dim", "norms"), [(8, False), (24, True), (64, False), (96, True), (128, True)])
def test_rotary_positions(device: Any, dim: int, norms: bool) -> None:
    tokens, queries, keys, eps = 7, 4, 2, 1e-6
    width = (queries + 2 * keys) * dim
    turned = queries + keys
    x, d = bf16(tokens, width), bf16(tokens, width, seed=1)
    positions = rng(2).integers(0, 50, tokens).astype(np.int32)
    angles = np.arange(50)[:, None] * 10000.0 ** -(np.arange(0, dim, 2) / dim)
    weights = [(1 + 0.1 * rng(i).standard_normal(dim)).astype(np.float32) for i in (3, 4)]
    addresses = [upload(device, w).address for w in weights]
    heads = rope.Heads(
        queries,
        keys,
        dim,
        upload(device, np.cos(angles).astype(np.float32)).address,
        upload(device, np.sin(angles).astype(np.float32)).address,
        ops.Norm(addresses[0], eps) if norms else None,
        ops.Norm(addresses[1], eps) if norms else None,
        0,
    )
    on, y = upload(device, x, width + 8), empty(device, tokens, turned * dim, BFLOAT16)
    places = upload(device, positions).address
    rope.rotate(device, heads, on, y, places)
    h = wide(x)[:, : turned * dim].reshape(tokens, turned, dim)
    weight = np.concatenate([np.tile(weights[0], (queries, 1)), np.tile(weights[1], (keys, 1))])
    r = 1 / np.sqrt((h**2).mean(-1, keepdims=True) + eps)
    cos, sin = np.cos(angles)[positions][:, None], np.sin(angles)[positions][:, None]

    def turn(v: NDArray[Any], sign: int) -> NDArray[Any]:
        low, high = v[..., : dim // 2], v[..., dim // 2 :]
        return np.concatenate([low * cos - sign * high * sin, high * cos + sign * low * sin], -1)

    def back(v: NDArray[Any]) -> NDArray[Any]:
        v = turn(v, -1)
        if norms:
            v = v * weight
            v = r * (v - h * (v * h).mean(-1, keepdims=True) * r * r)
        return v.reshape(tokens, -1)

    expected = turn(h * r * weight if norms else h, 1)
    assert error(download(device, y), expected.reshape(tokens, -1)) < ROUNDED

    on_d = upload(device, d)
    rope.rotate_backward(device, heads, on_d, places, on, None)
    found = download(device, on_d)
    of_turned = wide(d)[:, : turned * dim].reshape(tokens, turned, dim)
    assert error(found[:, : turned * dim], back(of_turned)) < ROUNDED
    assert (found[:, turned * dim :].view(np.uint16) == d[:, turned * dim :].view(np.uint16)).all()

    # The gradients of keys and values in the shares of their query heads.
    on_d = upload(device, d)
    shares = [rng(i).standard_normal((queries, tokens, dim)).astype(np.float32) for i in (5, 6)]
    at = [upload(device, share.reshape(queries * tokens, dim)).address for share in shares]
    rope.rotate_backward(device, heads, on_d, places, on, (at[0], at[1]))
    both = [s.reshape(keys, queries // keys, tokens, dim).sum(1).transpose(1, 0, 2) for s in shares]
    of_turned = of_turned.copy()
    of_turned[:, queries:] = both[0]
    found = download(device, on_d)
    assert error(found[:, : turned * dim], back(of_turned)) < ROUNDED
    assert error(found[:, turned * dim :], both[1].reshape(tokens, -1)) < ROUNDED


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("dim", "queries", "keys", "lengths", "window", "capability", "memory"),
    [
        (64, 4, 2, (130, 5, 1), 0, 80, 163),
        (64, 2, 1, (200,), 64, 80, 99),
        (128, 2, 1, (90,), 33, 80, 163),
        (128, 2, 1, (70,), 0, 86, 99),
        (8, 4, 2, (33, 20), 0, 90, 227),
        (24, 2, 1, (67, 3), 0, 90, 227),
        (256, 1, 1, (70,), 0, 90, 227),
        (64, 2, 2, (300, 5, 130), 0, 90, 227),
        (64, 2, 1, (400,), 100, 90, 227),
        (128, 4, 2, (140, 3), 33, 90, 227),
        (128, 2, 1, (200,), 0, 90, 227),
    ],
)
def test_attention(
    device: Any,
    dim: int,
    queries: int,
    keys: int,
    lengths: tuple[int, ...],
    window: int,
    capability: int,
    memory: int,
    shared: bool,
) -> None:
    """Packed sequences, grouped heads, windows; keys' gradients by key head or in shares of query heads."""
    shape = attention.shape_for(dim, capability, memory << 10)
    if shape.source == "model/attention90.cu" and device.capability != 90:
        pytest.skip("the kernel is for compute capability 9.0")
    tokens, group, width = sum(lengths), queries // keys, (queries + 2 * keys) * dim
    qkv, dout = bf16(tokens, width), bf16(tokens, queries * dim, seed=1)
    heads = rope.Heads(queries, keys, dim, 0, 0, None, None, window)

    q, k, v = np.split(wide(qkv), [queries * dim, (queries + keys) * dim], 1)
    q = q.reshape(tokens, queries, dim)
    k, v = (np.repeat(x.reshape(tokens, keys, dim), group, 1) for x in (k, v))
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    place = np.concatenate([np.arange(n) for n in lengths])
    seen = (sequence[:, None] == sequence) & (place[:, None] >= place)
    if window:
        seen &= place + window > place[:, None]
    scores = np.where(seen, np.einsum("qhd,khd->hqk", q, k) / math.sqrt(dim), -np.inf)
    top = scores.max(-1, keepdims=True)
    p = np.exp(scores - top)
    total = p.sum(-1, keepdims=True)
    p /= total
    out = np.einsum("hqk,khd->qhd", p, v)

    on = upload(device, qkv, width + 8)
    parts = attention.split(on, heads)
    on_out, lse = (
        empty(device, tokens, queries * dim, BFLOAT16, queries * dim + 16),
        empty(device, queries, tokens, np.float32),
    )

    def tiles(rows: int, late_first: bool) -> tuple[int, int]:
        count = sum(-(-n // rows) for n in lengths) + 1  # and one that is empty
        return upload(device, attention.tiles(lengths, rows, count, late_first=late_first)).address, count

    attention.attend(device, shape, heads, *parts, tiles(shape.rows, True), on_out, lse.address)
    assert error(download(device, on_out), out.reshape(tokens, -1)) < ROUNDED
    assert np.abs(download(device, lse) - ((top + np.log(total))[..., 0] / math.log(2))).max() < 1e-3

    d, delta = empty(device, tokens, width, BFLOAT16, width + 24), empty(device, queries, tokens, np.float32)
    shares = [empty(device, queries * tokens, dim, np.float32) for _ in range(2)] if shared else None
    attention.attend_backward(
        device, shape, heads, *parts, on_out, upload(device, dout, queries * dim + 8), lse.address,
        delta.address, tiles(shape.back, True), tiles(shape.back, False), d,
        (shares[0].address, shares[1].address) if shares else None,
    )  # fmt: skip
    do = wide(dout).reshape(tokens, queries, dim)
    dv = np.einsum("hqk,qhd->khd", p, do)
    dp = np.einsum("qhd,khd->hqk", do, v)
    ds = p * (dp - np.einsum("qhd,qhd->hq", do, out)[..., None]) / math.sqrt(dim)
    dq, dk = np.einsum("hqk,khd->qhd", ds, k), np.einsum("hqk,qhd->khd", ds, q)
    found = whole(device, d)
    assert error(found[:, : queries * dim], dq.reshape(tokens, -1)) < SEVERAL
    for i, expected in enumerate((dk, dv)):
        if shares:
            got = download(device, shares[i]).reshape(queries, tokens, dim).transpose(1, 0, 2)
            assert error(got, expected) < SEVERAL
        else:
            first = (queries + i * keys) * dim
            got = found[:, first : first + keys * dim].reshape(tokens, keys, dim)
            assert error(got, expected.reshape(tokens, keys, group, dim).sum(2)) < SEVERAL


def space(device: Any, blocks: int) -> lora.Space:
    partial, counters = lora.space_bytes(device.processors, blocks)
    return lora.Space(device.allocate(partial), device.allocate(counters))


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(70, 136, 8), (130, 576, 48), (64, 64, 64), (5, 1000, 32)]
)
def test_narrow_products(device: Any, rows: int, depth: int, columns: int, across: bool) -> None:
    x = bf16(rows, depth)
    m = bf16(depth, columns, seed=1) if across else bf16(columns, depth, seed=1)
    y, copy = (empty(device, rows, columns, BFLOAT16, columns + 24 * i) for i in range(2))
    on, on_m, memory = upload(device, x, depth + 8), upload(device, m, m.shape[1] + 8), space(device, 99)
    for _ in range(2):  # the counters of parts are 0 again after each
        lora.project(device, on, on_m, y, memory, across=across, alpha=0.5, copy=copy)
        expected = 0.5 * wide(x) @ (wide(m) if across else wide(m).T)
        assert error(download(device, y), expected) < ROUNDED
        assert download(device, copy).tobytes() == download(device, y).tobytes()


def test_parts_of_sums_fit_their_memory_and_are_the_fewest_that_are_as_fast() -> None:
    for processors, warps in itertools.product((3, 108, 132, 148), lora.TILES):
        partial, _ = lora.space_bytes(processors, 1)
        for blocks, stages in itertools.product((1, 2, 25, 64, 80, 144, 256, 3000), (1, 3, 4, 32, 64, 224)):
            parts = lora.parts_for(blocks, stages, processors, warps)
            assert parts == 1 or blocks * parts * lora.TILES[warps] * lora.NARROWEST * 4 <= partial
            assert 1 <= parts <= max(1, stages // 4)
    assert lora.parts_for(64, 64, 132, 8) == 4  # x of 8192 x 4096: two rounds of half as much are as long
    assert lora.parts_for(144, 128, 132, 8) == 3  # two rounds of 43 stages, not one of 128


@pytest.mark.parametrize("tokens", [37, 600])
def test_gradients_of_adapters(device: Any, tokens: int) -> None:
    """Two adapted layers of three, with a rank that fills no slot: added to what is there."""
    rank, slot, inputs, outputs = 3, 8, 136, (40, 24, 72)
    b = 2 * rank * inputs
    adapters = (
        Adapter("first", rank, 0, 0.5, 0.0, 0, 0, b),
        Adapter("second", rank, slot, 1.5, 0.0, 0, rank * inputs, b + rank * outputs[0]),
    )
    modules = (
        Module("a", outputs[0], 0, adapters[0]),
        Module("b", outputs[1], outputs[0], None),
        Module("c", outputs[2], outputs[0] + outputs[1], adapters[1]),
    )
    group = Group("qkv", inputs, modules, slot)
    x, dy = bf16(tokens, inputs), bf16(tokens, sum(outputs), seed=1)
    z, dz = bf16(tokens, group.narrow, seed=2), bf16(tokens, group.narrow, seed=3)
    before = rng(4).standard_normal(b + rank * (outputs[0] + outputs[2])).astype(np.float32)
    gradients = upload(device, before)
    jobs = lora.gradient_jobs(
        group, *(upload(device, a, a.shape[1] + 8) for a in (x, dz, dy, z)), gradients.address
    )
    address = upload(device, jobs.view(np.uint8)).address
    lora.gradients(device, address, jobs, tokens, space(device, 99))
    expected = before.astype(np.float64)
    for module in group.modules:
        adapter = module.adapter
        if adapter is None:
            continue
        columns = slice(adapter.start, adapter.start + adapter.rank)
        da = wide(dz)[:, columns].T @ wide(x)
        db = adapter.scale * wide(dy)[:, module.row : module.row + module.outputs].T @ wide(z)[:, columns]
        expected[adapter.a : adapter.a + da.size] += da.ravel()
        expected[adapter.b : adapter.b + db.size] += db.ravel()
    assert error(download(device, gradients)[0], expected) < 1e-5


def test_dropout_masks_are_the_specifications(device: Any) -> None:
    tokens, width, seed = 10, 72, 2**40 + 7
    samples = np.array([5] * 4 + [9] * 6, np.uint32)
    places = np.array([*range(4), *range(6)], np.int32)
    x, y = bf16(tokens, width), bf16(tokens, width, seed=1)
    adapter = Adapter("", 4, 0, 1.0, 0.3, 99, 0, 0)
    dropped = lora.Dropped(upload(device, samples).address, upload(device, places).address, seed)
    on, out, added = upload(device, x, 80), empty(device, tokens, width, BFLOAT16, 88), upload(device, y, 88)
    dropped.rows(device, adapter, on, out)
    dropped.rows(device, adapter, on, added, add=True)
    parts = [keep_mask(seed, 99, sample, n * width, 0.3).reshape(n, width) for sample, n in ((5, 4), (9, 6))]
    mask = np.concatenate(parts)
    kept = np.where(mask, x, np.zeros(1, BFLOAT16))
    assert (download(device, out).view(np.uint16) == kept.view(np.uint16)).all()
    expected = (y.astype(np.float32) + kept.astype(np.float32)).astype(BFLOAT16)
    assert (download(device, added).view(np.uint16) == expected.view(np.uint16)).all()


def same_bits(found: NDArray[Any], expected: NDArray[Any]) -> bool:
    return np.array_equal(
        np.ascontiguousarray(found).view(np.uint16), np.ascontiguousarray(expected).view(np.uint16)
    )


@pytest.mark.parametrize("adapter_dtype", [np.dtype(np.float32), BFLOAT16])
def test_weights_are_written_out_as_the_reference_dequantizes_them(device: Any, adapter_dtype: Any) -> None:
    """Double-quantized, plain, unquantized; s B beside them and A below, zeros where there are none."""
    config = tiny_config()
    adapted = {"q_proj": 3, "v_proj": 3, "gate_proj": 8, "down_proj": 5}
    shapes = {
        f"model.layers.{i}.{'mlp' if name[0] in 'gud' else 'self_attn'}.{name}": AdapterShape(
            rank, 0.5, 0.0, 0
        )
        for i in range(2)
        for name, rank in adapted.items()
    }
    layers, count = groups_of(config, shapes)
    ways = [(64, "nf4", True), (32, "fp4", False), None]
    params: dict[str, Any] = {}
    forms: list[dict[str, Form]] = []
    for groups in layers:
        forms.append({})
        for group in groups.values():
            for module in group.modules:
                number = len(params)
                w = (0.1 * rng(number).standard_normal((module.outputs, group.inputs))).astype(np.float32)
                way = ways[number % 3]
                params[f"{module.name}.weight"] = (
                    w if way is None else nf4.quantize(w, way[0], way[1], way[2])
                )
                forms[-1][module.name] = form_of(params[f"{module.name}.weight"])
    parameters = rng(99).standard_normal(count).astype(np.float32).astype(adapter_dtype)

    def make(arena: Arena) -> Weights:
        at = arena.take("adapters", parameters.nbytes)
        weights = Weights(arena, layers, forms, 2, adapter_dtype == np.float32, at)
        weights.write_at(arena.take("buffers", weights.written_bytes))
        return weights

    size = Arena()
    make(size)
    arena = Arena(device.allocate(size.size))
    weights = make(arena)
    device.copy(arena.base, parameters.ctypes.data, parameters.nbytes)
    weights.load(device, params)
    for i, groups in enumerate(layers):
        for part in ("attention", "mlp"):
            weights.write(i, part)
        for key, group in groups.items():
            buffer = weights.buffers[i][key]
            rows = whole(device, buffer)[:, : buffer.columns]
            for module in group.modules:
                value = params[f"{module.name}.weight"]
                w = (
                    value.astype(BFLOAT16)
                    if isinstance(value, np.ndarray)
                    else nf4.dequantize(value, BFLOAT16)
                )
                part_of = rows[module.row : module.row + module.outputs]
                assert same_bits(part_of[:, : group.inputs], w)
                beside = np.zeros((module.outputs, group.narrow), BFLOAT16)
                adapter = module.adapter
                if adapter is not None:
                    a = parameters[adapter.a : adapter.a + adapter.rank * group.inputs].reshape(
                        adapter.rank, -1
                    )
                    b = parameters[adapter.b : adapter.b + adapter.rank * module.outputs].reshape(
                        -1, adapter.rank
                    )
                    scaled = (b.astype(np.float32) * np.float32(adapter.scale)).astype(BFLOAT16)
                    beside[:, adapter.start : adapter.start + adapter.rank] = scaled
                    below = rows[group.outputs + adapter.start :][: group.slot]
                    expected = np.zeros(below.shape, BFLOAT16)
                    expected[: adapter.rank, : group.inputs] = a.astype(BFLOAT16)
                    assert same_bits(below, expected)
                assert same_bits(part_of[:, group.inputs :], beside)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16])
@pytest.mark.parametrize("budget", [None, 40_000])
def test_adamw_is_the_specifications_to_the_bit(device: Any, dtype: Any, budget: int | None) -> None:
    """Paged and unpaged states, clipped and not, with a norm that is not finite in between."""
    count = 21_000
    start = rng().standard_normal(count).astype(np.float32).astype(dtype)
    host = AdamW({"a": start.copy().reshape(100, -1)}, weight_decay=0.01)

    def make(arena: Arena) -> tuple[adamw.Optimizer, int, int]:
        optimizer = adamw.Optimizer(arena, count, budget)
        return optimizer, arena.take("adapters", 4 * count), arena.take("adapters", 4 * count)

    size = Arena()
    make(size)
    optimizer, parameters, gradients = make(Arena(device.allocate(size.size)))
    assert (optimizer.turns > 0) == (budget is not None)
    optimizer.load(device, parameters, gradients, 0 if dtype == np.float32 else 2)
    optimizer.take(host, [("a", 0)])
    mirror = AdamW({"a": start.copy().reshape(100, -1)}, weight_decay=0.01)
    powers = (1.0, 1.0)
    for step in range(5):
        g = (10.0 ** (step - 3) * rng(step).standard_normal(count)).astype(np.float32)
        if step == 2:
            g[777] = np.inf
        grads = {"a": g.reshape(100, -1).copy()}
        norm = clip_grad_norm(grads, 0.3)
        rate = 1e-3 * (step + 1)
        following = powers[0] * 0.9, powers[1] * 0.999
        optimizer.begin(adamw.scalars(host, following, rate, 1.0, 0.3))
        optimizer.wait_for_states()
        device.copy(gradients, g.ctypes.data, g.nbytes)
        optimizer.update()
        _, found, made = optimizer.outcome()
        assert made == np.isfinite(norm)
        if made:
            assert found == pytest.approx(norm, rel=1e-12)  # NF4-10.7
            mirror.step(grads, rate)
            powers = following
    optimizer.store(host, [("a", 0)], mirror.steps)
    for name in ("params", "m", "v"):
        assert getattr(host, name)["a"].tobytes() == getattr(mirror, name)["a"].tobytes(), name
