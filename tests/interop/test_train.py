"""AdamW, clipping and schedules against PyTorch's, the mask of a chat against transformers'."""

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nf4.formats.checkpoint import open_checkpoint
from nf4.train.adamw import AdamW, clip_grad_norm
from nf4.train.data import IGNORE, load_data
from nf4.train.schedule import SCHEDULES, learning_rate

LIGHT = settings(deadline=None, max_examples=30)


@LIGHT
@given(
    seed=st.integers(0, 1 << 16),
    shape=st.sampled_from([(3, 5), (64, 33), (1, 1)]),
    lr=st.floats(1e-6, 0.1),
    betas=st.sampled_from([(0.9, 0.999), (0.8, 0.95)]),
    decay=st.sampled_from([0.0, 0.1]),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
)
def test_adamw_is_pytorchs(
    seed: int, shape: tuple[int, ...], lr: float, betas: tuple[float, float], decay: float, scale: float
) -> None:
    generator = np.random.default_rng(seed)
    p = generator.standard_normal(shape).astype(np.float32)
    theirs = torch.nn.Parameter(torch.from_numpy(p.copy()))
    peer = torch.optim.AdamW([theirs], lr=lr, betas=betas, weight_decay=decay, foreach=False)
    ours = AdamW({"p": p}, betas=betas, weight_decay=decay)
    for _ in range(6):
        g = (scale * generator.standard_normal(shape)).astype(np.float32)
        ours.step({"p": g}, lr)
        theirs.grad = torch.from_numpy(g)
        peer.step()
    state = peer.state[theirs]
    np.testing.assert_allclose(ours.m["p"], state["exp_avg"].numpy(), rtol=1e-5, atol=1e-6 * scale)
    np.testing.assert_allclose(ours.v["p"], state["exp_avg_sq"].numpy(), rtol=1e-5)
    np.testing.assert_allclose(p, theirs.detach().numpy(), rtol=2e-6, atol=1e-5 * lr + 1e-7)


def test_bfloat16_follows_pytorchs_float32() -> None:
    """PyTorch keeps bfloat16 states for bfloat16 parameters; with float32 ones ours are not farther off."""
    generator = np.random.default_rng(0)
    start = generator.standard_normal((32, 32)).astype(ml_dtypes.bfloat16)
    p = start.copy()
    ours = AdamW({"p": p})
    exact = torch.nn.Parameter(torch.from_numpy(start.astype(np.float32)))
    low = torch.nn.Parameter(torch.from_numpy(start.astype(np.float32)).to(torch.bfloat16))
    peers = [torch.optim.AdamW([q], lr=0.01, weight_decay=0.0, foreach=False) for q in (exact, low)]
    for _ in range(20):
        g = generator.standard_normal(start.shape).astype(np.float32)
        ours.step({"p": g}, 0.01)
        for q, peer in zip((exact, low), peers, strict=True):
            q.grad = torch.from_numpy(g).to(q.dtype)
            peer.step()
    reference = exact.detach().numpy()
    our_error = np.abs(p.astype(np.float32) - reference).mean()
    assert our_error <= np.abs(low.detach().float().numpy() - reference).mean() * 1.05
    assert our_error < 0.01


@LIGHT
@given(seed=st.integers(0, 1 << 16), max_norm=st.sampled_from([1e-3, 0.3, 10.0, 1e4]))
def test_clipping_is_pytorchs(seed: int, max_norm: float) -> None:
    generator = np.random.default_rng(seed)
    grads = {
        name: generator.standard_normal(shape).astype(np.float32)
        for name, shape in (("b", (9,)), ("a", (40, 50)))
    }
    params = [torch.nn.Parameter(torch.zeros(g.shape)) for g in grads.values()]
    for p, g in zip(params, grads.values(), strict=True):
        p.grad = torch.from_numpy(g.copy())
    theirs = float(torch.nn.utils.clip_grad_norm_(params, max_norm))
    assert clip_grad_norm(grads, max_norm) == pytest.approx(theirs, rel=1e-5)
    for p, g in zip(params, grads.values(), strict=True):
        np.testing.assert_allclose(g, p.grad.numpy(), rtol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("steps", "warmup"), [(20, 0), (20, 5), (7, 7), (1, 0), (10, 30)])
def test_schedules_are_transformers(schedule: str, steps: int, warmup: int) -> None:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    peer = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    for step in range(steps):
        rate = learning_rate(step, steps=steps, lr=0.3, schedule=schedule, warmup=warmup)
        assert rate == pytest.approx(peer.get_last_lr()[0], rel=1e-14, abs=1e-300)
        optimizer.step()
        peer.step()


def test_the_mask_of_a_chat_is_transformers(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    from transformers import AutoTokenizer

    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    directory = tiny_model(tmp_path / "model", chat_template=template)
    messages = [
        {"role": role, "content": content}
        for role, content in (
            ("system", "be brief"),
            ("user", "2+2?"),
            ("assistant", "4"),
            ("user", "grüße"),
            ("assistant", "hi"),
        )
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text((json.dumps({"messages": messages}) + "\n") * 2)
    ours = load_data(path, open_checkpoint(directory).tokenizer(), 128, max_positions=128).train[0]
    theirs = AutoTokenizer.from_pretrained(directory).apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = theirs["input_ids"], theirs["assistant_masks"]
    assert ours.ids.tolist() == ids[:-1]
    assert ours.targets.tolist() == [t if m else IGNORE for t, m in zip(ids[1:], mask[1:], strict=True)]
