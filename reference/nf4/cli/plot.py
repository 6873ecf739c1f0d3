"""`nf4 plot`: the pictures that explain NF4."""

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from nf4 import bundled
from nf4.blockwise import check_block_size
from nf4.cli.output import json_option, print_json
from nf4.codebooks import CODEBOOKS
from nf4.evidence import plots
from nf4.evidence.weights import weights_of


@click.command("plot")
@click.argument("what", type=click.Choice(["grid"]))
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.option("--block-size", type=int, default=64, show_default=True, help="Elements a scale: 32 to 4096.")
@click.option("--out", type=click.Path(path_type=Path), default="grid.png", show_default=True)
@json_option
def command(what: str, model: Path | None, block_size: int, out: Path, as_json: bool) -> None:
    """Draw the NF4 grid and a uniform one under the normal density and under real weights, as a PNG.

    With the share of the values in each of NF4's bins: of normal data as the table is derived from, of normal
    data over the absmax of blocks, and of the weights of MODEL (the bundled model where none is given).
    """
    del what  # there is one picture so far
    check_block_size(block_size)
    weights = weights_of(model or bundled.MODEL)
    name = "the bundled model" if model is None else model.name
    plots.draw_grid(out, weights, block_size, name)
    values = sorted(map(float, CODEBOOKS["nf4"].values))
    found = plots.bin_masses(weights, "nf4", block_size)
    answer: dict[str, Any] = {
        "picture": str(out),
        "model": str(model) if model else "bundled",
        "block_size": block_size,
        "values": values,
        "masses": {key: shares.tolist() for key, shares in found.items()},
    }
    if as_json:
        print_json(answer)
        return
    table = Table(
        show_edge=False, title="% of the values in each bin of NF4 (1/16 is 6.25)", title_justify="left"
    )
    table.add_column("value", justify="right")
    for key in found:
        table.add_column(key, justify="right")
    for i, value in enumerate(values):
        table.add_row(f"{value:.6f}", *(f"{100 * shares[i]:.2f}" for shares in found.values()))
    Console().print(table)
    click.echo(f"written: {out}")
