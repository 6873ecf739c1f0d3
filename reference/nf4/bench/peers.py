"""The other side of `nf4 bench`: bitsandbytes, transformers and PEFT; run as `python -m nf4.bench.peers`.

It loads PyTorch, in a process of its own, as `nf4.conform.libraries` does and nothing else here.
"""

import argparse
import importlib
import json
import time
from typing import Any

import numpy as np

from nf4.bench import codec
from nf4.bench.machine import peak_bytes


def bitsandbytes_operations(x: np.ndarray[Any, np.dtype[np.float32]]) -> codec.Contenders:
    """Return bitsandbytes' side of each codec operation on x [rows, columns]: its public functional API."""
    torch: Any = importlib.import_module("torch")
    bnb: Any = importlib.import_module("bitsandbytes.functional")
    weights = torch.from_numpy(x)

    def quantize(tensor: Any, double: bool) -> Any:
        return bnb.quantize_4bit(
            tensor, blocksize=codec.BLOCK_SIZE, compress_statistics=double, quant_type="nf4"
        )

    # The dtype of the result is that of the tensor that was quantized.
    plain, double = quantize(weights, False), quantize(weights, True)
    plain16, double16 = quantize(weights.bfloat16(), False), quantize(weights.bfloat16(), True)
    return {
        "quantize float32": lambda: quantize(weights, False),
        "quantize float32, double": lambda: quantize(weights, True),
        "dequantize to float32": lambda: bnb.dequantize_4bit(*plain),
        "dequantize to float32, double": lambda: bnb.dequantize_4bit(*double),
        "dequantize to bfloat16": lambda: bnb.dequantize_4bit(*plain16),
        "dequantize to bfloat16, double": lambda: bnb.dequantize_4bit(*double16),
    }


def codec_side_by_side(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of each operation, ours and bitsandbytes', in alternating rounds of this process."""
    x = codec.random_weights()
    sides = {"nf4": codec.our_operations(x), "bitsandbytes": bitsandbytes_operations(x)}
    return codec.measure(sides, rounds)


def train(
    model_dir: str, ids: np.ndarray[Any, np.dtype[np.int64]], rank: int, checkpointing: bool, steps: int
) -> dict[str, Any]:
    """Run training steps of transformers + PEFT + bitsandbytes on token ids [batch, tokens].

    NF4 with double quantization, block 64, LoRA on every linear layer of the blocks, float32, AdamW. Returns
    the mean loss before the first step, the seconds of each step after one of warm-up, and the peak memory.
    """
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    peft: Any = importlib.import_module("peft")
    from nf4.model.llama import TARGETS

    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir,
        dtype=torch.float32,
        device_map="cpu",
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    lora = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, lora).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.0)
    batch = torch.from_numpy(ids)

    losses, seconds = [], []
    for _ in range(steps + 1):
        started = time.perf_counter()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        losses.append(float(loss.detach()))
        del loss
    return {
        "loss": losses[0],
        "trainable": sum(parameter.numel() for parameter in trainable),
        "seconds": seconds[1:],
        "peak_bytes": peak_bytes(),
    }


def main() -> None:
    """Print the answer to the command line as one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m nf4.bench.peers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("codec")
    one.add_argument("--rounds", type=int, required=True)
    two = commands.add_parser("train")
    two.add_argument("model")
    two.add_argument("ids", help=".npy of token ids, [batch, tokens]")
    two.add_argument("--rank", type=int, required=True)
    two.add_argument("--steps", type=int, required=True)
    two.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()
    if options.command == "codec":
        answer: dict[str, Any] = codec_side_by_side(options.rounds)
    else:
        ids = np.load(options.ids).astype(np.int64)
        answer = train(options.model, ids, options.rank, options.checkpointing, options.steps)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
