"""The checkpoint a run resumes from: trained arrays, AdamW states and the run's identity in one file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.errors import InputError
from nf4.formats.files import SafetensorsFile, SafetensorsWriter, TensorSpec, parse_json
from nf4.train.adamw import AdamW

NAME = "checkpoint.safetensors"

_KEY = "nf4.checkpoint"
_VERSION = 1


@dataclass
class Progress:
    """Where a run stands, beside its arrays. Losses are in nats a token; a step counts the updates made."""

    step: int = 0
    best_loss: float | None = None
    best_step: int = 0
    eval_before: float = 0.0
    eval_last: float = 0.0
    sample_prompt: str = ""
    sample_before: str = ""
    seconds: float = 0.0


def save(path: Path, optimizer: AdamW, progress: Progress, identity: Mapping[str, Any]) -> None:
    """Write the checkpoint so that at every moment path holds the whole previous one or the whole new one.

    Raises InputError if the disk refuses; the previous checkpoint then stays.
    """
    tensors = _tensors(optimizer)
    facts = {"version": _VERSION, "progress": vars(progress), "identity": dict(identity)}
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in tensors.items()}
    with SafetensorsWriter(path, specs, {_KEY: json.dumps(facts)}) as writer:
        for name, array in tensors.items():
            writer.write(name, array)


def read_facts(path: Path) -> tuple[Progress, dict[str, Any]]:
    """Return the progress and the identity in a checkpoint. Raises InputError if it is none."""
    return _facts(SafetensorsFile(path))


def _facts(file: SafetensorsFile) -> tuple[Progress, dict[str, Any]]:
    if _KEY not in file.metadata:
        raise InputError(
            f"{file.path}: not a checkpoint of nf4 finetune; --resume needs the directory of a run"
        )
    facts = parse_json(file.metadata[_KEY], f"{file.path}: {_KEY}")
    if facts.get("version") != _VERSION:
        raise InputError(
            f"{file.path}: checkpoint version {facts.get('version')}, this program reads {_VERSION}"
        )
    try:
        return Progress(**facts["progress"]), dict(facts["identity"])
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{file.path}: the checkpoint's header is damaged; start a new run") from None


def restore(path: Path, optimizer: AdamW) -> Progress:
    """Put a checkpoint's arrays into the parameters and the optimizer, in place; return the progress.

    Raises InputError, before anything is changed, if the tensors are not those of these parameters.
    """
    file = SafetensorsFile(path)
    progress, _ = _facts(file)
    expected = _tensors(optimizer)
    for name in sorted(expected.keys() ^ file.entries.keys()):
        where = "lacks" if name in expected else "has"
        raise InputError(
            f"{path}: the checkpoint {where} the tensor {name!r}, so it is of another model or adapter"
        )
    arrays: dict[str, NDArray[Any]] = {}
    for name, mine in expected.items():
        array = file.read(name)
        if array.shape != mine.shape or array.dtype != mine.dtype:
            raise InputError(
                f"{path}: {name!r} is {array.dtype} {array.shape}, the run needs {mine.dtype} {mine.shape}"
            )
        arrays[name] = array
    for name, p in optimizer.params.items():
        np.copyto(p, arrays[f"param.{name}"])
    optimizer.restore(
        progress.step,
        {name: arrays[f"adamw.m.{name}"] for name in optimizer.params},
        {name: arrays[f"adamw.v.{name}"] for name in optimizer.params},
    )
    return progress


def check_identity(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise InputError listing what differs between a checkpoint's run and the one to resume it."""
    different = [
        f"{name} was {saved.get(name)}, is now {now.get(name)}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]
    if different:
        raise InputError(f"{path}: a run resumes only as it began: {'; '.join(different)}")


def _tensors(optimizer: AdamW) -> dict[str, NDArray[Any]]:
    tensors: dict[str, NDArray[Any]] = {}
    for name, p in optimizer.params.items():
        tensors |= {
            f"param.{name}": p,
            f"adamw.m.{name}": optimizer.m[name],
            f"adamw.v.{name}": optimizer.v[name],
        }
    return tensors
