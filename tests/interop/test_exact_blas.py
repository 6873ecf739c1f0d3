"""Exact training with another BLAS: PyTorch's float64 products (MKL or its own) in the place of NumPy's."""

import types
from typing import Any

import numpy as np
import pytest
import torch
from nf4 import bundled
from nf4.exact import grid
from nf4.formats.checkpoint import QuantizeOptions, load_model
from nf4.formats.peft import linear_shapes
from nf4.lora import init_lora
from nf4.model.llama import Llama
from nf4.train.data import Example
from nf4.train.exact import ExactEngine


def step() -> tuple[float, dict[str, Any]]:
    base = load_model(bundled.MODEL, quantize=QuantizeOptions())
    adapters = {
        name: init_lora(name, inputs, outputs, 8, alpha=16, dropout=0.1, seed=0)
        for name, (outputs, inputs) in linear_shapes(base.config).items()
    }
    for lora in adapters.values():
        lora.B[...] = lora.A.T[: len(lora.B)] if len(lora.B) <= lora.A.shape[1] else 0.01
    text = np.frombuffer(bundled.FINETUNE_TEXT.read_bytes()[:402], np.uint8).astype(np.int32)
    examples = [Example(text[i : i + 200], text[i + 1 : i + 201]) for i in (0, 201)]
    engine = ExactEngine(
        Llama(base.config, base.params, adapters),
        batch_size=2, max_grad_norm=0.0, weight_decay=0.0, checkpointing=False, seed=1, threads=1,
    )  # fmt: skip
    return engine.gradients([(examples, range(2))])


def test_the_bits_are_those_of_numpys(monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(left: Any, right: Any, out: Any) -> Any:
        calls.append(out.size)
        out[...] = torch.matmul(torch.from_numpy(left), torch.from_numpy(right)).numpy()
        return out

    calls: list[int] = []
    loss, gradients = step()
    monkeypatch.setattr(grid, "np", types.SimpleNamespace(**{**vars(np), "matmul": multiply}))
    other_loss, other_gradients = step()
    assert len(calls) > 100
    assert other_loss == loss
    for name, gradient in gradients.items():
        assert (other_gradients[name] == gradient).all(), name
