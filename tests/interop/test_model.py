"""The model against PyTorch: backwards against autograd, models against transformers, LoRA against PEFT."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from nf4.errors import InputError
from nf4.exact.tables import rotation as exact_rotation
from nf4.lora import Dropout, LoRA, LoRALinear, Workspace, init_lora
from nf4.model.attention import Heads, attend, attend_backward
from nf4.model.config import LlamaConfig
from nf4.model.llama import TARGETS, Batch, Llama
from nf4.model.ops import head_loss, rms_norm, rms_norm_backward, rms_norm_dweight, swiglu, swiglu_backward
from nf4.model.rope import inverse_frequencies, rotate, rotation
from numpy.typing import NDArray

Array = NDArray[Any]

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "rope_theta": 1e5},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "head_dim": None},
    "qwen3": {"head_dim": 20, "tie_word_embeddings": True, "attention_bias": True},
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "yarn": YARN,
    "yarn-mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False},
    "yarn-given": YARN | {"attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        "long_factor": [2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
        "original_max_position_embeddings": 32,
    },
}


def leaf(x: Array) -> Any:
    return torch.tensor(x, requires_grad=True)


def check(pairs: list[tuple[Array, Any]], rtol: float = 1e-10) -> None:
    """Each of our arrays against a tensor, relative to the tensor's largest value."""
    for ours, theirs in pairs:
        expected = theirs.detach().numpy()
        assert ours.shape == expected.shape
        np.testing.assert_allclose(
            ours, expected, rtol=0, atol=rtol * max(1e-30, float(np.abs(expected).max()))
        )


def test_rms_norm() -> None:
    rng = np.random.default_rng(0)
    x, w, dy = rng.normal(size=(7, 12)), rng.normal(size=12), rng.normal(size=(7, 12))
    tx, tw = leaf(x), leaf(w)
    ty = torch.nn.functional.rms_norm(tx, (12,), tw, 1e-5)
    ty.backward(torch.tensor(dy))
    y, rstd = rms_norm(x, w, 1e-5)
    dw = rms_norm_dweight(dy, x, rstd)
    check([(y, ty), (dw, tw.grad), (rms_norm_backward(dy, x, w, rstd), tx.grad)])


def test_swiglu() -> None:
    gate, up, dy = np.random.default_rng(1).normal(size=(3, 5, 9)) * 4
    tg, tu = leaf(gate), leaf(up)
    ty = torch.nn.functional.silu(tg) * tu
    ty.backward(torch.tensor(dy))
    y = swiglu(gate, up, np.empty_like(gate))
    swiglu_backward(dy, gate, up)
    check([(y, ty), (gate, tg.grad), (up, tu.grad)])


@pytest.mark.parametrize("block", [4, 128])
def test_attention(block: int) -> None:
    rng = np.random.default_rng(2)
    heads, n = Heads(2, 3, 4), 19
    q, dout = rng.normal(size=(2, n, 24))
    k, v = rng.normal(size=(2, n, 8))
    tq, tk, tv = leaf(q), leaf(k), leaf(v)

    def by_head(x: Any) -> Any:
        return x.reshape(n, -1, 4).transpose(0, 1)

    tout = torch.nn.functional.scaled_dot_product_attention(
        by_head(tq), by_head(tk), by_head(tv), is_causal=True, enable_gqa=True
    )
    tout = tout.transpose(0, 1).reshape(n, 24)
    tout.backward(torch.tensor(dout))
    out, lse = attend(q, k, v, (n,), heads, None, Workspace(), block)
    grads = attend_backward(dout, q, k, v, out, lse, (n,), heads, None, Workspace(), block)
    check([(out, tout), *zip(grads, (tq.grad, tk.grad, tv.grad), strict=True)])


def test_rotation() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    config = LlamaConfig.from_dict(SIZES | {"model_type": "llama"}, "here")
    rng = np.random.default_rng(3)
    x, dy = rng.normal(size=(2, 11, 48))
    angle = np.arange(11)[:, None] * np.tile(inverse_frequencies(config, 11)[0], 2)
    tx = leaf(x)
    cos, sin = torch.tensor(np.cos(angle)), torch.tensor(np.sin(angle))
    ty = apply_rotary_pos_emb(tx.reshape(1, 11, 4, 12), tx.reshape(1, 11, 4, 12), cos[None], sin[None], 2)[0]
    ty.reshape(11, 48).backward(torch.tensor(dy))
    tables = rotation(config, (11,), np.float64)
    rotate(x, tables, 12, Workspace())
    rotate(dy, tables, 12, Workspace(), inverse=True)
    check([(x, ty.reshape(11, 48)), (dy, tx.grad)])


def test_head_and_cross_entropy() -> None:
    rng = np.random.default_rng(4)
    x, w, targets = rng.normal(size=(10, 6)), rng.normal(size=(17, 6)), rng.integers(17, size=10)
    tx, tw = leaf(x), leaf(w)
    tloss = torch.nn.functional.cross_entropy(tx @ tw.T, torch.tensor(targets), reduction="sum")
    (0.1 * tloss).backward()
    dw = np.zeros_like(w)
    loss, dx = head_loss(x, w, targets, Workspace(), 0.1, dw, elements=60)
    assert loss == pytest.approx(tloss.item(), rel=1e-12)
    assert dx is not None
    check([(dx, tx.grad), (dw, tw.grad)])


def test_lora_linear_with_dropout() -> None:
    rng = np.random.default_rng(5)
    x, w, b, dout = (rng.normal(size=s) for s in ((7, 9), (5, 9), 5, (7, 5)))
    lora = LoRA(rng.normal(size=(2, 9)), rng.normal(size=(5, 2)), 1.7, 0.5, stream=1)
    layer = LoRALinear(w, b, lora)
    y, cache = layer.forward(x, Dropout(0, (3, 4), (0, 1)))
    assert cache.bits is not None
    assert cache.dropout is not None
    kept = torch.tensor(cache.dropout.apply(cache.bits, np.ones_like(x), np.empty_like(x)) * 2)
    tx, tA, tB = leaf(x), leaf(lora.A), leaf(lora.B)
    ty = tx @ torch.tensor(w).T + torch.tensor(b) + 1.7 * ((tx * kept) @ tA.T) @ tB.T
    ty.backward(torch.tensor(dout))
    dx, dA, dB = layer.backward(dout, cache)
    assert dx is not None
    assert dA is not None
    assert dB is not None
    check([(y, ty), (dx, tx.grad), (dA, tA.grad), (dB, tB.grad)])


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("length", [20, 64, 100])
@pytest.mark.parametrize("old", [True, False])
def test_frequencies(name: str, length: int, old: bool) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theta = 5e4
    theirs = transformers.LlamaConfig(**SIZES, rope_parameters=ROPES[name] | {"rope_theta": theta})
    kind = ROPES[name]["rope_type"]
    compute: Callable[..., Any] = ROPE_INIT_FUNCTIONS.get(
        kind, LlamaRotaryEmbedding.compute_default_rope_parameters
    )
    expected, factor = compute(theirs, "cpu", seq_len=length) if kind != "default" else compute(theirs)
    written = (
        {"rope_theta": theta, "rope_scaling": ROPES[name]}
        if old
        else {"rope_parameters": ROPES[name] | {"rope_theta": theta}}
    )
    ours = LlamaConfig.from_dict(SIZES | {"model_type": "llama"} | written, "here")
    inv_freq, our_factor = inverse_frequencies(ours, length)
    np.testing.assert_allclose(inv_freq, expected.numpy(), rtol=2e-6)
    assert our_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("length", [20, 100])
def test_exact_tables(name: str, length: int) -> None:
    """Within what the float32 of transformers loses: of each angle, and of the entry."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_parameters": ROPES[name] | {"rope_theta": 5e4}}
    rotary = LlamaRotaryEmbedding(transformers.LlamaConfig(**SIZES, **parameters))
    theirs = rotary(torch.zeros(1, length, 1), torch.arange(length)[None])
    ours = LlamaConfig.from_dict(SIZES | {"model_type": "llama"} | parameters, "here")
    bound = 1e-6 + np.arange(length)[:, None] * 2.0**-21
    for mine, their in zip(exact_rotation(ours, (length,)), theirs, strict=True):
        assert (np.abs(mine - their[0, :, :6].numpy()) < bound).all()


def hf_model(tmp_path: Path, kind: str, **changes: Any) -> tuple[Any, LlamaConfig, dict[str, Array]]:
    """A random transformers model in float64, and its config.json and parameters as we read them."""
    torch.manual_seed(0)
    settings = SIZES | FAMILIES[kind] | changes
    config = transformers.AutoConfig.for_model(kind, **{k: v for k, v in settings.items() if v is not None})
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).double().train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (1.0 if "norm" in name else 0.0))
    model.save_pretrained(tmp_path)
    read = LlamaConfig.from_dict(json.loads((tmp_path / "config.json").read_text()), "config.json")
    params = {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
    return model, read, params


def ragged_batch(lengths: tuple[int, ...]) -> Batch:
    rng = np.random.default_rng(0)
    n = sum(lengths)
    ids, targets = rng.integers(SIZES["vocab_size"], size=(2, n)).astype(np.int32)
    targets[rng.random(n) < 0.2] = -100
    return Batch(ids, targets, lengths, tuple(range(len(lengths))))


def torch_loss(model: Any, batch: Batch) -> Any:
    """The sum of the token losses, each sequence run by itself."""
    total, start = torch.zeros((), dtype=torch.float64), 0
    for n in batch.lengths:
        rows = slice(start, start + n)
        logits = model(input_ids=torch.tensor(batch.ids[rows])[None].long()).logits[0]
        targets = torch.tensor(batch.targets[rows]).long()
        total = total + torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
        start += n
    return total


# transformers computes the angles in float32, so equality is to about 1e-6 of positions this small.
@pytest.mark.parametrize("kind", FAMILIES)
def test_loss_logits_and_parameter_gradients(tmp_path: Path, kind: str) -> None:
    theirs, config, params = hf_model(tmp_path, kind)
    ours = Llama(config, params)  # type: ignore[arg-type]
    batch = ragged_batch((17, 1, 30))
    tloss = torch_loss(theirs, batch)
    (0.05 * tloss).backward()
    loss, grads = ours.loss_and_grads(batch, loss_scale=0.05, train="full", checkpointing=False, seed=0)
    assert loss == pytest.approx(tloss.item(), rel=1e-5)
    assert ours.loss(batch) == pytest.approx(tloss.item(), rel=1e-5)
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert set(grads) == set(expected)
    check([(grads[name], expected[name]) for name in grads], rtol=1e-4)
    with torch.no_grad():
        check(
            [(ours.logits(batch.ids), theirs(input_ids=torch.tensor(batch.ids)[None].long()).logits[0])], 1e-5
        )


@pytest.mark.parametrize("rope", ROPES)
def test_loss_of_every_rope(tmp_path: Path, rope: str) -> None:
    theirs, config, params = hf_model(tmp_path, "llama", rope_parameters=ROPES[rope] | {"rope_theta": 1e4})
    batch = ragged_batch((31, 90))
    with torch.no_grad():
        expected = torch_loss(theirs, batch).item()
    assert Llama(config, params).loss(batch) == pytest.approx(expected, rel=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", FAMILIES)
def test_greedy_generation(tmp_path: Path, kind: str) -> None:
    from nf4.model.generate import generate

    theirs, config, params = hf_model(tmp_path, kind)
    prompt = [5, 3, 8, 90]
    out = theirs.eval().generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    ours = Llama(config, params)  # type: ignore[arg-type]
    assert list(generate(ours, prompt, 20)) == out[0, 4:].tolist()


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_gradients_are_pefts(tmp_path: Path, kind: str, rslora: bool) -> None:
    theirs, config, params = hf_model(tmp_path, kind)
    adapted = peft.get_peft_model(
        theirs,
        peft.LoraConfig(
            r=4,
            lora_alpha=6,
            lora_dropout=0.0,
            target_modules=list(TARGETS),
            use_rslora=rslora,
            task_type="CAUSAL_LM",
        ),
    ).double()
    tensors = {n: p for n, p in adapted.named_parameters() if "lora_" in n}
    adapters: dict[str, LoRA] = {}
    for name, p in tensors.items():
        with torch.no_grad():
            p.copy_(torch.randn_like(p) * 0.2)
        module, _, side = name.removeprefix("base_model.model.").partition(".lora_")
        into, out = params[f"{module}.weight"].shape[::-1]
        lora = adapters.setdefault(module, init_lora(module, into, out, 4, 6, 0.0, 0, rslora=rslora))
        setattr(lora, side[0], p.detach().numpy().copy())
    batch = ragged_batch((17, 1, 30))
    tloss = torch_loss(adapted, batch)
    (0.05 * tloss).backward()
    ours = Llama(config, params, adapters)  # type: ignore[arg-type]
    loss, grads = ours.loss_and_grads(batch, loss_scale=0.05, train="lora", checkpointing=True, seed=0)
    assert loss == pytest.approx(tloss.item(), rel=1e-5)
    assert len(grads) == len(tensors)
    pairs = [
        (grads[name.removeprefix("base_model.model.").replace(".default", "")], p.grad)
        for name, p in tensors.items()
    ]
    check(pairs, rtol=1e-4)


def test_unknown_architecture_is_refused(tmp_path: Path) -> None:
    transformers.GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="model_type 'gpt2'"):
        LlamaConfig.from_dict(json.loads((tmp_path / "config.json").read_text()), "config.json")
