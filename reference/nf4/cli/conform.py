"""`nf4 conform`: the specification's vectors against a port, and which clause it breaks."""

import textwrap
from datetime import date
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from nf4.cli.output import TensorProgress, json_option, print_json
from nf4.conform.clauses import clause
from nf4.conform.operations import OPERATIONS
from nf4.conform.port import HarnessError, Port
from nf4.conform.report import OUTCOMES, WIDTH, as_html, claim, failures, notes, run_json, tally, verdict
from nf4.conform.run import Run, execute, known_failures, search_beyond, search_layers, select
from nf4.conform.vectors import VERSION, Vector, flags, load
from nf4.errors import InputError

EXAMPLES = 100
"""Inputs that the search draws for each operation, and histories for a layer."""


@click.command("conform")
@click.argument("port", metavar="[-- COMMAND...]", nargs=-1, type=click.UNPROCESSED)
@click.option("--python", metavar="MODULE:OBJECT", help="Call this Python object, class or module.")
@click.option("--scoreboard", is_flag=True, help="Run the libraries installed here, and print their table.")
@click.option("--list", "as_list", is_flag=True, help="List the vectors, and run nothing.")
@click.option("--only", multiple=True, metavar="GLOB", help="Only these ids, clauses, flags or operations.")
@click.option(
    "--known-failures",
    "known_path",
    type=click.Path(path_type=Path),
    help="File of ids or globs that may fail, one a line; one that passes is an error.",
)
@click.option(
    "--search/--no-search",
    default=None,
    help="Look beyond the vectors too.  [default: with --python, without --only]",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the search.")
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    help="Seconds that an answer may take.  [default: 10; with --scoreboard 60]",
)
@click.option(
    "--vectors", "directory", type=click.Path(path_type=Path), help="Run the vectors of this directory."
)
@click.option(
    "--report", "page", metavar="FILE.html", type=click.Path(path_type=Path), help="Write a page too."
)
@json_option
@click.pass_context
def command(
    context: click.Context,
    port: tuple[str, ...],
    python: str | None,
    scoreboard: bool,
    as_list: bool,
    only: tuple[str, ...],
    known_path: Path | None,
    search: bool | None,
    seed: int,
    timeout: float | None,
    directory: Path | None,
    page: Path | None,
    as_json: bool,
) -> None:
    """Ask a port for every vector of the specification, and say which clause it breaks, at which bit.

    COMMAND is a program that speaks the JSON lines of spec/13-conformance.md; it is run without a shell.
    With --python a Python object whose functions are named as the operations is called instead. With
    --scoreboard every library that this Python has and the kit knows is asked, each in a process of its own.

    Exit codes: 0 it conforms, 1 it does not, 2 the harness is broken or nothing was run.
    """
    every = load(directory)
    chosen = select(every, only)
    if as_list:
        show_list(chosen, as_json)
        return
    if scoreboard:
        if port or python is not None:
            raise InputError("nf4 conform --scoreboard runs the libraries that it knows; name no port")
        show_scoreboard(chosen, timeout, as_json)
        return
    if bool(port) == (python is not None):
        raise InputError(
            "nf4 conform runs one port: say  nf4 conform -- COMMAND  or  nf4 conform --python MODULE:OBJECT"
        )
    known = known_failures(known_path, every) if known_path is not None else {}
    options = ("--vectors", str(directory)) if directory is not None else ()
    subject = ("--python", python) if python is not None else ("--", *port)
    asked = {vector.id for vector in chosen}
    partly = {vector.operation for vector in every if vector.id not in asked}
    whole = OPERATIONS.keys() - partly if directory is None else ()
    run = Run(python or port[0], subject, options, seed=seed, whole=frozenset(whole))
    search = (python is not None and not only) if search is None else search
    examine(run, chosen, known, timeout or 10.0, search, quiet=as_json)
    report(run, flags(directory), page, as_json)
    context.exit(run.exit_code)


def examine(
    run: Run,
    vectors: list[Vector],
    known: dict[str, set[str]],
    timeout: float,
    search: bool,
    quiet: bool,
) -> None:
    """Start the port that run names, run the vectors and the search, and end it; run says what came of it."""
    port: Port | None = None
    try:
        if run.subject[0] == "--python":
            from nf4.conform.python_port import load as load_python

            port = load_python(run.subject[1], timeout)
        else:
            from nf4.conform.protocol import SubprocessPort

            port = SubprocessPort(run.subject[1:], timeout)
            run.port = port.name
        quiet = quiet or not Console(stderr=True).is_terminal
        with TensorProgress("asking", quiet=quiet) as progress:
            execute(run, port, vectors, known, progress)
        if search and run.broken is None:
            asked = {vector.operation for vector in vectors}
            operations = [name for name in OPERATIONS if name in asked]
            with TensorProgress("searching", quiet=quiet) as progress:
                search_beyond(run, port, operations, EXAMPLES, progress)
            layers = getattr(port, "layers", None)  # of a Python port alone
            if layers is not None:
                search_layers(run, layers, EXAMPLES)
    except HarnessError as error:
        run.broken = str(error)
    finally:
        if port is not None:
            run.remarks += port.close()


def report(run: Run, sentences: dict[str, str], page: Path | None, as_json: bool) -> None:
    """Print a run for a person or a program, and write its page. sentences: those of the flags, by name."""
    if page is not None:
        from nf4.formats.files import atomic_write

        with atomic_write(page) as file:
            file.write(as_html(run, sentences, date.today().isoformat()).encode())
    if as_json:
        print_json(run_json(run))
        return
    text = failures(run, sentences)
    if text:
        click.echo(text)
    asked = [r for r in run.results if not r.found and r.vector.operation not in run.not_offered]
    if asked:
        table = Table(show_edge=False)
        table.add_column("clause")
        table.add_column("")
        for outcome in OUTCOMES:
            table.add_column(outcome, justify="right")
        chapter = ""
        for name, counts in tally(asked).items():
            cells = (str(counts[outcome] or "") for outcome in OUTCOMES)
            if chapter and not name.startswith(chapter):
                table.add_section()
            chapter = name.partition(".")[0] + "."
            bad = counts["failed"] or counts["errored"]
            table.add_row(name, clause(name).title, *cells, style="bold red" if bad else "")
        Console().print(table)
        click.echo()
    click.echo(notes(run), nl=False)
    click.echo(verdict(run))
    may = str(claim(run))
    if may:
        click.echo(textwrap.fill(may, WIDTH, initial_indent="  ", subsequent_indent="  "))
    if page is not None:
        click.echo(f"written: {page}")


def show_scoreboard(vectors: list[Vector], timeout: float | None, as_json: bool) -> None:
    """Run the libraries, and print what each conforms to, as Markdown or JSON. InputError where none is."""
    from nf4.conform import scoreboard

    libraries = scoreboard.entries()
    if all(entry.versions is None for entry in libraries):
        titles = ", ".join(entry.title for entry in libraries)
        raise InputError(
            f"--scoreboard: none of the libraries that it knows is installed ({titles}); "
            "install some, or all by  pip install '.[scoreboard]'  in nf4's checkout"
        )
    console = Console(stderr=True)
    scores = scoreboard.run(
        libraries,
        vectors,
        timeout or scoreboard.TIMEOUT,
        lambda title: console.print(f"asking {title}") if console.is_terminal else None,
    )
    if as_json:
        print_json(scoreboard.as_json(scores))
    else:
        click.echo(scoreboard.markdown(scores), nl=False)


def show_list(vectors: list[Vector], as_json: bool) -> None:
    """Print the vectors: a line each, or as JSON."""
    if as_json:
        rows = [
            {name: getattr(vector, name) for name in ("id", "operation", "clauses", "flags", "comment")}
            for vector in vectors
        ]
        print_json({"specification": VERSION, "vectors": rows})
        return
    for vector in vectors:
        words = [vector.id, vector.operation, *vector.clauses, *vector.flags]
        click.echo(" ".join(words))
