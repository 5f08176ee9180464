"""``report.html``: one file that needs nothing else, from the results of the demo."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nlm.cli.figures import accuracy_by_tasks, barrier, by_layer
from nlm.cli.page import page
from nlm.cli.results import (
    CORRECTIONS,
    SECTIONS,
    SETTINGS,
    Results,
    headline,
    score,
    shown_numbers_of_tasks,
)

_MARK = '<meta name="generator" content="nlm'


@dataclass(frozen=True)
class Figure:
    """A picture as a data URI, what it shows, and what to read from it."""

    title: str
    image: str
    caption: str


def render(results: Results) -> str:
    """The report as HTML. All text from the results is escaped.

    Parameters
    ----------
    results : what ``nlm.demo.experiment.run`` returns, or the file that ``nlm demo --json`` wrote
    """
    return page(
        "report.html.jinja",
        results=results,
        headline=headline(results),
        figures=list(_figures(results)),
        numbers=shown_numbers_of_tasks(results),
        settings={name: words for name, words in SETTINGS.items() if name in results["settings"]},
        corrections=CORRECTIONS,
        sections=SECTIONS,
        score=score,
    )


def is_report(path: Path) -> bool:
    """Whether a file is a report that nlm wrote."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _MARK.encode() in file.read(1024)


def _figures(results: Results) -> Iterator[Figure]:
    yield Figure(
        "Average over the tasks",
        accuracy_by_tasks(results, "average"),
        "Accuracy of the merged model over that of each task's expert, averaged over the tasks.",
    )
    yield Figure(
        "The worst task",
        accuracy_by_tasks(results, "worst"),
        "The same for the task that loses most.",
    )
    if "layers" in results:
        yield Figure(
            "Variance by layer",
            by_layer(results, "variance_ratio"),
            "Merged activations lose variance with depth; TACT restores each layer's to 1.",
        )
        yield Figure(
            "Distance by layer",
            by_layer(results, "relative_distance"),
            "How far the merged activations lie from the expert's, relative to the expert's.",
        )
    if "barrier" in results:
        yield Figure(
            "Loss between the foundations",
            barrier(results),
            "Pre-training loss on the line between the foundations: alignment lowers the barrier.",
        )
