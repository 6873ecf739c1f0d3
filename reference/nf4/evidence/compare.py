"""Quantizers side by side on the weights of a model and on normal data: bits, errors, and perplexity."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.bench import machine
from nf4.evidence.grids import QUANTIZERS
from nf4.evidence.quality import Quality, judge
from nf4.evidence.weights import Weight, normal_data
from nf4.formats.checkpoint import LINEAR_WEIGHT, load_model, open_checkpoint
from nf4.model.llama import Llama
from nf4.tensor import QuantizedTensor
from nf4.train.data import IGNORE, Example, load_data

NORMAL = "normal data"

_CHUNK = 1 << 16  # elements: differences in float64 are never all in memory
_SEQ_LEN = 512

Progress = Callable[[str, int, int], None]  # what comes next, how much is done, of how much


@dataclass
class Sums:
    """What the figures of some tensors are made of."""

    weights: int = 0
    nbytes: int = 0
    square: float = 0.0
    square_error: float = 0.0
    magnitude: float = 0.0
    magnitude_error: float = 0.0
    greatest: float = 0.0  # error, over the RMS of its tensor

    def add(self, other: "Sums") -> None:
        """Take other tensors in."""
        self.weights += other.weights
        self.nbytes += other.nbytes
        self.square += other.square
        self.square_error += other.square_error
        self.magnitude += other.magnitude
        self.magnitude_error += other.magnitude_error
        self.greatest = max(self.greatest, other.greatest)

    def figures(self) -> dict[str, float]:
        """Bits a weight, sqrt(sum e^2 / sum x^2), sum |e| / sum |x|, and the greatest |e| over the RMS."""
        return {
            "bits_per_weight": 8 * self.nbytes / self.weights if self.weights else 0.0,
            "relative_rms_error": math.sqrt(self.square_error / self.square) if self.square else 0.0,
            "relative_mean_error": self.magnitude_error / self.magnitude if self.magnitude else 0.0,
            "max_error": self.greatest,
        }


@dataclass
class Tally:
    """The errors of one quantizer at one block size: over all tensors, by kind, by layer."""

    all: Sums = field(default_factory=Sums)
    kinds: dict[str, Sums] = field(default_factory=dict)
    layers: dict[int, Sums] = field(default_factory=dict)

    def add(self, weight: Weight, sums: Sums) -> None:
        """Take a tensor in."""
        self.all.add(sums)
        self.kinds.setdefault(weight.kind, Sums()).add(sums)
        if weight.layer is not None:
            self.layers.setdefault(weight.layer, Sums()).add(sums)

    def record(self) -> dict[str, Any]:
        """Return the figures of all, by kind and by layer."""
        return {
            "weights": self.all.weights,
            **self.all.figures(),
            "kinds": {kind: self.kinds[kind].figures() for kind in sorted(self.kinds)},
            "layers": {str(layer): self.layers[layer].figures() for layer in sorted(self.layers)},
        }


def measure(x: NDArray[Any], quantizer: str, block_size: int) -> Sums:
    """Return the sums of the errors of x, of any shape, after quantization and back (in the dtype of x)."""
    rounded = QUANTIZERS[quantizer].round(x, block_size)
    sums = Sums(x.size, rounded.nbytes)
    flat, decoded = x.reshape(-1), rounded.values.reshape(-1)
    greatest = 0.0
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK].astype(np.float64)
        error = np.abs(part - decoded[start : start + _CHUNK])
        sums.magnitude += float(np.abs(part).sum())
        sums.magnitude_error += float(error.sum())
        greatest = max(greatest, float(error.max()))
        sums.square += float(np.square(part, out=part).sum())
        sums.square_error += float(np.square(error, out=error).sum())
    rms = math.sqrt(sums.square / flat.size) if flat.size else 0.0
    sums.greatest = greatest / rms if rms else 0.0
    return sums


def tallies(
    weights: Sequence[Weight], pairs: Sequence[tuple[str, int]], progress: Progress
) -> dict[tuple[str, int], Tally]:
    """Return the tally of each (quantizer, block size); every tensor is read once."""
    found = {pair: Tally() for pair in pairs}
    for i, weight in enumerate(weights):
        progress(weight.name, i, len(weights))
        x = weight.read()
        for (name, block_size), tally in found.items():
            tally.add(weight, measure(x, name, block_size))
    progress("", len(weights), len(weights))
    return found


def rounded_model(base: Llama, quantizer: str, block_size: int) -> Llama:
    """Return the model with its linear weights quantized and back, in float32; the rest is shared."""
    params = dict(base.params)
    for name, value in params.items():
        if LINEAR_WEIGHT.fullmatch(name):
            assert not isinstance(value, QuantizedTensor)
            params[name] = QUANTIZERS[quantizer].round(value, block_size).values
    return Llama(base.config, params)


def qualities(
    base: Llama, examples: Sequence[Example], pairs: Sequence[tuple[str, int]], progress: Progress
) -> tuple[Quality, dict[tuple[str, int], Quality]]:
    """Return how well the model predicts in full precision, and with each (quantizer, block size)."""
    full, found = judge(base, examples), {}
    for i, (name, block_size) in enumerate(pairs):
        progress(f"{name}, block {block_size}", i, len(pairs))
        found[name, block_size] = judge(rounded_model(base, name, block_size), examples)
    progress("", len(pairs), len(pairs))
    return full, found


def windows(model: Path, text: Path, tokens: int) -> list[Example]:
    """Return the windows of a text, evenly spread over it, that hold about so many tokens (0 for all).

    A window is as long as the model's positions allow, at most 512. Raises InputError for a bad text.
    """
    source = open_checkpoint(model)
    positions = int(source.config.get("max_position_embeddings", _SEQ_LEN))
    found = load_data(
        text, source.tokenizer(), min(positions, _SEQ_LEN), max_positions=positions, eval_path=text
    ).heldout
    if not tokens:
        return found
    longest = max(int((example.targets != IGNORE).sum()) for example in found)
    count = min(len(found), max(2, round(tokens / longest)))
    return [found[i * len(found) // count] for i in range(count)]


def compare(
    weights: Sequence[Weight],
    pairs: Sequence[tuple[str, int]],
    progress: Progress,
    *,
    model: Path | None = None,
    examples: Sequence[Example] = (),
) -> dict[str, Any]:
    """Return the figures of each (quantizer, block size) on the weights; with examples, of the model's text.

    Raises InputError where a weight can't be read or is not finite.
    """
    found = tallies(weights, pairs, progress)
    full, judged = None, dict[tuple[str, int], Quality]()
    if model is not None and examples:
        full, judged = qualities(load_model(model, quantize=None), examples, pairs, progress)
    results = []
    for (name, block_size), tally in found.items():
        record = {"quantizer": name, "block_size": block_size, **tally.record()}
        if full is not None:
            record |= judged[name, block_size].against(full)
        results.append(record)
    return {
        "tensors": len(weights),
        "full_precision": None if full is None else full.figures(),
        "results": results,
    }


def compare_normal(pairs: Sequence[tuple[str, int]], progress: Progress) -> dict[str, Any]:
    """Return the figures of each (quantizer, block size) on 2^22 values of N(0, 1)."""
    return compare([normal_data()], pairs, progress)


def report(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return parts, by what each was measured on, with machine, date and versions."""
    return {"report": "compare", **machine.describe(()), "parts": parts}
