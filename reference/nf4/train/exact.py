"""The engine of the exact tier on this machine's processor: no bit depends on threads, BLAS or batches."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.errors import InputError
from nf4.exact.grid import NotFiniteError
from nf4.exact.llama import ExactLlama
from nf4.exact.ops import add, mean_loss
from nf4.model.llama import Batch, Llama
from nf4.train.adamw import AdamW, clip_grad_norm
from nf4.train.data import IGNORE, Example
from nf4.train.engine import MicroBatch, Update
from nf4.train.step import over_groups

Float32 = NDArray[np.float32]


class PairwiseSum:
    """The sum of arrays that come one after another, in the order of NF4-15.6.

    Of G arrays it is the sum of the first h and that of the rest, h being the greatest power of two below G,
    and so on for both: whoever has a run of neighbours can sum it alone. At most log2 G arrays are held.
    """

    def __init__(self, add: Callable[[Any, Any], None] = add) -> None:
        """add: adds its second argument to its first, in place."""
        self._add = add
        self._sums: list[tuple[int, Any]] = []  # of 2^level neighbours each, falling

    def add(self, array: Any) -> None:
        """Add the next array, which is then this sum's own."""
        level = 0
        while self._sums and self._sums[-1][0] == level:
            _, before = self._sums.pop()
            self._add(before, array)
            array, level = before, level + 1
        self._sums.append((level, array))

    def total(self) -> Any:
        """The sum of what was added, at least one array; nothing may be added after."""
        _, last = self._sums.pop()
        while self._sums:
            _, before = self._sums.pop()
            self._add(before, last)
            last = before
        return last


class ExactEngine:
    """This machine's processor in the arithmetic of chapters 14 and 15, whatever the number of threads."""

    def __init__(
        self,
        model: Llama,
        *,
        batch_size: int,
        max_grad_norm: float,
        weight_decay: float,
        checkpointing: bool,
        seed: int,
        threads: int,
    ) -> None:
        self.optimizer = AdamW(model.trainable("lora"), weight_decay=weight_decay)
        self._model = ExactLlama(model)
        self._batch_size, self._max_grad_norm = batch_size, max_grad_norm
        self._checkpointing, self._seed, self._threads = checkpointing, seed, threads

    def step(self, micro_batches: Sequence[MicroBatch], rate: float) -> Update:
        """Make one update at a learning rate, unless its loss or norm is not finite (NF4-15.9)."""
        try:
            loss, grads = self.gradients(micro_batches)
        except NotFiniteError:
            return Update(math.nan, math.nan, 0)
        update = Update(loss, clip_grad_norm(grads, self._max_grad_norm), count_tokens(micro_batches))
        if update.finite:
            self.optimizer.step(grads, rate)
        return update

    def gradients(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, dict[str, Float32]]:
        """Return the mean loss of a step and its gradient (NF4-15.5, NF4-15.6).

        Raises InputError where no token of the step is a target, NotFiniteError where it diverged.
        """
        targets = count_targets([e for examples, _ in micro_batches for e in examples])
        sums: dict[str, PairwiseSum] = {name: PairwiseSum() for name in self.optimizer.params}

        def work(batch: Batch) -> tuple[Float32, dict[str, Float32]]:
            return self._model.losses_and_gradients(
                batch, scale=1.0 / targets, checkpointing=self._checkpointing, seed=self._seed
            )

        losses: list[Float32] = []
        for examples, samples in micro_batches:
            by_sequence: list[tuple[Float32, dict[str, Float32]]] = [_NOTHING] * len(examples)
            for members, (rows, gradients) in over_groups(work, examples, samples, self._threads):
                parts = _cut(rows, [examples[i] for i in members])
                for place, (i, part) in enumerate(zip(members, parts, strict=True)):
                    by_sequence[i] = part, {name: g[place] for name, g in gradients.items()}
            for part, own in by_sequence:
                losses.append(part)
                for name, gradient in own.items():
                    sums[name].add(gradient)
        loss = mean_loss(np.concatenate(losses), targets)
        return loss, {name: pairwise.total() for name, pairwise in sums.items()}

    def evaluate(self, examples: Sequence[Example]) -> float:
        """Return the mean loss over the target tokens, in nats, without dropout (NF4-15.5)."""
        losses = [np.empty(0, np.float32)] * len(examples)
        for start in range(0, len(examples), self._batch_size):
            part = examples[start : start + self._batch_size]
            for members, rows in over_groups(self._model.losses, part, range(len(part)), self._threads):
                cut = _cut(rows, [part[i] for i in members])
                for i, own in zip(members, cut, strict=True):
                    losses[start + i] = own
        return mean_loss(np.concatenate(losses), count_targets(examples))

    def load(self) -> None:
        """Nothing to do: the optimizer's arrays are the model's own."""

    def store(self) -> None:
        """Nothing to do: the optimizer's arrays are the model's own."""


_NOTHING: tuple[Float32, dict[str, Float32]] = (np.empty(0, np.float32), {})


def _cut(rows: Float32, examples: Sequence[Example]) -> list[Float32]:
    """The rows of packed examples, by example."""
    return np.split(rows, np.cumsum([len(example) for example in examples])[:-1])


def count_targets(examples: Sequence[Example]) -> int:
    """The target tokens of a step. Raises InputError where there is none (NF4-10.9)."""
    targets = sum(int((example.targets != IGNORE).sum()) for example in examples)
    if not targets:
        raise InputError("the step has no target token: every target is -100; leave such sequences out")
    return targets


def count_tokens(micro_batches: Sequence[MicroBatch]) -> int:
    """The positions that a step takes."""
    return sum(len(example) for examples, _ in micro_batches for example in examples)
