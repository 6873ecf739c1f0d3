"""`nf4 bench`: speed and memory, alone or side by side with bitsandbytes and PEFT."""

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from nf4.cli.output import print_json, size
from nf4.errors import InputError
from nf4.ranks import started
from nf4.train.gpu import gpu

PEERS = {"codec": "bitsandbytes", "train": "peft"}
_TIMELINE = 24  # lines of each
_WAYS = {"prepared": "recipe", "plain": "bfloat16"}
"""Of the peer on the GPU, by name: what a column is called."""
_FLOAT64 = "float64_operations_per_second"


@click.command("bench")
@click.argument("what", type=click.Choice(list(PEERS)), default="codec")
@click.option("--against", type=click.Choice(list(PEERS.values())), help="Measure this peer in the same run.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where our side runs, and the peer's.",
)
@click.option(
    "--rounds", type=click.IntRange(1), help="Rounds after warm-up.  [default: codec 9, on cuda 20; train 2]"
)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="Train on this model, not on random weights; on cuda the rows of 135M, 1.2B or 8B alone.",
)
@click.option("--exact", is_flag=True, help="Measure exact training (NF4-15), too.")
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write the report here; - prints it."
)
def command(
    what: str,
    against: str | None,
    device: str,
    rounds: int | None,
    model: Path | None,
    exact: bool,
    json_path: Path | None,
) -> None:
    """Measure quantize and dequantize (codec), or one QLoRA training step (train).

    codec: float32 4096 x 4096 in blocks of 64, plain and double-quantized; on cuda bfloat16 of three
    shapes, and products with the weight. train: a model of SmolLM2-135M's shape in NF4 with double
    quantization, r 8 on all linear layers, 4 x 256 tokens, float32, AdamW. Both sides run with their own
    default number of threads. train on cuda: Llama-shaped models of 135M, 1.2B and 8B parameters, r 16,
    bfloat16, with the floor that arithmetic and memory set, a timeline, and generation; with --exact 135M
    alone. Under mpirun, train measures rank 0 alone and all ranks in turn, 4 x 256 tokens a rank; on cuda
    1.2B at 4 x 1024 and 8B at 4 x 2048.
    """
    if against is not None and PEERS[what] != against:
        raise InputError(f"nf4 bench {what} runs against {PEERS[what]}, not {against}")
    if what == "codec" and model is not None:
        raise InputError("--model is for  nf4 bench train; the codec is measured on random weights")
    if what == "codec" and exact:
        raise InputError("--exact is for  nf4 bench train; the codec is exact in every case")
    ranks = started()
    if ranks.size > 1:
        if what == "codec" or against is not None:
            raise InputError("ranks measure  nf4 bench train, without a peer; start what else by itself")
        from nf4.bench import ranks as shared

        if device == "cuda":
            ranks.each(gpu).take_device(ranks)
            from nf4_gpu.train import bench as training

            cases = training.cases(None if model is None else str(model), exact)
            report = {"gpu": training.gpu_name(), **shared.run(cases, ranks, rounds or 2, exact)}
        else:
            report = shared.run(shared.processors(model, exact), ranks, rounds or 2, exact)
        if ranks.rank:
            return
    elif device == "cuda":
        gpu()
        if what == "codec":
            from nf4_gpu import bench

            report = bench.run(rounds or 20, against)
        else:
            if rounds is not None:
                raise InputError(
                    "--rounds is not for  nf4 bench train --device cuda: it measures a few steps each"
                )
            from nf4_gpu.train import bench as training

            report = training.run(against, None if model is None else str(model), exact)
    elif what == "codec":
        from nf4.bench import codec

        report = codec.run(rounds or 9, against)
    else:
        from nf4.bench import train

        report = train.run(model, rounds or 2, against, exact)
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
    if report["benchmark"] == "cuda":
        show_cuda(report)
        return
    if report["benchmark"] == "train on cuda":
        show_training(report)
        return
    if report["benchmark"] == "ranks":
        show_ranks(report)
        return
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


def show_cuda(report: dict[str, Any]) -> None:
    """Print a table a shape: microseconds by side, our share of the rate of a copy, and the ratios."""
    click.echo(f"{report['gpu']}; kernel times in us, medians of {report['rounds']} graph replays")
    for found in report["shapes"]:
        rows, columns = found["shape"]
        copy = found["copy"]
        rate = copy["bytes_per_second"] / 1e12
        title = f"{rows} x {columns}: copy {copy['seconds'] * 1e6:.1f} us, {rate:.2f} TB/s"
        table = Table(show_edge=False, title=title, title_justify="left")
        sides = [side for side in ("nf4", report["against"], "cublas") if side is not None]
        table.add_column("operation", no_wrap=True)
        for column in ["nf4", "of copy", *(name for side in sides[1:] for name in (side, "ratio"))]:
            table.add_column(column, justify="right")
        for result in found["results"]:
            name = result["operation"] + (", double" if result["double_quant"] else "")
            seconds, ratios = result["seconds"], result["ratios"]
            cells = [f"{seconds['nf4'] * 1e6:.1f}", f"{result['of_copy']:.3f}"]
            for side in sides[1:]:
                there = side in ratios
                cells += [f"{seconds[side] * 1e6:.1f}", f"{ratios[side]:.2f}"] if there else ["", ""]
            table.add_row(name, *cells)
        Console().print(table)
    table = Table(show_edge=False, title="a call from Python, us of the host", title_justify="left")
    table.add_column("operation")
    sides = [side for side in ("nf4", report["against"]) if side is not None]
    for side in sides:
        table.add_column(side, justify="right")
    for result in report["calls"]:
        name = result["operation"] + (", double" if result["double_quant"] else "")
        seconds = result["seconds"]
        table.add_row(name, *(f"{seconds[side] * 1e6:.1f}" if side in seconds else "" for side in sides))
    Console().print(table)


def show_training(report: dict[str, Any]) -> None:
    """Print a row a measurement: time, memory, floor, ratios; then where the time of each goes.

    The peer is measured in two ways: as the QLoRA recipe prepares a model, and in bfloat16 throughout.
    """
    found = report["ceilings"]
    click.echo(
        f"{report['gpu']}; a copy runs at {found['copy_bytes_per_second'] / 1e12:.2f} TB/s, a product at "
        f"{found['product_operations_per_second'] / 1e12:.0f} TFLOP/s"
        + (f", in float64 at {found[_FLOAT64] / 1e12:.0f}" if _FLOAT64 in found else "")
    )
    table = Table(show_edge=False)
    columns = ["", "ms", "GiB", "floor, ms", "reached"]
    ways = _WAYS if report["against"] else {}
    for title in ways.values():
        columns += [f"{title}, ms", "GiB", "ratio"]
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for result in report["results"]:
        ours, peer = result["nf4"], result.get(report["against"]) or {"ways": []}
        by_way = {answer["way"]: answer for answer in peer["ways"]}
        answers = [by_way.get(way) for way in ways]  # None where there was no room
        if "tokens_per_second" in ours:
            floor = ours["bytes"] / found["copy_bytes_per_second"]
            rate = ours["tokens_per_second"]
            cells = [f"{1e3 / rate:.2f}", "", f"{1e3 * floor:.2f}", f"{floor * rate:.2f}"]
            for answer in answers:
                theirs = answer and answer["tokens_per_second"]
                cells += [f"{1e3 / theirs:.2f}", "", f"{rate / theirs:.2f}"] if theirs else [""] * 3
        else:
            floor = ours["floor_seconds"]
            cells = [f"{1e3 * ours['seconds']:.2f}", f"{ours['peak_bytes'] / 2**30:.2f}"]
            cells += [f"{1e3 * floor:.2f}", f"{floor / ours['seconds']:.2f}"]
            for answer in answers:
                if answer is None:
                    cells += [""] * 3
                else:
                    cells += [f"{1e3 * answer['seconds']:.2f}", f"{answer['peak_bytes'] / 2**30:.2f}"]
                    cells.append(f"{answer['seconds'] / ours['seconds']:.2f}")
        table.add_row(result["row"], *cells)
    Console(width=160).print(table)
    for result in report["results"]:
        click.echo(f"\n{result['row']}, one by one:")
        for row in result["nf4"]["timeline"][:_TIMELINE]:
            rate = f", {row['flops'] / 1e12:.0f} TFLOP/s" if row["flops"] else ""
            click.echo(f"  {1e3 * row['seconds']:9.3f} ms  {row['count']:4} x {row['what']}{rate}")


def show_ranks(report: dict[str, Any]) -> None:
    """Print a row a case: the step on one rank and on all, and what sharing it costs."""
    what = "exact" if report["exact"] else "fast"
    click.echo(
        f"{report.get('gpu', 'processors')}; {report['ranks']} ranks on {report['hosts']} hosts, "
        f"{report['threads'][0]} threads each; {what} mode; medians of {report['rounds']} rounds"
    )
    table = Table(show_edge=False)
    columns = ["", "one rank, ms", "tokens/s", f"{report['ranks']} ranks, ms", "tokens/s", "speed-up"]
    for i, column in enumerate([*columns, "over a share's, ms", "adapter"]):
        table.add_column(column, justify="right" if i else "left", no_wrap=not i)
    for row in report["results"]:
        seconds, rates = row["seconds"], row["tokens_per_second"]
        table.add_row(
            row["case"],
            f"{1e3 * seconds['one']:.1f}",
            f"{rates['one']:.0f}",
            f"{1e3 * seconds['all']:.1f}",
            f"{rates['all']:.0f}",
            f"{row['speed_up']:.3f}",
            f"{1e3 * row['overhead_seconds']:.1f}",
            "same bits" if row["same_bits"] else "other bits",
        )
    Console(width=140).print(table)
