"""`nf4 inspect`: what a model, an adapter or a safetensors file holds, tensor by tensor and in all."""

import math
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from nf4.cli.output import json_option, print_json, size
from nf4.formats.bitsandbytes import StoredWeight, group_names
from nf4.formats.checkpoint import open_checkpoint
from nf4.formats.files import DTYPES, SafetensorsFile, read_json
from nf4.formats.peft import CONFIG as ADAPTER_CONFIG
from nf4.formats.peft import WEIGHTS as ADAPTER_WEIGHTS
from nf4.nested import NestedAbsmax
from nf4.tensor import QuantizedTensor

ADAPTER_KEYS = ("base_model_name_or_path", "r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules")


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@json_option
def command(path: Path, as_json: bool) -> None:
    """List the tensors of PATH: dtype, shape, block size, codebook, bits per weight, bytes, and the totals.

    PATH is a Hugging Face directory (4-bit ones too), a GGUF file, an adapter, or one safetensors file.
    """
    answer = describe(path)
    if as_json:
        print_json(answer)
    else:
        show(answer)


def describe(path: Path) -> dict[str, Any]:
    """Return kind, facts, tensors and totals of `path`. Raises InputError on any other format."""
    facts: dict[str, Any] = {}
    if (path / ADAPTER_CONFIG).exists():
        kind = "PEFT adapter"
        config = read_json(path / ADAPTER_CONFIG)
        facts = {key: config[key] for key in ADAPTER_KEYS if key in config}
        rows = safetensors_rows(SafetensorsFile(path / ADAPTER_WEIGHTS))
    elif path.is_file() and path.suffix == ".safetensors":
        kind = "safetensors file"
        rows = safetensors_rows(SafetensorsFile(path))
    else:
        source = open_checkpoint(path)
        facts = {key: source.config[key] for key in ("model_type",) if key in source.config}
        kind = "GGUF model" if source.path.is_file() else "Hugging Face model"
        rows = []
        for name in source.names():
            dtype, shape = source.dtype(name), source.shape(name)
            value = source.read(name) if kind == "Hugging Face model" and dtype not in DTYPES else None
            rows.append(
                quantized_row(name, value) if isinstance(value, QuantizedTensor) else row(name, dtype, shape)
            )
    rows.sort(key=lambda item: _natural(item["name"]))
    return {"path": str(path), "kind": kind, **facts, "tensors": rows, "total": total(rows)}


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def safetensors_rows(file: SafetensorsFile) -> list[dict[str, Any]]:
    """Return a row for each tensor of one file; the parts of a 4-bit weight make one row."""
    groups = group_names(file.entries, str(file.path))
    parts = {part for names in groups.values() for part in names}
    rows = [row(name, entry.dtype, entry.shape) for name, entry in file.entries.items() if name not in parts]
    rows += [
        quantized_row(name, StoredWeight(name, dict.fromkeys(keys, file)).read())
        for name, keys in groups.items()
    ]
    return rows


def row(name: str, dtype: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Return the row of a plain tensor, or of one in a GGUF block format."""
    count = math.prod(shape)
    block_size = None
    if dtype in DTYPES:
        nbytes = count * DTYPES[dtype].itemsize
    else:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        elements, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]
        nbytes = count // elements * block_bytes
        block_size = elements if elements > 1 else None
    return {
        "name": name,
        "dtype": dtype,
        "shape": list(shape),
        "block_size": block_size,
        "codebook": None,
        "double_quant": None,
        "bits_per_weight": 8 * nbytes / count if count else 0.0,
        "bytes": nbytes,
    }


def quantized_row(name: str, q: QuantizedTensor) -> dict[str, Any]:
    """Return the row of a 4-bit weight; its bytes are codes and scales, without the tables (NF4-5.4)."""
    return {
        "name": name,
        "dtype": q.dtype.name,
        "shape": list(q.shape),
        "block_size": q.block_size,
        "codebook": q.codebook.name,
        "double_quant": isinstance(q.absmax, NestedAbsmax),
        "bits_per_weight": q.bits_per_weight,
        "bytes": q.nbytes,
    }


def total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the sums over all rows, and over those that are 4-bit."""

    def part(items: list[dict[str, Any]]) -> dict[str, Any]:
        count = sum(math.prod(item["shape"]) for item in items)
        nbytes = sum(item["bytes"] for item in items)
        bits = 8 * nbytes / count if count else 0.0
        return {"tensors": len(items), "parameters": count, "bytes": nbytes, "bits_per_weight": bits}

    return {**part(rows), "quantized": part([item for item in rows if item["codebook"] is not None])}


def show(answer: dict[str, Any]) -> None:
    """Print the answer as a table."""
    console = Console()
    if not console.is_terminal:
        console.width = 160  # piped into another program: a row stays on a line
    facts = [f"{key} {answer[key]}" for key in ("model_type", *ADAPTER_KEYS) if key in answer]
    click.echo(": ".join([answer["path"], ", ".join([answer["kind"], *facts])]))
    table = Table(show_edge=False)
    table.add_column("tensor")
    table.add_column("dtype")
    for column in ("shape", "block", "codebook", "bits/weight", "bytes"):
        table.add_column(column, justify="right")
    for item in answer["tensors"]:
        double = " + double" if item["double_quant"] else ""
        table.add_row(
            item["name"],
            item["dtype"],
            " x ".join(map(str, item["shape"])) or "scalar",
            str(item["block_size"] or ""),
            f"{item['codebook']}{double}" if item["codebook"] else "",
            f"{item['bits_per_weight']:.3f}",
            f"{item['bytes']:,}",
        )
    console.print(table)
    sums = answer["total"]
    click.echo(
        f"{sums['tensors']} tensors, {sums['parameters']:,} parameters, {sums['bytes']:,} bytes "
        f"({size(sums['bytes'])}), {sums['bits_per_weight']:.3f} bits per weight"
    )
    part = sums["quantized"]
    if part["tensors"]:
        click.echo(
            f"of them in 4 bits: {part['tensors']} tensors, {part['parameters']:,} parameters, "
            f"{part['bytes']:,} bytes, {part['bits_per_weight']:.3f} bits per weight"
        )
