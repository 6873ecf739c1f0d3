"""The command line: a group of commands that are imported when called, and its exit codes."""

import traceback
from importlib import import_module
from typing import Any

import click

from nf4 import __version__
from nf4.errors import CheckFailed, InputError
from nf4.ranks import joined, launched

DONE, CHECK_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

# The help of each command stands here, so that `nf4 --help` imports none of them.
COMMANDS = {
    "finetune": "Quantize a model and train a LoRA adapter on it.",
    "quantize": "Write a model's linear weights as 4 bits.",
    "dequantize": "Write a 4-bit model as plain weights.",
    "inspect": "Show the tensors of a model or an adapter.",
    "generate": "Write text with a model.",
    "eval": "Measure a model's perplexity on a text.",
    "merge": "Add an adapter to the weights of its model.",
    "plan": "Plan the memory of inference and training.",
    "compare": "Compare NF4 with other 4-bit grids on real weights.",
    "explore": "Write a page to try the grids on.",
    "plot": "Draw the grid under the weights.",
    "conform": "Run the specification's vectors against a port.",
    "bench": "Measure speed and memory beside other programs.",
}


# Those that share their work where mpirun or srun starts several processes.
SHARED = ("finetune", "quantize", "bench")


class _Commands(click.Group):
    """Imports nf4.cli.NAME for the command NAME, and turns the two errors of a run into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        if cmd_name not in SHARED and (launch := launched()):
            raise InputError(
                f"{launch.size} processes were started together ({launch.variable}), and nf4 {cmd_name} is "
                f"the work of one: start it by itself; those that share theirs are {', '.join(SHARED)}"
            )
        command: click.Command = import_module(f"nf4.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        launch = launched()
        try:
            return super().invoke(ctx)
        except InputError as error:
            code, message = BAD_INPUT, str(error)
        except CheckFailed as error:
            code, message = CHECK_FAILED, str(error)
        except KeyboardInterrupt:
            code, message = INTERRUPTED, "interrupted"
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.ClickException as error:
            code = error.exit_code
            if launch is None or launch.rank == 0:
                click.echo(f"nf4: {_sentence(error)}", err=True)
            ctx.exit(code)
        except (click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:  # the other ranks would wait for this one for ever
            if joined().size == 1:
                raise
            code, message = CHECK_FAILED, traceback.format_exc().strip()
            if isinstance(error, MemoryError):
                message = f"out of memory ({error})"
        joined().end(message, code)
        ctx.exit(code)


def _sentence(error: click.ClickException) -> str:
    """What click says of the arguments, as one sentence with the way out."""
    message = error.format_message().rstrip(".")
    message = message[:1].lower() + message[1:]
    path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else ""
    return f"{message}; see  {' '.join(['nf4', *path.split()[1:]])} --help"


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nf4")
def main() -> None:
    """Quantize to NF4, fine-tune with QLoRA, evaluate and generate: in NumPy, or on a GPU.

    Exit codes: 0 done, 1 a check failed, 2 bad input, 130 interrupted.
    """
