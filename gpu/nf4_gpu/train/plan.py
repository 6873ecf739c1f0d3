"""What a run takes of the device's memory, worked out before it is loaded, and the nearest that fits."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from nf4.errors import InputError
from nf4.floats import FLOAT32
from nf4.model.config import LlamaConfig

from nf4_gpu.arena import Arena, round_up
from nf4_gpu.model.llama import Limits, Network
from nf4_gpu.model.weights import AdapterShape, Form, Group, groups_of
from nf4_gpu.train.adamw import Optimizer

_CLASSES = 16  # of sizes that passes are padded to, so that few graphs are recorded
_ROW_CLASSES = 8
USES = ("weights", "adapters", "states", "activations", "buffers")


@dataclass(frozen=True)
class Settings:
    """What a run may choose. Budgets in bytes, None for all; kept: layers left out of checkpointing."""

    batch_size: int
    seq_len: int
    checkpointing: bool = False
    kept: int = 0
    optimizer_budget: int | None = None
    weights_budget: int | None = None
    positions: int = 0  # of the longest sequence, if that is one generated
    training: bool = True


@dataclass(frozen=True)
class Plan:
    """A run's memory by use, in bytes, and what will take it up."""

    use: dict[str, int]
    total: int
    network: Network
    optimizer: Optimizer | None

    def describe(self) -> str:
        """Return the plan in one line."""
        parts = ", ".join(f"{use} {_gib(self.use.get(use, 0))}" for use in USES if self.use.get(use))
        return f"device memory: {_gib(self.total)} GiB ({parts})"


def make(
    arena: Arena,
    config: LlamaConfig,
    adapters: Mapping[str, AdapterShape],
    forms: Sequence[Mapping[str, Form]],
    settings: Settings,
    *,
    adapter_dtype: np.dtype[Any] = FLOAT32,
    processors: int = 132,
    capability: int = 90,
    shared_memory: int = 227 << 10,
) -> Plan:
    """Lay a run out in an arena; with one of base 0 this is arithmetic and needs no device."""
    layers, parameters = groups_of(config, adapters)
    resident = resident_layers(layers, forms, settings.weights_budget)
    tokens = round_up(settings.batch_size * settings.seq_len, 64)
    depth = config.num_hidden_layers
    limits = Limits(
        tokens=tokens,
        rows=tokens,
        sequences=settings.batch_size + 1,
        positions=max(settings.seq_len, settings.positions),
        kept=min(settings.kept, depth) if settings.checkpointing else depth,
        resident=resident,
        training=settings.training,
    )
    network = Network(
        arena,
        config,
        layers,
        parameters,
        forms,
        limits,
        adapter_dtype=adapter_dtype,
        processors=processors,
        capability=capability,
        shared_memory=shared_memory,
    )
    optimizer = Optimizer(arena, parameters, settings.optimizer_budget) if settings.training else None
    return Plan(dict(arena.use), arena.size, network, optimizer)


def resident_layers(
    layers: Sequence[Mapping[str, Group]], forms: Sequence[Mapping[str, Form]], budget: int | None
) -> int:
    """Return how many of the first layers' weights stay on the device within a budget in bytes.

    Raises InputError for a budget that has no room for the two layers that the others go through.
    """
    sizes = [
        sum(
            round_up(size, 16)
            for group in groups.values()
            for module in group.modules
            for size in form[module.name].sizes(module.outputs * group.inputs).values()
        )
        for groups, form in zip(layers, forms, strict=True)
    ]
    if budget is None or sum(sizes) <= budget:
        return len(sizes)
    turns = min(2, len(sizes)) * max(sizes)
    if budget < turns:
        raise InputError(
            f"--weights-budget: {_gib(budget)} GiB are too few; two layers take {_gib(turns)} GiB"
        )
    count, used = 0, turns
    while count < len(sizes) - 2 and used + sizes[count] <= budget:
        used += sizes[count]
        count += 1
    return count


def check_fits(plan_of: Callable[[Settings], int], settings: Settings, free: int, describe: str) -> None:
    """Raise InputError, with the nearest settings that do, where a run's memory is more than is free.

    plan_of returns the bytes of a run with such settings.
    """
    if plan_of(settings) <= free:
        return
    for changed, words in nearest(settings):
        try:
            fits = plan_of(changed) <= free
        except InputError:
            continue
        if fits:
            raise InputError(f"{describe}, and {_gib(free)} GiB are free; it fits with {words}")
    raise InputError(
        f"{describe}, and {_gib(free)} GiB are free; no setting makes it fit: take a smaller model"
    )


def nearest(settings: Settings) -> Iterator[tuple[Settings, str]]:
    """Yield ever thriftier settings, with the options that choose them."""
    words: list[str] = []
    if not settings.checkpointing:
        settings = replace(settings, checkpointing=True, kept=0)
        words.append("--checkpointing")
        yield settings, " ".join(words)
    elif settings.kept:
        settings = replace(settings, kept=0)
        words.append("--keep-layers 0")
        yield settings, " ".join(words)
    budget = 64 << 20
    if settings.training and (settings.optimizer_budget is None or settings.optimizer_budget > budget):
        settings = replace(settings, optimizer_budget=budget)
        words.append("--optimizer-budget 64M")
        yield settings, " ".join(words)
    batches = []
    size = settings.batch_size
    while size > 1:
        size //= 2
        batches.append(size)
    for size in batches:
        yield replace(settings, batch_size=size), " ".join([*words, f"--batch-size {size}"])
    if batches:
        settings = replace(settings, batch_size=1)
        words.append("--batch-size 1")
    for budget in (8 << 30, 4 << 30, 2 << 30, 1 << 30, 512 << 20):
        if settings.weights_budget is None or settings.weights_budget > budget:
            settings = replace(settings, weights_budget=budget)
            text = f"{budget >> 30}G" if budget >> 30 else f"{budget >> 20}M"
            yield settings, " ".join([*words, f"--weights-budget {text}"])
    size = settings.seq_len
    while size > 128:
        size //= 2
        yield replace(settings, seq_len=size), " ".join([*words, f"--seq-len {size}"])


def padded(n: int, most: int, classes: int = _CLASSES) -> int:
    """Return the size that one of n, at most `most`, is padded to: one of so many."""
    step = max(64, round_up(-(-most // classes), 64))
    return min(round_up(max(n, 1), step), most)


def padded_rows(n: int, tokens: int) -> int:
    """Return the rows that n rows with a target, of so many padded tokens, are padded to."""
    return padded(n, tokens, _ROW_CLASSES)


def _gib(n: int) -> str:
    return f"{n / 2**30:.2f}"
