"""`nf4 generate`: text from a model, with an adapter or without, written as it comes."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from nf4 import bundled
from nf4.cli.model import device_option, open_model, weight_options
from nf4.cli.output import json_option, print_json
from nf4.errors import InputError
from nf4.formats.tokenizer import Tokenizer
from nf4.model.generate import generate
from nf4.train.gpu import gpu


@click.command("generate")
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.option("--prompt", required=True, help="The text to continue.")
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option(
    "--temperature", type=click.FloatRange(0.0), default=0.0, show_default=True, help="0: the likeliest."
)
@click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="0: all tokens.")
@click.option("--top-p", type=click.FloatRange(0.0, 1.0, min_open=True), default=1.0, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@weight_options
@device_option
@json_option
def command(
    model: Path | None,
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    adapter: Path | None,
    codebook: str | None,
    block_size: int | None,
    double_quant: bool | None,
    device: str,
    as_json: bool,
) -> None:
    """Continue a prompt with MODEL (the bundled model if none is named)."""
    on_gpu = gpu() if device == "cuda" else None
    opened = open_model(model or bundled.MODEL, adapter, codebook, block_size, double_quant)
    ids = opened.tokenizer.encode(prompt)
    if not ids:
        raise InputError(
            "--prompt is empty, and this model's tokenizer begins no text by itself; give some text"
        )
    positions = opened.model.config.max_position_embeddings
    room = positions - len(ids)
    if room < 1:
        raise InputError(f"--prompt has {len(ids)} tokens, but the model has {positions} positions")
    count = min(max_tokens, room)
    tokens: list[int] = []
    speaks: Any = opened.model if on_gpu is None else on_gpu.decoder(opened.model, len(ids), len(ids) + count)
    continued = generate if on_gpu is None else on_gpu.generate
    started = time.perf_counter()

    def produced() -> Iterator[int]:
        for token in continued(
            speaks,
            ids,
            count,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop_ids=opened.tokenizer.eos_ids,
        ):
            tokens.append(token)
            yield token

    if not as_json:
        click.echo(prompt, nl=False)
    text = ""
    for piece in pieces(produced(), ids, opened.tokenizer):
        text += piece
        if not as_json:
            click.echo(piece, nl=False)
    seconds = time.perf_counter() - started
    if as_json:
        print_json(
            {
                "prompt": prompt,
                "text": text,
                "prompt_tokens": len(ids),
                "tokens": tokens,
                "weights": opened.weights,
                "seconds": seconds,
            }
        )
        return
    click.echo()
    if len(tokens) == room < max_tokens:
        click.echo(f"stopped: the model has no more than {positions} positions", err=True)


def pieces(tokens: Iterator[int], prompt: list[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the text that tokens add to the prompt; the first bytes of an unfinished character wait."""
    ids = prompt[-8:]  # enough before the first token for the decoder to know what precedes it
    shown = tokenizer.decode(ids)
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("�"):
            yield text[len(shown) :]
            shown = text
    text = tokenizer.decode(ids)
    yield text[len(shown) :]
