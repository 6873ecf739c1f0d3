"""The page of `nf4 explore`: page.html with the JavaScript port, what draws it, and weights, in one file."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nf4.formats.files import atomic_write

_HERE = Path(__file__).parent

PORT = _HERE / "nf4.mjs"
"""The port in JavaScript; tests/conform/test_ports.py holds it against every vector of the codec."""

SAMPLE = 4096  # weights of a tensor that go into the page: whole blocks of every size


def build(tensors: Mapping[str, NDArray[np.float32]]) -> str:
    """Return the page, with a float32 array a name to choose from beside the distributions it draws."""
    encoded = {
        name: base64.b64encode(np.ascontiguousarray(x, "<f4").reshape(-1).tobytes()).decode()
        for name, x in tensors.items()
    }
    text = json.dumps(encoded).replace("<", "\\u003c")  # a name can't end the script
    drawing = (_HERE / "page.js").read_text("utf-8")
    page = (_HERE / "page.html").read_text("utf-8")
    # The page's own names are in a block, apart from those of the port.
    program = f"{PORT.read_text('utf-8')}\n{{\n{drawing}}}"
    head, _, rest = page.partition("/*tensors*/")
    middle, _, tail = rest.partition("/*program*/")
    return head + text + middle + program + tail


def write(path: Path, tensors: Mapping[str, NDArray[np.float32]]) -> None:
    """Write the page, atomically. Raises InputError if the disk refuses."""
    with atomic_write(path) as file:
        file.write(build(tensors).encode())
