"""The other side of `nf4 bench train --device cuda`: transformers, PEFT and bitsandbytes, a process.

As `nf4_gpu.peers` it loads PyTorch, in a process of its own. Run as `python -m nf4_gpu.train.peers`.
"""

import argparse
import gc
import importlib
import json
import statistics
import time
from contextlib import suppress
from typing import Any

import cupy
from nf4.model.llama import TARGETS

from nf4_gpu.train.bench import (
    ALPHA,
    CLIP,
    GENERATED,
    PROMPT,
    RANK,
    RATE,
    ROWS,
    STEPS,
    WARM_UP,
    Row,
    token_ids,
)
from nf4_gpu.train.models import CONFIGS, weights

WAYS = ("prepared", "plain")


def base_model(name: str) -> Any:
    """Return transformers' model with the weights of `models`, its linear layers 4-bit by bitsandbytes."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    bnb: Any = importlib.import_module("bitsandbytes")
    values = {key: value for key, value in CONFIGS[name].items() if key != "torch_dtype"}
    config = transformers.LlamaConfig(**values)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    for parameter, array in weights(name):
        tensor = torch.from_dlpack(array).clone()
        del array
        path, _, last = parameter.rpartition(".")
        parent, _, child = path.rpartition(".")
        owner = model.get_submodule(parent)
        if path.endswith("_proj"):
            with torch.device("meta"):
                linear = bnb.nn.Linear4bit(
                    tensor.shape[1], tensor.shape[0], bias=False, compute_dtype=torch.bfloat16,
                    compress_statistics=True, quant_type="nf4",
                )  # fmt: skip
            linear.weight = bnb.nn.Params4bit(
                tensor.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=linear
            )
            setattr(owner, child, linear.to("cuda"))
        else:
            setattr(model.get_submodule(path), last, torch.nn.Parameter(tensor, requires_grad=False))
        cupy.get_default_memory_pool().free_all_blocks()
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary_emb = type(model.model.rotary_emb)(config, device="cuda")
    model.is_loaded_in_4bit = True
    return model


def adapted(name: str, checkpointing: bool, way: str) -> Any:
    """Return the model with adapters on all linear layers.

    way: "prepared", as the QLoRA recipe has it, what is not in 4 bits and the adapters in float32, products
    by autocast; or "plain", all of that in bfloat16.
    """
    peft: Any = importlib.import_module("peft")
    how = {"use_reentrant": False}
    model = base_model(name)
    if way == "prepared":
        model = peft.prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs=how if checkpointing else None,
        )
    elif checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        model.enable_input_require_grads()
    model.config.use_cache = False
    lora = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, lora, autocast_adapter_dtype=way == "prepared").train()


def casting(way: str) -> Any:
    """Return the context that a way computes in."""
    torch: Any = importlib.import_module("torch")
    return torch.autocast("cuda", dtype=torch.bfloat16, enabled=way == "prepared")


def measure(row: Row, model: Any, way: str) -> dict[str, Any]:
    """Return a step's seconds, the losses, the most memory that tensors took. AdamW's states are float32."""
    torch: Any = importlib.import_module("torch")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if way == "prepared":
        optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0, fused=True)
    else:
        bnb: Any = importlib.import_module("bitsandbytes")
        optimizer = bnb.optim.AdamW(trainable, lr=RATE, weight_decay=0.0, optim_bits=32)
    batch = torch.from_numpy(token_ids(row.model, row.batch, row.tokens)).to("cuda").long()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    losses, seconds = [], []
    for _ in range(WARM_UP + STEPS):
        started = time.perf_counter()
        with casting(way):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        del loss
    return {
        "way": way,
        "seconds": statistics.median(seconds[WARM_UP:]),
        "losses": losses,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def generate(name: str, model: Any, way: str) -> dict[str, Any]:
    """Return the tokens a second of a greedy continuation with the adapters on, after the first eight."""
    torch: Any = importlib.import_module("torch")
    model = model.eval()
    model.gradient_checkpointing_disable()
    model.config.use_cache = True
    prompt = torch.from_numpy(token_ids(name, 1, PROMPT)).to("cuda").long()
    seconds = {}
    for count in (8, GENERATED // 4):
        torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.no_grad(), casting(way):
            model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count,
                min_new_tokens=count, do_sample=False, pad_token_id=0, use_cache=True,
            )  # fmt: skip
        torch.cuda.synchronize()
        seconds[count] = time.perf_counter() - started
    rate = (GENERATED // 4 - 8) / (seconds[GENERATED // 4] - seconds[8])
    return {"way": way, "tokens_per_second": rate}


def main() -> None:
    """Print the figures of the rows of one model, by their names, as one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m nf4_gpu.train.peers", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--generation", action="store_true")
    options = parser.parse_args()
    torch: Any = importlib.import_module("torch")
    found: dict[str, list[dict[str, Any]]] = {}
    for way in WAYS:
        rows = [row for row in ROWS if row.model == options.model and row.name == row.plain]
        model = adapted(options.model, rows[0].checkpointing, way)
        for row in rows:
            with suppress(torch.cuda.OutOfMemoryError):  # a row that this way has no room for
                found.setdefault(row.name, []).append(measure(row, model, way))
            gc.collect()
            torch.cuda.empty_cache()
        if options.generation:
            found.setdefault("generation", []).append(generate(options.model, model, way))
        del model
        gc.collect()
        torch.cuda.empty_cache()
    print(json.dumps({name: {"ways": answers} for name, answers in found.items()}))


if __name__ == "__main__":
    main()
