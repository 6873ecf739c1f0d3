"""`nf4 finetune`: the options, a file of them, the progress shown, and the answer."""

import time
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click
import psutil
import yaml
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nf4 import bundled
from nf4.cli.output import SIZE, json_option, print_json, size
from nf4.codebooks import CODEBOOKS
from nf4.errors import InputError
from nf4.formats.checkpoint import AS_STORED
from nf4.model.llama import TARGETS
from nf4.ranks import Ranks, started
from nf4.train import log, snapshot
from nf4.train.data import LOSS_ON
from nf4.train.finetune import (
    ADAPTER_DTYPES,
    BEST,
    DEVICES,
    FinetuneOptions,
    FinetuneResult,
    Report,
    finetune,
    saved_options,
)
from nf4.train.schedule import SCHEDULES

# What suits the small bundled model better than the defaults for a large one.
_BUNDLED: dict[str, Any] = {"steps": 120, "lr": 2e-3, "eval_every": 20}

_LINES = 20  # lines printed over a run where there is no terminal for a bar


def _read_config(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Make the values of a YAML file the defaults of the options it names."""
    if value is None:
        return None
    try:
        content = yaml.safe_load(value.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{value}: the config can't be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{value}: the config is not UTF-8 at byte {error.start}; convert it") from None
    except yaml.YAMLError as error:
        raise InputError(f"{value}: not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise InputError(f"{value}: options are expected, as lines of `name: value`")
    known = {p.name: p for p in ctx.command.params if p.name not in ("config", "as_json", "help")}
    defaults = {}
    for key, item in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            names = ", ".join(sorted(str(n).replace("_", "-") for n in known))
            raise InputError(f"{value}: there is no option {key!r}; known are {names}")
        defaults[name] = _config_value(value, str(key), known[name], item)
    ctx.default_map = {name: item for name, item in defaults.items() if item is not None}
    return value


def _config_value(path: Path, key: str, option: click.Parameter, item: Any) -> Any:
    """Return a value as the command line would have it, so that one check serves both."""
    if item is None:
        return None
    if isinstance(option.type, click.types.BoolParamType):
        if not isinstance(item, bool):
            raise InputError(f"{path}: {key} is {item!r}; it is true or false")
        return item
    if isinstance(item, list) and option.name == "targets":
        return ",".join(map(str, item))
    if isinstance(item, bool | list | dict):
        raise InputError(f"{path}: {key} is {item!r}; a single value is expected")
    text = str(item)  # so 3.7 for a whole number is refused, and 2e-4, which YAML takes for a text, accepted
    try:
        option.type.convert(text, option, None)
    except click.BadParameter as error:
        raise InputError(f"{path}: {key}: {error.message.rstrip('.')}") from None
    return text


def _targets(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    """Split --targets; its names are checked with the other options."""
    return TARGETS if value == "all" else tuple(name.strip() for name in value.split(",") if name.strip())


def _option(name: str, help: str, **settings: Any) -> Callable[..., Any]:
    """An option whose default is that of FinetuneOptions."""
    field = name.lstrip("-").partition("/")[0].replace("-", "_")
    default = next(f.default for f in fields(FinetuneOptions) if f.name == field)
    return click.option(name, help=help, default=default, show_default=default is not None, **settings)


@click.command("finetune")
@click.argument("model", required=False)
@click.argument("data", required=False)
@click.option("--out", required=True, help="Output directory: new, empty, or with --resume that of a run.")
@_option("--steps", "Updates to make.", type=int)
@_option("--rank", "Rank of the adapters.", type=int)
@_option("--alpha", "Scale of the adapters: alpha/rank, or alpha/sqrt(rank) with --rslora.", type=float)
@_option("--dropout", "Share of the adapters' input dropped in training.", type=float)
@_option("--rslora", "Scale by alpha/sqrt(rank).", is_flag=True)
@click.option(
    "--targets",
    default="all",
    show_default=True,
    callback=_targets,
    help=f"Layers that get an adapter, with commas between: {', '.join(TARGETS)}.",
)
@_option("--adapter-dtype", "Type of the adapters.", type=click.Choice(list(ADAPTER_DTYPES)))
@_option("--block-size", "Weights a scale: a power of two from 32 to 4096.", type=int)
@_option(
    "--codebook",
    "Values of the 4-bit codes; none: LoRA on the weights as they are.",
    type=click.Choice([*CODEBOOKS, AS_STORED]),
)
@_option("--double-quant/--no-double-quant", "Quantize the scales too.")
@_option("--lr", "Learning rate.", type=float)
@_option("--schedule", "Course of the learning rate over the steps.", type=click.Choice(SCHEDULES))
@_option("--warmup", "Steps over which the learning rate rises from 0.", type=int)
@_option("--weight-decay", "Decoupled weight decay of AdamW.", type=float)
@_option("--max-grad-norm", "Gradients are scaled down to this norm; 0 for never.", type=float)
@_option("--batch-size", "Sequences a micro-batch.", type=int)
@_option("--seq-len", "Most tokens a sequence; at most the model's positions.", type=int)
@_option("--grad-accum", "Micro-batches a step.", type=int)
@_option("--group-by-length", "Take sequences of like length together.", is_flag=True)
@_option("--loss-on", "Learn the completions and assistant's turns, or all.", type=click.Choice(LOSS_ON))
@_option("--checkpointing", "Recompute activations in backward: less memory, more time.", is_flag=True)
@_option("--device", "Where the model is computed.", type=click.Choice(DEVICES))
@_option("--keep-layers", "On cuda: layers left out of --checkpointing, the last ones.", type=int)
@_option(
    "--optimizer-budget",
    "On cuda: device memory for AdamW's states, such as 512M; the rest waits with the host.  [default: all]",
    type=SIZE,
)
@_option(
    "--weights-budget",
    "On cuda: device memory for 4-bit weights, such as 4G; the rest waits with the host.  [default: all]",
    type=SIZE,
)
@_option("--eval-data", "Held-out data.  [default: a tenth of DATA]")
@_option("--eval-every", "Steps between two evaluations; 0 for just at the end.", type=int)
@_option("--eval-sequences", "Held-out sequences measured, evenly spread; 0 for all.", type=int)
@_option("--save-every", "Steps between two checkpoints.  [default: with each evaluation]", type=int)
@_option("--seed", "Seed of everything random.", type=int)
@_option("--threads", "Threads; bits depend on them unless --exact.  [default: the processors]", type=int)
@_option("--exact", "The same adapter, bit for bit, on every machine (NF4-15); slower.", is_flag=True)
@_option(
    "--resume", "Go on from the checkpoint in --out, with its options where none are given.", is_flag=True
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    callback=_read_config,
    is_eager=True,
    help="YAML file of options by these names; those given on the command line win.",
)
@json_option
@click.pass_context
def command(ctx: click.Context, /, as_json: bool, config: Path | None, **values: Any) -> None:
    """Quantize MODEL to 4 bits and train a LoRA adapter on DATA.

    MODEL is a Hugging Face directory or a GGUF file; DATA is a text, or JSON lines (.jsonl) with `text`,
    `prompt` and `completion`, or chat `messages`. With neither, the bundled model learns the bundled text, by
    default in 120 steps at a rate of 2e-3.

    OUT gets adapter_model.safetensors and adapter_config.json, which PEFT loads, the best of them by held-out
    loss in best/, training_log.jsonl, loss.png, and checkpoint.safetensors, from which --resume goes on after
    any interruption to the same bits. With --resume, --steps may grow; a linear or cosine schedule stretches.

    Under mpirun or srun, ranks share the sequences of each step, which stays the same, and OUT is rank 0's.
    """
    given = {
        name
        for name in values
        if ctx.get_parameter_source(name) in (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP)
    }
    ranks = started()
    options = FinetuneOptions(**_settled(values, given, ranks))
    with _Shown(quiet=as_json or ranks.rank > 0) as shown:
        result = finetune(options, shown, ranks)
    if ranks.rank == 0:
        if as_json:
            print_json(_answer(result))
        else:
            _print(result)
        if result.interrupted:
            click.echo(
                f"nf4: interrupted after step {result.step} of {result.steps}; go on with: "
                f"nf4 finetune --resume --out {result.out}",
                err=True,
            )
    if result.interrupted:
        ctx.exit(130)


def _settled(values: dict[str, Any], given: set[str], ranks: Ranks) -> dict[str, Any]:
    """Return the values of all options: those given, then those of the run to resume, then the defaults."""
    saved = None
    if ranks.any(values["resume"]):
        saved = ranks.first(lambda: saved_options(Path(values["out"]), ranks.size))
    if saved is not None:
        saved["targets"] = tuple(saved["targets"])
        return values | {name: value for name, value in saved.items() if name in values and name not in given}
    if values["model"] is None:
        if "data" in given:
            raise InputError("DATA is given without MODEL; give both, or neither for the bundled ones")
        preset = {"model": str(bundled.MODEL), "data": str(bundled.FINETUNE_TEXT), **_BUNDLED}
        return values | {name: value for name, value in preset.items() if name not in given}
    if values["data"] is None:
        raise InputError(
            f"MODEL {values['model']} is given without DATA; name a .txt or .jsonl file to learn"
        )
    return values


class _Shown(Report):
    """Shows a run on standard error: a bar on a terminal, else a line now and then."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(stderr=True, quiet=quiet, soft_wrap=True)
        self._process = psutil.Process()
        self._bar: Progress | None = None
        self._task: Any = None
        self._steps = self._tokens = 0
        self._began = time.monotonic()

    def __enter__(self) -> "_Shown":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def start(self, step: int, steps: int) -> None:
        self._steps, self._began = steps, time.monotonic()
        self._first = step
        if self._console.is_terminal and not self._console.quiet:
            self._bar = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[state]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=steps, completed=step, state="")
            self._bar.start()

    def step(self, record: dict[str, Any]) -> None:
        self._tokens += record["tokens"]
        step, elapsed = record["step"], time.monotonic() - self._began
        state = (
            f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
            f"{record['tokens'] / max(record['seconds'], 1e-9):,.0f} tokens/s  "
            f"{size(self._process.memory_info().rss)}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, state=state)
        elif step == self._steps or step % max(1, self._steps // _LINES) == 0:
            left = elapsed / (step - self._first) * (self._steps - step)
            self.note(f"step {step}/{self._steps}  {state}  {left:.0f} s left")

    def evaluation(self, step: int, loss: float) -> None:
        self.note(f"step {step}  held-out loss {loss:.4f}")


def _answer(result: FinetuneResult) -> dict[str, Any]:
    return {
        **asdict(result),
        "out": str(result.out),
        **{name: str(path) for name, path in _paths(result).items()},
    }


def _quoted(text: str) -> str:
    """Return a model's text indented, without the control characters that it may hold."""
    clean = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return "\n".join(f"    {line}" for line in clean.split("\n"))


def _paths(result: FinetuneResult) -> dict[str, Path]:
    return {
        "adapter": result.out,
        "best_adapter": result.out / BEST,
        "log": result.out / log.NAME,
        "picture": result.out / log.PICTURE,
        "checkpoint": result.out / snapshot.NAME,
    }


def _print(result: FinetuneResult) -> None:
    best = "" if result.best_loss is None else f", best {result.best_loss:.4f} at step {result.best_step}"
    click.echo(
        f"\nheld-out loss {result.eval_before:.4f} -> {result.eval_after:.4f}{best}\n"
        f"\nfrom the held-out text\n{_quoted(result.sample_prompt)}\n"
        f"\nit wrote before\n{_quoted(result.sample_before)}\n"
        f"\nit writes after\n{_quoted(result.sample_after)}\n"
    )
    for name, path in _paths(result).items():
        click.echo(f"{name.replace('_', ' '):13}{path}")
