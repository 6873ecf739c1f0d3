"""How the commands answer: tables and progress for a reader, one JSON object for a program."""

import json
import re
from types import TracebackType
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on standard output, nothing else."
)


def print_json(answer: dict[str, Any]) -> None:
    """Print one object as JSON; a number that is not finite becomes null, since JSON has no NaN."""
    click.echo(json.dumps(_finite(answer), indent=2, allow_nan=False, ensure_ascii=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0.0:
        return None
    return value


def size(count: float) -> str:
    """Return a number of bytes in the decimal unit that reads best, such as '92.9 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class _Size(click.ParamType):  # type: ignore[type-arg]
    """Bytes, with K, M or G for powers of 1024."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)(?:i?b)?", str(value).strip().lower())
        if found is None:
            self.fail(f"{value!r} is not a size; give bytes, or such as 512M or 4G", param, ctx)
        return int(float(found[1]) * 1024 ** " kmg".index(found[2] or " "))


SIZE = _Size()


class TensorProgress:
    """Progress tensor by tensor, on standard error: a bar, or a line a tenth where there is no terminal.

    Call it as nf4.formats.checkpoint.Progress is called.
    """

    def __init__(self, title: str, *, quiet: bool) -> None:
        self._title, self._quiet, self._tenth = title, quiet, 0
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("[dim]{task.fields[tensor]}"),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task(title, total=None, tensor="")

    def __enter__(self) -> "TensorProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, name: str, done: int, total: int) -> None:
        """Say that `done` of `total` tensors are ready, and that `name` is next or was last."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, tensor=name)
        elif not self._quiet and done * 10 // max(total, 1) > self._tenth:
            self._tenth = done * 10 // total
            click.echo(f"{self._title}: {done} of {total} tensors", err=True)
