"""One step's gradients, and the held-out loss: sequences over threads, sums in a fixed order."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from nf4 import parallel
from nf4.errors import InputError
from nf4.model.llama import Batch, Llama
from nf4.train.data import IGNORE, Example

R = TypeVar("R")


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the target tokens of the step, in nats; grads: its gradient; tokens: all positions."""

    loss: float
    grads: dict[str, NDArray[Any]]
    tokens: int


def make_batch(examples: Sequence[Example], samples: Sequence[int]) -> Batch:
    """Pack examples one after the other; samples are their places in the whole run, which key the dropout."""
    return Batch(
        ids=np.concatenate([example.ids for example in examples]),
        targets=np.concatenate([example.targets for example in examples]),
        lengths=tuple(len(example) for example in examples),
        samples=tuple(samples),
    )


def split(lengths: Sequence[int], groups: int) -> list[list[int]]:
    """Share sequences out over at most so many groups of like token counts; a group keeps their order."""
    loads = [0] * min(groups, len(lengths))
    members: list[list[int]] = [[] for _ in loads]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        lightest = loads.index(min(loads))
        loads[lightest] += lengths[i]
        members[lightest].append(i)
    return [sorted(group) for group in members]


def train_step(
    model: Llama,
    micro_batches: Sequence[tuple[Sequence[Example], Sequence[int]]],
    *,
    train: Literal["lora", "full"],
    checkpointing: bool,
    seed: int,
    threads: int,
    targets: int | None = None,
) -> StepResult:
    """Return the mean loss and its gradient over all micro-batches, each (examples, samples). NF4-10.9

    The loss of every token weighs the same whatever micro-batch it is in. Gradients are summed micro-batch by
    micro-batch and group by group, so their bits depend on the number of threads but not on which ends first.
    targets: those of the whole step where these micro-batches are a share of it; the losses and gradients of
    the shares then add up to the step's. Raises InputError where no token of the step is a target.
    """
    if targets is None:
        targets = count_targets([example for examples, _ in micro_batches for example in examples])
    loss, tokens, grads = 0.0, 0, dict[str, NDArray[Any]]()

    def work(batch: Batch) -> tuple[float, dict[str, NDArray[Any]]]:
        return model.loss_and_grads(
            batch, loss_scale=1.0 / targets, train=train, checkpointing=checkpointing, seed=seed
        )

    for examples, samples in micro_batches:
        for _, (part, part_grads) in over_groups(work, examples, samples, threads):
            loss += part
            for name, g in part_grads.items():
                if name in grads:
                    grads[name] += g
                else:
                    grads[name] = g
        tokens += sum(map(len, examples))
    return StepResult(loss / targets, grads, tokens)


def evaluate(
    model: Llama, examples: Sequence[Example], *, batch_size: int, threads: int, targets: int | None = None
) -> float:
    """Return the mean loss over the target tokens of all examples, in nats, without dropout.

    targets: those of all examples where these are a share of them; the shares' results then add up to it.
    """
    if targets is None:
        targets = count_targets(examples)
    loss = 0.0
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        loss += sum(found for _, found in over_groups(model.loss, part, range(len(part)), threads))
    return loss / targets


def count_targets(examples: Sequence[Example]) -> int:
    """The target tokens of sequences. Raises InputError where there is none (NF4-10.9)."""
    targets = sum(int((example.targets != IGNORE).sum()) for example in examples)
    if not targets:
        raise InputError("the step has no target token: every target is -100; leave such sequences out")
    return targets


def count_tokens(micro_batches: Sequence[tuple[Sequence[Example], Sequence[int]]]) -> int:
    """The positions that a step takes."""
    return sum(len(example) for examples, _ in micro_batches for example in examples)


def over_groups(
    work: Callable[[Batch], R], examples: Sequence[Example], samples: Sequence[int], threads: int
) -> list[tuple[list[int], R]]:
    """Call work on the examples in one batch a thread; the places of a batch's examples, and its result."""
    groups = split([len(example) for example in examples], threads)
    batches = [make_batch([examples[i] for i in group], [samples[i] for i in group]) for group in groups]
    # One thread in BLAS where the groups already use the cores.
    with blas_threads(threads if len(batches) == 1 else 1):
        return list(zip(groups, parallel.map_groups(work, batches), strict=True))


@cache
def _controller() -> Any:
    from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

    return ThreadpoolController()


@contextmanager
def blas_threads(threads: int) -> Iterator[None]:
    """Let BLAS use so many threads inside."""
    with _controller().limit(limits=threads, user_api="blas"):
        yield
