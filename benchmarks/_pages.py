"""What the page makers have in common: means with their errors, tables, pictures."""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
COLOURS = 96  # of a picture's palette


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


def save(pictures: Mapping[str, bytes]) -> None:
    """Writes pictures, by file name, with few colours."""
    from PIL import Image

    for name, picture in pictures.items():
        image = Image.open(io.BytesIO(picture)).convert("RGB").quantize(COLOURS)
        image.save(PICTURES / name, optimize=True)
