"""A Python object or module as a port: its functions are called with the inputs as NumPy arrays."""

import contextlib
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from functools import reduce
from importlib import import_module
from types import FrameType
from typing import TYPE_CHECKING, Any

from nf4.conform import values
from nf4.conform.operations import OPERATIONS
from nf4.conform.port import Answer, HarnessError

if TYPE_CHECKING:
    from nf4.conform.layers import LayerPort


class PythonPort:
    """Any object or module with functions named as operations (NF4-13.3).

    A function gets the input fields as keywords: arrays flat, but for quantize and quantize_double, whose x
    has its dtype and its shape, so that neither is passed; an x that no shape fits is refused without a call,
    as NumPy has no such array. It returns the output: a dict by field (with
    "steps", a dict, if it likes), a tuple in the order of the table, or the value where there is one and
    it is no dict; arrays of any shape, their dtypes exact. ValueError and OverflowError refuse the
    input, NotImplementedError skips it, any other exception is an error of the port. A function that is
    missing is an operation not offered. A function `layers` of no arguments returns a LayerPort
    (nf4.conform.layers), for the search of defects in the state of a library's layers.
    """

    def __init__(self, target: object, name: str, timeout: float = math.inf) -> None:
        """Time out a call after that many seconds, where the system can interrupt one: POSIX, main thread."""
        self.name = name
        self._target = target
        self._timeout = timeout
        self.operations = frozenset(name for name in OPERATIONS if callable(getattr(target, name, None)))
        self.layers: LayerPort | None = target.layers() if hasattr(target, "layers") else None

    def run(self, id: str, operation: str, input: Mapping[str, Any]) -> Answer:
        """Call the function of that name. Raises InputError on an input that is not the operation's."""
        if operation == "echo":
            flat = values.from_hex(input["x"], values.resolve("=dtype", input, id), id)
            return Answer("output", {"x": values.to_hex(flat)})
        fields = values.decode_input(operation, input, id)
        try:
            arguments = values.python_arguments(operation, fields)
            # What it prints is for people; standard output is for the report.
            with contextlib.redirect_stdout(sys.stderr), _time_limit(self._timeout):
                answer = getattr(self._target, operation)(**arguments)
        except _TimedOut as error:
            return Answer("errored", message=str(error))
        except NotImplementedError as error:
            return Answer("skipped", message=_one_line(error) or "not implemented")
        except (ValueError, OverflowError) as error:
            return Answer("refused", message=_one_line(error))
        except (Exception, SystemExit) as error:
            return Answer("errored", message=f"{_one_line(error, named=True)}{_where(error)}")
        return _answer(operation, input, answer)

    def close(self) -> list[str]:
        """Nothing to end."""
        return []


def load(text: str, timeout: float = math.inf) -> PythonPort:
    """Return the port MODULE:OBJECT, or MODULE; a class is instantiated without arguments.

    The current directory is searched too. Raises HarnessError if there is no such thing, or it fails.
    """
    module_name, _, path = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        with contextlib.redirect_stdout(sys.stderr):
            target = import_module(module_name)
            if path:
                target = reduce(getattr, path.split("."), target)
            if isinstance(target, type):
                target = target()
    except (Exception, SystemExit) as error:
        raise HarnessError(f"--python {text}: {_one_line(error, named=True)}{_where(error)}") from error
    port = PythonPort(target, text, timeout)
    if not port.operations:
        raise HarnessError(f"--python {text}: has no function named as an operation, such as quantize")
    return port


class _TimedOut(BaseException):
    """A call did not return in time. No Exception: a port may catch all of those."""


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise _TimedOut in the block after so many seconds, as soon as Python code runs."""
    if (
        math.isinf(seconds)
        or not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise _TimedOut(f"no answer within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _answer(operation: str, given: Mapping[str, Any], answer: Any) -> Answer:
    """Return what a function returned as an Answer; errored where that is not the operation's outputs."""
    names = list(OPERATIONS[operation].outputs)
    steps: Any = {}
    if isinstance(answer, Mapping):
        fields = dict(answer)
        steps = fields.pop("steps", {})
    elif isinstance(answer, tuple):
        if len(answer) != len(names):
            message = f"{operation} returned a tuple of {len(answer)}; it must be {', '.join(names)}"
            return Answer("errored", message=message)
        fields = dict(zip(names, answer, strict=True))
    elif len(names) == 1:
        fields = {names[0]: answer}
    else:
        kind = type(answer).__name__
        message = f"{operation} returned {kind}; it must be a dict or a tuple of {', '.join(names)}"
        return Answer("errored", message=message)
    try:
        return Answer(
            "output",
            values.encode_output(operation, fields, given, operation),
            values.encode_steps(operation, steps, given, operation),
        )
    except (ValueError, TypeError) as error:
        return Answer("errored", message=f"it returned no answer of its types: {error}")


def _one_line(error: BaseException, named: bool = False) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else f"{text[:300]}..."
    return f"{type(error).__name__}: {text}" if named else text


def _where(error: BaseException) -> str:
    """The innermost line of code that the exception came from, outside this module."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    return f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
