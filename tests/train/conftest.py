"""A tiny model, a text to learn, and `nf4` run in this process or in one that can be killed."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click.testing
import pytest
from nf4.cli import main
from nf4.formats.checkpoint import open_checkpoint
from nf4.formats.tokenizer import Tokenizer

REFERENCE = Path(__file__).parents[2] / "reference"
SENTENCES = ("the cat sat on the mat. ", "an old bird flew over it. ", "rain fell on the small house. ")


@pytest.fixture(scope="session")
def model(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("train") / "model")


@pytest.fixture(scope="session")
def tokenizer(model: Path) -> Tokenizer:
    return open_checkpoint(model).tokenizer()


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i}: {SENTENCES[i * i % 3]}" for i in range(120)))
    return path


@pytest.fixture
def nf4() -> Callable[..., click.testing.Result]:
    """Return run(*arguments): the command line in this process."""

    def run(*arguments: object) -> click.testing.Result:
        return click.testing.CliRunner().invoke(main, [str(argument) for argument in arguments])

    return run


@pytest.fixture(scope="session")
def start() -> Callable[[Sequence[object]], "subprocess.Popen[str]"]:
    """Return start(arguments): the command line in a process of its own."""

    def begin(arguments: Sequence[object]) -> "subprocess.Popen[str]":
        environment = {**os.environ, "PYTHONPATH": str(REFERENCE), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-c", "from nf4.cli import main; main()", *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin
