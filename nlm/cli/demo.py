"""``nlm demo``: run the experiment, print its table, write its files."""

import json
import os
from pathlib import Path

from rich.console import Console

from nlm.checkpoint import atomic_path, refuse_existing
from nlm.cli.progress import progress_bar
from nlm.cli.report import is_report, render
from nlm.cli.results import headline
from nlm.cli.tables import tables

_DEFAULT_REPORT = Path("report.html")
_LEGEND = (
    "All at once: statistics of all layers before any is corrected. λ = 0: no task vectors, the\n"
    "average of the foundations is corrected. Probe: a new last layer, from labelled images: as\n"
    "many as TACT sees without labels, or all of them.\n"
)


def demo(
    seed: int,
    tasks: int,
    json_file: Path | None,
    report_file: Path | None,
    force: bool,
    quiet: bool,
) -> None:
    """Run the demo. Files that may not be written are refused before the work starts.

    Without ``report_file`` the report is ``report.html`` in the current folder; one that an earlier
    run left there is replaced, any other file of that name is kept.
    """
    report = report_file or _DEFAULT_REPORT
    replace = force or (report_file is None and is_report(report))
    _refuse(report, replace)
    if json_file is not None:
        _refuse(json_file, force)
        if json_file.resolve() == report.resolve():
            raise ValueError(
                f"nlm demo: --json and --report must be two files, got {str(report)!r} twice"
            )

    with progress_bar(quiet) as progress:
        from nlm.demo.experiment import run

        results = run(seed=seed, tasks=tasks, progress=progress)
    console = Console(highlight=False, soft_wrap=True)
    for table in tables(results):
        console.print(table)
    console.print(_LEGEND, style="dim")
    console.print(headline(results), markup=False)
    if json_file is not None:
        _write(json_file, json.dumps(results, indent=2) + "\n", force)
    _write(report, render(results), replace)
    console.print(f"{results['seconds']:.0f} s; the report is {report}", markup=False)


def _refuse(path: Path, force: bool) -> None:
    refuse_existing(path, force)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(
            f"nlm: the folder of an output file must be writable, got {str(path.parent)!r}"
        )


def _write(path: Path, text: str, force: bool) -> None:
    with atomic_path(path, force) as temporary:
        temporary.write_text(text, encoding="utf-8")
