"""Does LoRA on 4 bits reach LoRA on 16? The same runs on each: `python -m nf4.evidence.finetuning FILE`."""

import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from nf4 import bundled
from nf4.bench import machine
from nf4.errors import InputError
from nf4.evidence.plots import figure
from nf4.formats.bitsandbytes import write_dequantized
from nf4.formats.checkpoint import AS_STORED, open_checkpoint
from nf4.formats.files import atomic_write, read_json
from nf4.train.finetune import FinetuneOptions, finetune
from nf4.train.log import NAME as LOG
from nf4.train.log import read_log

FULL = "16-bit LoRA"
BUNDLED = "bundled"


@dataclass(frozen=True)
class Variant:
    """How the base is kept while its adapters learn."""

    codebook: str
    double_quant: bool = False


VARIANTS = {
    FULL: Variant(AS_STORED),
    "NF4": Variant("nf4"),
    "NF4, double": Variant("nf4", double_quant=True),
    "FP4": Variant("fp4"),
    "Int4": Variant("int4"),
}
"""FP4 is that of bitsandbytes, Int4 the symmetric one; blocks of 64."""


def options(plan: Mapping[str, Any], model: Path, out: Path, variant: str, seed: int) -> FinetuneOptions:
    """Return the options of one run; all runs of a plan differ in the variant and the seed alone."""
    how = VARIANTS[variant]
    return FinetuneOptions(
        model=str(model),
        data=plan["data"],
        out=str(out),
        steps=plan["steps"],
        lr=plan["lr"],
        rank=plan["rank"],
        batch_size=plan["batch_size"],
        seq_len=plan["seq_len"],
        codebook=how.codebook,
        double_quant=how.double_quant,
        eval_every=max(1, plan["steps"] // 6),
        eval_sequences=0,
        seed=seed,
    )


def missing(results: Mapping[str, Any], seeds: int) -> Iterator[tuple[str, int]]:
    """Yield the (variant, seed) that have not been run, seed by seed."""
    done = {(run["variant"], run["seed"]) for run in results["runs"]}
    for seed in range(seeds):
        for variant in VARIANTS:
            if (variant, seed) not in done:
                yield variant, seed


def run(plan: Mapping[str, Any], model: Path, variant: str, seed: int) -> dict[str, Any]:
    """Fine-tune once, in a directory that is thrown away; return the held-out losses, nats a token."""
    with tempfile.TemporaryDirectory(prefix="nf4-finetuning-") as name:
        out = Path(name) / "out"
        result = finetune(options(plan, model, out, variant, seed))
        course = {r["step"]: round(r["eval_loss"], 6) for r in read_log(out / LOG) if "eval_loss" in r}
    return {
        "variant": variant,
        "seed": seed,
        "before": result.eval_before,
        "after": result.eval_after,
        "course": course,
        "seconds": round(result.seconds, 1),
    }


def summary(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return for each variant the held-out loss before and after, and how far after is above 16-bit LoRA's.

    `more` is the mean over the seeds of the difference from the 16-bit run of the same seed, more_spread its
    standard deviation, and spread that of the loss itself (0 for one seed).
    """
    full = {run["seed"]: run["after"] for run in runs if run["variant"] == FULL}
    rows = []
    for variant in VARIANTS:
        mine = [run for run in runs if run["variant"] == variant]
        if mine:
            after = [run["after"] for run in mine]
            more = [run["after"] - full[run["seed"]] for run in mine if run["seed"] in full]
            rows.append(
                {
                    "variant": variant,
                    "seeds": len(mine),
                    "before": mine[0]["before"],
                    "after": statistics.mean(after),
                    "spread": _spread(after),
                    "more": statistics.mean(more) if more else None,
                    "more_spread": _spread(more),
                }
            )
    return rows


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def show(results: Mapping[str, Any]) -> None:
    """Print the summary as a table."""
    table = Table(show_edge=False)
    for column in ("base", "seeds", "before", "after", "± over seeds", "more than 16-bit LoRA", "±"):
        table.add_column(column, justify="left" if column == "base" else "right")
    for row in summary(results["runs"]):
        more = "" if row["more"] is None else f"{row['more']:+.4f}"
        table.add_row(
            row["variant"],
            str(row["seeds"]),
            f"{row['before']:.4f}",
            f"{row['after']:.4f}",
            f"{row['spread']:.4f}",
            more,
            f"{row['more_spread']:.4f}",
        )
    Console().print(table)


def draw(path: Path, results: Mapping[str, Any]) -> None:
    """Draw the held-out loss over the steps, a line a run, and where each variant ends."""
    colours = dict(zip(VARIANTS, ("black", "tab:blue", "tab:cyan", "tab:red", "tab:green"), strict=True))
    with figure(path, 9, 4.2) as drawn:
        left, right = drawn.subplots(1, 2, width_ratios=(3, 2))
        for row in summary(results["runs"]):
            variant = row["variant"]
            mine = [run for run in results["runs"] if run["variant"] == variant]
            steps = [int(step) for step in mine[0]["course"]]
            mean = np.mean([list(run["course"].values()) for run in mine], 0)
            left.plot(steps, mean, color=colours[variant], label=variant, linewidth=1.5)
            at = list(VARIANTS).index(variant)
            ends = [run["after"] for run in mine]
            right.plot([at] * len(ends), ends, "o", color=colours[variant], alpha=0.6)
            right.plot([at - 0.3, at + 0.3], [row["after"]] * 2, color=colours[variant])
        left.set_xlabel("step")
        left.set_ylabel("held-out loss, nats a token")
        left.legend()
        right.set_xticks(range(len(VARIANTS)), list(VARIANTS), rotation=20)
        right.set_title("at the end: each seed, and the mean")


def load(path: Path, plan: Mapping[str, Any], packages: Sequence[str] = ()) -> dict[str, Any]:
    """Return the results so far; InputError if they are of another plan."""
    if not path.exists():
        return {**machine.describe(packages), "plan": dict(plan), "runs": []}
    results = read_json(path)
    if results.get("plan") != plan:
        raise InputError(f"{path}: holds runs of {results.get('plan')}; name another file")
    return results


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--model", default=BUNDLED, show_default=True)
@click.option("--data", default=BUNDLED, show_default=True, help="Text to learn; bundled: Genesis.")
@click.option("--steps", default=120, show_default=True)
@click.option("--lr", default=2e-3, show_default=True)
@click.option("--rank", default=8, show_default=True)
@click.option("--batch-size", default=4, show_default=True)
@click.option("--seq-len", default=256, show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--picture", type=click.Path(path_type=Path), help="Draw the runs into this PNG.")
def main(path: Path, model: str, data: str, seeds: int, picture: Path | None, **values: Any) -> None:
    """Fine-tune on bases of 16 bits, NF4, FP4 and Int4 with the same seeds, and keep the losses in PATH.

    The base is the model rounded to bfloat16, for all. Runs that PATH has already are not made again.
    """
    plan = {"model": Path(model).name, "data": Path(data).name, **values}
    results = load(path, plan)
    source = bundled.MODEL if model == BUNDLED else Path(model)
    text = str(bundled.FINETUNE_TEXT) if data == BUNDLED else data
    with tempfile.TemporaryDirectory(prefix="nf4-finetuning-") as name:
        base = Path(name) / "base"
        todo = list(missing(results, seeds))
        if todo:
            write_dequantized(open_checkpoint(source), base, np.dtype(ml_dtypes.bfloat16))
        for variant, seed in todo:
            click.echo(f"{variant}, seed {seed}", err=True)
            results["runs"].append(run({**plan, "data": text}, base, variant, seed))
            with atomic_write(path) as file:
                file.write((json.dumps(results, indent=1) + "\n").encode())
    show(results)
    if picture is not None:
        draw(picture, results)


if __name__ == "__main__":
    main()
