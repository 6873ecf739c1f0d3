"""The example ports in C++, Rust and JavaScript: built, short, and conforming in all that they offer."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from nf4.cli import main

PORTS = Path(__file__).parents[1] / "ports"
CODEC = {
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
}
BUILDS = {
    "cpp": (("nf4.cpp",), ("g++", "-std=c++20", "-O2", "-ffp-contract=off", "nf4.cpp", "-o")),
    "rust": (("nf4.rs",), ("rustc", "--edition", "2021", "-O", "nf4.rs", "-o")),
    # The page of `nf4 explore` computes with it, so it lies there.
    "javascript": (("../../reference/nf4/evidence/nf4.mjs", "port.mjs"), ("node",)),
}
LINES = 200


def compiler(name: str) -> str:
    """Where a compiler is; rustup puts its own in the home directory, not on every PATH."""
    found = shutil.which(name) or shutil.which(name, path=Path.home() / ".cargo" / "bin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.mark.parametrize("port", BUILDS)
def test_a_port_conforms(port: str, tmp_path: Path) -> None:
    sources, (tool, *arguments) = BUILDS[port]
    command = [compiler(tool)]
    if arguments:
        program = tmp_path / "nf4"
        subprocess.run([*command, *arguments, str(program)], cwd=PORTS, check=True)
        command = [str(program)]
    else:
        command.append(str(PORTS / sources[-1]))
    result = CliRunner().invoke(main, ["conform", "--json", "--", *command])
    report = json.loads(result.output)
    assert report["broken"] is None
    assert [r["id"] for r in report["results"] if r["outcome"] in {"failed", "errored"}] == []
    assert not any(r["outcome"] == "skipped" and r["operation"] in CODEC for r in report["results"])
    assert set(report["operations"]["offered"]) >= CODEC
    assert result.exit_code == 0


@pytest.mark.parametrize("port", BUILDS)
def test_a_port_is_short(port: str) -> None:
    lines = [line for name in BUILDS[port][0] for line in (PORTS / name).read_text("utf-8").splitlines()]
    assert len(lines) < LINES
    assert max(map(len, lines)) <= 120
