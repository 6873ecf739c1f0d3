"""SmolLM2-135M: transformers' loss, PEFT's gradients, and a real run that brings the held-out loss down."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import smollm2
import torch
import transformers
from click.testing import CliRunner
from nf4 import bundled
from nf4.cli import main
from nf4.formats.checkpoint import QuantizeOptions, load_model, open_checkpoint
from nf4.formats.peft import load_adapter
from nf4.lora import LoRA, init_lora
from nf4.model.llama import TARGETS, Llama
from nf4.tensor import QuantizedTensor, dequantize
from nf4.train.data import Example, load_data
from nf4.train.exact import ExactEngine
from nf4.train.step import make_batch


@pytest.fixture(scope="module")
def quantized(gguf: Path) -> Llama:
    return load_model(gguf, quantize=QuantizeOptions())


def windows_of(gguf: Path, text: Path) -> list[Example]:
    tokenizer = open_checkpoint(gguf).tokenizer()
    return load_data(text, tokenizer, 128, max_positions=8192, eval_path=text).heldout


@pytest.fixture(scope="module")
def examples(gguf: Path) -> list[Example]:
    return windows_of(gguf, bundled.HELDOUT_TEXT)[:4]


def theirs_of(gguf: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    return model.eval()


def with_our_weights(gguf: Path, model: Llama) -> Any:
    """The model in transformers, its linear layers holding what our NF4 weights decode to."""
    theirs = theirs_of(gguf)
    with torch.no_grad():
        for name, value in model.params.items():
            if isinstance(value, QuantizedTensor):
                theirs.get_parameter(name).copy_(torch.from_numpy(dequantize(value, np.dtype(np.float32))))
    return theirs


def their_loss(model: Any, examples: list[Example]) -> Any:
    """Sum of the token losses, sequence by sequence."""
    total = torch.zeros(())
    for example in examples:
        logits = model(torch.from_numpy(example.ids.astype(np.int64))[None]).logits[0]
        targets = torch.from_numpy(example.targets.astype(np.int64))
        total = total + torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return total


def test_loss_is_transformers(gguf: Path, examples: list[Example]) -> None:
    ours = load_model(gguf, quantize=None).loss(make_batch(examples, range(4)))
    with torch.no_grad():
        assert ours == pytest.approx(their_loss(theirs_of(gguf), examples).item(), rel=1e-5)


def test_lora_gradients_on_nf4_are_pefts(gguf: Path, quantized: Llama, examples: list[Example]) -> None:
    rng = np.random.default_rng(0)
    adapters = {}
    for name, value in quantized.params.items():
        if isinstance(value, QuantizedTensor):
            module = name.removesuffix(".weight")
            adapters[module] = init_lora(module, value.shape[1], value.shape[0], 8, 16, 0.0, seed=0)
            adapters[module].B[:] = rng.normal(0, 0.01, adapters[module].B.shape)
    ours = Llama(quantized.config, quantized.params, adapters)
    batch = make_batch(examples[:2], range(2))
    loss, grads = ours.loss_and_grads(batch, loss_scale=1 / 256, train="lora", checkpointing=False, seed=0)

    total, expected = their_gradients(gguf, quantized, adapters, examples[:2], torch.float64)
    assert loss == pytest.approx(total, rel=1e-5)
    assert grads.keys() == expected.keys()
    for name in expected:
        assert relative(grads[name], expected[name]) < 1e-4, name
    # In float32 PEFT's own rounding is the larger part: tensor by tensor it lies up to 2e-4 from its float64.
    _, single = their_gradients(gguf, quantized, adapters, examples[:2], torch.float32)
    for name in expected:
        assert relative(grads[name], expected[name]) <= relative(single[name], expected[name]) + 1e-5, name
    together = [np.concatenate([g[name].ravel() for name in expected]) for g in (grads, single)]
    assert relative(*together) < 1e-4


def relative(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def their_gradients(
    gguf: Path, quantized: Llama, adapters: dict[str, LoRA], examples: list[Example], dtype: Any
) -> tuple[float, dict[str, Any]]:
    """PEFT's loss sum and adapter gradients, with our NF4 weights and our adapters, in a dtype."""
    config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=list(TARGETS))
    theirs = peft.get_peft_model(with_our_weights(gguf, quantized), config).to(dtype)
    factors = {
        name.removeprefix("base_model.model.").replace(".default", ""): p
        for name, p in theirs.named_parameters()
        if "lora_" in name
    }
    with torch.no_grad():
        for name, p in factors.items():
            module, _, side = name.removesuffix(".weight").partition(".lora_")
            p.copy_(torch.from_numpy(getattr(adapters[module], side)))
    total = their_loss(theirs, examples)
    (total / 256).backward()
    return total.item(), {name: p.grad.numpy() for name, p in factors.items()}


def test_a_real_run(gguf: Path, quantized: Llama, tmp_path: Path) -> None:
    """60 steps on Genesis: the held-out loss falls by at least 0.6; PEFT gets our loss from the adapter."""
    out = tmp_path / "out"
    flags = (
        "--steps 60 --rank 8 --batch-size 4 --seq-len 128 --lr 1e-3 --eval-every 0 --eval-sequences 16 --json"
    )
    arguments = ["finetune", str(gguf), str(bundled.FINETUNE_TEXT), "--out", str(out), *flags.split()]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["eval_before"] - answer["eval_after"] >= 0.6

    examples = windows_of(gguf, bundled.FINETUNE_TEXT)[-4:]
    ours = Llama(quantized.config, quantized.params, load_adapter(out, quantized.config))
    theirs = peft.PeftModel.from_pretrained(with_our_weights(gguf, quantized), str(out)).eval()
    with torch.no_grad():
        expected = their_loss(theirs, examples).item()
    assert ours.loss(make_batch(examples, range(4))) == pytest.approx(expected, rel=1e-5)


def test_an_exact_step_has_the_pinned_gradients(gguf: Path, quantized: Llama) -> None:
    """Those that the GPU gives, too (tests/gpu/test_exact_on_gpu.py)."""
    model = Llama(quantized.config, quantized.params, smollm2.adapters(quantized))
    engine = ExactEngine(
        model, batch_size=1, max_grad_norm=0.0, weight_decay=0.0, checkpointing=False, seed=0, threads=2
    )
    example = smollm2.example(bundled.FINETUNE_TEXT.read_bytes(), model)
    assert smollm2.digest(*engine.gradients([([example], [0])])) == smollm2.PINNED
