"""The figures of the report, each a small PNG: side by side on a desk, stacked on a phone."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nlm.cli.results import SETTINGS, Results, numbers_of_tasks, score

# Okabe-Ito colours, told apart by colour-blind readers; the correction is the line's style.
_COLOURS = {"local": "#555555", "nonlocal": "#D55E00", "permuted": "#0072B2"}
_SERIES_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")
_STYLES = {"plain": ":", "repair": "--", "tact": "-"}
_STYLE_NAMES = {"plain": "plain", "repair": "REPAIR", "tact": "TACT"}
_SERIES_NAMES = {
    "nonlocal": "not aligned",
    "permuted": "aligned",
    "permuted + TACT": "aligned + TACT",
    "unaligned": "not aligned",
    "weights": "weight matching",
    "activations": "activation matching",
}
_DPI = 150


def accuracy_by_tasks(results: Results, which: str) -> str:
    """Normalised accuracy ("average" or "worst") against the number of tasks."""

    def draw(axes: Any) -> None:
        for setting, colour in _COLOURS.items():
            for correction, style in _STYLES.items():
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
        keys += [Line2D([], [], c="k", ls=ls, label=_STYLE_NAMES[k]) for k, ls in _STYLES.items()]
        axes.legend(
            handles=keys, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2, fontsize=8
        )

    return _png(draw, height=4.3)


def by_layer(results: Results, quantity: str) -> str:
    """ "variance_ratio" (logarithmic, 1 is ideal) or "relative_distance" against depth."""
    points = results["layers"]["points"]

    def draw(axes: Any) -> None:
        _lines(axes, range(len(points)), results["layers"][quantity])
        axes.set_xticks(range(len(points)), [point.rpartition(".")[2] for point in points])
        axes.set_xlabel("layer")
        if quantity == "variance_ratio":
            axes.axhline(1, color="#999999", lw=1, zorder=0)
            axes.set_yscale("log")
            axes.set_ylabel("variance, merged over expert")
        else:
            axes.set_ylim(bottom=0)
            axes.set_ylabel("distance to the expert, relative")

    return _png(draw)


def barrier(results: Results) -> str:
    """The pre-training loss on the line between the two foundations."""
    curve = results["barrier"]
    words = "share of the second foundation", "pre-training loss"
    return curves(curve["lambda"], curve["loss"], *words, bottom=0)


def curves(
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    across: str,
    up: str,
    bottom: float | None = None,
) -> str:
    """Some series over one axis, which is named ``across``."""

    def draw(axes: Any) -> None:
        _lines(axes, x, series)
        axes.set_ylim(bottom=bottom)
        axes.set_xlabel(across)
        axes.set_ylabel(up)

    return _png(draw)


def _lines(axes: Any, x: Sequence[float], series: Mapping[str, Sequence[float]]) -> None:
    for (name, y), colour in zip(series.items(), _SERIES_COLOURS, strict=False):
        axes.plot(list(x), y, marker="o", ms=4, c=colour, label=_SERIES_NAMES.get(name, name))
    axes.legend(fontsize=8)


def _png(draw: Callable[[Any], None], height: float = 3.4) -> str:
    """A figure as a data URI. Needs no display and leaves pyplot's global state alone."""
    figure = Figure(figsize=(4.8, height), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
