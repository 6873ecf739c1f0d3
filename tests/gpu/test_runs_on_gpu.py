"""`nf4 finetune --device cuda` and its kin from the command line: the files of the CPU's, the same refusals.

Emulated, and on the GPU. What ends a run early leaves a checkpoint, from which it goes on to the same bits.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from devices import GPU, device_of
from nf4.cli import main
from nf4.errors import InputError
from nf4.formats.files import SafetensorsFile
from nf4.train.log import read_log

ROOT = Path(__file__).parents[2]
SENTENCES = ("the cat sat on the mat. ", "an old bird flew over it. ", "rain fell on the small house. ")
STEPS = 6
OPTIONS = shlex.split(
    "--steps 6 --eval-every 3 --save-every 2 --eval-sequences 4 --seq-len 32 --batch-size 3 --grad-accum 2 "
    "--rank 4 --dropout 0.1 --lr 1e-2 --schedule cosine --warmup 2 --weight-decay 0.01"
)
QUICK = shlex.split("--steps 2 --seq-len 24 --batch-size 2 --eval-sequences 2 --lr 1e-2")


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i}: {SENTENCES[i * i % 3]}" for i in range(60)))
    return path


@pytest.fixture(params=["emulated", "cuda"])
def nf4(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Return run(*arguments): the command line, with the GPU or with an emulated one in its place."""
    device_of(request.param, request)
    if request.param != GPU:
        emulate(monkeypatch)

    def run(*arguments: object) -> Result:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        return result

    return run


def emulate(monkeypatch: pytest.MonkeyPatch, free: int = 8 << 30) -> None:
    """Put an emulated device where the commands look for the GPU."""
    import nf4_gpu.arrays
    from emulated import Emulated
    from nf4_gpu.train import engine, run

    monkeypatch.setattr(nf4_gpu.arrays, "require_gpu", lambda: None)
    monkeypatch.setattr(run, "_gpu", lambda: (free, Emulated.processors, 90, Emulated.shared_memory))
    for module in (run, engine):
        monkeypatch.setattr(module, "Cuda", Emulated)


def contents(out: Path) -> dict[str, Any]:
    """Everything a run leaves but its timings."""
    checkpoint = SafetensorsFile(out / "checkpoint.safetensors")
    files = [path for path in out.rglob("*") if path.is_file()]
    log = read_log(out / "training_log.jsonl")
    return {
        **{str(path.relative_to(out)): path.read_bytes() for path in files if "adapter" in path.name},
        "checkpoint": {name: checkpoint.read(name).tobytes() for name in checkpoint.entries},
        "log": [{key: value for key, value in record.items() if key != "seconds"} for record in log],
    }


def test_a_run_is_that_of_the_cpu_but_for_bfloat16(
    tmp_path: Path, model: Path, text: Path, nf4: Callable[..., Result]
) -> None:
    outs = {device: tmp_path / device for device in ("cpu", "cuda")}
    for device, out in outs.items():
        result = nf4("finetune", model, text, "--out", out, *OPTIONS, "--device", device)
        assert result.exit_code == 0, result.output
        if device == "cuda":
            plan = re.search(r"device memory: ([\d.]+) GiB \(weights [\d.]+, adapters.*\)", result.stderr)
            assert plan is not None
            assert re.search(r"device memory: .*; measured [\d.]+ GiB", result.stderr)
    names = {device: sorted(p.relative_to(out) for p in out.rglob("*")) for device, out in outs.items()}
    assert names["cpu"] == names["cuda"]
    logs = {device: read_log(out / "training_log.jsonl") for device, out in outs.items()}
    for ours, theirs in zip(logs["cuda"], logs["cpu"], strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["step"] == theirs["step"]
        for name in ("loss", "eval_loss"):
            if name in ours:
                assert ours[name] == pytest.approx(theirs[name], rel=0.01)

    found = nf4("eval", model, text, "--adapter", outs["cuda"], "--device", "cuda", "--json")
    assert found.exit_code == 0, found.output
    expected = nf4("eval", model, text, "--adapter", outs["cuda"], "--json")
    losses = [json.loads(result.stdout)["loss"] for result in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    said = nf4(
        "generate",
        model,
        "--prompt",
        "0: the",
        "--adapter",
        outs["cuda"],
        "--device",
        "cuda",
        "--max-tokens",
        8,
    )
    assert said.exit_code == 0, said.output
    assert said.stdout.strip()


def test_a_run_goes_on_to_the_same_bits_with_other_settings_of_memory(
    tmp_path: Path, model: Path, text: Path, nf4: Callable[..., Result]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*OPTIONS, "--schedule", "constant", "--device", "cuda"]
    assert nf4("finetune", model, text, "--out", whole, *options).exit_code == 0
    assert nf4("finetune", model, text, "--out", parts, *options, "--steps", 3).exit_code == 0
    result = nf4("finetune", "--resume", "--out", parts, "--steps", STEPS, "--optimizer-budget", "12K")
    assert result.exit_code == 0, result.output
    assert "going on after step 3" in result.stderr
    assert contents(parts) == contents(whole)
    result = nf4("finetune", "--resume", "--out", parts, "--device", "cpu")
    assert result.exit_code == 2
    assert "--device was cuda, is now cpu" in result.stderr


def test_a_gpu_that_fails_leaves_the_checkpoint_before(
    tmp_path: Path, model: Path, text: Path, nf4: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nf4_gpu.train import adamw, engine

    whole, out = tmp_path / "whole", tmp_path / "out"
    options = [*OPTIONS, "--device", "cuda"]
    assert nf4("finetune", model, text, "--out", whole, *options).exit_code == 0
    begin, begun = adamw.Optimizer.begin, []

    def failing(self: Any, scalars: Any) -> None:
        begun.append(0)
        if len(begun) == 4:
            raise RuntimeError("an illegal memory access was encountered")
        begin(self, scalars)

    monkeypatch.setattr(adamw.Optimizer, "begin", failing)
    result = nf4("finetune", model, text, "--out", out, *options)
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert "the GPU fails: an illegal memory access" in last
    assert "--resume" in last
    assert not (out / "adapter_model.safetensors").exists()

    # No memory when it is taken up again: nothing of it is touched.
    before = (out / "checkpoint.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        kind = engine.Cuda

        def refuse(self: Any, nbytes: int) -> int:
            raise InputError(f"{nbytes / 2**30:.2f} GiB of device memory can't be had")

        patch.setattr(kind, "allocate", refuse)
        result = nf4("finetune", "--resume", "--out", out)
        assert result.exit_code == 2
        assert "GiB of device memory can't be had" in result.stderr
    assert (out / "checkpoint.safetensors").read_bytes() == before
    result = nf4("finetune", "--resume", "--out", out)
    assert result.exit_code == 0, result.output
    assert contents(out) == contents(whole)


def test_a_loss_that_is_not_finite_ends_the_run(
    tmp_path: Path, model: Path, text: Path, nf4: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nf4_gpu.train.engine import GpuEngine

    send, sent = GpuEngine._send, []

    def poisoned(self: Any, number: int, *arguments: Any, drop: bool) -> Any:
        if drop:
            sent.append(0)
            if len(sent) == 5:  # of the third step
                self.store()
                next(iter(self.optimizer.params.values())).reshape(-1)[0] = float("nan")
                self.load()
        return send(self, number, *arguments, drop=drop)

    monkeypatch.setattr(GpuEngine, "_send", poisoned)
    out = tmp_path / "out"
    result = nf4("finetune", model, text, "--out", out, *OPTIONS, "--device", "cuda")
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("nf4: step 3: the loss is nan and the gradient norm nan")
    assert "the last good checkpoint is step 2" in last
    monkeypatch.setattr(GpuEngine, "_send", send)
    assert nf4("finetune", "--resume", "--out", out).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "tpu"], "'tpu' is not one of 'cpu', 'cuda'"),
        (["--keep-layers", 1], "--keep-layers is for --device cuda without --exact; leave it away"),
        (
            ["--optimizer-budget", "1G"],
            "--optimizer-budget is for --device cuda without --exact; leave it away",
        ),
        (["--weights-budget", "1G"], "--weights-budget is for --device cuda without --exact; leave it away"),
        (["--device", "cuda", "--keep-layers", 1], "--keep-layers is for --checkpointing"),
        (["--device", "cuda", "--optimizer-budget", "much"], "'much' is not a size"),
        (["--device", "cuda", "--optimizer-budget", "1K"], "--optimizer-budget: 0.0 MiB are too few"),
        (["--device", "cuda", "--weights-budget", "1K"], "--weights-budget: 0.00 GiB are too few"),
        (["--device", "cuda", "--seq-len", 129], "longer than the model's 128 positions"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, model: Path, text: Path, nf4: Callable[..., Result], arguments: list[Any], words: str
) -> None:
    out = tmp_path / "out"
    result = nf4("finetune", model, text, "--out", out, *QUICK, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not out.exists()


def test_models_that_do_not_fit_or_are_not_supported(
    tmp_path: Path, model: Path, text: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before anything is loaded, with the plan and the way out. By the plan's arithmetic alone."""
    from nf4.formats import checkpoint
    from nf4_gpu.train import run

    def refused(*arguments: object) -> str:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == 2, result.output
        return result.stderr.splitlines()[-1]

    out = tmp_path / "out"
    monkeypatch.setattr(checkpoint, "load_model", None)
    emulate(monkeypatch, free=run._RESERVE + (1 << 20))
    line = refused("finetune", model, text, "--out", out, *QUICK, "--device", "cuda")
    assert re.search(r"device memory: 0.0\d GiB \(.*\), and 0.25 GiB are free; no setting makes it fit", line)
    emulate(monkeypatch)
    odd = tiny_model(tmp_path / "odd", intermediate_size=60)
    line = refused("finetune", odd, text, "--out", out, *QUICK, "--device", "cuda")
    assert "intermediate_size is 60; on the GPU it must be a multiple of 8" in line
    assert not out.exists()


def test_a_gpu_without_bfloat16_is_refused(
    tmp_path: Path, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cupy
    import nf4_gpu.arrays

    monkeypatch.setattr(nf4_gpu.arrays, "require_gpu", lambda: None)
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 0)
    monkeypatch.setattr("nf4_gpu.compile.capability", lambda device: 75)
    for command in (
        ["finetune", model, text, "--out", tmp_path / "out", *QUICK],
        ["eval", model, text],
        ["generate", model, "--prompt", "a"],
    ):
        result = CliRunner().invoke(main, [*map(str, command), "--device", "cuda"])
        assert result.exit_code == 2, result.output
        assert "GPU 0 is of compute capability 7.5; bfloat16 on tensor cores" in result.stderr
        assert "take --device cpu" in result.stderr


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_and_killed(
    tmp_path: Path, model: Path, text: Path, request: pytest.FixtureRequest, sent: signal.Signals
) -> None:
    """On the GPU, in a process of its own, which then goes on to the bits of a run that nothing disturbed."""
    request.getfixturevalue("gpu")
    options = [*OPTIONS, "--device", "cuda"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert (
        CliRunner().invoke(main, ["finetune", str(model), str(text), "--out", str(whole), *options]).exit_code
        == 0
    )
    search = os.pathsep.join(map(str, (ROOT / "reference", ROOT / "gpu", *sys.path)))
    process = subprocess.Popen(
        [sys.executable, "-c", "from nf4.cli import main; main()",
         *map(str, ["finetune", model, text, "--out", out, *options])],
        env={**os.environ, "PYTHONPATH": search}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 3/"):
            process.send_signal(sent)
    assert process.wait() == (130 if sent == signal.SIGINT else -signal.SIGKILL)
    result = CliRunner().invoke(main, ["finetune", "--resume", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert contents(out) == contents(whole)


def test_device_memory_that_is_not_there(request: pytest.FixtureRequest) -> None:
    """What the driver refuses is told as bad input, and the device goes on."""
    device = device_of(GPU, request)
    with pytest.raises(
        InputError, match=r"1048576.00 GiB of device memory can't be had: [\d.]+ of [\d.]+ GiB are free"
    ):
        device.allocate(1 << 50)
    assert device.allocate(1 << 20)
