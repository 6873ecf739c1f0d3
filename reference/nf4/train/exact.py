"""The engine of the exact tier on this machine's processor: no bit depends on threads, BLAS or batches."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from nf4.exact.grid import NotFiniteError
from nf4.exact.llama import ExactLlama
from nf4.exact.ops import mean_loss
from nf4.model.generate import LanguageModel
from nf4.model.llama import Batch, Llama
from nf4.ranks import ALONE, Ranks
from nf4.train.adamw import AdamW, clip_grad_norm
from nf4.train.data import Example
from nf4.train.engine import MicroBatch, Update
from nf4.train.shares import PairwiseSum, cut, flatten, share, total_of_ranks, unflatten
from nf4.train.step import count_targets, count_tokens, over_groups

Float32 = NDArray[np.float32]


class ExactEngine:
    """The processor in the arithmetic of chapters 14 and 15, whatever the number of threads and ranks."""

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
        ranks: Ranks = ALONE,
    ) -> None:
        self.optimizer = AdamW(model.trainable("lora"), weight_decay=weight_decay)
        self._host, self._model = model, ExactLlama(model)
        self._batch_size, self._max_grad_norm = batch_size, max_grad_norm
        self._checkpointing, self._seed, self._threads = checkpointing, seed, threads
        self._ranks = ranks

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
        mine, runs = share(micro_batches, self._ranks)
        summed = PairwiseSum(first=runs[self._ranks.rank].start)
        losses = rows_of_all(self._ranks, lambda: self._losses_and_sum(mine, targets, summed))
        loss = mean_loss(losses, targets)
        gradient = total_of_ranks(summed, runs, self._ranks.rank, self._ranks.exchange)
        return loss, unflatten(gradient, self.optimizer.params)

    def _losses_and_sum(
        self, micro_batches: Sequence[MicroBatch], targets: int, summed: PairwiseSum
    ) -> Float32:
        """Return the losses by row, of a step of so many targets; add each sequence's gradient to summed."""

        def work(batch: Batch) -> tuple[Float32, dict[str, Float32]]:
            return self._model.losses_and_gradients(
                batch, scale=1.0 / targets, checkpointing=self._checkpointing, seed=self._seed
            )

        losses: list[Float32] = []
        for examples, samples in micro_batches:
            by_sequence = [(_NO_ROWS, _NO_ROWS)] * len(examples)
            for members, (rows, gradients) in over_groups(work, examples, samples, self._threads):
                parts = _cut(rows, [examples[i] for i in members])
                for place, (i, part) in enumerate(zip(members, parts, strict=True)):
                    by_sequence[i] = part, flatten([gradients[name][place] for name in self.optimizer.params])
            for part, gradient in by_sequence:
                losses.append(part)
                summed.add(gradient)
        return np.concatenate(losses)

    def evaluate(self, examples: Sequence[Example]) -> float:
        """Return the mean loss over the target tokens, in nats, without dropout (NF4-15.5)."""
        run = cut([len(example) for example in examples], self._ranks.size)[self._ranks.rank]
        losses = rows_of_all(self._ranks, lambda: self._losses(examples[run.start : run.stop]))
        return mean_loss(losses, count_targets(examples))

    def _losses(self, examples: Sequence[Example]) -> Float32:
        losses = [_NO_ROWS] * (len(examples) + 1)
        for start in range(0, len(examples), self._batch_size):
            part = examples[start : start + self._batch_size]
            for members, rows in over_groups(self._model.losses, part, range(len(part)), self._threads):
                cut_rows = _cut(rows, [part[i] for i in members])
                for i, own in zip(members, cut_rows, strict=True):
                    losses[start + i] = own
        return np.concatenate(losses)

    @property
    def language_model(self) -> LanguageModel:
        """The model itself, in the fast mode's arithmetic."""
        return self._host

    def remarks(self) -> Sequence[str]:
        """Return nothing."""
        return ()

    def load(self) -> None:
        """Nothing to do: the optimizer's arrays are the model's own."""

    def store(self) -> None:
        """Nothing to do: the optimizer's arrays are the model's own."""


_NO_ROWS = np.empty(0, np.float32)


def rows_of_all(ranks: Ranks, work: Callable[[], Float32]) -> Float32:
    """Return what work returns on each rank, one after another: the rows of sequences in their order.

    Raises NotFiniteError on all ranks where work raises it on one.
    """
    error = NotFiniteError("on another rank")
    rows: Float32 | None = None
    try:
        rows = work()
    except NotFiniteError as found:
        error = found
    found_rows = [part for part in ranks.gather(rows) if part is not None]
    if len(found_rows) < ranks.size:
        raise error
    return np.concatenate(found_rows)


def _cut(rows: Float32, examples: Sequence[Example]) -> list[Float32]:
    """The rows of packed examples, by example."""
    return np.split(rows, np.cumsum([len(example) for example in examples])[:-1])
