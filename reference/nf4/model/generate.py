"""Text generation: one token after another, with a key-value cache."""

from collections.abc import Collection, Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nf4.errors import InputError
from nf4.random import stream_of, uniform

_STREAM = stream_of("generate")


class LanguageModel(Protocol):
    """What text is generated with: Llama, or a model that is computed elsewhere."""

    def new_cache(self) -> Any:
        """Return the state of a sequence that has no tokens yet."""

    def logits(self, ids: NDArray[np.integer[Any]], cache: Any, last: bool) -> NDArray[Any]:
        """Return the logits after ids, which follow what the cache holds: with `last`, [1, vocabulary]."""


def generate(
    model: LanguageModel,
    ids: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Collection[int] = frozenset(),
) -> Iterator[int]:
    """Yield up to max_new_tokens token ids that continue ids; a stop id ends it and isn't yielded.

    temperature 0 takes the likeliest token. top_k 0 and top_p 1 leave the distribution whole. Draw i is the
    uniform of (seed, stream "generate", sample i) (NF4-11.3), so a seed gives the same text again.
    Raises InputError for an empty prompt and for options outside their ranges.
    """
    check_options(ids, temperature, top_k, top_p)
    cache = model.new_cache()
    rows = np.array(ids)
    for i in range(max_new_tokens):
        logits = model.logits(rows, cache, last=True)[0]  # [vocabulary]
        if temperature == 0:
            token = int(np.argmax(logits))
        else:
            draw = float(uniform(seed, _STREAM, 1, sample=i)[0])
            token = sample(logits, temperature, top_k, top_p, draw)
        if token in stop_ids:
            return
        yield token
        rows = np.array([token])


def check_options(ids: list[int], temperature: float, top_k: int, top_p: float) -> None:
    """Raise InputError for an empty prompt and for options of generate outside their ranges."""
    if not ids:
        raise InputError("the prompt has no tokens; give at least one")
    if not temperature >= 0:
        raise InputError(f"temperature is {temperature}; it must be at least 0")
    if top_k < 0:
        raise InputError(f"top_k is {top_k}; it must be at least 0")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}; it must be above 0 and at most 1")


def sample(logits: NDArray[Any], temperature: float, top_k: int, top_p: float, draw: float) -> int:
    """The token at `draw` in [0, 1) of softmax(logits / temperature), likeliest first, ties by id.

    Kept are the top_k likeliest (0 for all), and of them the fewest whose probabilities reach top_p.
    """
    order = np.argsort(-logits, kind="stable")
    if top_k:
        order = order[:top_k]
    scaled = logits[order].astype(np.float64) / temperature
    p = np.exp(scaled - scaled[0])
    total = np.cumsum(p / p.sum())
    count = min(int(np.searchsorted(total, top_p)) + 1, len(total))
    return int(
        order[np.searchsorted(total[:count], draw * total[count - 1], side="right").clip(max=count - 1)]
    )
