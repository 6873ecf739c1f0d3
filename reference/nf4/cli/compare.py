"""`nf4 compare`: NF4 beside other 4-bit grids on real weights and on normal data."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from nf4 import bundled
from nf4.blockwise import BLOCK_SIZES, check_block_size
from nf4.cli.output import TensorProgress, json_option, print_json
from nf4.errors import InputError
from nf4.evidence import compare, plots
from nf4.evidence.grids import QUANTIZERS
from nf4.evidence.weights import weights_of
from nf4.formats.files import DTYPES as STORED
from nf4.formats.files import atomic_directory, check_output_directory

_BY_KIND = 64  # the block size at which kinds and layers are shown, if it is among those compared


@click.command("compare")
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.option("--data", type=click.Path(path_type=Path), help="Text or JSON lines to measure perplexity on.")
@click.option(
    "--block-size", "block_sizes", type=int, multiple=True, help="May be repeated.  [default: 32 to 4096]"
)
@click.option(
    "--quantizer",
    "quantizers",
    type=click.Choice(list(QUANTIZERS)),
    multiple=True,
    help="May be repeated.  [default: all]",
)
@click.option(
    "--tokens", type=click.IntRange(0), default=16384, show_default=True, help="Of the text; 0 for all."
)
@click.option("--out", type=click.Path(path_type=Path), help="New directory for compare.json and the plots.")
@json_option
def command(
    model: Path | None,
    data: Path | None,
    block_sizes: tuple[int, ...],
    quantizers: tuple[str, ...],
    tokens: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Compare 4-bit quantizers on the linear weights of MODEL: bits, errors, and with --data perplexity.

    MODEL is a Hugging Face directory, a GGUF file or one safetensors file of matrices. Without it: the
    bundled model with its held-out text, and 4 million normal values. Errors are those of the decoded weight,
    relative to the weight: RMS, mean magnitude, and the greatest in units of its tensor's RMS.
    """
    for size in block_sizes:
        check_block_size(size)
    sizes = sorted(set(block_sizes)) or list(BLOCK_SIZES)
    names = [name for name in QUANTIZERS if not quantizers or name in quantizers]
    pairs = [(name, size) for name in names for size in sizes]
    if model is None and data is not None:
        raise InputError("--data is given without MODEL; give both, or neither for the bundled ones")
    if data is not None and model is not None and model.suffix == ".safetensors" and model.is_file():
        raise InputError(f"{model}: perplexity needs a whole model, with its config and tokenizer")
    if out is not None:
        check_output_directory(out)
    path, text = (bundled.MODEL, bundled.HELDOUT_TEXT) if model is None else (model, data)
    weights = weights_of(path)
    before = sorted({weight.stored for weight in weights} - set(STORED))
    if before:
        click.echo(
            f"nf4: weights of {path} are stored as {', '.join(before)}: "
            "the errors are those of quantizing them a second time",
            err=True,
        )
    examples = [] if text is None else compare.windows(path, text, tokens)
    with TensorProgress("comparing", quiet=as_json) as progress:
        parts = {str(path): compare.compare(weights, pairs, progress, model=path, examples=examples)}
        if model is None:
            parts[compare.NORMAL] = compare.compare_normal(pairs, progress)
    report = compare.report(parts)
    written: list[Path] = []
    if out is not None:
        at = shown_size(sizes)
        results = parts[str(path)]["results"]
        name = "the bundled model" if model is None else path.name
        with atomic_directory(out) as work:
            (work / "compare.json").write_text(json.dumps(report, indent=1) + "\n")
            plots.draw_histogram(work / "histogram.png", weights, at, f"{name}: {len(weights)} tensors")
            plots.draw_error_against_bits(work / "error-bits.png", results, name)
            if results[0]["layers"]:
                plots.draw_error_by_layer(work / "error-layers.png", results, at, f"{name}, block {at}")
            if model is None:
                results = parts[compare.NORMAL]["results"]
                plots.draw_error_against_bits(work / "error-bits-normal.png", results, compare.NORMAL)
            written = sorted(out / file.name for file in work.iterdir())
    if as_json:
        print_json(report)
        return
    for what, part in parts.items():
        show(what, part, names, sizes)
    if written:
        click.echo(f"\nwritten: {', '.join(map(str, written))}")


def shown_size(sizes: Sequence[int]) -> int:
    """Return the block size at which kinds and layers are shown."""
    return _BY_KIND if _BY_KIND in sizes else sizes[0]


def show(what: str, part: dict[str, Any], names: Sequence[str], sizes: Sequence[int]) -> None:
    """Print the tables of one source: all figures at one block size, and the error at each."""
    rows = {(row["quantizer"], row["block_size"]): row for row in part["results"]}
    at, full = shown_size(sizes), part["full_precision"]
    some = rows[names[0], at]
    kinds = list(some["kinds"]) if len(some["kinds"]) > 1 else []
    tensors = f"{part['tensors']} tensor{'s' * (part['tensors'] != 1)}"
    click.echo(f"\n{what}: {tensors}, {some['weights']:,} weights")
    if full is not None:
        click.echo(
            f"full precision: perplexity {full['perplexity']:.4f}, likeliest token right "
            f"{full['accuracy']:.2%}, on {full['tokens']:,} tokens"
        )
    head = ["bits", "RMS %", "mean %", "max", *(["perplexity", "nats more", "points lost"] if full else [])]
    figures = {}
    for name in names:
        row = rows[name, at]
        cells = [
            f"{row['bits_per_weight']:.3f}",
            f"{100 * row['relative_rms_error']:.3f}",
            f"{100 * row['relative_mean_error']:.3f}",
            f"{row['max_error']:.2f}",
        ]
        if full is not None:
            cells += [
                f"{row['perplexity']:.4f}",
                f"{row['loss_increase']:.5f} ±{row['loss_increase_error']:.5f}",
                f"{row['points_lost']:.2f} ±{row['points_lost_error']:.2f}",
            ]
        figures[name] = cells
    _table(f"block {at}", head, figures)
    if kinds:
        errors = {
            name: [f"{100 * rows[name, at]['kinds'][kind]['relative_rms_error']:.3f}" for kind in kinds]
            for name in names
        }
        _table(f"RMS error %, block {at}, by kind of tensor", kinds, errors)
    if len(sizes) > 1:
        heads = list(map(str, sizes))
        for title, key, scale in (
            ("bits per weight, by block size", "bits_per_weight", 1),
            ("RMS error %, by block size", "relative_rms_error", 100),
            *([("perplexity, by block size", "perplexity", 1)] if full is not None else []),
        ):
            by_size = {name: [f"{scale * rows[name, size][key]:.3f}" for size in sizes] for name in names}
            _table(title, heads, by_size)


def _table(title: str, columns: Sequence[str], rows: dict[str, list[str]]) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 160  # piped into another program: a row stays on a line
    table = Table(show_edge=False, title=title, title_justify="left")
    table.add_column("quantizer", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)
