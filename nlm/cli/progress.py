"""A progress bar on stderr; where stderr is no terminal, a line for each piece of work."""

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

Report = Callable[[str, float], None]


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Report | None]:
    """A function for what is being done and the share done; None where ``quiet``.

    Warnings raised meanwhile appear as one line each, without tearing the bar.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with _warnings_as_lines(console):
        if quiet:
            yield None
        elif not sys.stderr.isatty():
            yield _line_by_line(console)
        else:
            bar = Progress(
                BarColumn(bar_width=30),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}"),
                console=console,
                transient=True,
            )
            with bar:
                task = bar.add_task("starting", total=1.0)
                yield lambda what, share: bar.update(task, description=what, completed=share)


def _line_by_line(console: Console) -> Report:
    begun = time.perf_counter()
    last = ""

    def report(what: str, share: float) -> None:
        nonlocal last
        if what != last:
            console.print(
                f"{time.perf_counter() - begun:6.1f} s {share:4.0%}  {what}", markup=False
            )
            last = what

    return report


@contextmanager
def _warnings_as_lines(console: Console) -> Iterator[None]:
    def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        console.print(f"warning: {message}", markup=False)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
