"""training_log.jsonl, an object a step and one an evaluation, and the picture drawn from it."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from nf4.errors import InputError
from nf4.formats.files import atomic_write

NAME = "training_log.jsonl"
PICTURE = "loss.png"

_WINDOW = 20  # the drawn average of the training loss takes this part of the steps to either side


class TrainingLog:
    """The log of a run, open for appending after the line of a given step.

    What comes after that step, or was torn by a kill, is cut away first. Raises InputError when the disk
    refuses.
    """

    def __init__(self, path: Path, *, step: int, eval_before: float) -> None:
        self.path = path
        kept = [record for record in read_log(path) if record["step"] <= step] if path.exists() else []
        if step == 0 or not kept:
            kept = [{"step": 0, "eval_loss": eval_before}]
        with atomic_write(path) as file:
            file.write("".join(map(_line, kept)).encode())
        self._file = path.open("ab", buffering=0)  # no bytes left over to fail again on closing

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; a kill afterwards does not lose it."""
        line = _line(record).encode()
        with self._refusals():
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        """Bring the log to the disk, so that a checkpoint written next is never ahead of it."""
        with self._refusals():
            os.fsync(self._file.fileno())

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"{self.path}: can't be written ({error.strerror})") from None


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the records of a log, less a last line torn by a kill. Raises InputError on other damage."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None
    records = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise ValueError
        except (ValueError, TypeError, KeyError):
            if number == len(lines):  # no line end: it was being written
                break
            raise InputError(f"{path}:{number}: not a record of a training log; move the file away") from None
        records.append(record)
    return records


def draw(log: Path, picture: Path) -> None:
    """Draw the training and held-out loss of a log over the steps into a PNG."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_log(log)
    steps = [(r["step"], r["loss"]) for r in records if "loss" in r]
    evals = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]
    with mpl.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        if steps:
            x, y = zip(*steps, strict=True)
            axes.plot(x, y, color="tab:blue", alpha=0.3, linewidth=1, label="training, each step")
            axes.plot(x, _smoothed(y), color="tab:blue", linewidth=1.8, label="training, smoothed")
        axes.plot(*zip(*evals, strict=True), color="tab:red", marker="o", linewidth=1.8, label="held out")
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats per token)")
        axes.set_title(f"held-out loss {evals[0][1]:.3f} → {evals[-1][1]:.3f}")
        axes.grid(visible=True, alpha=0.3)
        axes.legend(frameon=False)
        with atomic_write(picture) as file:
            figure.savefig(file, format="png")


def _smoothed(values: tuple[float, ...]) -> list[float]:
    """Mean of the values around each, fewer at the ends: unlike an average of the past it does not lag."""
    reach = len(values) // _WINDOW
    parts = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"
