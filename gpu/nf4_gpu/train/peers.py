"""The other side of `nf4 bench train --device cuda`: transformers, PEFT and bitsandbytes; a process of its own.

As `nf4_gpu.peers`, the only other module that loads PyTorch. Run as `python -m nf4_gpu.train.peers`.
"""

import argparse
import gc
import importlib
import json
import statistics
import time
from typing import Any

import cupy
from nf4.model.llama import TARGETS

from nf4_gpu.train.bench import ALPHA, CLIP, GENERATED, PROMPT, RANK, RATE, ROWS, STEPS, WARM_UP, Row, token_ids
from nf4_gpu.train.models import CONFIGS, weights


def base_model(name: str) -> Any:
    """Return transformers' model with the weights of `models`, its linear layers in 4 bits by bitsandbytes."""
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


def adapted(name: str, checkpointing: bool) -> Any:
    """Return the model with adapters on all linear layers, as the QLoRA recipe prepares it."""
    peft: Any = importlib.import_module("peft")
    model = peft.prepare_model_for_kbit_training(
        base_model(name),
        use_gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
    )
    model.config.use_cache = False
    lora = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, lora).train()


def measure(row: Row) -> dict[str, Any]:
    """Return the seconds of a step, the first losses, and the most memory that tensors took."""
    torch: Any = importlib.import_module("torch")
    model = adapted(row.model, row.checkpointing)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0, fused=True)
    batch = torch.from_numpy(token_ids(row.model, row.batch, row.tokens)).to("cuda").long()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    losses, seconds = [], []
    for _ in range(WARM_UP + STEPS):
        started = time.perf_counter()
        with torch.autocast("cuda", dtype=torch.bfloat16):
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
        "seconds": statistics.median(seconds[WARM_UP:]),
        "losses": losses,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def generate(name: str) -> dict[str, Any]:
    """Return the tokens a second of a greedy continuation with the adapters on, after the first."""
    torch: Any = importlib.import_module("torch")
    model = adapted(name, checkpointing=False).eval()
    model.config.use_cache = True
    prompt = torch.from_numpy(token_ids(name, 1, PROMPT)).to("cuda").long()
    seconds = {}
    for count in (8, GENERATED // 2):
        for _ in range(2):
            torch.cuda.synchronize()
            started = time.perf_counter()
            with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
                model.generate(
                    input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count,
                    min_new_tokens=count, do_sample=False, pad_token_id=0,
                )  # fmt: skip
            torch.cuda.synchronize()
            seconds[count] = time.perf_counter() - started
    rate = (GENERATED // 2 - 8) / (seconds[GENERATED // 2] - seconds[8])
    return {"tokens_per_second": rate}


def main() -> None:
    """Print the figures of the rows of one model, by their names, as one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m nf4_gpu.train.peers", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--generation", action="store_true")
    options = parser.parse_args()
    torch: Any = importlib.import_module("torch")
    found: dict[str, Any] = {}
    for row in ROWS:
        if row.model == options.model and row.budget is None:
            try:
                found[row.name] = measure(row)
            except torch.cuda.OutOfMemoryError as error:
                found[row.name] = {"error": str(error)}
            gc.collect()
            torch.cuda.empty_cache()
    if options.generation:
        found["generation"] = generate(options.model)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
