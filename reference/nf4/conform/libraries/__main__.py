"""A library as a program that speaks the protocol (NF4-13.4): `python -m nf4.conform.libraries NAME`.

With `layers` after the name: the defects that histories of its layer show, as one JSON object.
"""

import contextlib
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from nf4.conform.layers import LayerPort, find_defects
from nf4.conform.libraries import LIBRARIES, versions
from nf4.conform.operations import OPERATIONS
from nf4.conform.protocol import VERSION
from nf4.conform.python_port import PythonPort


def serve(port: PythonPort, title: str) -> None:
    """Answer standard input for a port, line by line, until it ends or says stop."""
    # Libraries print, some from C++: whatever is no answer goes to standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        question = json.loads(line)
        if question["cmd"] == "stop":
            return
        answer = (
            {"version": VERSION, "name": title, "operations": sorted(port.operations)}
            if question["cmd"] == "start"
            else _answer(port, question)
        )
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class Refusing:
    """An adapter whose functions refuse the input with whatever exception the library raises."""

    def __init__(self, adapter: object) -> None:
        for operation in OPERATIONS:
            function = getattr(adapter, operation, None)
            if function is not None:
                setattr(self, operation, _refusing(function))


def _refusing(function: Callable[..., Any]) -> Callable[..., Any]:
    def asked(**arguments: Any) -> Any:
        try:
            return function(**arguments)
        except (NotImplementedError, ModuleNotFoundError):
            raise
        except Exception as error:  # each library has its own for what it does not take
            raise ValueError(f"{type(error).__name__}: {error}") from None

    return asked


def _answer(port: PythonPort, question: dict[str, Any]) -> dict[str, Any]:
    answer = port.run(question["id"], question["operation"], question["input"])
    if answer.kind == "output":
        return {"id": question["id"], "output": answer.output, "steps": answer.steps}
    return {"id": question["id"], answer.kind: answer.message}


def show_defects(port: LayerPort) -> None:
    """Print what histories of calls show, and what this machine can't show."""
    with contextlib.redirect_stdout(sys.stderr):
        defects = find_defects(port)
    print(json.dumps({"defects": [asdict(defect) for defect in defects], "limits": port.limits()}))


if __name__ == "__main__":
    name = sys.argv[1]
    module = importlib.import_module(f"nf4.conform.libraries.{name}")
    if sys.argv[2:] == ["layers"]:
        warnings.simplefilter("ignore")
        show_defects(module.layers())
        sys.exit()
    serve(PythonPort(Refusing(module), name), " ".join([name, *(versions(LIBRARIES[name]) or {}).values()]))
