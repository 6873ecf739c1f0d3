"""PyTorch on the CPU: casts, torch.optim.AdamW, clip_grad_norm_ and cross_entropy; no NF4."""

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.conform.libraries.tensors import to_numpy, to_torch, torch_dtype


def widen(x: NDArray[Any], dtype: str) -> NDArray[Any]:
    """x.to(torch.float32)."""
    return to_numpy(to_torch(x).to(torch_dtype("float32")))


def narrow(x: NDArray[Any], dtype: str) -> NDArray[Any]:
    """x.to(dtype)."""
    return to_numpy(to_torch(x).to(torch_dtype(dtype)))


def adamw(
    p: NDArray[Any],
    dtype: str,
    g: NDArray[Any],
    m: NDArray[Any],
    v: NDArray[Any],
    shape: list[int],
    updates: int,
    lr: NDArray[Any],
    beta1: NDArray[Any],
    beta2: NDArray[Any],
    eps: NDArray[Any],
    weight_decay: NDArray[Any],
) -> dict[str, NDArray[Any]]:
    """One step of torch.optim.AdamW's plain loop from that state; gradient and state of p's dtype."""
    torch: Any = importlib.import_module("torch")
    kind = torch_dtype(dtype)
    parameter = torch.nn.Parameter(to_torch(p).reshape(shape))
    parameter.grad = to_torch(g).reshape(shape).to(kind)
    optimizer = torch.optim.AdamW(
        [parameter],
        lr=lr.item(),
        betas=(beta1.item(), beta2.item()),
        eps=eps.item(),
        weight_decay=weight_decay.item(),
        foreach=False,
        fused=False,
    )
    optimizer.state[parameter] = {
        "step": torch.tensor(float(updates)),
        "exp_avg": to_torch(m).reshape(shape).to(kind),
        "exp_avg_sq": to_torch(v).reshape(shape).to(kind),
    }
    optimizer.step()
    state = optimizer.state[parameter]
    return {
        "p": to_numpy(parameter),
        "m": to_numpy(state["exp_avg"].float()),
        "v": to_numpy(state["exp_avg_sq"].float()),
    }


def clip(gradients: dict[str, NDArray[Any]], max_norm: NDArray[Any]) -> dict[str, Any]:
    """torch.nn.utils.clip_grad_norm_; the norm is widened to float64."""
    torch: Any = importlib.import_module("torch")
    parameters = {}
    for name, gradient in gradients.items():
        parameters[name] = torch.nn.Parameter(torch.zeros(gradient.shape))
        parameters[name].grad = to_torch(gradient)
    norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), max_norm.item())
    clipped = {name: to_numpy(parameter.grad) for name, parameter in parameters.items()}
    return {"norm": np.array([norm.item()]), "gradients": clipped}


def loss(
    logits: NDArray[Any], vocabulary: int, targets: list[int], parts: list[int]
) -> dict[str, NDArray[Any]]:
    """cross_entropy of all rows, its mean over the targets, and its gradient by autograd."""
    torch: Any = importlib.import_module("torch")
    rows = to_torch(logits).reshape(-1, vocabulary).requires_grad_()
    mean = torch.nn.functional.cross_entropy(rows, torch.tensor(targets))
    mean.backward()
    return {"loss": np.array([mean.item()]), "dlogits": to_numpy(rows.grad)}
