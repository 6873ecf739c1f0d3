"""The README's Python session gives what it shows, and its map and commands are those that exist."""

import doctest
import re
import shlex
from pathlib import Path

import pytest
from nf4.cli import main

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def test_the_session() -> None:
    result = doctest.testfile(str(README), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


def test_every_command_is_in_the_table() -> None:
    shown = set(re.findall(r"^\| `nf4 (\w+)", README.read_text("utf-8"), re.MULTILINE))
    assert shown == set(main.list_commands(None))  # type: ignore[arg-type]


def test_every_room_is_on_the_map() -> None:
    rooms = {
        f"reference/nf4/{p.name}/" for p in (ROOT / "reference/nf4").iterdir() if (p / "__init__.py").exists()
    }
    shown = set(re.findall(r"^\| `(reference/nf4/\w+/)`", README.read_text("utf-8"), re.MULTILINE))
    assert shown == rooms


def test_every_module_says_its_purpose_in_one_line() -> None:
    for path in (ROOT / "reference").rglob("*.py"):
        assert path.read_text("utf-8").startswith('"""'), path


def shown_commands() -> set[str]:
    """Every `nf4 ...` line that the README and the claims show, but for those with optional parts."""
    found = set()
    for path in (README, ROOT / "spec/claims.md"):
        text = path.read_text("utf-8")
        lines = re.findall(r"^\$ (.+)$", text, re.MULTILINE) + re.findall(r"`(nf4 [^`]+)`", text)
        for line in lines:
            for part in re.split(r"&&|;", line.replace("\n", " ").partition("#")[0]):
                command = part.strip()
                if command.startswith("nf4 ") and not re.search(r"[\[|]", command):
                    found.add(command)
    return found


@pytest.mark.parametrize("command", sorted(shown_commands()))
def test_a_command_that_is_shown_is_one(command: str) -> None:
    name, *arguments = shlex.split(command)[1:]
    found = main.get_command(None, name)  # type: ignore[arg-type]
    assert found is not None
    if arguments and "--help" not in arguments:
        assert found.make_context(name, arguments)  # parses them; runs nothing
