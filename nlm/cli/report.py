"""``nlm report``: results as one page that needs nothing else."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nlm.checkpoint import atomic_path, refuse_existing
from nlm.checkpoint.texts import parse_json
from nlm.cli import figures
from nlm.cli.drawable import check_forms, check_parts
from nlm.cli.page import page
from nlm.cli.results import (
    CORRECTIONS,
    METHODS,
    SERIES,
    SETTINGS,
    Results,
    headline,
    numbers_of_tasks,
    score,
    sections,
    settings,
    shown_numbers_of_tasks,
)

_MARK = '<meta name="generator" content="nlm'
_HISTOGRAM = 200, 60  # width and height
_TITLE = "Experts of two foundation models, merged into one"
_ON_THE_PLANE = {
    "average": "average over both tasks",
    "worst": "the worse of both tasks",
}
_NEEDS = {
    ("tact", "repair"): "Corrections see unlabelled samples of each task.",
    ("probe", "probe_full"): "The linear probes train a new last layer on labelled ones.",
    ("plain",): "Merging scales are chosen after correction, on validation samples that no other "
    "number here has seen.",
    ("tact_lambda0",): "At λ = 0 only the average of the foundations is corrected.",
}


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; the first cell of a row is its name."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A picture as a data URI, what it shows, what to read from it, and its numbers."""

    title: str
    image: str
    caption: str
    numbers: Table | None = None


def report(file: Path, output: Path, force: bool) -> None:
    """Writes the page of a file of results; one that may not be written is refused first."""
    if output.resolve() == file.resolve():
        raise ValueError(
            f"nlm report: the input and the output are two files, got {str(file)!r} twice"
        )
    refuse_existing(output, force)
    html = render(read(file))
    with atomic_path(output, force) as temporary:
        temporary.write_text(html, encoding="utf-8")
    print(f"The page is {output}")


def read(file: Path) -> Results:
    """The results in a file: those parts that a page can show, in the form that it needs.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It holds something else, or nothing of what a page shows.
    """
    from pydantic import TypeAdapter

    from nlm._results import Report

    if not file.is_file():
        raise FileNotFoundError(f"nlm report: results are a file, got {str(file)!r}")
    try:
        found: Any = parse_json(file.read_text(encoding="utf-8"))
        check_parts(found)
        results = TypeAdapter(Report).validate_python(found)
        check_forms(results)
    except ValueError as error:  # what JSON, pydantic and texts raise
        told: Any = getattr(error, "errors", list)()
        at = f"{'.'.join(map(str, told[0]['loc']))}: {told[0]['msg']}" if told else str(error)
        raise ValueError(
            f"nlm report: results are the JSON of nlm.report, nlm demo or nlm align, got another "
            f"form in {str(file)!r} ({at})"
        ) from error
    if not results.keys() & {"settings", "layers", "barrier", "alignment", "landscapes"}:
        raise ValueError(
            f"nlm report: results have something to show, got "
            f"{', '.join(map(repr, found)) or 'nothing'} in {str(file)!r}"
        )
    return results


def render(results: Results) -> str:
    """The page as HTML. All text from the results is escaped.

    Parameters
    ----------
    results : what :func:`nlm.report.merge_report` or ``nlm.demo.experiment.run`` returns
    """
    there = {correction for section in sections(results) for correction in section}
    return page(
        "report.html.jinja",
        results=results,
        title=results.get("title", _TITLE),
        lead=results.get("lead") or headline(results),
        figures=list(_figures(results)),
        landscapes=list(_landscapes(results)),
        projections=list(_projections(results)),
        histograms=list(_histograms(results)),
        histogram_size=_HISTOGRAM,
        numbers=shown_numbers_of_tasks(results),
        settings=settings(results),
        corrections=CORRECTIONS,
        methods=METHODS,
        sections=sections(results),
        remarks=[words for names, words in _NEEDS.items() if there & set(names)],
        by_task=_by_task(results),
        score=score,
    )


def is_report(path: Path) -> bool:
    """Whether a file is a report that nlm wrote."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _MARK.encode() in file.read(1024)


def _by_task(results: Results) -> tuple[str, Table] | None:
    """The setting, and per task the accuracy of its expert and what is left of it.

    Of the aligned experts where these are a setting, and at the largest number of tasks.
    """
    order = [name for name in ("permuted", *settings(results)) if name in settings(results)]
    for setting in order[:1]:
        tasks = max(map(int, results["settings"][setting]))
        cells = results["settings"][setting][str(tasks)]
        columns = {
            name: cells[name]["tasks"]
            for section in sections(results)
            for name in section
            if "tasks" in cells.get(name, ())
        }
        if columns:
            experts = results.get("experts", {})
            header = ["task", "expert", *(CORRECTIONS.get(name, name) for name in columns)]
            rows = [
                [
                    task,
                    _decimal(experts.get(task)),
                    *(_decimal(c.get(task)) for c in columns.values()),
                ]
                for task in next(iter(columns.values()))
            ]
            return settings(results)[setting], Table(header, rows)
    return None


def _figures(results: Results) -> Iterator[Figure]:
    if len(numbers_of_tasks(results)) > 1 and set(settings(results)) & set(SETTINGS):
        for which, title, caption in (
            ("average", "Average over the tasks", "Accuracy of the merged model over that of each "
             "task's expert, averaged over the tasks."),
            ("worst", "The worst task", "The same for the task that loses most."),
        ):  # fmt: skip
            image = figures.uri(figures.accuracy_by_tasks(results, which), 4.3)
            yield Figure(title, image, caption, _scores(results, which))
    if "layers" in results:
        layers = results["layers"]
        for what, title, caption in (
            ("variance_ratio", "Variance by layer", "Variance of the merged activations over that "
             "of the expert's: where it falls with depth they collapse; 1 is ideal."),
            ("relative_distance", "Distance by layer", "How far the merged activations lie from "
             "the expert's, relative to the expert's."),
        ):  # fmt: skip
            numbers = _series("layer", layers["points"], layers[what])
            yield Figure(title, figures.uri(figures.by_layer(layers, what)), caption, numbers)
    if "barrier" in results:
        yield _barrier(results["barrier"])
    for method, found in results.get("alignment", {}).items():
        objective = found.get("objective", ())
        if len(objective) > 1:
            draw = figures.curves(
                range(len(objective)), {"objective": objective}, "sweep", "sum of similarities"
            )
            yield Figure(
                f"Objective against the sweep, by {METHODS.get(method, method)}",
                figures.uri(draw),
                "What the alignment maximises, after each sweep over the groups; it never falls.",
                _series("sweep", list(map(str, range(len(objective)))), {"objective": objective}),
            )


def _barrier(curve: Mapping[str, Any]) -> Figure:
    positions, losses = curve["lambda"], curve["loss"]
    draw = figures.curves(positions, losses, "share of the second model", "loss", bottom=0)
    each = [f"{value:.3g} {SERIES.get(name, name)}" for name, value in curve["barrier"].items()]
    return Figure(
        "Loss against the share of the second model",
        figures.uri(draw),
        "The loss on the line between the two models' weights; what it rises above the line of its "
        f"ends is the barrier: {', '.join(each)}.",
        _series("share", [f"{at:g}" for at in positions], losses),
    )


def _landscapes(results: Results) -> Iterator[Figure]:
    surfaces = results.get("landscapes", {})
    finite: dict[str, list[float]] = {}
    for surface in surfaces.values():
        for quantity, grid in surface["values"].items():
            every = [value for row in grid for value in row if math.isfinite(value)]
            finite.setdefault(quantity, []).extend(every)
    spans = {name: (min(v, default=0.0), max(v, default=1.0)) for name, v in finite.items()}
    for title, surface in surfaces.items():
        away = [
            f"{name} {models[2]:.3g}" for name, models in surface["models"].items() if models[2]
        ]
        off = f" Distance from the plane: {', '.join(away)}." if away else ""
        for quantity, grid in surface["values"].items():
            told = _ON_THE_PLANE.get(quantity, quantity)
            what = f"Accuracy over the expert's, {told}," if told != quantity else told.capitalize()
            rows = [
                [f"{y:.3g}", *map(_number, row)] for y, row in zip(surface["y"], grid, strict=True)
            ]
            yield Figure(
                f"{SERIES.get(title, title)}: {told}",
                figures.uri(figures.landscape(surface, quantity, spans[quantity]), 3.8),
                f"{what} over the plane, from {spans[quantity][0]:.3g} to "
                f"{spans[quantity][1]:.3g} in all pictures of it.{off}",
                Table(["y \\ x", *(f"{x:.3g}" for x in surface["x"])], rows),
            )


def _projections(results: Results) -> Iterator[Figure]:
    for title, places in results.get("projections", {}).items():
        samples = len(next(iter(places.values())))
        image = figures.uri(figures.scatter(places), 4.2)
        yield Figure(title, image, f"{samples} samples, each once for every model.")


def _histograms(results: Results) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Method -> its groups, each with the outline of its histogram."""
    for method, found in results.get("alignment", {}).items():
        groups = []
        for name, counts in found.get("histogram", {}).items():
            about = found.get("groups", {}).get(name, {})
            how = ", by weights" if name in found.get("by_weights", ()) else ""
            groups.append(
                {
                    "name": name,
                    "units": about.get("units", f"{sum(counts)} units"),
                    "origin": about.get("origin", ""),
                    "similarity": f"{found['correlation'][name]:.3f}{how}",
                    "path": _bars(counts),
                }
            )
        if groups:
            yield method, groups


def _bars(counts: Sequence[int]) -> str:
    """A histogram as the path of its outline."""
    width, height = _HISTOGRAM
    step, most = width / len(counts), max(*counts, 1)
    steps = "".join(f"V{height * (1 - n / most):.1f}h{step:.1f}" for n in counts)
    return f"M0 {height}{steps}V{height}z"


def _scores(results: Results, which: str) -> Table:
    """The numbers of a figure of accuracies."""
    rows = [
        [f"{words}, {CORRECTIONS.get(correction, correction)}"]
        + [_decimal((score(results, setting, tasks, correction) or {}).get(which))
           for tasks in numbers_of_tasks(results)]
        for setting, words in settings(results).items()
        for correction in ("plain", "repair", "tact")
    ]  # fmt: skip
    return Table(["tasks", *map(str, numbers_of_tasks(results))], rows)


def _series(across: str, names: Sequence[str], series: Mapping[str, Sequence[float]]) -> Table:
    """The numbers of curves: a row for each place on the axis."""
    rows = [
        [name, *(_number(values[number]) for values in series.values())]
        for number, name in enumerate(names)
    ]
    return Table([across, *(SERIES.get(name, name) for name in series)], rows)


def _number(value: float) -> str:
    return f"{value:.4g}"


def _decimal(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:.3f}"
