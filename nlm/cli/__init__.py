"""The ``nlm`` command. Only the command that runs imports what it needs: help is instant."""

import os
import sys


def main() -> None:
    """Run the command line; exit code 0, 1 for a failure, 2 for a wrong use, 130 when stopped."""
    # Read once, when torch loads. Beside other busy processes, threads that spin while they wait
    # make a training step of two threads up to ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        from nlm.cli.app import run
    except ModuleNotFoundError as error:
        sentence = missing_package(error)
        if sentence is None:
            raise
        sys.exit(sentence)
    sys.exit(run(sys.argv[1:]))


def missing_package(error: Exception) -> str | None:
    """The sentence for a package of the ``cli`` extra that is not installed, else None."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    package = error.name.partition(".")[0]
    if package == "nlm":
        return None
    return f"nlm: the command line needs {package}, got no such package: pip install nlm[cli]"
