"""What `import nf4` brings with it, and the names it offers."""

import subprocess
import sys

import nf4
import pytest

ALLOWED = {"nf4", "numpy", "ml_dtypes"}


def test_import_needs_numpy_and_ml_dtypes_alone() -> None:
    program = (
        "import sys; before = set(sys.modules); import nf4;"
        "nf4.dequantize(nf4.quantize(__import__('numpy').ones(99, 'f4'), double_quant=True));"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split()) - set(sys.stdlib_module_names)
    assert {"nf4", "numpy", "ml_dtypes"} <= loaded
    assert {name for name in loaded if not name.startswith("_")} <= ALLOWED


@pytest.mark.parametrize("name", nf4.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(nf4, name) is not None


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="module 'nf4' has no attribute 'nf5'"):
        nf4.nf5  # noqa: B018
    assert nf4.__version__ == "0.1.0"
