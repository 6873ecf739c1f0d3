"""Parameters of a model that is trained from nothing."""

import math

import numpy as np
from numpy.typing import NDArray

from nf4.model.config import LlamaConfig
from nf4.model.llama import parameter_shapes
from nf4.random import stream_of, uniform

_DEVIATION = 0.02  # transformers' initializer_range


def random_params(config: LlamaConfig, seed: int) -> dict[str, NDArray[np.float32]]:
    """Return float32 parameters by their names: matrices normal(0, 0.02), norms 1, biases 0. NF4-10.10

    A matrix draws from the stream of its own name, so its values do not depend on the other parameters.
    """
    params: dict[str, NDArray[np.float32]] = {}
    for name, shape in parameter_shapes(config).items():
        if len(shape) > 1:
            params[name] = normal(seed, stream_of(name), math.prod(shape)).reshape(shape)
        else:
            params[name] = np.full(shape, 0.0 if name.endswith(".bias") else 1.0, np.float32)
    return params


def normal(seed: int, stream: int, n: int) -> NDArray[np.float32]:
    """Return n normal(0, 0.02) numbers by Box and Muller from pairs of uniforms. NF4-10.10"""
    pairs = -(-n // 2)
    u = uniform(seed, stream, 2 * pairs)
    # 1 - u lies in (0, 1], where the logarithm is finite.
    radius = _DEVIATION * np.sqrt(-2.0 * np.log(1.0 - u[:pairs].astype(np.float64)))
    angle = 2.0 * np.pi * u[pairs:].astype(np.float64)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n].astype(np.float32)
