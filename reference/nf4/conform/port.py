"""What the kit asks and what it is answered: a port, its answer, and the error of a broken harness."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class Answer:
    """A port's answer to one question (NF4-13.4), its values still as JSON.

    output and steps go with kind "output"; message is the reason of "refused" and "skipped", and with
    "errored" what went wrong: in the port, or in how it answered.
    """

    kind: Literal["output", "refused", "skipped", "errored"]
    output: Mapping[str, Any] = field(default_factory=dict)
    steps: Mapping[str, Any] = field(default_factory=dict)
    message: str = ""


class Port(Protocol):
    """An implementation that can be asked: a program, a Python object, or another library behind one."""

    name: str
    operations: frozenset[str]

    def run(self, id: str, operation: str, input: Mapping[str, Any]) -> Answer:
        """Answer one question of JSON values; "echo" gives its x back.

        Raises HarnessError where the port can't be asked again.
        """

    def close(self) -> list[str]:
        """End it, and return what was wrong besides its answers, a sentence each."""


class HarnessError(Exception):
    """The port can't be asked at all, so that nothing is said about any clause (exit 2)."""
