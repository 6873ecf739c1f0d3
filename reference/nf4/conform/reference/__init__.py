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

__all__ = [
    "codebook",
    "decode_absmax",
    "dequantize",
    "dequantize_double",
    "encode_absmax",
    "narrow",
    "quantize",
    "quantize_double",
    "storage",
    "widen",
]
