"""Prints the SHA-256 of a battery of exact operations: the same on every machine (test_machines.py)."""

import hashlib

import numpy as np
from drawn import FAMILIES, batch, model, numbers
from nf4.exact import elementary, grid, ops
from nf4.exact.llama import ExactLlama
from nf4.model.ops import IGNORED
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


def results() -> list[NDArray[np.generic]]:
    """What the operations give, of sizes that cross every chunk, piece and block."""
    found: list[NDArray[np.generic]] = []
    for m, k, n in ((3, 5, 2), (129, 577, 257), (64, 4099, 48), (700, 64, 90)):
        a, b = numbers(f"a{m}", m, k), numbers(f"b{m}", k, n)
        found += [
            grid.product(a, b),
            grid.product(b.T.copy(), a.T.copy()),
            grid.product(a, np.asfortranarray(b)),
        ]
    heads, keys = numbers("heads", 6, 70, 16), numbers("keys", 6, 70, 16)
    found.append(grid.product(heads, keys.mT))
    wide, other = numbers("wide", 3, 70_001), numbers("other", 3, 70_001)
    found += [grid.total(wide), grid.dot(wide, other), grid.total(wide.reshape(-1))]
    x = numbers("x", 200_003, scale=110)
    found += [elementary.exp(x), elementary.log(np.abs(x))]
    gate, up, dout = (numbers(name, 130, 768, scale=9) for name in ("gate", "up", "dout"))
    found.append(ops.swiglu(gate, up, np.empty_like(gate)))
    dgate, dup = gate.copy(), up.copy()
    ops.swiglu_backward(dout, dgate, dup)
    p = ops.softmax(gate.copy())
    y, rstd = ops.rms_norm(gate, up[0], 1e-5)
    logits = numbers("logits", 60, 4200, scale=20)
    targets = np.arange(60) * 70
    targets[7] = IGNORED
    losses = ops.cross_entropy(logits, targets, 1 / 59)
    turned = gate.copy()
    ops.rotate(turned, up[:, :32], dout[:, :32])
    found += [dgate, dup, p, ops.softmax_backward(dout.copy(), p), y, rstd]
    found += [ops.rms_norm_backward(dout.copy(), gate, up[0], rstd), logits, losses, turned]
    return [*found, np.array(ops.mean_loss(losses, 59)), *steps()]


def steps() -> list[NDArray[np.generic]]:
    """Losses and gradients by sequence of a model of each family, one of a vocabulary beyond a piece."""
    found: list[NDArray[np.generic]] = []
    for kind, rope in zip(FAMILIES, ("yarn", "llama3", "dynamic", "linear"), strict=True):
        scaling = {"rope_type": rope, "factor": 3.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        vocabulary = 4200 if kind == "qwen3" else 50
        small = model(kind, dropout=0.2, rope_scaling=scaling, vocab_size=vocabulary, intermediate_size=150)
        losses, gradients = ExactLlama(small).losses_and_gradients(
            batch(small.config, (70, 1, 33)), scale=1 / 83, checkpointing=True, seed=3
        )
        found += [losses, *gradients.values()]
    return found


def digest() -> str:
    """The SHA-256 of all results, their bytes in little-endian order."""
    whole = hashlib.sha256()
    for result in results():
        whole.update(np.ascontiguousarray(result).astype(result.dtype.newbyteorder("<")).tobytes())
    return whole.hexdigest()


if __name__ == "__main__":
    print(digest())
