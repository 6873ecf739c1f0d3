"""The README's Python session gives what it shows, and its map and commands are those that exist."""

import doctest
import re
from pathlib import Path

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
