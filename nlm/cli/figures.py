"""The figures of the report, each a small PNG: side by side on a desk, stacked on a phone."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, NullFormatter

from nlm.cli.results import SERIES, SETTINGS, Results, numbers_of_tasks, score

# Okabe-Ito colours, told apart by colour-blind readers; the correction is the line's style.
_COLOURS = {"local": "#555555", "nonlocal": "#D55E00", "permuted": "#0072B2"}
_SERIES_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#A67C00", "#56B4E9")
_EXPERT_COLOUR = "#555555"
_STYLES = {"plain": ":", "repair": "--", "tact": "-", "probe": "--", "probe_full": "-"}
_DRAWN = ("plain", "repair", "tact")
_STYLE_NAMES = {
    "plain": "plain",
    "repair": "REPAIR",
    "tact": "TACT",
    "probe": "probe, as many labels",
    "probe_full": "probe, all labels",
}
_DPI = 150
_NAMED_LAYERS = 8  # more are numbered

Draw = Callable[[Any], None]


def accuracy_by_tasks(results: Results, which: str, corrections: Sequence[str] = _DRAWN) -> Draw:
    """Normalised accuracy ("average" or "worst") against the number of tasks."""
    styles = {name: _STYLES[name] for name in corrections}

    def draw(axes: Any) -> None:
        for setting, colour in _COLOURS.items():
            for correction, style in styles.items():
                points = [
                    (tasks, scores[which])
                    for tasks in numbers_of_tasks(results)
                    if (scores := score(results, setting, tasks, correction)) is not None
                ]
                if points:
                    axes.plot(*zip(*points, strict=True), style, marker="o", ms=4, c=colour)
        axes.set_xticks(numbers_of_tasks(results))
        axes.set_ylim(0, 1.03)
        axes.set_xlabel("tasks")
        axes.set_ylabel(f"normalised accuracy, {which}")
        keys = [Line2D([], [], c=c, lw=3, label=SETTINGS[name]) for name, c in _COLOURS.items()]
        keys += [Line2D([], [], c="k", ls=ls, label=_STYLE_NAMES[k]) for k, ls in styles.items()]
        axes.legend(
            handles=keys, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2, fontsize=8
        )

    return draw


def by_layer(layers: Mapping[str, Any], quantity: str) -> Draw:
    """ "variance_ratio" (logarithmic, 1 is ideal) or "relative_distance" against depth."""
    points = layers["points"]

    def draw(axes: Any) -> None:
        _lines(axes, range(len(points)), layers[quantity])
        if len(points) <= _NAMED_LAYERS:
            names = [_plain(point.rpartition(".")[2]) for point in points]
            axes.set_xticks(range(len(points)), names)
        axes.set_xlabel("layer")
        if quantity == "variance_ratio":
            axes.axhline(1, color="#999999", lw=1, zorder=0)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}" if axes.get_ylim()[0] > 0.1 else NullFormatter())
            axes.set_ylabel("variance, merged over expert")
        else:
            axes.set_ylim(bottom=0)
            axes.set_ylabel("distance to the expert, relative")

    return draw


def curves(
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    across: str,
    up: str,
    bottom: float | None = None,
) -> Draw:
    """Some series over one axis, which is named ``across``."""

    def draw(axes: Any) -> None:
        _lines(axes, x, series)
        axes.set_ylim(bottom=bottom)
        if isinstance(x, range):
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.set_xlabel(across)
        axes.set_ylabel(up)

    return draw


def landscape(surface: Mapping[str, Any], quantity: str, span: tuple[float, float]) -> Draw:
    """A quantity on a plane of weights, in colours that go over ``span``, and where models lie."""
    low, high = span

    def draw(axes: Any) -> None:
        axes.grid(False)
        levels = np.linspace(low, high, 21)
        if not (np.diff(levels) > 0).all():  # all alike, or as near as numbers can be
            levels = low + (abs(low) or 1.0) * np.linspace(0, 1, 21)
        grid = surface["x"], surface["y"], surface["values"][quantity]
        filled = axes.contourf(*grid, levels=levels, cmap="viridis", extend="both")
        ticks = [t for t in MaxNLocator(6).tick_values(low, high) if low <= t <= high]
        axes.figure.colorbar(filled, ax=axes, ticks=ticks, extendfrac=0.02)
        top = 0.15 * surface["y"][0] + 0.85 * surface["y"][-1]
        left, right = np.quantile([surface["x"][0], surface["x"][-1]], (0.25, 0.75))
        for name, (x, y, _) in surface["models"].items():
            axes.plot(x, y, "o", ms=6, mfc="white", mec="black")
            side = "left" if x < left else "right" if x > right else "center"
            axes.annotate(
                _short(name), (x, y), (0, -15 if y > top or side == "right" else 7),
                textcoords="offset points", ha=side, fontsize=8,
                path_effects=[withStroke(linewidth=2, foreground="w")],
            )  # fmt: skip
        axes.set_xlabel("distance of weights")

    return draw


def scatter(places: Mapping[str, Sequence[Sequence[float]]]) -> Draw:
    """Samples as the models see them; the expert's are grey."""

    def draw(axes: Any) -> None:
        colours = cycle(_SERIES_COLOURS)
        for name, each in places.items():
            colour = _EXPERT_COLOUR if name == "expert" else next(colours)
            label = _short(SERIES.get(name, name))
            axes.scatter(*zip(*each, strict=True), s=9, c=colour, alpha=0.65, lw=0, label=label)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.02), ncol=len(places), fontsize=8,
            markerscale=2, frameon=False, handletextpad=0.2, columnspacing=1,
        )  # fmt: skip

    return draw


def uri(draw: Draw, height: float = 3.4) -> str:
    """A figure as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png([draw], height)).decode()


def png(
    draws: Sequence[Draw], height: float = 3.4, titles: Sequence[str] = (), dpi: int = _DPI
) -> bytes:
    """Figures side by side. Needs no display and leaves pyplot's global state alone."""
    figure = Figure(figsize=(4.8 * len(draws), height), dpi=dpi, layout="constrained")
    for number, draw in enumerate(draws):
        axes = figure.add_subplot(1, len(draws), number + 1)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        if titles:
            axes.set_title(titles[number], fontsize=10)
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data)
    return data.getvalue()


def _lines(axes: Any, x: Sequence[float], series: Mapping[str, Sequence[float]]) -> None:
    for (name, y), colour in zip(series.items(), cycle(_SERIES_COLOURS), strict=False):
        label = _plain(SERIES.get(name, name))
        axes.plot(list(x), y, marker="o", ms=4, c=colour, label=label)
    if len(series) > 1:
        axes.legend(fontsize=8)


def _short(text: str, most: int = 24) -> str:
    """A name that leaves room for the picture: of a long one the start and the end."""
    half = most // 2
    return _plain(
        text if len(text) <= most else f"{text[: half - 1]}\N{HORIZONTAL ELLIPSIS}{text[-half:]}"
    )


def _plain(text: str) -> str:
    """A text in which a dollar is a dollar: others begin a formula."""
    return text.replace("$", r"\$")
