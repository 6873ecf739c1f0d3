"""Where a run computes: an engine makes the steps that the loop orders, in an arithmetic of its own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from nf4.model.generate import LanguageModel
from nf4.model.llama import Llama
from nf4.ranks import ALONE, Ranks
from nf4.train.adamw import AdamW, clip_grad_norm
from nf4.train.data import Example
from nf4.train.shares import PairwiseSum, cut, flatten, share, total_of_ranks, unflatten
from nf4.train.step import count_targets, evaluate, train_step

MicroBatch = tuple[Sequence[Example], Sequence[int]]
"""Examples, and their places in the whole run, which key the dropout."""


@dataclass(frozen=True)
class Update:
    """What a step came to: the mean loss in nats, the norm before clipping, and the positions taken."""

    loss: float
    norm: float
    tokens: int

    @property
    def finite(self) -> bool:
        """Whether the update was made: one whose loss or norm is not finite is left out (NF4-10.7)."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class Engine(Protocol):
    """Makes a run's steps, on all ranks together: each is told the whole step, and takes its share of it.

    optimizer holds the trained arrays and their states at rest: an engine that works elsewhere copies them
    there by `load`, and back by `store`, which the loop calls before it reads them.
    """

    optimizer: AdamW

    def step(self, micro_batches: Sequence[MicroBatch], rate: float) -> Update:
        """Make one update at a learning rate, unless its loss or norm is not finite."""
        ...

    def evaluate(self, examples: Sequence[Example]) -> float:
        """Return the mean loss over the target tokens, in nats, without dropout."""
        ...

    def load(self) -> None:
        """Take over the arrays and states that the optimizer holds."""
        ...

    def store(self) -> None:
        """Bring the optimizer up to date."""
        ...

    @property
    def language_model(self) -> LanguageModel:
        """The model as it is trained so far, to generate with."""
        ...

    def remarks(self) -> Sequence[str]:
        """Return what is to be said of the engine at the end of a run."""
        ...


class FastEngine:
    """The processor in float32, products by NumPy's BLAS: the bits depend on the threads and the ranks."""

    def __init__(
        self,
        model: Llama,
        train: Literal["lora", "full"],
        *,
        batch_size: int,
        max_grad_norm: float,
        weight_decay: float,
        checkpointing: bool,
        seed: int,
        threads: int,
        ranks: Ranks = ALONE,
    ) -> None:
        self.optimizer = AdamW(model.trainable(train), weight_decay=weight_decay)
        self._ranks = ranks
        self._model, self._train, self._batch_size, self._max_grad_norm = (
            model,
            train,
            batch_size,
            max_grad_norm,
        )
        self._checkpointing, self._seed, self._threads = checkpointing, seed, threads

    def step(self, micro_batches: Sequence[MicroBatch], rate: float) -> Update:
        """Make one update at a learning rate, unless its loss or norm is not finite."""
        mine, _ = share(micro_batches, self._ranks)
        result = train_step(
            self._model,
            mine,
            train=self._train,
            checkpointing=self._checkpointing,
            seed=self._seed,
            threads=self._threads,
            targets=count_targets([e for examples, _ in micro_batches for e in examples]),
        )
        grads, loss, tokens = result.grads, result.loss, result.tokens
        if self._ranks.size > 1:
            grads = self._summed(grads)
            parts = self._ranks.gather((loss, tokens))
            loss, tokens = sum(part for part, _ in parts), sum(part for _, part in parts)
        update = Update(loss, clip_grad_norm(grads, self._max_grad_norm), tokens)
        if update.finite:
            self.optimizer.step(grads, rate)
        return update

    def _summed(self, grads: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The sum of the ranks' gradients, the same bits on all: as if each were that of one sequence."""
        ranks = self._ranks
        own = PairwiseSum(first=ranks.rank)
        own.add(flatten([grads[name] for name in self.optimizer.params]))
        runs = [range(rank, rank + 1) for rank in range(ranks.size)]
        return unflatten(total_of_ranks(own, runs, ranks.rank, ranks.exchange), self.optimizer.params)

    def evaluate(self, examples: Sequence[Example]) -> float:
        """Return the mean loss over the target tokens, in nats, without dropout."""
        run = cut([len(example) for example in examples], self._ranks.size)[self._ranks.rank]
        part = evaluate(
            self._model,
            examples[run.start : run.stop],
            batch_size=self._batch_size,
            threads=self._threads,
            targets=count_targets(examples),
        )
        return sum(self._ranks.gather(part))

    def load(self) -> None:
        """Nothing to do: the optimizer's arrays are the model's own."""

    def store(self) -> None:
        """Nothing to do: the optimizer's arrays are the model's own."""

    @property
    def language_model(self) -> LanguageModel:
        """The model itself."""
        return self._model

    def remarks(self) -> Sequence[str]:
        """Return nothing."""
        return ()
