"""A library as a program that speaks the protocol (NF4-13.4): `python -m nf4.conform.libraries NAME`."""

import importlib
import json
import os
import sys
import warnings
from typing import Any

from nf4.conform.libraries import LIBRARIES, versions
from nf4.conform.python_port import PythonPort


def main(name: str) -> None:
    """Answer standard input, line by line, with the library of that name."""
    # Libraries print, some from C++: whatever is no answer goes to standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    port = PythonPort(importlib.import_module(f"nf4.conform.libraries.{name}"), name)
    for line in sys.stdin:
        question = json.loads(line)
        if question["cmd"] == "stop":
            break
        answers.write(json.dumps(_answer(port, question)) + "\n")
        answers.flush()


def _answer(port: PythonPort, question: dict[str, Any]) -> dict[str, Any]:
    if question["cmd"] == "start":
        title = " ".join([port.name, *(versions(LIBRARIES[port.name]) or {}).values()])
        return {"version": 1, "name": title, "operations": sorted(port.operations)}
    answer = port.run(question["id"], question["operation"], question["input"])
    if answer.kind == "output":
        return {"id": question["id"], "output": answer.output, "steps": answer.steps}
    return {"id": question["id"], answer.kind: answer.message}


if __name__ == "__main__":
    main(sys.argv[1])
