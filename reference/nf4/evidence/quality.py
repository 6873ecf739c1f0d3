"""How well a model predicts a text, window by window, so that two models can be compared in pairs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4 import parallel
from nf4.model.llama import Llama
from nf4.train.data import IGNORE, Example
from nf4.train.step import blas_threads


@dataclass(frozen=True)
class Quality:
    """For each window: its target tokens, the sum of their losses in nats, and how many were likeliest."""

    tokens: NDArray[np.float64]  # [windows], as are the others
    losses: NDArray[np.float64]
    hits: NDArray[np.float64]

    def figures(self) -> dict[str, Any]:
        """Tokens, mean loss in nats a token, perplexity, and the share of tokens that were the likeliest."""
        count = float(self.tokens.sum())
        loss = float(self.losses.sum()) / count
        return {
            "tokens": int(count),
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "accuracy": float(self.hits.sum()) / count,
        }

    def against(self, full: "Quality") -> dict[str, Any]:
        """The figures, and how much worse than `full` on the same windows, each with its standard error."""
        loss, loss_error = _difference(self.losses - full.losses, self.tokens)
        accuracy, accuracy_error = _difference(full.hits - self.hits, self.tokens)
        return self.figures() | {
            "loss_increase": loss,
            "loss_increase_error": loss_error,
            "points_lost": 100 * accuracy,
            "points_lost_error": 100 * accuracy_error,
        }


def judge(model: Llama, examples: Sequence[Example]) -> Quality:
    """Return the quality of the model on the examples, a window on each thread at a time."""
    with blas_threads(1):
        found = np.array(parallel.map_groups(lambda example: _window(model, example), examples))
    return Quality(*found.T)


def _window(model: Llama, example: Example) -> tuple[float, float, float]:
    logits = model.logits(example.ids)  # [T, vocabulary]
    at = np.flatnonzero(example.targets != IGNORE)
    total = hits = 0.0
    for start in range(0, len(at), 64):  # rows: float64 copies stay small
        rows = at[start : start + 64]
        part, targets = logits[rows].astype(np.float64), example.targets[rows]
        top = part.max(1)
        picked = part[np.arange(len(rows)), targets]
        total += float(np.sum(np.log(np.exp(part - top[:, None]).sum(1)) + top - picked))
        hits += float(np.sum(part.argmax(1) == targets))
    return float(len(at)), total, hits


def _difference(sums: NDArray[np.float64], tokens: NDArray[np.float64]) -> tuple[float, float]:
    """Return the mean difference a token, and its standard error over the windows (0 for a single one)."""
    mean = float(sums.sum() / tokens.sum())
    count = len(sums)
    if count < 2:
        return mean, 0.0
    rest = sums - mean * tokens
    error = math.sqrt(count / (count - 1) * float(rest @ rest)) / float(tokens.sum())
    return mean, error
