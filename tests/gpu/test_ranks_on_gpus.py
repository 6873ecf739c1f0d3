"""Ranks of several GPUs: each has its own, and the exact mode's bits are those of one, or of none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from in_threads import on_threads
from launchers import Mpi, found
from nf4.errors import InputError
from nf4.ranks import ALONE, Ranks
from nf4_gpu import ranks as gpu_ranks

RUN = (
    "--exact", "--steps", 3, "--seq-len", 40, "--batch-size", 2, "--grad-accum", 3, "--eval-every", 2,
    "--eval-sequences", 5, "--dropout", 0.2, "--lr", 1e-2, "--rank", 4,
)  # fmt: skip


class Runtime:
    """CUDA's runtime on hosts with GPUs of these places; each rank's thread chooses one."""

    def __init__(self, *places: str) -> None:
        self.places = places

    def getDeviceCount(self) -> int:
        return len(self.places)

    def setDevice(self, device: int) -> None:
        assert 0 <= device < len(self.places)

    def deviceGetPCIBusId(self, device: int) -> str:
        return self.places[device]


def taken(monkeypatch: pytest.MonkeyPatch, ranks: int, *places: str, hosts: int = 1) -> list[str]:
    """What each rank says, of ranks that are dealt out to hosts with these GPUs each."""
    monkeypatch.setattr(gpu_ranks, "runtime", Runtime(*places))

    def take(own: Ranks) -> str:
        own.local, own.host = own.rank % (ranks // hosts), f"host{own.rank // (ranks // hosts)}"
        try:
            gpu_ranks.take_device(own)
        except InputError as error:
            return str(error)
        return ""

    return on_threads(ranks, take)


def test_each_rank_of_a_host_takes_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert taken(monkeypatch, 2, "01:00", "02:00") == ["", ""]
    assert taken(monkeypatch, 4, "01:00", "02:00", hosts=2) == [""] * 4
    shared = taken(monkeypatch, 3, "01:00", "02:00")
    assert len(set(shared)) == 1
    assert shared[0].startswith(
        "--device cuda: ranks 0 and 2 on host0 would share the GPU 01:00; start as many"
    )
    assert "ranks 0 and 1 on host0 would share" in taken(monkeypatch, 2, "01:00")[0]
    gpu_ranks.take_device(ALONE)  # takes what is current


def test_what_is_exchanged_goes_through_nccl_on_the_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    class Communicator:
        def __init__(self, *arguments: Any) -> None:
            calls.append(("join", *arguments))

        def send(self, *arguments: Any) -> None:
            calls.append(("send", *arguments))

        def recv(self, *arguments: Any) -> None:
            calls.append(("recv", *arguments))

    nccl = SimpleNamespace(
        NCCL_FLOAT32=7,
        NcclCommunicator=Communicator,
        get_unique_id=lambda: "id",
        groupStart=lambda: calls.append(("start",)),
        groupEnd=lambda: calls.append(("end",)),
    )
    monkeypatch.setattr(gpu_ranks, "_nccl", lambda: nccl)
    stream = SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=99))
    monkeypatch.setattr(gpu_ranks, "cupy", SimpleNamespace(cuda=stream))

    def array(at: int, size: int) -> Any:
        return SimpleNamespace(data=SimpleNamespace(ptr=at), size=size)

    gpu_ranks.Nccl(ALONE).exchange([(1, array(1000, 5))], [(1, array(2000, 6)), (2, array(3000, 7))])
    assert calls == [
        ("join", 1, "id", 0),
        ("start",),
        ("send", 1000, 5, 7, 1, 99),
        ("recv", 2000, 6, 7, 1, 99),
        ("recv", 3000, 7, 7, 2, 99),
        ("end",),
    ]


def test_two_gpus_end_in_the_bits_of_one_and_of_none(
    two_gpus: None, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    from click.testing import CliRunner
    from nf4.cli import main

    model, text = tiny_model(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("".join(f"{i}: an old bird flew over the {i * i % 7} houses. " for i in range(90)))
    for device in ("cpu", "cuda"):
        arguments = ["finetune", model, text, "--out", tmp_path / device, "--device", device, *RUN]
        assert CliRunner().invoke(main, [str(argument) for argument in arguments]).exit_code == 0
    mpi = next(iter(found().values()))
    done = mpi.nf4(2, "finetune", model, text, "--out", tmp_path / "two", "--device", "cuda", *RUN)
    assert done.returncode == 0, done.stderr
    adapters = [(tmp_path / out / "adapter_model.safetensors").read_bytes() for out in ("cpu", "cuda", "two")]
    assert adapters[0] == adapters[1] == adapters[2]


EMULATED = """
import hashlib, json, sys
sys.path.insert(0, sys.argv.pop(1))
import numpy as np
from emulated import Emulated
from nf4.formats.checkpoint import QuantizeOptions, load_model
from nf4.model.llama import Llama
from nf4.ranks import started
from nf4.train.data import Example
from nf4.train.finetune import FinetuneOptions, new_adapters
from nf4_gpu.train import run
options = FinetuneOptions("", "", "", rank=4, dropout=0.1, batch_size=2, seq_len=24, device="cuda")
base, ranks = load_model(sys.argv[1], quantize=QuantizeOptions()), started()
model = Llama(base.config, base.params, new_adapters(base, options))
ids = np.random.default_rng(0).integers(0, 256, (12, 25)).astype(np.int32)
examples = [Example(row[: 24 - i], row[1 : 25 - i]) for i, row in enumerate(ids)]
engine = run.engine(model, options, 24, 0, ranks, device=Emulated())
found = []
for step in range(3):
    places = [range(4 * step + i, 4 * step + i + 2) for i in (0, 2)]
    update = engine.step([([examples[i] for i in part], part) for part in places], 1e-2)
    found.append([update.loss, update.norm, update.tokens])
found.append([engine.evaluate(examples[:3])])
engine.store()
bits = hashlib.sha256(b"".join(p.tobytes() for p in engine.optimizer.params.values())).hexdigest()
assert len(set(ranks.gather((bits, str(found))))) == 1  # the same on all
if ranks.rank == 0:
    print(json.dumps(found))
"""


def test_the_fast_engine_shares_a_step(tmp_path: Path, tiny_model: Callable[..., Path], mpich: Mpi) -> None:
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to compile the kernels for this processor")
    model, results = tiny_model(tmp_path / "model"), []
    for ranks in (1, 2, 3):
        done = mpich.python(ranks, "-c", EMULATED, Path(__file__).parent, model)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert one == pytest.approx(two, rel=1e-6)
