"""transformers: the learning rates of get_scheduler; no NF4 of its own."""

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NAMES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def learning_rate(step: int, steps: int, warmup: int, schedule: str, lr: NDArray[Any]) -> NDArray[Any]:
    """get_scheduler's factor for the step, times lr; "constant" is its constant_with_warmup."""
    torch: Any = importlib.import_module("torch")
    optimization: Any = importlib.import_module("transformers.optimization")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr.item())
    scheduler = optimization.get_scheduler(_NAMES.get(schedule, schedule), optimizer, warmup, steps)
    return np.array([lr.item() * scheduler.lr_lambdas[0](step)])
