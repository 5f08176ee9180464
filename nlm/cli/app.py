"""The commands and their options, and the one place where an error becomes a sentence."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from nlm import __version__
from nlm.checkpoint.names import printable
from nlm.cli import align, bench, merge, missing_package, spec

_TASKS = 8
_STOPPED = 130  # what a shell reports for Ctrl-C, and typer returns

app = typer.Typer(
    name="nlm",
    help="Non-local model merging: align, merge and correct experts of different foundations.",
    no_args_is_help=True,
    epilog="Exit codes: 0 done, 1 failed, with a sentence on stderr, 2 wrong use, 130 stopped.",
)
app.add_typer(spec.app)
app.add_typer(bench.app)
app.command()(align.align)
app.command()(merge.merge)
app.command()(merge.restore)


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code; errors are one sentence on stderr.

    ``NLM_TRACEBACK=1`` shows where an error comes from.
    """
    command = typer.main.get_command(app)
    try:
        outcome = command.main(arguments, prog_name="nlm", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        outcome = _STOPPED
    except Exception as error:
        if os.environ.get("NLM_TRACEBACK"):
            raise
        return _explain(error)
    if outcome == _STOPPED:
        print("nlm: stopped", file=sys.stderr)
    return outcome if isinstance(outcome, int) else 0


def _explain(error: Exception) -> int:
    """Print an error as a sentence; return 2 for a wrong use of the command line, else 1."""
    usage = getattr(error, "format_message", None)
    if usage is not None:
        if sentence := usage():  # none where the help was shown instead
            _say(f"nlm: {sentence}")
        return int(getattr(error, "exit_code", 2))
    message = missing_package(error) or _of_system(error) or str(error) or type(error).__name__
    lines = getattr(error, "problems", None) or message.split("\n")  # of a recipe: a line each
    first = lines[0] if message.startswith("nlm") else f"nlm: {lines[0]}"
    _say(first, *lines[1:])
    return 1


def _say(*lines: str) -> None:
    """Prints lines to stderr, in which nothing of a file's can steer the terminal."""
    print("\n".join(map(printable, lines)), file=sys.stderr)


def _of_system(error: Exception) -> str | None:
    """The sentence for an error of the system on a file."""
    if not isinstance(error, OSError) or error.errno is None or error.filename is None:
        return None
    names = [name for name in (error.filename, error.filename2) if name is not None]
    files = " and ".join(repr(name) for name in names)  # a copy or a rename has two
    return f"nlm: files can be read and written, got {error.strerror!r} for {files}"


def _version(wanted: bool) -> None:
    if wanted:
        print(f"nlm {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Non-local model merging: align, merge and correct experts of different foundations."""


@app.command()
def demo(
    json: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, images and batches.")] = 0,
    tasks: Annotated[
        int, typer.Option(min=2, max=_TASKS, help="How many tasks to merge at most.")
    ] = _TASKS,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
    report: Annotated[
        Path | None,
        typer.Option(help="Write the report to this file.", show_default="report.html"),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Merge experts of two unrelated foundations into one multi-task model, on real data.

    The first run trains the foundations and experts (minutes) and keeps them in the user's cache
    folder; alignment, merging, correction and evaluation run every time.
    """
    from nlm.cli.demo import demo as run_demo

    run_demo(seed, tasks, json, report, force, quiet)


@app.command()
def info(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the live backends, instruction set, threads and versions."""
    from nlm.cli.info import show

    show(json)


@app.command()
def check(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML, of nlm or of mergekit.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find everything that is wrong with a recipe and its files, before any work.

    The exit code is 1 where there is something, with a sentence for each on stderr.
    """
    from nlm.cli.check import check as run_check

    run_check(recipe, json)


@app.command()
def report(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="RUN.json",
            help="What nlm demo --json, nlm align --json or nlm.report.merge_report left.",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Write the page (HTML) here.")],
    force: spec.Force = False,
) -> None:
    """Draw the results of a merge, or of an alignment, as one page that needs no other file."""
    from nlm.cli.report import report as write

    write(file, output, force)
