"""The conformance kit on the GPU: every vector of its operations, and the search over the exact ones."""

import pytest
from click.testing import CliRunner
from nf4.cli import main
from nf4.conform.operations import OPERATIONS
from nf4_gpu import conform

OFFERED = {
    *("quantize", "dequantize", "quantize_double", "dequantize_double", "encode_absmax", "decode_absmax"),
    *("keep_mask", "lora_forward", "lora_backward"),
}


def test_what_is_offered() -> None:
    assert {name for name in OPERATIONS if hasattr(conform, name)} == OFFERED


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "options",
    [
        ["--no-search"],
        # Where terms cancel, sums under a tolerance differ by more than it: these have tests of their own.
        ["--search", *(f"--only={name}" for name in sorted(OFFERED - {"lora_forward", "lora_backward"}))],
    ],
    ids=["vectors", "search"],
)
def test_the_kit(options: list[str]) -> None:
    result = CliRunner().invoke(main, ["conform", "--python", "nf4_gpu.conform", *options])
    assert result.exit_code == 0, result.output
