"""`nf4 eval`: how well a model predicts a text: nats per token, perplexity, bits per byte."""

import math
import time
import warnings
from pathlib import Path

import click

from nf4.cli.model import device_option, open_model, weight_options
from nf4.cli.output import json_option, print_json
from nf4.errors import CheckFailed
from nf4.parallel import worker_threads
from nf4.train.data import IGNORE, LOSS_ON, load_data
from nf4.train.gpu import gpu
from nf4.train.step import evaluate


@click.command("eval")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--seq-len",
    type=click.IntRange(1),
    help="Tokens a window.  [default: the model's positions, at most 512]",
)
@click.option("--loss-on", type=click.Choice(LOSS_ON), default="completion", show_default=True)
@weight_options
@device_option
@json_option
def command(
    model: Path,
    data: Path,
    seq_len: int | None,
    loss_on: str,
    adapter: Path | None,
    codebook: str | None,
    block_size: int | None,
    double_quant: bool | None,
    device: str,
    as_json: bool,
) -> None:
    """Measure MODEL on all of DATA, a plain text or JSON lines.

    A text is cut into windows of --seq-len tokens, each predicted from its own beginning.
    """
    on_gpu = gpu() if device == "cuda" else None
    opened = open_model(model, adapter, codebook, block_size, double_quant)
    positions = opened.model.config.max_position_embeddings
    length = seq_len or min(positions, 512)
    examples = load_data(
        data, opened.tokenizer, length, max_positions=positions, loss_on=loss_on, eval_path=data
    ).heldout
    learned = [int(token) for example in examples for token in example.targets if token != IGNORE]
    size = len(opened.tokenizer.decode(learned).encode("utf-8"))
    started = time.perf_counter()
    with warnings.catch_warnings():  # an overflow is told once, below
        warnings.simplefilter("ignore", RuntimeWarning)
        if on_gpu is not None:
            loss = on_gpu.evaluate(opened.model, examples)
        else:
            loss = evaluate(opened.model, examples, batch_size=worker_threads(), threads=worker_threads())
    seconds = time.perf_counter() - started
    if not math.isfinite(loss):
        raise CheckFailed(f"{model}: the loss on {data} is {loss}; the weights or the adapter are damaged")
    answer = {
        "model": str(model),
        "adapter": str(adapter) if adapter else None,
        "data": str(data),
        "weights": opened.weights,
        "seq_len": length,
        "tokens": len(learned),
        "bytes": size,
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": loss * len(learned) / (size * math.log(2)) if size else None,
        "seconds": seconds,
    }
    if as_json:
        print_json(answer)
        return
    bits = f"{answer['bits_per_byte']:.5f} bits per byte" if size else "no text"
    click.echo(
        f"{loss:.5f} nats per token, perplexity {answer['perplexity']:.4f}, {bits} "
        f"({len(learned):,} tokens, {size:,} bytes, windows of {length}; "
        f"weights {opened.weights}; {seconds:.1f} s)"
    )
