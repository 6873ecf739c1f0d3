"""`nf4 plan`: the memory of inference and training by part, and the cards that hold it."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from nf4.blockwise import check_block_size
from nf4.cli.output import json_option, print_json, size
from nf4.errors import InputError
from nf4.evidence import plan
from nf4.formats.checkpoint import LINEAR_WEIGHT, open_checkpoint
from nf4.formats.files import read_json
from nf4.model.config import LlamaConfig
from nf4.parallel import worker_threads

ENGINES = {engine.name: engine for engine in (plan.CUDA, plan.CPU)}
_UNITS = {"": 1.0, "M": 1e6, "B": 1e9, "T": 1e12}
_ADAPTER_BYTES = {"float32": 4, "bfloat16": 2}


def _parameters(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Read 7B, 1.5b, 135M or 7000000000."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d*)?)([MBT]?)", value.strip().upper())
    count = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not 1e6 <= count <= 1e13:
        raise InputError(f"--params {value}: give a number of parameters such as 7B or 135M, from 1M to 10T")
    return count


@click.command("plan")
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.option("--params", callback=_parameters, help="Instead of MODEL, a number of parameters, such as 7B.")
@click.option("--gpu", type=float, help="Memory of the card in GB, as it is sold: does it hold this?")
@click.option("--device", type=click.Choice(list(ENGINES)), default="cuda", show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=4, show_default=True)
@click.option("--seq-len", type=click.IntRange(1), default=256, show_default=True, help="Tokens a sequence.")
@click.option("--rank", type=click.IntRange(1), default=8, show_default=True, help="Of the adapters.")
@click.option(
    "--adapter-dtype", type=click.Choice(list(_ADAPTER_BYTES)), default="float32", show_default=True
)
@click.option("--block-size", type=int, default=64, show_default=True, help="Weights a scale: 32 to 4096.")
@click.option(
    "--context", type=click.IntRange(1), default=2048, show_default=True, help="Tokens in inference."
)
@click.option("--threads", type=click.IntRange(1), help="Of the CPU.  [default: the processors]")
@json_option
def command(
    model: Path | None,
    params: float | None,
    gpu: float | None,
    device: str,
    batch_size: int,
    seq_len: int,
    rank: int,
    adapter_dtype: str,
    block_size: int,
    context: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Plan the memory of inference and of LoRA training, in 16 bits, NF4, and NF4 double-quantized.

    MODEL is a Hugging Face directory, its config.json, or a GGUF file; --params takes the shape of the
    published model of that size instead. On cuda, the plan is of one GPU that computes in bfloat16; on cpu,
    of nf4 finetune and nf4 generate. Adapters are on all linear layers.
    """
    check_block_size(block_size)
    if (model is None) == (params is None):
        raise InputError("give a MODEL or a number of parameters by --params, and not both")
    if gpu is not None and not 0 < gpu < 1e6:
        raise InputError(f"--gpu {gpu}: it is the memory of a card in GB, above 0")
    if gpu is not None and device == "cpu":
        raise InputError("--gpu is for the plan of a GPU; leave --device cpu away")
    if params is not None:
        name, config = plan.family_shape(params)
        source = 2
    else:
        assert model is not None
        name, config, source = str(model), *read_shape(model)
    run = plan.Run(
        batch_size=batch_size,
        seq_len=min(seq_len, config.max_position_embeddings),
        rank=rank,
        adapter=_ADAPTER_BYTES[adapter_dtype],
        block_size=block_size,
        context=min(context, config.max_position_embeddings),
        source=source,
        threads=threads or worker_threads(),
    )
    answer = describe(name, config, run, ENGINES[device], gpu)
    if as_json:
        print_json(answer)
    else:
        show(answer)


def read_shape(model: Path) -> tuple[LlamaConfig, int]:
    """Return a model's shape and the bytes of a value of its linear weights (2 where only its config is)."""
    if model.name == "config.json" or (model / "config.json").exists():
        path = model if model.name == "config.json" else model / "config.json"
        config = read_json(path)
        kind = config.get("torch_dtype") or config.get("dtype")
        return LlamaConfig.from_dict(config, str(path)), 4 if kind == "float32" else 2
    source = open_checkpoint(model)
    linear = next((name for name in source.names() if LINEAR_WEIGHT.fullmatch(name)), None)
    if linear is None:
        raise InputError(f"{model}: has no linear layers of the Llama family")
    return LlamaConfig.from_dict(source.config, str(source.path)), source.value_dtype(linear).itemsize


def describe(
    name: str, config: LlamaConfig, run: plan.Run, engine: plan.Engine, gpu: float | None
) -> dict[str, Any]:
    """Return the plan as `nf4 plan --json` prints it, in bytes."""
    phases = {
        "inference": {form: plan.inference(config, engine, run, form) for form in plan.FORMS},
        "training": {form: plan.training(config, engine, run, form, False) for form in plan.FORMS},
        "training, checkpointing": {
            form: plan.training(config, engine, run, form, True) for form in plan.FORMS
        },
    }
    answer: dict[str, Any] = {
        "model": name,
        "parameters": plan.parameter_count(config),
        "shape": {
            key: getattr(config, key)
            for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
                        "num_key_value_heads", "vocab_size")
        },
        "device": engine.name,
        "run": asdict(run),
        "stored": {form: plan.stored(config, run, form) for form in plan.FORMS},
        "phases": {
            phase: {form: {"parts": parts, "total": plan.total(parts)} for form, parts in forms.items()}
            for phase, forms in phases.items()
        },
    }  # fmt: skip
    if engine is plan.CUDA:
        answer["smallest_card_gb"] = {
            phase: {form: plan.smallest_card(parts) for form, parts in forms.items()}
            for phase, forms in phases.items()
        }
    if gpu is not None:
        answer["gpu_gb"] = gpu
        answer["holds"] = {
            phase: {form: plan.holds(gpu, parts) for form, parts in forms.items()}
            for phase, forms in phases.items()
        }
        answer["longest_sequence"] = plan.longest_sequence(config, run, gpu)
        answer["ways_to_fit"] = [asdict(way) for way in plan.ways_to_fit(config, run, gpu)]
    return answer


def show(answer: dict[str, Any]) -> None:
    """Print the plan as a table a phase, and what a card makes of it."""
    shape, run, cuda = answer["shape"], answer["run"], answer["device"] == "cuda"
    where = "one GPU, bfloat16" if cuda else f"nf4 on a CPU, float32, {run['threads']} threads"
    click.echo(
        f"{answer['model']}: {answer['parameters'] / 1e9:.3g} billion parameters, "
        f"{shape['num_hidden_layers']} layers x {shape['hidden_size']}, {shape['intermediate_size']}; "
        f"{shape['num_attention_heads']} heads, {shape['num_key_value_heads']} of keys; "
        f"vocabulary {shape['vocab_size']}"
    )
    full = answer["stored"][plan.UNQUANTIZED]
    sizes = ", ".join(
        f"{size(count)} in {form}" + (f" ({full / count:.2f} times less)" if count < full else "")
        for form, count in answer["stored"].items()
    )
    click.echo(f"stored: {sizes}\non {where}; GB are 10^9 bytes\n")
    step = f"{run['batch_size']} x {run['seq_len']} tokens, rank {run['rank']}"
    titles = {
        "inference": f"inference, {run['context']} tokens",
        "training": f"training, {step}",
        "training, checkpointing": f"training, {step}, checkpointing",
    }
    for phase, forms in answer["phases"].items():
        table = Table(show_edge=False, title=titles[phase], title_justify="left")
        table.add_column("GB", no_wrap=True)
        for form in forms:
            table.add_column("32 bits" if form == plan.UNQUANTIZED and not cuda else form, justify="right")
        columns = list(forms.values())
        for part in columns[0]["parts"]:
            table.add_row(part, *(_gb(column["parts"][part]) for column in columns))
        table.add_section()
        table.add_row("total", *(_gb(column["total"]) for column in columns))
        if cuda:
            cards = answer["smallest_card_gb"][phase].values()
            table.add_row("smallest card", *(f"{card} GB" if card else "none" for card in cards))
        if "holds" in answer:
            held = answer["holds"][phase].values()
            table.add_row(f"fits {answer['gpu_gb']:g} GB", *("yes" if fits else "no" for fits in held))
        Console().print(table)
        click.echo()
    if cuda:
        named = {card for cards in answer["smallest_card_gb"].values() for card in cards.values() if card}
        cards = "; ".join(f"{card} GB: {plan.CARDS[card]}" for card in sorted(named))
        click.echo(f"cards, whose GB are 2^30 bytes: {cards or 'none is large enough'}")
    if "holds" in answer:
        click.echo(verdict(answer))


def _gb(count: int) -> str:
    return f"{count / 1e9:.3f}" if count else ""


def verdict(answer: dict[str, Any]) -> str:
    """Return what a card holds of it, and what to change where it doesn't."""
    gpu = f"{answer['gpu_gb']:g} GB"
    longest = answer["longest_sequence"]
    lines = [
        f"\n{gpu} train double-quantized NF4 on one sequence of up to {longest:,} tokens, checkpointing"
        if longest
        else f"\n{gpu} do not hold the whole of this model, not even for one sequence of 64 tokens"
    ]
    ways = answer["ways_to_fit"]
    if not ways:
        lines.append(f"training in NF4 as asked fits {gpu} as it is")
    else:
        lines.append("training in NF4 as asked does not fit; change, one after the other:")
        lines += [
            f"  {way['change']}: {size(way['bytes'])}{', fits' if way['holds'] else ''}" for way in ways
        ]
        if not ways[-1]["holds"]:
            lines.append("  and still it does not fit: take a larger card, or a smaller model")
    return "\n".join(lines)
