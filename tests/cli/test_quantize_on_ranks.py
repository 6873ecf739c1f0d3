"""`mpirun -n N nf4 quantize`: the bytes of one process, and nothing left behind by a rank that fails."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launchers import Mpi
from safetensors.numpy import load_file, save_file

RunJson = Callable[..., dict[str, Any]]


@pytest.fixture
def source(tmp_path: Path, tiny_model: Callable[..., Path]) -> Path:
    """A model in three shards."""
    directory = tiny_model(tmp_path / "source", num_hidden_layers=3)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    names = sorted(tensors)
    for i, file in enumerate(files):
        save_file({name: tensors[name] for name in names[i::3]}, directory / file, {"format": "pt"})
    index = {"weight_map": {name: files[i % 3] for i, name in enumerate(names)}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*")}


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_output_is_that_of_one_process(
    tmp_path: Path, source: Path, mpich: Mpi, run_json: RunJson, ranks: int
) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    expected = run_json("quantize", source, alone)
    done = mpich.nf4(ranks, "quantize", source, shared, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected | {"output": str(shared)}
    assert contents(shared) == contents(alone)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "shared", "source"]


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_damaged_weight_ends_all(tmp_path: Path, source: Path, mpich: Mpi, layer: int) -> None:
    name = f"model.layers.{layer}.mlp.up_proj.weight"
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = load_file(source / index[name])
    tensors[name][1, 2] = np.nan
    save_file(tensors, source / index[name], {"format": "pt"})
    done = mpich.nf4(3, "quantize", source, tmp_path / "out")
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("nf4: ")]
    assert len(said) == 1, done.stderr
    assert re.search(rf"{source}: tensor '{name}': .*nan", said[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_an_output_that_exists_and_one_that_is_too_large(tmp_path: Path, source: Path, mpich: Mpi) -> None:
    program = """
import resource, signal, sys
from nf4.ranks import started
if started().rank == 0:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sys.dont_write_bytecode = True  # it would be cut off, and stay
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
from nf4.cli import main
main()
"""
    full = mpich.python(2, "-c", program, "quantize", source, tmp_path / "out")
    assert full.returncode == 2
    assert re.search(r"^nf4: .*model\.safetensors: can't be written", full.stderr, re.MULTILINE)
    assert full.stderr.count("nf4: ") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").touch()
    refused = mpich.nf4(2, "quantize", source, tmp_path / "out")
    assert refused.returncode == 2
    assert refused.stderr.count("nf4: ") == 1
    assert "the output directory isn't empty" in refused.stderr
