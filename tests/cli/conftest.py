"""Running commands in this process: the answer as JSON, and a bad input's exit code and message."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from nf4.cli import main
from nf4.formats.peft import linear_shapes, save_adapter
from nf4.lora import init_lora
from nf4.model.config import LlamaConfig

PROSE = "It was the best of times, it was the worst of times, it was the age of wisdom. Größe, 時.\n" * 12


@pytest.fixture
def run() -> Callable[..., str]:
    """Return run(*arguments, exit_code=0) -> standard output, or standard error when it is to fail."""

    def call(*arguments: Any, exit_code: int = 0) -> str:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == exit_code, result.output
        return result.stderr if exit_code else result.stdout

    return call


@pytest.fixture
def run_json(run: Callable[..., str]) -> Callable[..., dict[str, Any]]:
    """Return run_json(*arguments) -> the one object that --json prints."""

    def call(*arguments: Any) -> dict[str, Any]:
        answer = json.loads(run(*arguments, "--json"))
        assert isinstance(answer, dict)
        return answer

    return call


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    """A tiny float32 model that no test changes."""
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """An adapter of rank 4 for it, on all linear layers, with a B that is not zero."""
    directory = tmp_path_factory.mktemp("adapter") / "adapter"
    config = LlamaConfig.from_dict(json.loads((model / "config.json").read_text()), str(model))
    generator = np.random.default_rng(5)
    adapters = {}
    for name, (outputs, inputs) in linear_shapes(config).items():
        adapters[name] = init_lora(name, inputs, outputs, 4, 8.0, 0.0, seed=1)
        adapters[name].B[...] = 0.05 * generator.standard_normal((outputs, 4))
    save_adapter(directory, adapters, base=str(model))
    return directory


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    """A plain text of a few windows."""
    path = tmp_path / "prose.txt"
    path.write_text(PROSE, encoding="utf-8")
    return path
