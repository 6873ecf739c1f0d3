"""`nf4 merge`: an adapter into the weights, with the drift from the model as it was trained."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
from numpy.typing import NDArray

from nf4.cli.model import quantize_options, settle
from nf4.cli.output import TensorProgress, json_option, print_json
from nf4.codebooks import CODEBOOKS
from nf4.formats.checkpoint import AS_STORED, load_model, open_checkpoint
from nf4.formats.merge import write_merged
from nf4.formats.peft import load_adapter
from nf4.formats.tokenizer import Tokenizer
from nf4.model.config import LlamaConfig
from nf4.model.llama import Llama

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees Celsius because",
    "Question: What is 17 + 25?\nAnswer:",
    "In the beginning",
    "Dear Sir or Madam,\n\nI am writing to",
    "The three most important things about a program are",
)
"""What the drift is measured on: every position of these texts."""


@click.command("merge")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--onto",
    type=click.Choice(["original", "dequantized"]),
    required=True,
    help="The weights as MODEL stores them, or as training saw them: quantized and decoded.",
)
@click.option(
    "--codebook",
    type=click.Choice([*CODEBOOKS, AS_STORED]),
    help="none: not quantized.  [default: as the adapter was trained]",
)
@quantize_options
@json_option
def command(
    model: Path,
    adapter: Path,
    out: Path,
    onto: Literal["original", "dequantized"],
    codebook: str | None,
    block_size: int | None,
    double_quant: bool | None,
    as_json: bool,
) -> None:
    """Merge ADAPTER into MODEL, as plain safetensors in the new directory OUT, and report the drift.

    An adapter is trained on quantized weights. Merged onto the dequantized ones it computes the same up to
    rounding; onto the original ones, the quantization error it had learned to live with is gone, and the
    logits move. An adapter of another program doesn't say how its base was quantized: say it by --codebook,
    --block-size and --double-quant.
    """
    options = settle(adapter, codebook, block_size, double_quant)
    source = open_checkpoint(model)
    tokenizer = source.tokenizer()  # before the work: without one there is nothing to measure the drift on
    adapters = load_adapter(adapter, LlamaConfig.from_dict(source.config, str(source.path)))
    with TensorProgress("merging", quiet=as_json) as progress:
        write_merged(source, adapters, out, onto=onto, options=options, progress=progress)

    base = load_model(source, quantize=options)
    trained = prompt_logits(Llama(base.config, base.params, adapters), tokenizer)
    del base  # the two models are never in memory together
    merged = prompt_logits(load_model(out, quantize=None), tokenizer)
    found = drift(trained, merged)
    answer = {
        "model": str(model),
        "adapter": str(adapter),
        "output": str(out),
        "onto": onto,
        "trained_on": asdict(options),
        "prompts": list(PROMPTS),
        "drift": found,
    }
    if as_json:
        print_json(answer)
        return
    trained_on = "unquantized" if options.codebook == AS_STORED else options.codebook
    click.echo(
        f"{out}: merged onto the {onto} weights\n"
        f"drift of the logits against base + adapter on {trained_on} weights, "
        f"over the {found['positions']} positions of {len(PROMPTS)} prompts: "
        f"max |difference| {found['max_abs']:.3g}, mean {found['mean_abs']:.3g}; "
        f"KL {found['mean_kl']:.3g} nats a token (max {found['max_kl']:.3g}); "
        f"same likeliest token at {found['same_top']:.1%}"
    )


def prompt_logits(model: Llama, tokenizer: Tokenizer) -> NDArray[np.float32]:
    """Return the logits at every position of PROMPTS, [positions, vocabulary]."""
    most = model.config.max_position_embeddings
    return np.concatenate(
        [model.logits(np.asarray(tokenizer.encode(prompt)[:most], np.int32)) for prompt in PROMPTS]
    )


def drift(trained: NDArray[np.float32], merged: NDArray[np.float32]) -> dict[str, Any]:
    """Return how far merged is from trained, both [positions, vocabulary], as figures.

    KL is that of merged from trained, sum p_trained (log p_trained - log p_merged), in nats a position.
    """
    worst, total, same = 0.0, 0.0, 0
    divergences = []
    for a, b in zip(trained, merged, strict=True):  # a position at a time: float64 copies stay small
        difference = np.abs(a.astype(np.float64) - b)
        worst, total = max(worst, float(difference.max())), total + float(difference.mean())
        log_p, log_q = log_softmax(a), log_softmax(b)
        divergences.append(float(np.exp(log_p) @ (log_p - log_q)))
        same += int(a.argmax() == b.argmax())
    count = len(divergences)
    return {
        "positions": count,
        "max_abs": worst,
        "mean_abs": total / count,
        "mean_kl": sum(divergences) / count,
        "max_kl": max(divergences),
        "same_top": same / count,
    }


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the log probabilities of one position's logits [vocabulary], in float64."""
    shifted = logits.astype(np.float64) - float(logits.max())
    log_p: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return log_p
