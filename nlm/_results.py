"""The form of results: plain numbers, as JSON holds them. Imports no torch.

Any part of a :class:`Report` may be missing. :mod:`nlm.report` measures one.
"""

from typing_extensions import NotRequired, TypedDict


class Cell(TypedDict):
    """Normalised accuracies: a merged model's over those of the experts."""

    average: float
    worst: float
    scale: NotRequired[float]
    tasks: NotRequired[dict[str, float]]


class Layers(TypedDict):
    """model -> what :func:`nlm.evaluate.layer_statistics` finds at each point, over all tasks."""

    points: list[str]
    variance_ratio: dict[str, list[float]]
    relative_distance: dict[str, list[float]]


Barrier = TypedDict(
    "Barrier",
    {"lambda": list[float], "loss": dict[str, list[float]], "barrier": dict[str, float]},
)
Barrier.__doc__ = "What was done before -> losses at the shares ``lambda``, and their barrier."


class Group(TypedDict):
    """What a group of units is, in words."""

    units: str
    origin: str


class Alignment(TypedDict):
    """An :class:`nlm.align.AlignmentReport`; ``groups`` says what its groups are."""

    method: NotRequired[str]
    correlation: dict[str, float]
    seconds: float
    objective: NotRequired[list[float]]
    histogram: NotRequired[dict[str, list[int]]]
    by_weights: NotRequired[list[str]]
    excluded: NotRequired[list[str]]
    groups: NotRequired[dict[str, Group]]


class Surface(TypedDict):
    """An :class:`nlm.evaluate.Landscape`."""

    x: list[float]
    y: list[float]
    values: dict[str, list[list[float]]]
    models: dict[str, tuple[float, float, float]]


class Report(TypedDict, total=False):
    """The parts of a report.

    title, lead, notes : what the page says first.
    seconds, seed : of the whole run.
    tasks : in the order in which they were merged.
    foundations, experts : accuracies.
    settings : setting -> number of tasks -> correction -> scores.
    layers, barrier, alignment : method -> how it went.
    landscapes, projections : title -> figure; a projection is model -> two numbers a sample.
    run : what was chosen. timings : seconds of each stage. versions : of packages.
    """

    title: str
    lead: str
    notes: list[str]
    seconds: float
    seed: int
    tasks: list[str]
    foundations: dict[str, float]
    experts: dict[str, float]
    settings: dict[str, dict[str, dict[str, Cell]]]
    layers: Layers
    barrier: Barrier
    alignment: dict[str, Alignment]
    landscapes: dict[str, Surface]
    projections: dict[str, dict[str, list[list[float]]]]
    run: dict[str, str | float]
    timings: dict[str, float]
    versions: dict[str, str]
