"""The ``nlm`` command. Only the command that runs imports what it needs: help is instant."""

import os
import sys

# The packages of the extras that are imported without a sentence of their own.
_OF_EXTRA = {
    "click": "cli", "jinja2": "cli", "markupsafe": "cli", "matplotlib": "cli", "pydantic": "cli",
    "rich": "cli", "typer": "cli", "transformers": "hf",
}  # fmt: skip


def main() -> None:
    """Run the command line; exit code 0, 1 for a failure, 2 for a wrong use, 130 when stopped."""
    # Read once, when torch loads. Threads that spin long while they wait make steps of two threads
    # up to ten times slower beside other busy processes; ones that never spin cost a third alone.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        from nlm.cli.app import run
    except ModuleNotFoundError as error:
        sentence = missing_package(error)
        if sentence is None:
            raise
        sys.exit(sentence)
    sys.exit(run(sys.argv[1:]))


def missing_package(error: Exception) -> str | None:
    """The sentence for a package that is not installed, with how to get it; else None."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    package = error.name.partition(".")[0]
    if package == "nlm":
        return None
    if package in _OF_EXTRA:
        needs, how = "the command line", f"nlm[{_OF_EXTRA[package]}]"
    else:
        needs, how = "this command", package
    return f"nlm: {needs} needs {package}, got no such package: pip install {how}"
