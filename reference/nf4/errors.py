"""The two ways a run can end without its result; the command line turns them into exit codes."""


class InputError(ValueError):
    """The input can't be used (exit 2). The message names the file or tensor, the value, and the way out."""


class CheckFailed(RuntimeError):  # noqa: N818  it names an exit, not a mistake
    """The input was fine and the run refused to go on, such as on a loss that is NaN (exit 1)."""
