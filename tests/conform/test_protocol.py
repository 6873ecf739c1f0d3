"""Ports that misbehave: the kit says how, goes on or stops, never hangs, and blames no clause."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from nf4.conform import protocol
from nf4.conform.port import HarnessError
from nf4.conform.protocol import SubprocessPort
from nf4.conform.run import Run, execute
from nf4.conform.vectors import Vector

PORT = """
import json, os, signal, subprocess, sys, time

def say(value):
    sys.stdout.write(value if isinstance(value, str) else json.dumps(value) + "\\n")
    sys.stdout.flush()

def greet():
    say({"version": 1, "name": "tiny", "operations": ["storage"]})

def good(m):
    say({"id": m["id"], "output": {"bytes": m["input"]["elements"]}})

def bad(m):  # the question of 13 elements
    good(m)

def echo(m):
    say({"id": m["id"], "output": {"x": m["input"]["x"]}})

def stop():
    sys.exit(0)

{misbehaviour}

for line in sys.stdin:
    m = json.loads(line)
    if m["cmd"] == "start":
        greet()
    elif m["cmd"] == "stop":
        stop()
    elif m["operation"] == "echo":
        echo(m)
    elif m["input"]["elements"] == 13:
        bad(m)
    else:
        good(m)
"""

Start = Callable[..., SubprocessPort]


def write(directory: Path, misbehaviour: str) -> list[str]:
    """Write a port and return its command."""
    path = directory / "port.py"
    path.write_text(PORT.replace("{misbehaviour}", misbehaviour))
    return [sys.executable, str(path)]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return start(misbehaviour, timeout=2) -> the port, which is closed in the end."""
    ports: list[SubprocessPort] = []

    def call(misbehaviour: str, timeout: float = 2) -> SubprocessPort:
        ports.append(SubprocessPort(write(tmp_path, misbehaviour), timeout))
        return ports[-1]

    yield call
    for port in ports:
        port.close()


def ask(port: SubprocessPort, id: str, elements: int, **more: Any) -> tuple[str, str]:
    answer = port.run(id, "storage", {"elements": elements, "block_size": 64, "double_quant": False} | more)
    if answer.kind == "output":
        assert answer.output == {"bytes": elements}
    return answer.kind, answer.message


def gone(pid: int) -> bool:
    """Whether a process has ended; nobody may have taken note of it yet."""
    for _ in range(100):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_a_port_that_behaves(start: Start) -> None:
    port = start("")
    assert (port.name, port.operations) == ("tiny", {"storage"})
    assert [ask(port, f"v{n}", n)[0] for n in range(20)] == ["output"] * 20
    assert port.run("e", "echo", {"dtype": "float32", "x": "80000000"}).output == {"x": "80000000"}
    assert port.close() == []


# What it does at the question of 13 elements, and what is said of it. The question after it is answered.
WRONG_ANSWERS = {
    "hangs": ("time.sleep(60)", "it gave no answer within 0.5 s"),
    "exits": ("sys.exit(3)", "it ended with exit code 3"),
    "exits-well": ("sys.exit(0)", "it ended with exit code 0"),
    "raises": ("raise KeyError('kaput')", "exit code 1; its standard error ends: KeyError: 'kaput'"),
    "segfaults": ("os.kill(os.getpid(), signal.SIGSEGV)", "it died of SIGSEGV"),
    "noise": (
        "say('here I am\\n'); good(m)",
        "a line that is no JSON object on its standard output: 'here I am'",
    ),
    "a-list": ("say('[1]\\n')", "no JSON object"),
    "blank-line": ("say('\\n'); good(m)", "no JSON object"),
    "not-utf-8": (r"sys.stdout.buffer.write(b'{\"id\": \"\xff\"}\n'); sys.stdout.flush()", "invalid JSON"),
    "half-a-line": ("say('{\"id\":'); sys.exit(0)", "it ended in the middle of a line"),
    "cut-json": ("say('{\"id\":\\n')", "invalid JSON"),
    "other-id": ("say({'id': 'v0', 'output': {'bytes': 1}})", "answered with 'v0' when asked 'bad'"),
    "no-id": ("say({'output': {'bytes': 1}})", "answered with no id when asked 'bad'"),
    "nan": (
        "say({'id': m['id'], 'output': {'bytes': float('nan')}})",
        "answered with NaN, which is not JSON",
    ),
    "infinity": (
        "say({'id': m['id'], 'output': {'bytes': float('inf')}})",
        "with Infinity, which is not JSON",
    ),
    "nothing": ("say({'id': m['id']})", "must have one of output, refused, skipped, errored"),
    "two-kinds": ("say({'id': m['id'], 'output': {}, 'refused': 'no'})", "must have one of"),
    "extra-field": ("say({'id': m['id'], 'output': {}, 'time': 3})", "has a field 'time'"),
    "steps-of-refusal": ("say({'id': m['id'], 'refused': 'no', 'steps': {}})", "has a field 'steps'"),
    "output-a-list": ("say({'id': m['id'], 'output': [3]})", "output and steps must be objects"),
    "reason-a-number": ("say({'id': m['id'], 'skipped': 3})", "skipped must be a sentence"),
    "key-twice": ('say(\'{"id":"bad","output":{},"output":{}}\\n\')', "a key twice"),
    "deep": ("say('{\"a\":' * 100000 + '\\n')", "invalid JSON"),
    "long-number": ("say('{\"id\":' + '1' * 5000 + '}\\n')", "invalid JSON"),
    "gigabytes": ("while True: say('0' * 1000000)", "more than 32,000,000 bytes for one answer"),
    "endless-lines": ("while True: say('{}\\n' * 1000)", "no id"),
    "closes-stdout": ("os.close(1); time.sleep(60)", "it closed its standard output and went on"),
    "leaves-a-child": ("subprocess.Popen(['sleep', '60']); os._exit(3)", "it ended with exit code 3"),
}


@pytest.mark.parametrize("case", WRONG_ANSWERS)
def test_a_wrong_answer_is_named_and_the_next_is_asked(start: Start, case: str) -> None:
    code, message = WRONG_ANSWERS[case]
    port = start(f"def bad(m):\n    {code}", timeout=0.5 if case == "hangs" else 5)
    assert ask(port, "v0", 0) == ("output", "")
    kind, said = ask(port, "bad", 13)
    assert (kind, message in said) == ("errored", True), said
    assert len(said) < 600
    assert ask(port, "v2", 2) == ("output", "")


def test_a_second_answer_is_found_at_the_next_question(start: Start) -> None:
    port = start("def bad(m):\n    good(m); good(m); time.sleep(0.05)")
    assert ask(port, "bad", 13) == ("output", "")
    time.sleep(0.3)
    kind, said = ask(port, "v2", 2)
    assert kind == "errored"
    assert "wrote a line before it was asked" in said
    assert ask(port, "v3", 3) == ("output", "")


def test_answers_it_may_give(start: Start) -> None:
    port = start("def bad(m):\n    say({'id': m['id'], m['input']['block_size']: 'why'})")
    for kind in ("refused", "skipped", "errored"):
        assert ask(port, kind, 13, block_size=kind) == (kind, "why")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def greet(): time.sleep(60)", "it gave no answer within 1.8 s"),
        ("sys.exit(4)", "at start, it ended with exit code 4"),
        ("import nonsense", "its standard error ends: ModuleNotFoundError: No module named 'nonsense'"),
        ("say('Hello\\n')", "no JSON object on its standard output: 'Hello'"),
        ("def greet(): say({'version': 2, 'name': 'n', 'operations': []})", "speaks version 2"),
        ("def greet(): say({'version': 1, 'name': 'n'})", "must answer with version, name and operations"),
        ("def greet(): say({'version': 1, 'name': '', 'operations': []})", "its name must be a string"),
        ("def greet(): say({'version': 1, 'name': 'n', 'operations': 'all'})", "must be a list of names"),
        (
            "def greet(): say({'version': 1, 'name': 'n', 'operations': [1e999]})",
            "Infinity, which is not JSON",
        ),
    ],
)
def test_a_start_that_fails_breaks_the_harness(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(HarnessError) as raised:
        SubprocessPort(write(tmp_path, code), 0.3 if "sleep" in code else 5)
    assert message in str(raised.value)
    assert "port.py" in str(raised.value)


def test_a_command_that_is_none(tmp_path: Path) -> None:
    for command in (["/nowhere/port"], [str(tmp_path)], ["a\0b"]):
        with pytest.raises(HarnessError, match="can't be started"):
            SubprocessPort(command, 1)


def test_no_shell_sees_the_command(tmp_path: Path) -> None:
    argument = "$(touch hacked); *"
    code = "def greet(): say({'version': 1, 'name': sys.argv[1], 'operations': []})"
    port = SubprocessPort([*write(tmp_path, code), argument], 2)
    assert port.name == argument
    port.close()


def test_operations_it_cannot_be_asked_are_a_remark(start: Start) -> None:
    port = start(
        "def greet(): say({'version': 1, 'name': 'n', 'operations': ['storage', 'levitate', 'echo']})"
    )
    assert port.operations == {"storage"}
    assert port.close() == ["it offers operations that this specification does not have: levitate"]


def test_a_port_that_hangs_again_and_again_breaks_the_harness(start: Start) -> None:
    port = start("def bad(m): time.sleep(60)", timeout=0.2)
    for _ in range(protocol.MAX_HANGS):
        assert ask(port, "bad", 13)[0] == "errored"
    with pytest.raises(HarnessError, match="hung 4 times, the last at bad"):
        ask(port, "bad", 13)


def test_a_port_that_dies_again_and_again_breaks_the_harness(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "MAX_RESTARTS", 2)
    port = start("def bad(m): sys.exit(1)")
    for _ in range(3):
        assert ask(port, "bad", 13)[0] == "errored"
    with pytest.raises(HarnessError, match="had to be started again 2 times"):
        ask(port, "v", 1)


def test_a_port_that_starts_again_as_another(start: Start, tmp_path: Path) -> None:
    code = f"""
ran = {str(tmp_path / "ran")!r}
def greet():
    say({{'version': 1, 'name': 'again' if os.path.exists(ran) else 'first', 'operations': []}})
def bad(m):
    open(ran, 'w'); sys.exit(1)
"""
    port = start(code)
    assert ask(port, "bad", 13)[0] == "errored"
    with pytest.raises(HarnessError, match="another name or other operations"):
        ask(port, "v", 1)


def test_it_need_not_read_what_it_is_asked(start: Start) -> None:
    port = start("def good(m): time.sleep(60)", timeout=0.5)
    big = {"dtype": "float32", "x": "3f800000" * 1_000_000}
    assert ask(port, "v0", 1)[0] == "errored"
    port = start('def echo(m): say(\'{"id":"early"}\\n\'); time.sleep(60)', timeout=0.5)
    begun = time.monotonic()
    assert [port.run(str(i), "echo", big).kind for i in range(2)] == ["errored"] * 2
    assert time.monotonic() - begun < 5


def test_megabytes_of_standard_error_block_nobody(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    port = start("def bad(m): sys.stderr.write('words ' * 2000000); good(m)", timeout=10)
    assert ask(port, "bad", 13) == ("output", "")
    assert port.close() == []
    shown = capsys.readouterr().err
    assert shown.startswith("words words")
    assert "is not shown" in shown
    assert len(shown) < 70_000


@pytest.mark.parametrize(
    ("code", "remark"),
    [
        ("def stop(): time.sleep(60)", "it did not end within 0.5 s"),
        ("def stop(): pass\nimport atexit\natexit.register(time.sleep, 60)", "did not end within 0.5 s"),
        ("def stop(): sys.exit(7)", "when told to stop, it ended with exit code 7"),
        ("def stop(): say('bye\\n'); sys.exit(0)", "it wrote a line after its last answer: 'bye'"),
    ],
)  # fmt: skip
def test_a_stop_that_goes_wrong_is_a_remark(start: Start, code: str, remark: str) -> None:
    port = start(code, timeout=0.5)
    assert ask(port, "v", 1) == ("output", "")
    (said,) = port.close()
    assert remark in said


def test_its_children_end_with_it(start: Start) -> None:
    code = """
child = subprocess.Popen(['sleep', '60'])
def greet():
    say({'version': 1, 'name': str(child.pid), 'operations': ['storage']})
"""
    port = start(code)
    assert psutil.pid_exists(int(port.name))
    assert port.close() == []
    assert gone(int(port.name))


def test_a_hung_port_and_its_children_end(start: Start, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = f"""
def bad(m):
    child = subprocess.Popen(['sleep', '60'])
    open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')
    time.sleep(60)
"""
    port = start(code, timeout=0.5)
    assert ask(port, "bad", 13)[0] == "errored"
    assert all(gone(int(pid)) for pid in pids.read_text().split())


def vector(id: str, elements: int) -> Vector:
    given = {"elements": elements, "block_size": 64, "double_quant": False}
    return Vector(id, "storage", ("NF4-5.4",), (), "A count.", given, {"bytes": elements})


@pytest.mark.parametrize("case", ["hangs", "raises", "noise", "other-id", "nan", "extra-field"])
def test_no_clause_is_blamed_for_it(start: Start, case: str) -> None:
    port = start(f"def bad(m):\n    {WRONG_ANSWERS[case][0]}", timeout=0.5 if case == "hangs" else 5)
    run = Run("tiny", ("--", "tiny"))
    execute(run, port, [vector("v0", 1), vector("bad", 13), vector("v2", 2)], {})
    outcomes = [(result.outcome, result.difference) for result in run.results]
    assert outcomes == [("passed", None), ("errored", None), ("passed", None)]
    assert (run.broken, run.exit_code) == (None, 1)


BACK = "def echo(m): x = m['input']['x']; say({{'id': m['id'], 'output': {{'x': {0}}}}})"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (BACK.format("x.replace('80000000', '00000000')"), "must give back x of its input as it came"),
        (BACK.format("x.upper()"), "smoke-float32 must"),
        (BACK.format("x or '00000000'"), "smoke-empty must"),
        (BACK.format("x[:4096]"), "smoke-long must"),
        ("def echo(m): say({'id': m['id'], 'skipped': 'no echo'})", "no echo, so no vector was run: no echo"),
        ("def echo(m): sys.exit(9)", "got no echo, so no vector was run: it ended with exit code 9"),
        ("def echo(m): say('debug\\n')", "so no vector was run: it wrote a line that is no JSON"),
        ("def greet(): say({'version': 1, 'name': 'n', 'operations': []})", "does not offer storage"),
        ("def good(m): say({'id': m['id'], 'skipped': 'on holiday'})", "nothing was run: on holiday"),
    ],
)  # fmt: skip
def test_a_broken_harness_is_not_a_broken_port(start: Start, code: str, message: str) -> None:
    run = Run("tiny", ("--", "tiny"))
    execute(run, start(code), [vector("v0", 1)], {})
    assert run.broken is not None
    assert message in run.broken
    assert run.exit_code == 2
    assert [result for result in run.results if result.outcome != "skipped"] == []
