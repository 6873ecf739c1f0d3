"""The layer of bitsandbytes, Linear4bit, for the search of defects in its state."""

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.codebooks import CODEBOOKS
from nf4.conform.layers import LayerSpec, Saved
from nf4.conform.libraries.tensors import to_numpy, to_torch
from nf4.nested import NestedAbsmax
from nf4.tensor import QuantizedTensor

Array = NDArray[Any]


class BitsandbytesLayers:
    """Layers of bitsandbytes on the CPU (nf4.conform.layers.LayerPort)."""

    def __init__(self) -> None:
        self.name = f"bitsandbytes {_bitsandbytes().__version__}"

    def quantize(self, spec: LayerSpec) -> "BitsandbytesLayer":
        """Return Linear4bit of the weight, quantized by moving it to the CPU."""
        layer = _empty(spec)
        layer.weight = _bitsandbytes().nn.Params4bit(
            to_torch(spec.weight),
            blocksize=spec.block_size,
            compress_statistics=spec.double_quant,
            quant_type="nf4",
            module=layer,
        )
        return BitsandbytesLayer(layer.to("cpu"))

    def load(self, spec: LayerSpec, saved: Saved) -> "BitsandbytesLayer":
        """Return Linear4bit of a state_dict, as transformers loads it."""
        layer = _empty(spec)
        state = {name: to_torch(array) for name, array in saved.items()}
        statistics = {name: value for name, value in state.items() if name.startswith("weight.")}
        layer.weight = _bitsandbytes().nn.Params4bit.from_prequantized(
            data=state["weight"], quantized_stats=statistics, device="cpu", module=layer
        )
        if spec.bias is not None:
            layer.bias.data = state["bias"]
        return BitsandbytesLayer(layer)

    def read(self, spec: LayerSpec, saved: Saved) -> QuantizedTensor:
        """Return the tensor of a state_dict (NF4-8.2)."""
        absmax: Array | NestedAbsmax = saved["weight.absmax"]
        if spec.double_quant:
            state = _bitsandbytes().functional.QuantState.from_dict(
                {name: to_torch(array) for name, array in saved.items() if name.startswith("weight.")},
                device=_torch().device("cpu"),
            )
            absmax = NestedAbsmax(
                saved["weight.absmax"],
                saved["weight.nested_absmax"],
                np.float32(state.offset.item()),
                saved["weight.nested_quant_map"],
            )
        return QuantizedTensor(
            saved["weight"].reshape(-1),
            absmax,
            spec.weight.shape,
            spec.weight.dtype,
            spec.block_size,
            CODEBOOKS["nf4"],
        )

    def limits(self) -> list[str]:
        """Return what of bitsandbytes this processor does not run."""
        limits = []
        if _torch().backends.cpu.get_cpu_capability() != "AVX512":
            limits.append(
                f"{self.name} finds no AVX-512 on this machine, with which dequantize runs another kernel; "
                "that one is not tried"
            )
        if not _bitsandbytes().functional.has_avx512bf16():
            limits.append(
                f"{self.name} finds no AVX512-BF16 on this machine, with which a forward in evaluation "
                "repacks the weights in place; what follows from that is not tried"
            )
        return limits


class BitsandbytesLayer:
    """One Linear4bit (nf4.conform.layers.Layer)."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def forward(self, x: Array, training: bool) -> Array:
        """Return the output of the layer, in train or eval mode."""
        self.layer.train(training)
        torch = _torch()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            return to_numpy(self.layer(to_torch(x)))

    def save(self) -> Saved:
        """Return its state_dict."""
        return {name: to_numpy(tensor).copy() for name, tensor in self.layer.state_dict().items()}

    def dequantize(self) -> Array:
        """Return dequantize_4bit of its weight and quant_state."""
        weight = self.layer.weight
        with _torch().compiler.set_stance("force_eager"):
            return to_numpy(_bitsandbytes().functional.dequantize_4bit(weight.data, weight.quant_state))


def _bitsandbytes() -> Any:
    return importlib.import_module("bitsandbytes")


def _torch() -> Any:
    return importlib.import_module("torch")


def _empty(spec: LayerSpec) -> Any:
    """A Linear4bit of that form, its weight to be replaced."""
    out_features, in_features = spec.weight.shape
    layer = _bitsandbytes().nn.Linear4bit(
        in_features,
        out_features,
        bias=spec.bias is not None,
        compute_dtype=to_torch(spec.weight[:0]).dtype,
        compress_statistics=spec.double_quant,
        quant_type="nf4",
    )
    if spec.bias is not None:
        layer.bias.data = to_torch(spec.bias)
    return layer
