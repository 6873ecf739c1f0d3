"""A run's steps on the GPU: packed sequences in, losses out, everything between recorded into graphs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from nf4.errors import CheckFailed, InputError
from nf4.floats import FLOAT32
from nf4.formats.peft import linear_shapes
from nf4.model.generate import LanguageModel
from nf4.model.llama import Llama
from nf4.ranks import ALONE, Ranks
from nf4.train.adamw import AdamW
from nf4.train.data import IGNORE, Example
from nf4.train.engine import MicroBatch, Update
from nf4.train.shares import cut, share
from nf4.train.step import count_targets, count_tokens
from numpy.typing import NDArray

from nf4_gpu.arena import Arena
from nf4_gpu.device import Cuda, Device
from nf4_gpu.model.generate import Decoder, why_not
from nf4_gpu.model.llama import Pass
from nf4_gpu.model.weights import Form, form_of, shapes_of
from nf4_gpu.train import plan as planning
from nf4_gpu.train.adamw import scalars
from nf4_gpu.train.plan import Plan, Settings

FLOAT64 = np.dtype(np.float64)
_MOST_GRAPHS = 64  # shapes beyond are launched one by one
_BLOCKS = 8  # of pinned memory, that evaluation takes turns in


class Inference:
    """A model on the device, laid out for given settings; passes over packed sequences.

    With decode, also a decoder that shares its memory. The same bits whether passes are recorded or launched.
    """

    def __init__(
        self, model: Llama, settings: Settings, *, device: Device, record: bool = True, decode: bool = False
    ) -> None:
        self._device, self._settings, self._record = device, settings, record
        self._config = config = model.config
        dtypes = {array.dtype for lora in model.adapters.values() for array in (lora.A, lora.B)}
        if len(dtypes) > 1:
            raise InputError("the adapters are of different dtypes; on the GPU they must be of one")
        self._adapter_dtype = dtypes.pop() if dtypes else FLOAT32
        adapters, forms = shapes_of(model.adapters), forms_of(model)

        def make(arena: Arena) -> tuple[Plan, Decoder | None]:
            plan = planning.make(
                arena,
                config,
                adapters,
                forms,
                settings,
                adapter_dtype=self._adapter_dtype,
                processors=device.processors,
                capability=device.capability,
                shared_memory=device.shared_memory,
            )
            self._total = arena.take("buffers", 8)
            decoder = None
            if decode and why_not(config, device.shared_memory) is None:
                decoder = Decoder(arena, plan.network, max(settings.positions, settings.seq_len))
            return plan, decoder

        size = Arena()
        make(size)
        self.plan, self.decoder = make(Arena(device.allocate(size.size)))
        self._network = self.plan.network
        self._network.load(device, model.params)
        self._network.load_adapters(model.adapters)
        if self.decoder is not None:
            self.decoder.load(device)
        self._blocks: list[NDArray[np.int32]] = []
        self._graphs: dict[tuple[Any, ...], Callable[[], None] | None] = {}

    def total_loss(self, examples: Sequence[Example]) -> float:
        """Return the sum of the losses of all target tokens, without dropout."""
        device, size = self._device, self._settings.batch_size
        device.synchronize()  # what was interrupted may still go on
        device.fill(self._total, 0, 8)
        for number, first in enumerate(range(0, len(examples), size)):
            part = examples[first : first + size]
            if number and number % _BLOCKS == 0:
                device.synchronize()  # the blocks of inputs are used again
            shape = self._send(number % _BLOCKS, part, range(len(part)), drop=False)
            self._run(("loss", shape), lambda shape=shape: self._network.loss(shape, self._total))  # type: ignore[misc]
        device.synchronize()
        total = np.zeros(1)
        device.copy(total.ctypes.data, self._total, 8)
        device.synchronize()
        return float(total[0])

    def _send(self, number: int, examples: Sequence[Example], samples: Sequence[int], *, drop: bool) -> Pass:
        """Copy a micro-batch to the device from one of the blocks of pinned memory; return its shape."""
        limits, inputs = self._network.limits, self._network.inputs
        tokens = sum(len(example) for example in examples)
        rows = sum(int((example.targets >= 0).sum()) for example in examples)
        if tokens > limits.tokens or len(examples) >= limits.sequences:
            raise InputError(
                f"a batch of {len(examples)} sequences and {tokens} tokens is more than the plan's "
                f"{limits.sequences - 1} and {limits.tokens}"
            )
        check_vocabulary(examples, self._config.vocab_size)
        padded = planning.padded(tokens, limits.tokens)
        shape = Pass(padded, planning.padded_rows(rows, padded), drop)
        while len(self._blocks) <= number:
            self._blocks.append(self._device.allocate_pinned(inputs.nbytes).view(np.int32))
        block = self._blocks[number]
        sequences = [(e.ids, e.targets, sample) for e, sample in zip(examples, samples, strict=True)]
        inputs.fill(block, shape, sequences, self._network.angles)
        self._device.copy(inputs.at("ids"), block.ctypes.data, inputs.nbytes)
        return shape

    def _run(self, key: tuple[Any, ...], run: Callable[[], None]) -> None:
        """Launch: the first time as it is, which compiles all; from the second on as a recorded graph."""
        if not self._record or (key not in self._graphs and len(self._graphs) >= _MOST_GRAPHS):
            run()
        elif key not in self._graphs:
            run()
            self._graphs[key] = None
        else:
            graph = self._graphs[key]
            if graph is None:
                graph = self._graphs[key] = self._device.record(run)
            graph()


class GpuEngine(Inference):
    """Trains adapters on a GPU, or one a rank, in bfloat16; sums, norms, adapters and states in float32.

    The same bits whether passes are recorded or launched, states or weights paged, layers checkpointed or
    not.
    """

    optimizer: AdamW

    def __init__(
        self,
        model: Llama,
        settings: Settings,
        *,
        max_grad_norm: float,
        weight_decay: float,
        seed: int,
        device: Device | None = None,
        record: bool = True,
        ranks: Ranks = ALONE,
    ) -> None:
        if not model.adapters:
            raise InputError("the model has no adapters; on the GPU nothing else is trained")
        self._ranks = ranks
        self.optimizer = AdamW(model.trainable("lora"), weight_decay=weight_decay)
        super().__init__(
            model, settings, device=device or Cuda(), record=record, decode=settings.positions > 0
        )
        self._model, self._max_grad_norm, self._seed = model, max_grad_norm, seed
        assert self.plan.optimizer is not None
        self._states = self.plan.optimizer
        kind = 0 if self._adapter_dtype == FLOAT32 else 2
        self._states.load(self._device, self._network.parameters, self._network.gradients, kind)
        self._places = []
        for name in model.adapters:
            adapter = self._network.adapter(name)
            self._places.append((f"{name}.lora_A.weight", adapter.a))
            self._places.append((f"{name}.lora_B.weight", adapter.b))
        self._steps, self._powers = 0, (1.0, 1.0)
        if ranks.size > 1:
            self._device.join(ranks)
        self.load()

    def step(self, micro_batches: Sequence[MicroBatch], rate: float) -> Update:
        """Make one update at a learning rate, unless its loss or norm is not finite.

        Raises InputError for a token outside the vocabulary and for a step without a target, and
        CheckFailed where the GPU fails.
        """
        targets = count_targets([example for examples, _ in micro_batches for example in examples])
        beta1, beta2 = self.optimizer.betas
        powers = self._powers[0] * beta1, self._powers[1] * beta2
        mine, _ = share(micro_batches, self._ranks)
        with _failures():
            self._device.synchronize()  # what was interrupted may still go on
            self._states.begin(scalars(self.optimizer, powers, rate, 1.0 / targets, self._max_grad_norm))
            for number, (examples, samples) in enumerate(mine):
                shape = self._send(number, examples, samples, drop=True)
                self._run(("train", shape), lambda shape=shape: self._pass(shape))  # type: ignore[misc]
            if self._ranks.size > 1:
                self._device.sum_over_ranks(self._network.gradients, self._states.count, FLOAT32)
                self._device.sum_over_ranks(self._states.loss, 1, FLOAT64)
            self._states.wait_for_states()
            self._run(("update",), self._states.update)
            loss, norm, made = self._states.outcome()
        if made:
            self._steps, self._powers = self._steps + 1, powers
        return Update(loss / targets, norm, count_tokens(micro_batches))

    def evaluate(self, examples: Sequence[Example]) -> float:
        """Return the mean loss over the target tokens, in nats, without dropout."""
        run = cut([len(example) for example in examples], self._ranks.size)[self._ranks.rank]
        with _failures():
            part = self.total_loss(examples[run.start : run.stop])
        return sum(self._ranks.gather(part)) / count_targets(examples)

    def load(self) -> None:
        """Take over the arrays and states that the optimizer holds."""
        self._states.take(self.optimizer, self._places)
        self._steps, self._powers = self.optimizer.steps, (1.0, 1.0)
        beta1, beta2 = self.optimizer.betas
        for _ in range(self._steps):
            self._powers = self._powers[0] * beta1, self._powers[1] * beta2

    def store(self) -> None:
        """Bring the optimizer up to date."""
        with _failures():
            self._states.store(self.optimizer, self._places, self._steps)

    @property
    def language_model(self) -> LanguageModel:
        """The model with its adapters as they are now, to generate with."""
        if self.decoder is not None:
            return self.decoder
        self.store()
        return self._model

    def remarks(self) -> list[str]:
        """Return the plan of memory and the peak that was measured."""
        return [f"{self.plan.describe()}; measured {self._device.taken / 2**30:.2f} GiB"]

    def gradients(self) -> dict[str, NDArray[np.float32]]:
        """Return the gradients of the last step, before clipping."""
        found = {}
        for name, at in self._places:
            array = np.empty(self.optimizer.params[name].shape, np.float32)
            self._device.copy(array.ctypes.data, self._network.gradients + 4 * at, array.nbytes)
            self._device.synchronize()
            found[name] = array
        return found

    def timeline(self, device: Any, micro_batches: Sequence[MicroBatch], rate: float) -> list[dict[str, Any]]:
        """Return what a step launches and how long each takes, on a Timed device that is the engine's."""
        record, self._record = self._record, False
        try:
            rows: list[dict[str, Any]] = device.measured(lambda: self.step(micro_batches, rate))
        finally:
            self._record = record
        return rows

    def _pass(self, shape: Pass) -> None:
        self._network.loss_and_gradients(shape, self._states.loss, self._states.loss_scale, self._seed)


def forms_of(model: Llama) -> list[dict[str, Form]]:
    """Return how each linear weight of a model is stored, by layer and module."""
    forms: list[dict[str, Form]] = [{} for _ in range(model.config.num_hidden_layers)]
    for name in linear_shapes(model.config):
        forms[int(name.split(".")[2])][name] = form_of(model.params[f"{name}.weight"])
    return forms


def check_vocabulary(examples: Sequence[Example], vocabulary: int) -> None:
    """Raise InputError for a token id or target that the model has not."""
    for example in examples:
        for what, values in (("token id", example.ids), ("target", example.targets)):
            bad = (values < 0) | (values >= vocabulary)
            if what == "target":
                bad &= values != IGNORE
            if bad.any():
                raise InputError(
                    f"{what} {values[np.argmax(bad)]} is outside the model's vocabulary of {vocabulary}; "
                    "is this the model's own tokenizer?"
                )


@contextmanager
def _failures() -> Iterator[None]:
    """Tell a failure of the GPU as a failed check: what was saved before is whole."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise CheckFailed(
            f"the GPU fails: {error}; end what else uses it and go on from the last checkpoint by --resume"
        ) from error
