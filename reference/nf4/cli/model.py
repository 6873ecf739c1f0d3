"""Opening a model, with an adapter and 4-bit weights or not, for the commands that run one."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from nf4.codebooks import CODEBOOKS
from nf4.formats.checkpoint import QuantizeOptions, load_model, open_checkpoint
from nf4.formats.peft import load_adapter
from nf4.formats.tokenizer import Tokenizer
from nf4.model.llama import Llama

AS_STORED = "none"


@dataclass(frozen=True)
class Opened:
    """A model ready to run, its tokenizer, and in a few words what its weights are."""

    model: Llama
    tokenizer: Tokenizer
    weights: str


def weight_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --adapter, --codebook, --block-size and --double-quant to a command."""
    for option in (
        click.option("--double-quant/--no-double-quant", default=True, show_default=True),
        click.option(
            "--block-size", type=int, default=64, show_default=True, help="Elements a scale: 32 to 4096."
        ),
        click.option(
            "--codebook",
            type=click.Choice([*CODEBOOKS, AS_STORED]),
            help="Quantize the linear layers first, or not.  [default: nf4 with --adapter, else none]",
        ),
        click.option("--adapter", type=click.Path(path_type=Path), help="LoRA adapter, a PEFT directory."),
    ):
        function = option(function)
    return function


def open_model(
    path: Path, adapter: Path | None, codebook: str | None, block_size: int, double_quant: bool
) -> Opened:
    """Load model and tokenizer. An adapter runs on NF4 weights unless told otherwise: it was trained on them.

    Raises InputError on a broken model or adapter.
    """
    source = open_checkpoint(path)
    tokenizer = source.tokenizer()  # before the weights: it is soon read, and may be missing
    codebook = codebook or ("nf4" if adapter else AS_STORED)
    options = None
    weights = "as stored"
    if codebook != AS_STORED:
        options = QuantizeOptions(block_size=block_size, codebook=codebook, double_quant=double_quant)
        weights = f"{codebook}, block {block_size}{', double-quantized' if double_quant else ''}"
    if "quantization_config" in source.config:
        weights = "as stored (4-bit)"
    model = load_model(source, quantize=options)
    if adapter is not None:
        model = Llama(model.config, model.params, load_adapter(adapter, model.config))
    return Opened(model, tokenizer, weights)
