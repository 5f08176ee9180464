"""What the page makers have in common: means with their errors, tables, pictures."""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
COLOURS = 96  # of a picture's palette
COLOUR_OF = ("#0072B2", "#D55E00", "#555555", "#009E73", "#CC79A7", "#A67C00")
DOTS = ("o", "s", "D", "^", "v", "P")


def error(values: Sequence[float]) -> float:
    """The standard error of the mean; 0 of a single value."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard error."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {error(values):.{digits}f}"


def counted(things: Sequence[object], word: str) -> str:
    """So many of them, in words."""
    return f"{len(things)} {word}{'s' * (len(things) != 1)}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], names: int = 1) -> str:
    """Markdown; all columns but the first ones are numbers."""
    rule = "|---" * names + "|--:" * (len(header) - names) + "|"
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([f"| {' | '.join(header)} |", rule, *lines])


TRAINED = (
    "Seeds are fixed; networks are trained once and kept in nlm's cache folder under a hash of all "
    "that they depend on."
)


def again(*commands: str, closing: str = TRAINED) -> str:
    """How a page is made anew: its experiments, then its own maker; what is fixed and kept."""
    lines = "\n".join(f"python benchmarks/{command}" for command in commands)
    return f"## Again\n\n```sh\n{lines}\n```\n\n{closing}"


Panel = Mapping[str, Mapping[str, float]]  # series -> row -> value


def dots(panels: Mapping[str, Panel], across: str, limit: float | None = None) -> bytes:
    """A picture with a line for each row and a dot for each series, panels side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    every = [panel for panel in panels.values()]
    names = list(dict.fromkeys(row for panel in every for found in panel.values() for row in found))
    series = list(dict.fromkeys(name for panel in every for name in panel))
    width = 3.2 + 2.4 * len(panels)
    figure = Figure(figsize=(width, 1.1 + 0.24 * len(names)), dpi=80, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, panel) in zip(axes, panels.items(), strict=True):
        for number, name in enumerate(series):
            rows = [row for row in names if row in panel.get(name, ())]
            axis.plot(
                [panel[name][row] for row in rows], [names.index(row) for row in rows],
                DOTS[number % len(DOTS)], ms=6, c=COLOUR_OF[number % len(COLOUR_OF)], alpha=0.85,
                label=name,
            )  # fmt: skip
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xlim(0 if limit else None, limit)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(across)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data)
    return data.getvalue()


def save(pictures: Mapping[str, bytes]) -> None:
    """Writes pictures, by file name, with few colours."""
    from PIL import Image

    for name, picture in pictures.items():
        image = Image.open(io.BytesIO(picture)).convert("RGB").quantize(COLOURS)
        image.save(PICTURES / name, optimize=True)
