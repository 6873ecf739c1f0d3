"""The README's Python session gives what it shows, and its map and commands are those that exist."""

import doctest
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from nf4.cli import main
from nf4.conform.bugs import BUGS
from nf4.conform.operations import OPERATIONS
from nf4.conform.vectors import load

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


def test_every_module_is_on_the_map() -> None:
    row = r"^\| `((?:reference|gpu)/[\w/]+)` \| (.+) \|$"
    rows = dict(re.findall(row, README.read_text("utf-8"), re.MULTILINE))
    commands = set(main.list_commands(None))  # type: ignore[arg-type]
    exact = {path.stem for path in (ROOT / "reference/nf4/exact").glob("*.py")}
    as_said = {"reference/nf4/cli/": commands, "gpu/nf4_gpu/exact/": exact}  # the row says so of all of them
    for room, text in rows.items():
        there = {path.stem for path in (ROOT / room).glob("*.py")} - {"__init__", "testing"}
        named = set(re.findall(r"`(\w+)`", text)) | as_said.get(room, set())
        assert there - named == set(), f"{room} has modules that its row doesn't name"


def test_the_size_of_the_kit_is_the_one_stated() -> None:
    files = [path for path in (ROOT / "spec/vectors").iterdir() if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    text = README.read_text("utf-8")
    assert f"{len(load())} vectors ({size / 1e6:.1f} MB in `spec/vectors`" in text
    assert f"for {len(OPERATIONS)} operations" in text
    assert f"each of {len(BUGS)} classes of bug" in text


def test_every_module_says_its_purpose_in_one_line() -> None:
    for path in (ROOT / "reference").rglob("*.py"):
        assert path.read_text("utf-8").startswith('"""'), path


def program(part: str) -> str:
    """The one program of the README that has this part."""
    shown = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (found,) = (text for text in shown if part in text)
    return found


def said_by(*command: str, folder: Path) -> str:
    return subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False
    ).stdout


def test_the_harness_does_what_is_said_of_it(tmp_path: Path) -> None:
    (tmp_path / "port.py").write_text(program('if ask["cmd"] == "stop"'), "utf-8")
    conform = ("-c", "from nf4.cli import main; main()", "conform", "--", sys.executable, "port.py")
    assert "Sixteen vectors pass and one fails" in README.read_text("utf-8")
    assert "16 passed, 1 failed" in said_by(*conform, folder=tmp_path)


def test_the_class_for_pytest_does_what_is_said_of_it(tmp_path: Path) -> None:
    (tmp_path / "test_nearest.py").write_text(program("class Nearest"), "utf-8")
    said = said_by("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_nearest.py", folder=tmp_path)
    found = re.search(r"(\d+) failed, (\d+) passed, (\d+) skipped", said)
    assert found, said
    failed, passed, skipped = found.groups()
    text = " ".join(README.read_text("utf-8").split())
    assert f"{passed} vectors pass, {failed} fail" in text
    assert f"{skipped} are skipped" in text


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
