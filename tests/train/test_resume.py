"""A run killed, interrupted or out of disk, and taken up again, ends with the bits of one that was not."""

import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from nf4.errors import InputError
from nf4.train import snapshot
from nf4.train.log import TrainingLog, read_log

Nf4 = Callable[..., Result]
Start = Callable[[Sequence[object]], "subprocess.Popen[str]"]

STEPS = 12
OPTIONS = shlex.split(
    "--steps 12 --eval-every 4 --save-every 3 --eval-sequences 4 --seq-len 32 --batch-size 3 --grad-accum 2 "
    "--rank 4 --dropout 0.1 --lr 1e-2 --schedule cosine --warmup 3 --weight-decay 0.01 --threads 2"
)

# Kills the process at the n-th rename, just before or just after it: in the middle of whatever it was saving.
KILLED_AT_RENAME = """
import os, signal, sys
count, after, rename = int(sys.argv.pop(1)), sys.argv.pop(1) == "after", os.replace
def replace(*names):
    global count
    count -= 1
    if count == 0 and not after:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*names)
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
from nf4.cli import main
main()
"""

# A disk that takes no file beyond so many bytes, as a full one does.
FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.dont_write_bytecode = True  # it would be cut off, and stay
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from nf4.cli import main
main()
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path, text: Path) -> Path:
    """The directory of the run that nothing disturbed."""
    from click.testing import CliRunner
    from nf4.cli import main

    out = tmp_path_factory.mktemp("whole") / "out"
    result = CliRunner().invoke(main, ["finetune", str(model), str(text), "--out", str(out), *OPTIONS])
    assert result.exit_code == 0, result.output
    return out


def contents(out: Path) -> dict[str, Any]:
    """Everything a run leaves but its timings."""
    files = {str(p.relative_to(out)): p for p in out.rglob("*") if p.is_file()}
    assert sorted(files) == [
        "adapter_config.json", "adapter_model.safetensors", "best/adapter_config.json",
        "best/adapter_model.safetensors", "checkpoint.safetensors", "loss.png", "training_log.jsonl",
    ]  # fmt: skip
    tensors = snapshot.SafetensorsFile(files["checkpoint.safetensors"])
    return {
        **{name: files[name].read_bytes() for name in files if "adapter" in name},
        "checkpoint": {name: tensors.read(name).tobytes() for name in tensors.entries},
        "log": [
            {k: v for k, v in r.items() if k != "seconds"} for r in read_log(files["training_log.jsonl"])
        ],
    }


@pytest.mark.parametrize("step", [1, 5, 9])
def test_killed_after_a_step(
    tmp_path: Path, model: Path, text: Path, whole: Path, start: Start, nf4: Nf4, step: int
) -> None:
    out = tmp_path / "out"
    process = start(["finetune", model, text, "--out", out, *OPTIONS])
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(f"step {step}/"):
            process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (out / "adapter_model.safetensors").exists()
    result = nf4("finetune", "--resume", "--out", out)
    assert result.exit_code == 0, result.output
    assert re.search(r"going on after step \d+ of", result.output)
    assert contents(out) == contents(whole)


@pytest.mark.parametrize(
    ("count", "when"), [(1, "before"), (2, "after"), (5, "before"), (9, "after"), (13, "before")]
)
def test_killed_while_saving(
    tmp_path: Path, model: Path, text: Path, whole: Path, nf4: Nf4, count: int, when: str
) -> None:
    out = tmp_path / "out"
    arguments = ["finetune", str(model), str(text), "--out", str(out), *OPTIONS]
    reference = str(Path(__file__).parents[2] / "reference")
    process = subprocess.run(
        [sys.executable, "-c", KILLED_AT_RENAME, str(count), when, *arguments],
        env={"PYTHONPATH": reference, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL
    result = nf4(*arguments, "--resume")
    assert result.exit_code == 0, result.output
    assert contents(out) == contents(whole)


def test_interrupted_by_the_keyboard(
    tmp_path: Path, model: Path, text: Path, whole: Path, start: Start, nf4: Nf4
) -> None:
    out = tmp_path / "out"
    process = start(["finetune", model, text, "--out", out, *OPTIONS])
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    hint = lines[-1].partition("go on with: nf4 ")[2].split()
    assert hint == ["finetune", "--resume", "--out", str(out)]
    assert snapshot.read_facts(out / snapshot.NAME)[0].step < STEPS
    assert nf4(*hint).exit_code == 0
    assert contents(out) == contents(whole)


def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, model: Path, text: Path, whole: Path, nf4: Nf4
) -> None:
    out = tmp_path / "out"
    arguments = ["finetune", str(model), str(text), "--out", str(out), *OPTIONS]
    assert nf4(*[*arguments, "--steps", "6"]).exit_code == 0
    # As if killed between step 6's checkpoint and its adapter.
    (out / "adapter_model.safetensors").unlink()
    before = (out / snapshot.NAME).read_bytes()
    process = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(len(before) // 2), *arguments, "--resume"],
        env={"PYTHONPATH": str(Path(__file__).parents[2] / "reference"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
        text=True,
    )
    assert process.returncode == 1, process.stderr
    assert re.search(r"checkpoint\.safetensors: can't be written .* --resume from it", process.stderr)
    assert "Traceback" not in process.stderr
    assert (out / snapshot.NAME).read_bytes() == before
    assert not list(out.rglob("*.tmp"))


def test_a_full_disk_ends_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        TrainingLog(tmp_path / "log", step=0, eval_before=5.0) as log,
        open("/dev/full", "ab", buffering=0) as full,
    ):
        monkeypatch.setattr(log, "_file", full)
        with pytest.raises(InputError, match=r"log: can't be written \(No space left on device\)"):
            log.write({"step": 1})
    assert read_log(tmp_path / "log") == [{"step": 0, "eval_loss": 5.0}]


def test_steps_may_grow(tmp_path: Path, model: Path, text: Path, nf4: Nf4) -> None:
    short, long = tmp_path / "short", tmp_path / "long"
    options = ["--seq-len", 32, "--eval-every", 2, "--lr", 0.01]
    assert nf4("finetune", model, text, "--out", long, "--steps", 6, *options).exit_code == 0
    assert nf4("finetune", model, text, "--out", short, "--steps", 4, *options).exit_code == 0
    assert nf4("finetune", "--out", short, "--resume", "--steps", 6).exit_code == 0
    assert contents(short) == contents(long)
    result = nf4("finetune", "--out", short, "--resume", "--steps", 5)
    assert result.exit_code == 2
    assert "--steps 5: the run in" in result.stderr


def test_what_differs_is_listed(tmp_path: Path, model: Path, text: Path, whole: Path, nf4: Nf4) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    result = nf4("finetune", model, other, "--out", whole, "--resume", "--rank", 2, "--seed", 7)
    assert result.exit_code == 2
    assert "--rank was 4, is now 2; --seed was 0, is now 7; data was" in result.stderr
    assert "model was" not in result.stderr


def test_a_run_from_before_an_option_resumes(
    tmp_path: Path, model: Path, text: Path, nf4: Nf4, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    read = snapshot.read_facts
    assert nf4("finetune", model, text, "--out", out, "--steps", 2, "--seq-len", 32).exit_code == 0

    def without_device(path: Path) -> Any:
        progress, identity = read(path)
        identity["options"].pop("device")
        return progress, identity

    monkeypatch.setattr(snapshot, "read_facts", without_device)
    result = nf4("finetune", "--out", out, "--resume", "--steps", 3)
    assert result.exit_code == 0, result.output


def test_another_model_is_refused(
    tmp_path: Path, tiny_model: Callable[..., Path], text: Path, whole: Path, nf4: Nf4
) -> None:
    before = contents(whole)
    result = nf4("finetune", tiny_model(tmp_path / "other", seed=1), text, "--out", whole, "--resume")
    assert result.exit_code == 2
    assert re.search(
        "a run resumes only as it began: model was [0-9a-f]{64}, is now [0-9a-f]{64}$", result.stderr
    )
    assert contents(whole) == before


def test_a_torn_log_is_cut_and_a_damaged_one_refused(
    tmp_path: Path, model: Path, text: Path, nf4: Nf4
) -> None:
    out = tmp_path / "out"
    assert nf4("finetune", model, text, "--out", out, "--steps", 2, "--seq-len", 32).exit_code == 0
    log = out / "training_log.jsonl"
    good = log.read_bytes()
    log.write_bytes(good + b'{"step": 3, "loss": 4.5, "lr"')
    assert nf4("finetune", "--out", out, "--resume").exit_code == 0
    assert log.read_bytes() == good
    log.write_bytes(b"nonsense\n" + good)
    result = nf4("finetune", "--out", out, "--resume")
    assert result.exit_code == 2
    assert "training_log.jsonl:1: not a record" in result.stderr


def test_files_that_are_no_checkpoint(tmp_path: Path, model: Path, text: Path, whole: Path, nf4: Nf4) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / snapshot.NAME).write_bytes((whole / "adapter_model.safetensors").read_bytes())
    result = nf4("finetune", model, text, "--out", out, "--resume")
    assert result.exit_code == 2
    assert "not a checkpoint of nf4 finetune" in result.stderr
    (out / snapshot.NAME).write_bytes((whole / snapshot.NAME).read_bytes()[:-1])
    result = nf4("finetune", model, text, "--out", out, "--resume")
    assert result.exit_code == 2
    assert "truncated" in result.stderr
    (out / snapshot.NAME).rename(out / "notes.txt")
    result = nf4("finetune", model, text, "--out", out, "--resume")
    assert result.exit_code == 2
    assert "there is no such checkpoint to resume from, and" in result.stderr
    assert "isn't empty; name another --out" in result.stderr
    assert json.dumps(sorted(p.name for p in out.iterdir())) == '["notes.txt"]'


def test_restore_checks_every_tensor_first(tmp_path: Path) -> None:
    from nf4.train.adamw import AdamW

    path = tmp_path / snapshot.NAME
    ours = AdamW({"a": np.ones((2, 2), np.float32)})
    snapshot.save(path, ours, snapshot.Progress(step=3), {})
    for other, message in (
        (
            AdamW({"b": np.zeros((2, 2), np.float32)}),
            "lacks the tensor 'adamw.m.b'|has the tensor 'adamw.m.a'",
        ),
        (AdamW({"a": np.zeros((2, 3), np.float32)}), r"is float32 \(2, 2\), the run needs float32 \(2, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            snapshot.restore(path, other)
        assert not any(p.any() for p in other.params.values())
    same = AdamW({"a": np.zeros((2, 2), np.float32)})
    assert snapshot.restore(path, same).step == 3
    assert same.params["a"].all()
