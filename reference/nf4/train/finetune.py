"""The training loop, and QLoRA fine-tuning on it: from a model and a text to an adapter on the disk."""

import hashlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nf4 import parallel
from nf4.codebooks import CODEBOOKS
from nf4.errors import CheckFailed, InputError
from nf4.formats import peft
from nf4.formats.checkpoint import AS_STORED, Checkpoint, QuantizeOptions, load_model, open_checkpoint
from nf4.formats.files import SafetensorsWriter, TensorSpec, check_output_directory, only_writer
from nf4.formats.tokenizer import Tokenizer
from nf4.lora import LoRA, init_lora
from nf4.model.config import LlamaConfig
from nf4.model.generate import generate
from nf4.model.llama import TARGETS, Llama
from nf4.nested import NestedAbsmax
from nf4.ranks import ALONE, Ranks, program, started
from nf4.tensor import QuantizedTensor
from nf4.train import snapshot
from nf4.train.data import IGNORE, Data, Example, evenly, load_data, ordering
from nf4.train.engine import Engine, FastEngine
from nf4.train.exact import ExactEngine
from nf4.train.gpu import gpu
from nf4.train.log import NAME as LOG
from nf4.train.log import PICTURE, TrainingLog, draw
from nf4.train.schedule import SCHEDULES, learning_rate

DEVICES = ("cpu", "cuda")

BEST = "best"
"""The folder, in the output directory, of the result with the lowest held-out loss."""

DEVICES = ("cpu", "cuda")

ADAPTER_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

_SAMPLE_PROMPT = 32  # tokens of held-out text that the samples go on from
SAMPLE_TOKENS = 200  # and characters, at most
_SAMPLE_SECONDS = 10.0  # a large model says less
# What may change when a run resumes; and what may, too, where no bit of an exact run depends on it.
_FREE = (
    "model", "data", "eval_data", "out", "steps", "save_every", "resume", "keep_layers", "optimizer_budget",
    "weights_budget",
)  # fmt: skip
_FREE_IF_EXACT = ("checkpointing", "device", "threads")
# What may differ between the ranks of a run: where their files are; their contents may not.
_PATHS = ("model", "data", "eval_data", "out")


@dataclass(frozen=True)
class FinetuneOptions:
    """Everything a run depends on; the defaults are those of the command line.

    seq_len is in tokens, budgets in bytes. A step takes batch_size * grad_accum sequences, whatever the
    number of ranks: each takes its share of them, at most batch_size at a time.
    """

    model: str
    data: str
    out: str
    eval_data: str | None = None
    steps: int = 200
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    targets: tuple[str, ...] = TARGETS
    adapter_dtype: str = "float32"
    block_size: int = 64
    codebook: str = "nf4"
    double_quant: bool = True
    lr: float = 2e-4
    schedule: str = "constant"
    warmup: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 0.3
    batch_size: int = 4
    seq_len: int = 256
    grad_accum: int = 1
    group_by_length: bool = False
    loss_on: str = "completion"
    checkpointing: bool = False
    device: str = "cpu"
    keep_layers: int = 0
    optimizer_budget: int | None = None
    weights_budget: int | None = None
    seed: int = 0
    threads: int | None = None
    exact: bool = False
    eval_every: int = 50
    eval_sequences: int = 64
    save_every: int | None = None
    resume: bool = False

    def check(self) -> None:
        """Raise InputError for a value out of its range, naming the option."""
        least: dict[str, float] = {
            "steps": 1, "rank": 1, "batch_size": 1, "seq_len": 1, "grad_accum": 1, "threads": 1,
            "save_every": 1, "warmup": 0, "weight_decay": 0, "max_grad_norm": 0, "dropout": 0, "seed": 0,
            "eval_every": 0, "eval_sequences": 0, "keep_layers": 0, "optimizer_budget": 1,
            "weights_budget": 1,
        }  # fmt: skip
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not low <= value < math.inf:
                raise InputError(f"{_flag(name)} {value}: it must be {_finite(value)}at least {low}")
        for name in ("alpha", "lr"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise InputError(f"{_flag(name)} {value}: it must be {_finite(value)}above 0")
        if self.dropout >= 1:
            raise InputError(f"--dropout {self.dropout}: it must be below 1")
        if self.seed >= 1 << 64:
            raise InputError(f"--seed {self.seed}: it must be below 2^64")
        choices: dict[str, Any] = {
            "codebook": [*CODEBOOKS, AS_STORED], "schedule": SCHEDULES, "adapter_dtype": ADAPTER_DTYPES,
            "device": DEVICES,
        }  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f"{_flag(name)} {getattr(self, name)}: it is one of {', '.join(known)}")
        for name, without in (("keep_layers", 0), ("optimizer_budget", None), ("weights_budget", None)):
            if (self.device == "cpu" or self.exact) and getattr(self, name) != without:
                raise InputError(f"{_flag(name)} is for --device cuda without --exact; leave it away")
        if self.keep_layers and not self.checkpointing:
            raise InputError("--keep-layers is for --checkpointing; without it all layers are kept")
        for target in self.targets:
            if target not in TARGETS:
                raise InputError(
                    f"--targets {target}: the layers that take an adapter are {', '.join(TARGETS)}"
                )
        if not self.targets:
            raise InputError(f"--targets: name at least one of {', '.join(TARGETS)}")
        if self.block_size not in [1 << k for k in range(5, 13)]:
            raise InputError(f"--block-size {self.block_size}: it is a power of two from 32 to 4096")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _finite(value: float) -> str:
    return "" if math.isfinite(value) else "a finite number, "


@dataclass(frozen=True)
class FinetuneResult:
    """What a run came to. Losses in nats a token; tokens and seconds are those of this call's steps."""

    out: Path
    step: int
    steps: int
    interrupted: bool
    eval_before: float
    eval_after: float
    best_loss: float | None
    best_step: int
    sample_prompt: str
    sample_before: str
    sample_after: str
    tokens: int
    seconds: float


class Report:
    """Hears what a run does; this one says nothing. The command line's shows progress."""

    def note(self, text: str) -> None:
        """Hear one sentence about the run."""

    def start(self, step: int, steps: int) -> None:
        """Hear that training starts after the given step."""

    def step(self, record: dict[str, Any]) -> None:
        """Hear a step's record as it goes into the log."""

    def evaluation(self, step: int, loss: float) -> None:
        """Hear a held-out loss."""


class SavesTo(Protocol):
    """Writes the trained result into a directory, atomically, as it is now."""

    def __call__(self, directory: Path) -> None: ...  # noqa: D102


def finetune(
    options: FinetuneOptions, report: Report | None = None, ranks: Ranks | None = None
) -> FinetuneResult:
    """Quantize a model, train LoRA adapters on it, and write them with log, picture and checkpoint.

    With the codebook "none" the model is not quantized: plain LoRA, to compare with. ranks: those that mpirun
    or srun started with this process unless given; rank 0 alone writes and reports. Raises InputError for bad
    options, model, data or output directory, and for ranks of different runs, before anything is written, and
    CheckFailed when the loss is no longer finite.
    """
    ranks = ranks or started()
    report = report if report is not None and ranks.rank == 0 else Report()
    ranks.each(options.check)
    ranks.agree(
        program(options.device) | {_flag(k): v for k, v in asdict(options).items() if k not in _PATHS}
    )
    _check_share(options, ranks)
    if ranks.size > 1:
        report.note(ranks.describe())
    options = prepare_output(options, ranks)
    if options.device == "cuda":
        ranks.each(gpu).take_device(ranks)
    source, tokenizer, data = ranks.each(lambda: _open(options))
    total = len(data.train) + len(data.heldout) + data.dropped
    for count, what in (
        (data.truncated, f"cut to {options.seq_len} tokens"),
        (data.dropped, "left out: no target"),
    ):
        if count:
            report.note(f"{count} of {total} examples {what}")
    if options.device == "cuda" and not options.exact:
        config = LlamaConfig.from_dict(source.config, str(source.path))
        most = _longest(data), SAMPLE_TOKENS
        report.note(ranks.each(lambda: gpu().check_plan(source, config, options, *most)))
    form = f"in {options.codebook}, block {options.block_size}"
    report.note(f"loading {options.model} {'as stored' if options.codebook == AS_STORED else form}")
    quantized = QuantizeOptions(options.block_size, options.codebook, options.double_quant)
    base = ranks.each(lambda: load_model(source, quantize=quantized))
    adapters = new_adapters(base, options)
    model = Llama(base.config, base.params, adapters)

    def save(directory: Path) -> None:
        base_path = str(Path(options.model).resolve())
        peft.save_adapter(directory, adapters, base=base_path, rslora=options.rslora, trained_on=quantized)

    return train_loop(model, tokenizer, data, options, train="lora", save=save, report=report, ranks=ranks)


def _open(options: FinetuneOptions) -> tuple[Checkpoint, Tokenizer, Data]:
    """Open the model and read the data. Raises InputError for either."""
    source = open_checkpoint(options.model)
    tokenizer = source.tokenizer()
    config = LlamaConfig.from_dict(source.config, str(source.path))
    data = load_data(
        options.data,
        tokenizer,
        options.seq_len,
        max_positions=config.max_position_embeddings,
        loss_on=options.loss_on,
        eval_path=options.eval_data,
        seed=options.seed,
    )
    return source, tokenizer, data


def _check_share(options: FinetuneOptions, ranks: Ranks) -> None:
    """Raise InputError unless a step has a sequence for each rank."""
    sequences = options.batch_size * options.grad_accum
    if sequences < ranks.size:
        raise InputError(
            f"--batch-size {options.batch_size} and --grad-accum {options.grad_accum}: a step's {sequences} "
            f"sequences are too few for {ranks.size} ranks; raise one of them, or start fewer ranks"
        )


def new_adapters(model: Llama, options: FinetuneOptions) -> dict[str, LoRA]:
    """Return a fresh adapter for each targeted linear layer of the model, by the module's name. NF4-9.3"""
    adapters = {}
    for module, (out_features, in_features) in peft.linear_shapes(model.config).items():
        if module.rpartition(".")[2] in options.targets:
            adapters[module] = init_lora(
                module,
                in_features,
                out_features,
                options.rank,
                options.alpha,
                options.dropout,
                options.seed,
                rslora=options.rslora,
                dtype=ADAPTER_DTYPES[options.adapter_dtype],
            )
    return adapters


def save_parameters(directory: Path, model: Llama) -> None:
    """Write a model trained in full as directory/model.safetensors. Raises InputError if the disk refuses."""
    params = model.trainable("full")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{directory}: can't be made ({error.strerror})") from None
    specs = {name: TensorSpec(p.dtype, p.shape) for name, p in params.items()}
    with SafetensorsWriter(directory / "model.safetensors", specs) as writer:
        for name, p in params.items():
            writer.write(name, p)


def prepare_output(options: FinetuneOptions, ranks: Ranks = ALONE) -> FinetuneOptions:
    """Refuse an output directory that is not for this run, and settle the number of threads. Writes nothing.

    The threads set how sums are grouped, so a run resumes with the number it began with. Raises InputError.
    Under ranks the directory is that of rank 0, and all take the same number of threads.
    """
    threads = min(ranks.gather(parallel.worker_threads()))
    return replace(options, threads=ranks.first(lambda: _prepared(options, threads, ranks.size)))


def _prepared(options: FinetuneOptions, available: int, ranks: int) -> int:
    """Check the output directory; return the number of threads."""
    out = Path(options.out)
    checkpoint = out / snapshot.NAME
    threads = options.threads
    if checkpoint.exists():
        if not options.resume:
            raise InputError(f"{out}: it holds a run; go on with it by --resume, or name another --out")
        _, identity = snapshot.read_facts(checkpoint)
        if _binding_threads(identity, ranks):
            threads = threads or identity["options"]["threads"]
        if options.steps < identity["steps"]:
            raise InputError(
                f"--steps {options.steps}: the run in {out} has {identity['steps']}; they may only grow"
            )
    elif out.is_dir() and options.resume and all(path.name.endswith(".tmp") for path in out.iterdir()):
        pass  # killed before its first checkpoint: there is nothing to lose, so it starts over
    elif out.is_dir() and options.resume:
        raise InputError(
            f"{checkpoint}: there is no such checkpoint to resume from, and the directory isn't empty; "
            "name another --out"
        )
    else:
        check_output_directory(out)
    return threads or available


def _binding_threads(identity: dict[str, Any], ranks: int) -> bool:
    """Whether the bits of a run depend on its threads, and it can still have the same."""
    options = identity["options"]
    return "threads" in options and not options.get("exact") and identity.get("ranks", 1) == ranks


def saved_options(out: Path, ranks: int = 1) -> dict[str, Any] | None:
    """Return the options of the run that a directory holds, by their names, or None if it holds none.

    The number of threads is among them where so many ranks can go on to the same bits with it.
    """
    path = out / snapshot.NAME
    if not path.exists():
        return None
    _, identity = snapshot.read_facts(path)
    options = dict(identity["options"])
    if not _binding_threads(identity, ranks):
        options.pop("threads", None)
    return {**options, **identity["paths"], "steps": identity["steps"]}


def train_loop(
    model: Llama,
    tokenizer: Tokenizer | None,
    data: Data,
    options: FinetuneOptions,
    *,
    train: Literal["lora", "full"],
    save: SavesTo,
    report: Report,
    ranks: Ranks = ALONE,
) -> FinetuneResult:
    """Train the model's adapters, or with train="full" all its parameters, as options says; NF4-10.

    options comes from prepare_output. Without a tokenizer no samples are drawn. The result, by save, goes to
    options.out, and the best by held-out loss to its folder best/. Rank 0 alone writes.
    """
    engine = _engine(model, data, options, train, ranks)
    loop = _Loop(model, tokenizer, data, options, train, save, report, ranks, engine)
    result = loop.run()
    for remark in engine.remarks():
        report.note(remark)
    return result


def _longest(data: Data) -> int:
    """Return the tokens of the longest example."""
    return max(len(example) for example in (*data.train, *data.heldout))


class _Loop:
    """One run: what it works on, and where it stands. All ranks go through it; rank 0 has the files."""

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer | None,
        data: Data,
        options: FinetuneOptions,
        train: Literal["lora", "full"],
        save: SavesTo,
        report: Report,
        ranks: Ranks,
        engine: Engine,
    ) -> None:
        self.model, self.tokenizer, self.data, self.options = model, tokenizer, data, options
        self.train, self.save, self.report, self.ranks = train, save, report, ranks
        self.out = Path(options.out)
        self.checkpoint = self.out / snapshot.NAME
        self.heldout = evenly(data.heldout, options.eval_sequences)
        self.identity = _identity(model, data, options, train, ranks.size)
        ranks.agree({name: self.identity[name] for name in ("train", "model", "data")})
        self.engine = engine
        self.progress = snapshot.Progress()
        self.saved_step = 0
        self.log: TrainingLog | None = None
        self._kept, self._is_kept = ExitStack(), False

    def run(self) -> FinetuneResult:
        with self._kept:
            return self._run()

    def _run(self) -> FinetuneResult:
        if self.ranks.first(self._clean_up):
            self._resume()
        else:
            self._begin()
        seconds = self.progress.seconds
        self.ranks.first(self._open_log)
        try:
            tokens = self._train()
            self.engine.store()
            self.ranks.first(self._finish)
        except InputError as error:  # the input was good when the run began: it is the disk
            raise CheckFailed(
                f"{error}; the checkpoint of step {self.saved_step} is whole: --resume from it"
            ) from error
        progress = self.progress
        return FinetuneResult(
            out=self.out,
            step=progress.step,
            steps=self.options.steps,
            interrupted=progress.step < self.options.steps,
            eval_before=progress.eval_before,
            eval_after=progress.eval_last,
            best_loss=progress.best_loss,
            best_step=progress.best_step,
            sample_prompt=progress.sample_prompt,
            sample_before=progress.sample_before,
            sample_after=self.ranks.first(self._sample)[1],
            tokens=tokens,
            seconds=progress.seconds - seconds,
        )

    def _clean_up(self) -> bool:
        """Remove what a save that was killed left; return whether there is a checkpoint."""
        if self.out.is_dir():
            self._keep()
        for folder in (self.out, self.out / BEST):
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink()
        return self.checkpoint.exists()

    def _finish(self) -> None:
        self.save(self.out)
        draw(self.out / LOG, self.out / PICTURE)

    def _train(self) -> int:
        """Make the steps that are left, or those up to a Ctrl-C; return the tokens they took."""
        options, tokens = self.options, 0
        order = ordering(
            [len(example) for example in self.data.train],
            seed=options.seed,
            batch_size=options.batch_size,
            group_by_length=options.group_by_length,
        )
        self.report.start(self.progress.step, options.steps)
        with self.log or nullcontext(), _interrupts() as interrupted:
            while self.progress.step < options.steps and not self.ranks.any(interrupted()):
                record = self._step(order)
                self._write_log(record)
                self.report.step(record)
                tokens += record["tokens"]
                step = self.progress.step
                last = step == options.steps
                evaluates = last or (options.eval_every > 0 and step % options.eval_every == 0)
                if evaluates:
                    self._evaluate()
                if last or (step % options.save_every == 0 if options.save_every else evaluates):
                    self._save_checkpoint()
            if self.saved_step != self.progress.step:
                self._save_checkpoint()
        return tokens

    def _open_log(self) -> None:
        self.log = TrainingLog(self.out / LOG, step=self.progress.step, eval_before=self.progress.eval_before)

    def _write_log(self, record: dict[str, Any]) -> None:
        self.ranks.first(lambda: self.log.write(record) if self.log else None)

    def _begin(self) -> None:
        """Measure the untrained model and write the checkpoint of step 0: from here it can be resumed."""
        prompt, text = self.ranks.first(self._sample)
        loss = self._heldout_loss()
        self.progress = snapshot.Progress(
            eval_before=loss, eval_last=loss, sample_prompt=prompt, sample_before=text
        )
        self.report.evaluation(0, loss)
        self.ranks.first(self._make_out)
        self._save_checkpoint()

    def _make_out(self) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.out}: can't be made ({error.strerror})") from None
        self._keep()
        check_output_directory(self.out)  # another run may have come and gone since it was looked at

    def _keep(self) -> None:
        """Keep other runs out of the directory until this one ends."""
        if not self._is_kept:
            self._kept.enter_context(only_writer(self.out))
            self._is_kept = True

    def _resume(self) -> None:
        optimizer = self.engine.optimizer
        self.progress = self.ranks.first(self._restore)
        for arrays in (optimizer.params, optimizer.m, optimizer.v):
            for array in arrays.values():
                self.ranks.spread_array(array)
        if self.ranks.rank:
            optimizer.restore(self.progress.step, optimizer.m, optimizer.v)
        self.engine.load()
        self.saved_step = self.progress.step
        self.report.note(f"going on after step {self.progress.step} of {self.out}")

    def _restore(self) -> snapshot.Progress:
        """Put the checkpoint of this run into the optimizer. Raises InputError if it is another run's."""
        saved = snapshot.read_facts(self.checkpoint)[1]
        exact = bool(saved["options"].get("exact")) and self.options.exact
        alike = exact or saved.get("ranks", 1) == self.ranks.size
        if not alike:
            self.report.note(
                f"begun on {saved.get('ranks', 1)} ranks, continued on {self.ranks.size}: without --exact "
                "its last bits depend on their number"
            )
        free = _FREE_IF_EXACT if exact else () if alike else ("threads",)
        pair = (_comparable(identity, free) for identity in (saved, self.identity))
        snapshot.check_identity(self.checkpoint, *pair)
        return snapshot.restore(self.checkpoint, self.engine.optimizer)

    def _step(self, order: Callable[[int], int]) -> dict[str, Any]:
        """Make one update; return its record for the log."""
        options, step = self.options, self.progress.step
        began = time.perf_counter()
        first = step * options.grad_accum * options.batch_size
        micro_batches = []
        for start in range(first, first + options.grad_accum * options.batch_size, options.batch_size):
            samples = range(start, start + options.batch_size)
            micro_batches.append(([self.data.train[order(n)] for n in samples], samples))
        rate = learning_rate(
            step, steps=options.steps, lr=options.lr, schedule=options.schedule, warmup=options.warmup
        )
        update = self.engine.step(micro_batches, rate)
        if not update.finite:
            what = f"the loss is {update.loss} and the gradient norm {update.norm}"
            raise self._diverged(step + 1, what)
        seconds = time.perf_counter() - began
        self.progress.step = step + 1
        self.progress.seconds += seconds
        return {
            "step": step + 1,
            "loss": update.loss,
            "lr": rate,
            "grad_norm": update.norm,
            "tokens": update.tokens,
            "seconds": round(seconds, 4),
        }

    def _evaluate(self) -> None:
        """Log the held-out loss; keep the result if it is the best so far."""
        progress = self.progress
        progress.eval_last = loss = self._heldout_loss()
        self._write_log({"step": progress.step, "eval_loss": loss})
        self.report.evaluation(progress.step, loss)
        if progress.best_loss is None or loss < progress.best_loss:
            # Before the checkpoint that knows of it: a kill between the two only makes the run find it again.
            self.engine.store()
            self.ranks.first(lambda: self.save(self.out / BEST))
            progress.best_loss, progress.best_step = loss, progress.step

    def _heldout_loss(self) -> float:
        loss = self.engine.evaluate(self.heldout)
        if not math.isfinite(loss):
            raise self._diverged(self.progress.step, f"the held-out loss is {loss}")
        return loss

    def _diverged(self, step: int, what: str) -> CheckFailed:
        if step == 0:
            return CheckFailed(f"{what} before any training: the model's weights are damaged, get it again")
        return CheckFailed(
            f"step {step}: {what}; the last good checkpoint is step {self.saved_step} in {self.checkpoint}; "
            f"try a lower --lr (now {self.options.lr:g}) or --max-grad-norm (now "
            f"{self.options.max_grad_norm:g}), or a longer --warmup, in a new --out"
        )

    def _save_checkpoint(self) -> None:
        self.engine.store()
        self._compare_ranks()

        def save() -> None:
            if self.log is not None:
                self.log.sync()
            snapshot.save(self.checkpoint, self.engine.optimizer, self.progress, self.identity)

        self.ranks.first(save)
        self.saved_step = self.progress.step

    def _compare_ranks(self) -> None:
        """Raise CheckFailed where ranks have come to hold different results, which only a fault can do."""
        if self.ranks.size == 1:
            return
        total = hashlib.sha256()
        for array in self.engine.optimizer.params.values():
            total.update(array.reshape(-1).view(np.uint8).data)
        found = self.ranks.gather((total.hexdigest(), self.ranks.host))
        for rank, (digest, host) in enumerate(found):
            if digest != found[0][0]:
                raise CheckFailed(
                    f"step {self.progress.step}: rank {rank} on {host} holds other bits than rank 0 on "
                    f"{found[0][1]}, so a processor, a GPU or memory is at fault; the last good checkpoint "
                    f"is step {self.saved_step} in {self.checkpoint}"
                )

    def _sample(self) -> tuple[str, str]:
        """Return the beginning of the first held-out example and how the model goes on from it."""
        if self.tokenizer is None:
            return "", ""
        prompt = _sample_prompt(self.data.heldout[0])
        room = self.model.config.max_position_embeddings - len(prompt)
        ids: list[int] = []
        text, began = "", time.monotonic()
        for token in generate(
            self.engine.language_model,
            prompt,
            max(0, min(room, SAMPLE_TOKENS)),
            temperature=0.8,
            top_p=0.95,
            seed=self.options.seed,
            stop_ids=self.tokenizer.eos_ids,
        ):
            ids.append(token)
            text = self.tokenizer.decode(ids)
            if len(text) >= SAMPLE_TOKENS or time.monotonic() - began > _SAMPLE_SECONDS:
                break
        return self.tokenizer.decode(prompt), text


def _engine(
    model: Llama, data: Data, options: FinetuneOptions, train: Literal["lora", "full"], ranks: Ranks
) -> Engine:
    """Return what makes the run's steps."""
    settings: dict[str, Any] = {
        "batch_size": options.batch_size,
        "max_grad_norm": options.max_grad_norm,
        "weight_decay": options.weight_decay,
        "checkpointing": options.checkpointing,
        "seed": options.seed,
        "threads": options.threads or parallel.worker_threads(),
        "ranks": ranks,
    }
    if options.device == "cuda":
        if train == "full":
            raise InputError("--device cuda trains adapters; training in full runs on the CPU")
        engine: Engine
        if options.exact:
            engine = gpu().exact_engine(model, **settings)
        else:
            engine = gpu().engine(model, options, _longest(data), SAMPLE_TOKENS, ranks)
        return engine
    if options.exact:
        return ExactEngine(model, **settings)
    return FastEngine(model, train, **settings)


def _sample_prompt(example: Example) -> list[int]:
    """Return the tokens before the first that is learned; of a text, learned throughout, its beginning."""
    first = int(np.argmax(example.targets != IGNORE))
    ids: list[int] = example.ids[: first + 1 if first else min(_SAMPLE_PROMPT, len(example))].tolist()
    return ids


def _identity(model: Llama, data: Data, options: FinetuneOptions, train: str, ranks: int) -> dict[str, Any]:
    """Return what makes two runs the same one: the options and digests of the weights and the examples.

    The ranks are told where bits depend on their number.
    """
    given = asdict(options)
    identity = {
        "options": {name: value for name, value in given.items() if name not in _FREE}
        | {"targets": list(options.targets)},
        "paths": {
            name: str(Path(given[name]).resolve()) if given[name] else None
            for name in ("model", "data", "eval_data")
        },
        "steps": options.steps,
        "train": train,
        "model": _model_digest(model),
        "data": data.digest(),
    }
    return identity if options.exact else identity | {"ranks": ranks}


def _comparable(identity: dict[str, Any], free: tuple[str, ...]) -> dict[str, Any]:
    """What must be the same; a run that began before there was an option ran as its default says."""
    defaults = {field.name: field.default for field in fields(FinetuneOptions) if field.name not in _FREE}
    options = defaults | identity["options"]
    plain = {_flag(name): value for name, value in options.items() if name not in free}
    return plain | {name: identity[name] for name in ("train", "model", "data")}


def _model_digest(model: Llama) -> str:
    """Return a SHA-256 over the names and bits of all parameters, as quantized; adapters are left out."""
    total = hashlib.sha256()

    def add(array: NDArray[Any]) -> None:
        total.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    for name in sorted(model.params):
        value = model.params[name]
        total.update(name.encode() + repr(tuple(value.shape)).encode())
        if isinstance(value, QuantizedTensor):
            add(value.codes)
            absmax = value.absmax
            if isinstance(absmax, NestedAbsmax):
                add(absmax.codes)
                add(absmax.absmax)
                total.update(absmax.offset.tobytes())
            else:
                add(absmax)
        else:
            add(value)
    return total.hexdigest()


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C end a run after the step in progress; a second one ends it at once."""
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():  # only there can signals be taken over
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
