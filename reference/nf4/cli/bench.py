"""`nf4 bench`: speed and memory, alone or side by side with bitsandbytes and PEFT."""

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from nf4.cli.output import print_json, size
from nf4.errors import InputError

PEERS = {"codec": "bitsandbytes", "train": "peft"}


@click.command("bench")
@click.argument("what", type=click.Choice(list(PEERS)), default="codec")
@click.option("--against", type=click.Choice(list(PEERS.values())), help="Measure this peer in the same run.")
@click.option("--rounds", type=click.IntRange(1), help="Rounds after warm-up.  [default: codec 9, train 2]")
@click.option("--model", type=click.Path(path_type=Path), help="Train on this model, not on random weights.")
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write the report here; - prints it."
)
def command(
    what: str, against: str | None, rounds: int | None, model: Path | None, json_path: Path | None
) -> None:
    """Measure quantize and dequantize (codec), or one QLoRA training step (train).

    codec: float32 4096 x 4096 in blocks of 64, plain and double-quantized. train: a model of SmolLM2-135M's
    shape in NF4 with double quantization, r 8 on all linear layers, 4 x 256 tokens, float32, AdamW. Both
    sides run with their own default number of threads.
    """
    if against is not None and PEERS[what] != against:
        raise InputError(f"nf4 bench {what} runs against {PEERS[what]}, not {against}")
    if what == "codec":
        from nf4.bench import codec

        if model is not None:
            raise InputError("--model is for  nf4 bench train; the codec is measured on random weights")
        report = codec.run(rounds or 9, against)
    else:
        from nf4.bench import train

        report = train.run(model, rounds or 2, against)
    if json_path == Path("-"):
        print_json(report)
        return
    show(report)
    if json_path is not None:
        from nf4.formats.files import atomic_write

        with atomic_write(json_path) as file:
            file.write((json.dumps(report, indent=2) + "\n").encode())
        click.echo(f"written: {json_path}")


def show(report: dict[str, Any]) -> None:
    """Print the report as a table, under the machine it was measured on."""
    on = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    click.echo(
        f"{on['cpu']}, {on['cores']} cores, {size(on['ram_bytes'])} RAM, {on['system']}; {report['date']}"
    )
    click.echo(versions)
    codec = report["benchmark"] == "codec"
    table = Table(show_edge=False)
    for column in (
        ["operation", "nf4", report["against"], "ratio"] if codec else ["side", "tokens/s", "peak", "loss"]
    ):
        if column is not None:
            table.add_column(column, justify="left" if column in {"operation", "side"} else "right")
    for row in report["results"]:
        if codec:
            speeds = [row[side]["elements_per_second"] for side in ("nf4", report["against"]) if side in row]
            ratio = [f"{row['speed_ratio']:.2f}"] if "speed_ratio" in row else []
            table.add_row(row["operation"], *(f"{speed / 1e6:.0f} M/s" for speed in speeds), *ratio)
        else:
            table.add_row(
                row["side"],
                f"{row['tokens_per_second']:.1f}",
                size(row["peak_bytes"]),
                f"{row['loss']:.6f}",
            )
    Console().print(table)
    for name, ratio in report.get("ratios", {}).items():
        click.echo(f"{name}: {ratio:.2f}")
