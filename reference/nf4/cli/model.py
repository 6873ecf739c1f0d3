"""Opening a model, with an adapter and 4-bit weights or not, for the commands that run one."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from nf4.codebooks import CODEBOOKS
from nf4.formats.checkpoint import AS_STORED, QuantizeOptions, load_model, open_checkpoint
from nf4.formats.peft import load_adapter, read_trained_on
from nf4.formats.tokenizer import Tokenizer
from nf4.model.llama import Llama


@dataclass(frozen=True)
class Opened:
    """A model ready to run, its tokenizer, and in a few words what its weights are."""

    model: Llama
    tokenizer: Tokenizer
    weights: str


def device_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --device to a command."""
    return click.option(
        "--device",
        type=click.Choice(["cpu", "cuda"]),
        default="cpu",
        show_default=True,
        help="Where the model is computed: float32 on the CPU, bfloat16 on the GPU.",
    )(function)


def quantize_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --block-size and --double-quant to a command; None where they are not given."""
    for option in (
        click.option(
            "--double-quant/--no-double-quant", default=None, help="[default: as the adapter was trained]"
        ),
        click.option(
            "--block-size",
            type=int,
            help="Elements a scale: 32 to 4096.  [default: as the adapter was trained]",
        ),
    ):
        function = option(function)
    return function


def weight_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --adapter, --codebook, --block-size and --double-quant to a command."""
    function = quantize_options(function)
    for option in (
        click.option(
            "--codebook",
            type=click.Choice([*CODEBOOKS, AS_STORED]),
            help="Quantize the linear layers, or not.  [default: as the adapter was trained, else none]",
        ),
        click.option("--adapter", type=click.Path(path_type=Path), help="LoRA adapter, a PEFT directory."),
    ):
        function = option(function)
    return function


def settle(
    adapter: Path | None, codebook: str | None, block_size: int | None, double_quant: bool | None
) -> QuantizeOptions:
    """What is given, then what the adapter's file says it was trained on, then the defaults."""
    known = (read_trained_on(adapter) if adapter else None) or QuantizeOptions()
    return QuantizeOptions(
        block_size=known.block_size if block_size is None else block_size,
        codebook=codebook or known.codebook,
        double_quant=known.double_quant if double_quant is None else double_quant,
    )


def open_model(
    path: Path,
    adapter: Path | None,
    codebook: str | None,
    block_size: int | None,
    double_quant: bool | None,
) -> Opened:
    """Load model and tokenizer. An adapter runs on the weights it was trained on unless told otherwise.

    Raises InputError on a broken model or adapter.
    """
    source = open_checkpoint(path)
    tokenizer = source.tokenizer()  # before the weights: it is soon read, and may be missing
    options = None
    weights = "as stored"
    if codebook != AS_STORED and (adapter or codebook):
        options = settle(adapter, codebook, block_size, double_quant)
        if options.codebook != AS_STORED:
            nested = ", double-quantized" if options.double_quant else ""
            weights = f"{options.codebook}, block {options.block_size}{nested}"
    if "quantization_config" in source.config:
        weights = "as stored (4-bit)"
    model = load_model(source, quantize=options)
    if adapter is not None:
        model = Llama(model.config, model.params, load_adapter(adapter, model.config))
    return Opened(model, tokenizer, weights)
