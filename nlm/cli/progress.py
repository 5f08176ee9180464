"""A progress bar on stderr; where stderr is no terminal, lines.

Of work that is known in bytes both tell how many are done, how fast, and the time that is left.
"""

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from nlm.checkpoint.names import printable
from nlm.recipe.forecast import readable

Report = Callable[[str, float], None]

_EVERY = 1.0  # seconds between lines of work that is known in bytes


@contextmanager
def progress_bar(quiet: bool, size: int | None = None) -> Iterator[Report | None]:
    """A function for what is being done and the share done; None where ``quiet``.

    Warnings raised meanwhile appear as one line each, without tearing the bar.

    Parameters
    ----------
    size : bytes of all the work, where it is known in bytes.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with _warnings_as_lines(console):
        if quiet:
            yield None
        elif not sys.stderr.isatty():
            yield _line_by_line(console) if size is None else _now_and_then(console, size)
        else:
            of_bytes: list[ProgressColumn] = []
            if size is not None:
                of_bytes = [DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()]
            bar = Progress(
                BarColumn(bar_width=30),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                *of_bytes,
                TextColumn("{task.description}", markup=False),  # tensors have any names
                console=console,
                transient=True,
            )
            total = 1.0 if size is None else float(size)
            with bar:
                task = bar.add_task("starting", total=total)
                yield lambda what, share: bar.update(
                    task, description=printable(what), completed=share * total
                )


def _line_by_line(console: Console) -> Report:
    begun = time.perf_counter()
    last = ""

    def report(what: str, share: float) -> None:
        nonlocal last
        if what != last:
            console.print(
                f"{time.perf_counter() - begun:6.1f} s {share:4.0%}  {printable(what)}",
                markup=False,
            )
            last = what

    return report


def _now_and_then(
    console: Console, size: int, clock: Callable[[], float] = time.perf_counter
) -> Report:
    """A line for each kind of work before the bytes ("kind: tensor"), else one a second at most."""
    begun = clock()
    first: tuple[float, float] | None = None  # when bytes began to be done, and the share then
    last, kind = -_EVERY, ""

    def report(what: str, share: float) -> None:
        nonlocal first, last, kind
        now = clock() - begun
        line = f"{now:6.1f} s {share:4.0%}  {readable(share * size)} of {readable(size)}"
        if share <= 0:
            if what.partition(":")[0] == kind and now - last < _EVERY:
                return
            kind = what.partition(":")[0]
        elif first is None:
            first = now, share
        elif now - last < _EVERY and share < 1:
            return
        if first is not None and share > first[1]:
            rate = (share - first[1]) * size / max(now - first[0], 1e-9)
            line += f", {readable(rate)} a second, {(1 - share) * size / rate:.0f} s left"
        console.print(f"{line}  {printable(what)}", markup=False)
        last = now

    return report


@contextmanager
def _warnings_as_lines(console: Console) -> Iterator[None]:
    def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        console.print(f"warning: {printable(str(message))}", markup=False)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
