"""The examples inside the text of the specification give what the text says, on the reference."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from nf4.conform import reference, values
from nf4.errors import InputError

SPEC = Path(__file__).parents[2] / "spec"
FENCE = re.compile(r"^```json example\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CLAUSE = re.compile(r"^### (NF4-\d+\.\d+)", re.MULTILINE)


def examples() -> dict[str, dict[str, Any]]:
    """Every example by the clause it stands under and its number there."""
    found = {}
    for path in sorted(SPEC.glob("[0-9]*.md")):
        text = path.read_text("utf-8")
        for match in FENCE.finditer(text):
            clause = CLAUSE.findall(text, 0, match.start())[-1]
            number = 1 + sum(name.startswith(f"{clause} ") for name in found)
            found[f"{clause} {number}"] = json.loads(match[1])
    return found


@pytest.mark.parametrize("name", examples())
def test_an_example_gives_what_the_text_says(name: str) -> None:
    example = examples()[name]
    operation, given = example["operation"], example["input"]
    assert set(example) in ({"operation", "input", "output"}, {"operation", "input", "refused"})
    arguments = values.python_arguments(operation, values.decode_input(operation, given, name))
    if "refused" in example:
        with pytest.raises(InputError):
            getattr(reference, operation)(**arguments)
        return
    answer = getattr(reference, operation)(**arguments)
    wanted = values.decode_output(operation, example["output"], given, name)
    assert values.encode_output(operation, answer, given, name) == values.encode_output(
        operation, wanted, given, name
    )


def test_every_chapter_that_computes_has_an_example() -> None:
    chapters = {name.split(".")[0] for name in examples()}
    assert {f"NF4-{n}" for n in (2, 3, 4, 5, 6, 7, 9, 10, 11)} <= chapters
