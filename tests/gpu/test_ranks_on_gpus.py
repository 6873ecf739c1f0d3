"""Ranks of several GPUs: each has its own, and the exact mode's bits are those of one, or of none."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from in_threads import on_threads
from launchers import found
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
