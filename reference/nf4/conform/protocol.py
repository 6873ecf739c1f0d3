"""A program as a port: JSON lines on its standard input and output, whatever it does instead."""

import contextlib
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

from nf4.conform.operations import OPERATIONS
from nf4.conform.port import Answer, HarnessError

VERSION = 1

MAX_ANSWER_BYTES = 32_000_000  # the largest right answer has a hundredth of that
MAX_SHOWN_ERRORS = 64_000  # bytes of standard error passed on; the rest is read and dropped
START_TIMES = 6  # a start may take so many times as long as an answer: it imports, or compiles
MAX_HANGS = 3
MAX_RESTARTS = 100
STOP_SECONDS = 5.0
_POLL, _GRACE = 0.05, 0.2  # seconds: between looks at whether it lives; for what it leaves behind

_END = None  # in the queue of lines: the program closed its standard output
_KINDS = ("output", "refused", "skipped", "errored")


class _BrokenError(Exception):
    """The program has to be started again: what it writes next belongs to no question."""


class _HungError(_BrokenError):
    """It didn't answer in time."""


class _MalformedError(Exception):
    """One line that is the answer, and not of the form of NF4-13.4."""


class SubprocessPort:
    """A program that speaks the protocol (NF4-13.4), started without a shell in a process group of its own.

    A question that it hangs at, dies at, or answers with anything but one line in order is an answer
    "errored", and the program is started again: MAX_HANGS times after the first, MAX_RESTARTS in all.
    """

    def __init__(self, command: Sequence[str], timeout: float = 10.0) -> None:
        """Start it: an answer may take timeout seconds. Raises HarnessError if it doesn't start or greet."""
        self.command = list(command)
        self._timeout = timeout
        self._process: _Process | None = None
        self._hangs = self._restarts = 0
        self._remarks: list[str] = []
        self.name, self.operations = self._start()

    def run(self, id: str, operation: str, input: Mapping[str, Any]) -> Answer:
        """Ask one question. Raises HarnessError where the program has been started again too often."""
        if self._process is None:
            self._restarts += 1
            if self._restarts > MAX_RESTARTS:
                raise HarnessError(f"{self._shown} had to be started again {MAX_RESTARTS} times")
            if self._start() != (self.name, self.operations):
                raise HarnessError(f"{self._shown} started again with another name or other operations")
        process = self._process
        assert process is not None
        try:
            process.send({"cmd": "run", "id": id, "operation": operation, "input": input})
            return _answer(id, process.receive(self._timeout))
        except _MalformedError as error:
            return Answer("errored", message=str(error))
        except _BrokenError as error:
            message = f"{error}{process.last_words()}"
            self._process = None
            process.kill()
            if isinstance(error, _HungError):
                self._hangs += 1
                if self._hangs > MAX_HANGS:
                    raise HarnessError(f"{self._shown} hung {self._hangs} times, the last at {id}") from None
            return Answer("errored", message=message)

    def close(self) -> list[str]:
        """Tell it to stop and, if it doesn't, end it; what it left running ends too."""
        process, self._process = self._process, None
        if process is not None:
            self._remarks += process.stop(min(self._timeout, STOP_SECONDS))
        return self._remarks

    @property
    def _shown(self) -> str:
        return shlex.join(self.command)

    def _start(self) -> tuple[str, frozenset[str]]:
        process = _Process(self.command)
        try:
            process.send({"cmd": "start", "version": VERSION})
            name, offered = _greeting(process.receive(START_TIMES * self._timeout))
        except (_BrokenError, _MalformedError) as error:
            process.kill()
            raise HarnessError(f"{self._shown}: at start, {error}{process.last_words()}") from None
        except BaseException:
            process.kill()
            raise
        self._process = process
        unknown = sorted(offered - OPERATIONS.keys() - {"echo"})
        remark = f"it offers operations that this specification does not have: {', '.join(unknown)}"
        if unknown and remark not in self._remarks:
            self._remarks.append(remark)
        return name, offered & OPERATIONS.keys()


class _Process:
    """One run of the program, with a thread for each of its three pipes, so that none can block another."""

    def __init__(self, command: Sequence[str]) -> None:
        try:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=os.name == "posix",
            )
        except OSError as error:
            reason = error.strerror or str(error)
            raise HarnessError(f"{shlex.join(command)}: can't be started ({reason})") from None
        except ValueError as error:  # a NUL in an argument
            raise HarnessError(f"{shlex.join(command)}: can't be started ({error})") from None
        self._questions: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._lines: queue.SimpleQueue[bytes | _BrokenError | None] = queue.SimpleQueue()
        self._unread = 0  # bytes in _lines and in the line being read
        self._lock = threading.Lock()
        self._tail = b""
        pipes = (
            (self._write, self._child.stdin),
            (self._read, self._child.stdout),
            (self._drain, self._child.stderr),
        )
        self._threads = [threading.Thread(target=work, args=(pipe,), daemon=True) for work, pipe in pipes]
        for thread in self._threads:
            thread.start()

    def send(self, message: Mapping[str, Any]) -> None:
        """Queue one line. Raises _BrokenError if it has written without being asked."""
        if not self._lines.empty():
            line = self._taken(self._lines.get())
            raise _BrokenError(f"it wrote a line before it was asked: {_shown(line)}")
        self._questions.put(json.dumps(message, separators=(",", ":"), allow_nan=False).encode() + b"\n")

    def receive(self, seconds: float) -> bytes:
        """Return the next line. Raises _BrokenError where none comes."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                return self._taken(self._lines.get(timeout=min(_POLL, left)))
            if self._child.poll() is not None:
                # Something it started may hold its standard output open: then no end is seen.
                with contextlib.suppress(queue.Empty):
                    return self._taken(self._lines.get(timeout=_GRACE))
                raise _BrokenError(self._death())
        raise _HungError(f"it gave no answer within {seconds:g} s")

    def stop(self, seconds: float) -> list[str]:
        """Ask it to end, wait so long, and end it. Returns what it did instead."""
        remarks = []
        self._questions.put(b'{"cmd":"stop"}\n')
        self._questions.put(None)
        try:
            code = self._child.wait(seconds)
            if code:
                remarks.append(f"when told to stop, {self._death()}")
        except subprocess.TimeoutExpired:
            remarks.append(f"told to stop, it did not end within {seconds:g} s")
        self.kill()
        with contextlib.suppress(queue.Empty):
            line = self._lines.get(timeout=0)
            if isinstance(line, bytes):
                remarks.append(f"it wrote a line after its last answer: {_shown(line)}")
        return remarks

    def kill(self) -> None:
        """End the program and everything in its process group."""
        if os.name == "posix":
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, signal.SIGKILL)
        else:
            self._child.kill()
        self._child.wait()
        self._questions.put(None)
        for thread in self._threads:
            thread.join(1.0)  # a pipe may be held open by a process that left the group
        for thread, pipe in zip(self._threads[1:], (self._child.stdout, self._child.stderr), strict=True):
            if pipe is not None and not thread.is_alive():
                pipe.close()

    def last_words(self) -> str:
        """The last line of its standard error, as the end of a sentence."""
        self._threads[2].join(_GRACE)
        lines = self._tail.decode("utf-8", "replace").split("\n")
        words = [line.strip() for line in lines if line.strip()]
        return f"; its standard error ends: {words[-1][:200]}" if words else ""

    def _taken(self, line: "bytes | _BrokenError | None") -> bytes:
        """Return a line out of the queue. Raises _BrokenError where it is something else."""
        if isinstance(line, bytes):
            with self._lock:
                self._unread -= len(line) + 1
            return line
        if isinstance(line, _BrokenError):
            raise line
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(_GRACE)
        if self._child.returncode is None:
            raise _BrokenError("it closed its standard output and went on")
        raise _BrokenError(self._death())

    def _death(self) -> str:
        code = self._child.returncode
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"it died of {signal.Signals(-code).name}"
        return f"it ended with exit code {code}"

    def _write(self, pipe: IO[bytes]) -> None:
        with contextlib.suppress(OSError):
            while (line := self._questions.get()) is not None:
                pipe.write(line)
                pipe.flush()
        with contextlib.suppress(OSError):
            pipe.close()

    def _read(self, pipe: IO[bytes]) -> None:
        parts: list[bytes] = []
        while part := os.read(pipe.fileno(), 1 << 16):
            with self._lock:
                self._unread += len(part)
                unread = self._unread
            if unread > MAX_ANSWER_BYTES:
                self._lines.put(_BrokenError(f"it wrote more than {MAX_ANSWER_BYTES:,} bytes for one answer"))
                return  # what follows stays in the pipe, and it stands still until it is killed
            *whole, rest = part.split(b"\n")
            for line in whole:
                self._lines.put(b"".join([*parts, line]))
                parts = []
            parts.append(rest)
        if any(parts):
            self._lines.put(_BrokenError(f"it ended in the middle of a line: {_shown(b''.join(parts))}"))
        self._lines.put(_END)

    def _drain(self, pipe: IO[bytes]) -> None:
        shown = 0
        while part := os.read(pipe.fileno(), 1 << 16):
            self._tail = (self._tail + part)[-4096:]
            if shown < MAX_SHOWN_ERRORS:
                text = part[: MAX_SHOWN_ERRORS - shown].decode("utf-8", "replace")
                shown += len(part)
                if shown >= MAX_SHOWN_ERRORS:
                    text += "\n(the rest of the port's standard error is not shown)\n"
                with contextlib.suppress(OSError, ValueError):  # ours is closed: the port must not wait
                    sys.stderr.write(text)


def _parse(line: bytes) -> dict[str, Any]:
    """Parse one line. Raises _BrokenError on noise, _MalformedError on an object that is wrong JSON."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise _MalformedError(f"it answered with a key twice in one object: {_shown(line)}")
        return found

    def constant(name: str) -> Any:
        raise _MalformedError(f"it answered with {name}, which is not JSON: {_shown(line)}")

    if not line.strip().startswith(b"{"):
        raise _BrokenError(f"it wrote a line that is no JSON object on its standard output: {_shown(line)}")
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except _MalformedError:
        raise
    except (ValueError, RecursionError) as error:
        raise _MalformedError(f"it answered with invalid JSON ({error}): {_shown(line)}") from None
    assert isinstance(value, dict)  # it begins with a brace
    return value


def _greeting(line: bytes) -> tuple[str, frozenset[str]]:
    value = _parse(line)
    if set(value) != {"version", "name", "operations"}:
        raise _MalformedError(f"it must answer with version, name and operations, not {_shown(line)}")
    if value["version"] != VERSION or isinstance(value["version"], bool):
        raise _MalformedError(f"it speaks version {value['version']!r} of the protocol; this is {VERSION}")
    name, operations = value["name"], value["operations"]
    if not isinstance(name, str) or not name:
        raise _MalformedError(f"its name must be a string, not {name!r}")
    if not isinstance(operations, list) or not all(isinstance(item, str) for item in operations):
        raise _MalformedError(f"its operations must be a list of names, not {operations!r}")
    return name, frozenset(operations)


def _answer(id: str, line: bytes) -> Answer:
    """Return a line as the answer to the question id.

    Raises _MalformedError on a wrong form, and _BrokenError where the line is no answer to that question.
    """
    value = _parse(line)
    if value.get("id") != id:
        got = repr(value["id"]) if "id" in value else "no id"
        raise _BrokenError(f"it answered with {got[:100]} when asked {id!r}: {_shown(line)}")
    kinds = [kind for kind in _KINDS if kind in value]
    if len(kinds) != 1:
        raise _MalformedError(f"its answer must have one of {', '.join(_KINDS)}: {_shown(line)}")
    kind = kinds[0]
    others = value.keys() - {"id", kind} - ({"steps"} if kind == "output" else set())
    if others:
        raise _MalformedError(
            f"its answer has a field {min(others)!r} that is not of the protocol: {_shown(line)}"
        )
    if kind == "output":
        output, steps = value["output"], value.get("steps", {})
        if not isinstance(output, dict) or not isinstance(steps, dict):
            raise _MalformedError(f"output and steps must be objects: {_shown(line)}")
        return Answer("output", output, steps)
    message = value[kind]
    if not isinstance(message, str):
        raise _MalformedError(f"{kind} must be a sentence: {_shown(line)}")
    if kind == "refused":
        return Answer("refused", message=message)
    return Answer("skipped", message=message) if kind == "skipped" else Answer("errored", message=message)


def _shown(line: bytes) -> str:
    text = line[:120].decode("utf-8", "replace")
    return repr(text) + ("..." if len(line) > 120 else "")
