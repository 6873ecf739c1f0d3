"""One QLoRA training step, ours and PEFT's, each side in fresh processes that take turns."""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.bench import machine
from nf4.errors import InputError
from nf4.parallel import worker_threads

BATCH, TOKENS, RANK = 4, 256, 8
PEER_PACKAGES = ("torch", "bitsandbytes", "transformers", "peft", "accelerate")
STEPS_A_ROUND = 2

# The shape of SmolLM2-135M.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def run(model: Path | None, rounds: int, against: str | None, exact: bool = False) -> dict[str, Any]:
    """Measure one step of 4 x 256 tokens and return the report (see `nf4 bench train --json`).

    Both sides read the same float32 weights: those of `model`, or random ones in SmolLM2-135M's shape. Each
    round starts a fresh process a side, which loads, quantizes, takes one step of warm-up and two timed ones.
    exact: the exact tier is a side, too. Raises InputError if the model can't be read or the peer isn't
    installed.
    """
    if against is not None:
        machine.require(PEER_PACKAGES, f"nf4 bench train --against {against}")
    with tempfile.TemporaryDirectory(prefix="nf4-bench-") as name:
        directory = Path(name) / "model"
        if model is None:
            write_random_model(directory, CONFIG)
        else:
            from nf4.formats.bitsandbytes import write_dequantized
            from nf4.formats.checkpoint import open_checkpoint

            write_dequantized(open_checkpoint(model), directory, np.dtype(np.float32))
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        positions = config["max_position_embeddings"]
        if positions < TOKENS:
            raise InputError(f"{model}: has {positions} positions, but the step measured takes {TOKENS}")
        ids = np.random.default_rng(1).integers(0, config["vocab_size"], (BATCH, TOKENS))
        ids_file = str(Path(name) / "ids.npy")
        np.save(ids_file, ids)

        common = [str(directory), ids_file, "--rank", str(RANK), "--steps", str(STEPS_A_ROUND)]
        sides = {
            "nf4": ("nf4.bench.train", common),
            "nf4, checkpointing": ("nf4.bench.train", [*common, "--checkpointing"]),
        }
        if exact:
            sides["nf4, exact"] = ("nf4.bench.train", [*common, "--exact"])
        if against is not None:
            sides[against] = ("nf4.bench.peers", ["train", *common])
            sides[f"{against}, checkpointing"] = ("nf4.bench.peers", ["train", *common, "--checkpointing"])
        answers: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for turn in range(rounds):
            for side in sides if turn % 2 == 0 else reversed(sides):
                answers[side].append(json.loads(machine.run_module(*sides[side])))
    results = {side: summary(side, rows) for side, rows in answers.items()}
    return {
        "benchmark": "train",
        **machine.describe(PEER_PACKAGES if against else ()),
        "against": against,
        "model": "random weights, SmolLM2-135M's shape" if model is None else str(model),
        "batch": [BATCH, TOKENS],
        "rank": RANK,
        "rounds": rounds,
        "results": list(results.values()),
        "ratios": ratios(results, against),
    }


def summary(side: str, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median seconds of all steps, tokens per second, and the largest peak memory."""
    seconds = statistics.median(second for answer in answers for second in answer["seconds"])
    return {
        "side": side,
        "seconds": seconds,
        "tokens_per_second": BATCH * TOKENS / seconds,
        "peak_bytes": max(answer["peak_bytes"] for answer in answers),
        "loss": answers[0]["loss"],
        "trainable": answers[0]["trainable"],
    }


def ratios(results: dict[str, dict[str, Any]], against: str | None) -> dict[str, float]:
    """Return ours over the peer's, as users run it by default and at its thriftiest; exact over fast time."""
    table = {}
    if "nf4, exact" in results:
        slower = results["nf4, exact"]["seconds"] / results["nf4"]["seconds"]
        table["time (nf4, exact) / (nf4)"] = slower
    if against is None:
        return table
    for ours, peer in (
        ("nf4", against),
        ("nf4, checkpointing", against),
        ("nf4, checkpointing", f"{against}, checkpointing"),
    ):
        pair = f"({ours}) / ({peer})"
        table[f"tokens/s {pair}"] = results[ours]["tokens_per_second"] / results[peer]["tokens_per_second"]
        table[f"peak memory {pair}"] = results[ours]["peak_bytes"] / results[peer]["peak_bytes"]
    table["loss nf4 / peer"] = results["nf4"]["loss"] / results[against]["loss"]
    return table


def write_random_model(directory: Path, config: dict[str, Any]) -> None:
    """Write a Llama checkpoint of N(0, 0.02) weights in float32, one tensor in memory at a time."""
    from nf4.formats.files import SafetensorsWriter, TensorSpec, write_json
    from nf4.model.config import LlamaConfig
    from nf4.model.llama import parameter_shapes

    shapes = parameter_shapes(LlamaConfig.from_dict(config, "the random model"))
    directory.mkdir()
    write_json(directory / "config.json", config)
    generator = np.random.default_rng(0)
    specs = {name: TensorSpec(np.dtype(np.float32), shape) for name, shape in shapes.items()}
    with SafetensorsWriter(directory / "model.safetensors", specs) as writer:
        for name, shape in shapes.items():
            if len(shape) == 1:
                writer.write(name, np.ones(shape, np.float32))
            else:
                weights = generator.standard_normal(shape, dtype=np.float32)
                weights *= np.float32(0.02)
                writer.write(name, weights)


def our_steps(
    model_dir: str, ids: NDArray[np.int64], rank: int, checkpointing: bool, steps: int, exact: bool = False
) -> dict[str, Any]:
    """Run training steps of this project on token ids [batch, tokens]; the counterpart of peers.train."""
    from nf4.formats.checkpoint import QuantizeOptions, load_model
    from nf4.formats.peft import linear_shapes
    from nf4.lora import init_lora
    from nf4.model.llama import Llama
    from nf4.train.data import IGNORE, Example
    from nf4.train.engine import Engine, FastEngine
    from nf4.train.exact import ExactEngine

    base = load_model(model_dir, quantize=QuantizeOptions())
    adapters = {
        name: init_lora(name, inputs, outputs, rank, alpha=2 * rank, dropout=0.0, seed=0)
        for name, (outputs, inputs) in linear_shapes(base.config).items()
    }
    model = Llama(base.config, base.params, adapters)
    settings: dict[str, Any] = {
        "batch_size": len(ids),
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "checkpointing": checkpointing,
        "seed": 0,
        "threads": worker_threads(),
    }
    engine: Engine = ExactEngine(model, **settings) if exact else FastEngine(model, "lora", **settings)
    tokens = ids.astype(np.int32)
    # As transformers shifts its labels: the last position predicts nothing.
    examples = [Example(row, np.append(row[1:], np.int32(IGNORE))) for row in tokens]

    losses, seconds = [], []
    for _ in range(steps + 1):
        started = time.perf_counter()
        update = engine.step([(examples, range(len(examples)))], 1e-4)
        seconds.append(time.perf_counter() - started)
        losses.append(update.loss)
    return {
        "loss": losses[0],
        "trainable": sum(array.size for array in engine.optimizer.params.values()),
        "seconds": seconds[1:],
        "peak_bytes": machine.peak_bytes(),
    }


def main() -> None:
    """Print the figures of our side as one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m nf4.bench.train", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("ids", help=".npy of token ids, [batch, tokens]")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--exact", action="store_true")
    options = parser.parse_args()
    ids = np.load(options.ids)
    answer = our_steps(options.model, ids, options.rank, options.checkpointing, options.steps, options.exact)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
