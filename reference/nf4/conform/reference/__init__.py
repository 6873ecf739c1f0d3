"""The reference as a port: a function for each operation, named so, its inputs the keywords (NF4-13.3).

`nf4 conform --python nf4.conform.reference` runs it. Arrays are NumPy, flat but for the x of quantize and
quantize_double; each function returns a dict of its outputs and raises InputError on what must be refused.
"""

from nf4.conform.reference.codec import (
    codebook,
    decode_absmax,
    dequantize,
    dequantize_double,
    encode_absmax,
    narrow,
    quantize,
    quantize_double,
    storage,
    widen,
)
from nf4.conform.reference.files import (
    merge,
    quantize_model,
    read_adapter,
    read_model,
    read_tensor,
    write_tensor,
)
from nf4.conform.reference.training import (
    adamw,
    clip,
    example_order,
    held_out,
    init_adapter,
    init_matrix,
    keep_mask,
    learning_rate,
    lora_backward,
    lora_forward,
    lora_step,
    loss,
    permutation,
    philox,
    stream,
    uniform,
)

__all__ = [
    "adamw",
    "clip",
    "codebook",
    "decode_absmax",
    "dequantize",
    "dequantize_double",
    "encode_absmax",
    "example_order",
    "held_out",
    "init_adapter",
    "init_matrix",
    "keep_mask",
    "learning_rate",
    "lora_backward",
    "lora_forward",
    "lora_step",
    "loss",
    "merge",
    "narrow",
    "permutation",
    "philox",
    "quantize",
    "quantize_double",
    "quantize_model",
    "read_adapter",
    "read_model",
    "read_tensor",
    "storage",
    "stream",
    "uniform",
    "widen",
    "write_tensor",
]
