"""The engine of the exact tier on the device: the updates of nf4.train.exact, to the same bits."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import cupy
import numpy as np
from cupy.cuda import runtime
from nf4.errors import InputError
from nf4.exact.grid import PIECE, NotFiniteError, total
from nf4.exact.ops import mean_loss
from nf4.lora import LoRA
from nf4.model.generate import LanguageModel
from nf4.model.llama import Llama
from nf4.ranks import ALONE, Ranks
from nf4.train.adamw import AdamW, clip_factor
from nf4.train.data import Example
from nf4.train.engine import MicroBatch, Update
from nf4.train.exact import rows_of_all
from nf4.train.shares import PairwiseSum, cut, share, total_of_ranks
from nf4.train.step import count_targets, count_tokens, make_batch
from numpy.typing import NDArray

from nf4_gpu.arrays import KINDS
from nf4_gpu.compile import capability, kernel
from nf4_gpu.exact import grid
from nf4_gpu.exact.llama import DeviceLlama
from nf4_gpu.ranks import Nccl

Float32 = NDArray[np.float32]

_NEEDS = 80  # more shared memory for a block than Turing has


class ExactEngine:
    """A GPU, or one a rank, in the arithmetic of chapters 14 and 15.

    The adapters are views of one array on the device, their states and gradients likewise.
    """

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
        arch = capability(runtime.getDevice())
        if arch < _NEEDS:
            raise InputError(
                f"--device cuda: this GPU is of compute capability {arch / 10}; exact training needs 8.0"
            )
        self.optimizer = AdamW(model.trainable("lora"), weight_decay=weight_decay)
        self._host = model
        self._batch_size, self._max_grad_norm = batch_size, max_grad_norm
        self._checkpointing, self._seed, self._ranks = checkpointing, seed, ranks
        self._exchange = Nccl(ranks).exchange if ranks.size > 1 else ranks.exchange
        params = self.optimizer.params
        dtype = next(iter(params.values())).dtype
        size = sum(p.size for p in params.values())
        self._stream = cupy.cuda.Stream(non_blocking=True)
        with self._stream:
            self._p = cupy.empty(size, dtype)
            self._m, self._v = (cupy.empty(size, cupy.float32) for _ in "mv")
            views = _views(self._p, params)
            adapters: dict[str, LoRA] = {
                name: replace(lora, A=views[f"{name}.lora_A.weight"], B=views[f"{name}.lora_B.weight"])
                for name, lora in model.adapters.items()
            }
            self._model = DeviceLlama(model, adapters)
            self._by_count, starts = _pieces(params)
            self._starts = cupy.asarray(starts)
            self._space = grid.Space()
            self.load()

    def step(self, micro_batches: Sequence[MicroBatch], rate: float) -> Update:
        """Make one update at a learning rate, unless its loss or norm is not finite (NF4-15.9)."""
        with self._stream:
            tokens = count_tokens(micro_batches)
            try:
                loss, gradient = self.gradient(micro_batches)
            except NotFiniteError:
                return Update(math.nan, math.nan, tokens)
            norm = self._norm(gradient)
            update = Update(loss, norm, tokens)
            if update.finite:
                clip = np.float32(clip_factor(norm, self._max_grad_norm))
                s = self.optimizer.advance(rate)
                function = kernel(runtime.getDevice(), "train/exact.cu", "update", DTYPE=KINDS[self._p.dtype])
                scalars = clip, s.rest1, s.beta2, s.rest2, s.root, s.eps, s.step, s.decay
                n = self._p.size
                head = self._p, gradient, self._m, self._v, np.int64(n)
                function((-(-n // 256),), (256,), (*head, *scalars))
            return update

    def gradient(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, cupy.ndarray]:
        """Return the mean loss of a step and its gradient, all arrays one after another (NF4-15.5, NF4-15.6).

        Raises InputError where no token of the step is a target, NotFiniteError where it diverged.
        """
        targets = count_targets([e for examples, _ in micro_batches for e in examples])
        mine, runs = share(micro_batches, self._ranks)
        summed = PairwiseSum(grid.add, first=runs[self._ranks.rank].start)
        losses = rows_of_all(self._ranks, lambda: self._losses_and_sum(mine, targets, summed))
        loss = mean_loss(losses, targets)
        return loss, total_of_ranks(
            summed, runs, self._ranks.rank, self._exchange, lambda size: cupy.empty(size, cupy.float32)
        )

    def _losses_and_sum(
        self, micro_batches: Sequence[MicroBatch], targets: int, summed: PairwiseSum
    ) -> Float32:
        """Return the losses by row, of a step of so many targets; add each sequence's gradient to summed."""
        losses: list[Any] = []
        for examples, samples in micro_batches:
            part, gradients = self._model.losses_and_gradients(
                make_batch(examples, samples),
                scale=1.0 / targets,
                checkpointing=self._checkpointing,
                seed=self._seed,
            )
            if len(micro_batches) > 1:  # whose memory the next one may overwrite
                part = part.copy()
            losses.append(part)
            memory = next(iter(gradients.values()))  # all arrays of a sequence follow one another
            for by_sequence in cupy.ndarray((len(memory), self._p.size), cupy.float32, memory.data):
                summed.add(by_sequence.copy() if len(micro_batches) > 1 else by_sequence)
        return self._read(losses)

    def evaluate(self, examples: Sequence[Example]) -> float:
        """Return the mean loss over the target tokens, in nats, without dropout (NF4-15.5)."""
        run = cut([len(example) for example in examples], self._ranks.size)[self._ranks.rank]
        losses = rows_of_all(self._ranks, lambda: self._losses(examples[run.start : run.stop]))
        return mean_loss(losses, count_targets(examples))

    def _losses(self, examples: Sequence[Example]) -> Float32:
        with self._stream:
            losses = []
            for start in range(0, len(examples), self._batch_size):
                part = examples[start : start + self._batch_size]
                losses.append(self._model.losses(make_batch(part, range(len(part)))))
            return self._read(losses)

    @property
    def language_model(self) -> LanguageModel:
        """The host's model with the adapters as they are now, in the fast mode's arithmetic."""
        self.store()
        return self._host

    def remarks(self) -> Sequence[str]:
        """Return nothing."""
        return ()

    def load(self) -> None:
        """Take over the arrays and states that the optimizer holds."""
        with self._stream:
            for flat, held in self._pairs():
                flat.set(np.concatenate([array.reshape(-1) for array in held.values()]))

    def store(self) -> None:
        """Bring the optimizer up to date."""
        with self._stream:
            for flat, held in self._pairs():
                arrays, start = flat.get(), 0
                for array in held.values():
                    array.reshape(-1)[:] = arrays[start : start + array.size]
                    start += array.size

    def _pairs(self) -> list[tuple[cupy.ndarray, dict[str, Any]]]:
        """What the device and the optimizer have of the same."""
        held = self.optimizer
        return [(self._p, held.params), (self._m, held.m), (self._v, held.v)]

    def _read(self, losses: list[cupy.ndarray]) -> Float32:
        """Wait for the losses. Raises NotFiniteError where something on the way was not finite."""
        found = np.concatenate([np.empty(0, np.float32), *(cupy.asnumpy(part) for part in losses)])
        grid.check(int(grid.status()[0]))
        return found

    def _norm(self, gradient: cupy.ndarray) -> float:
        """The 2-norm of the gradient, from the sums of its pieces (NF4-15.7)."""
        sums = cupy.asnumpy(grid.squares(gradient, self._starts, self._space))
        try:
            grid.check(int(grid.status()[0]))
        except NotFiniteError:
            return math.nan
        squares = np.empty(len(self.optimizer.params))
        for count, (places, pieces) in self._by_count.items():
            squares[places] = sums[pieces[:, 0]] if count == 1 else total(sums[pieces])
        return math.sqrt(float(total(squares)))


def _views(flat: cupy.ndarray, params: dict[str, NDArray[Any]]) -> dict[str, cupy.ndarray]:
    """The parts of flat in the shapes of params, by name."""
    found, start = {}, 0
    for name, p in params.items():
        found[name] = flat[start : start + p.size].reshape(p.shape)
        start += p.size
    return found


def _pieces(
    params: dict[str, NDArray[Any]],
) -> tuple[dict[int, tuple[list[int], NDArray[np.int64]]], NDArray[np.int64]]:
    """The pieces of the arrays among all, and where they begin; the last entry is their end.

    By the number of pieces: the places of such arrays among the sorted names, and [arrays, number].
    """
    places = {name: i for i, name in enumerate(sorted(params))}
    found: dict[int, tuple[list[int], list[range]]] = {}
    starts: list[int] = []
    start = 0
    for name, p in params.items():
        first = len(starts)
        starts += range(start, start + p.size, PIECE)
        start += p.size
        same = found.setdefault(len(starts) - first, ([], []))
        same[0].append(places[name])
        same[1].append(range(first, len(starts)))
    arrays = {count: (at, np.array(pieces)) for count, (at, pieces) in found.items()}
    return arrays, np.array([*starts, start], np.int64)
