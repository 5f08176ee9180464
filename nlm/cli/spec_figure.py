"""A specification drawn: a row for each group, a column for each module, as SVG.

A cell is filled where a group stands on an entry of the module: its upper left half where it is on
the first dimension (a weight's outputs, a bias), its lower right half on a later one (a weight's
inputs). Groups inside other groups are indented below them; layers that are alike are drawn once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape

from nlm.cli.spec_layers import Entry, Run, Shown
from nlm.symmetry import AxisGroup
from nlm.symmetry.layout import references

_CELL = 20
_INDENT = 14
_LETTER = 6.2  # width of a letter at 11 px, on average
_LONGEST = 32  # letters of a module's name
# Okabe-Ito colours, told apart by colour-blind readers; groups inside a group have its colour.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#A67C00", "#56B4E9", "#555555")


@dataclass
class _Column:
    """A module and the entries of the state dict that belong to it."""

    module: str
    runs: tuple[Run, ...]
    entries: list[Entry] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The module's name inside its innermost run of layers."""
        name = self.module
        if self.runs:
            name = name[len(f"{self.runs[-1].prefix}.{self.runs[-1].first}.") :] or name
        return _shortened(name, _LONGEST)


def figure(shown: Shown) -> str:
    """The picture as one ``<svg>`` element."""
    columns = _columns(shown.entries)
    rows = list(_rows(shown))
    colours = _colours(shown.groups)
    slant = _LETTER * max((len(column.label) for column in columns), default=0)
    left = 12 + max((_INDENT * depth + _LETTER * len(label) for _, depth, label in rows), default=0)
    top = 18 + 0.84 * slant
    right, bottom = left + _CELL * len(columns), top + _CELL * len(rows)
    levels = max((len(column.runs) for column in columns), default=0)
    width, height = right + 0.57 * slant + 8, bottom + 8 + 20 * levels
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" role="img" font-size="11" fill="#1d2430" '
        f'font-family="system-ui, -apple-system, Segoe UI, Roboto, sans-serif">',
        f"<title>{len(rows)} groups over {len(columns)} modules</title>",
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#fff"/>',
        f'<path d="{_grid(left, top, len(columns), len(rows))}" stroke="#e6e9ed"/>',
    ]
    for number, column in enumerate(columns):
        x = left + _CELL * (number + 0.5)
        parts.append(
            f'<text transform="translate({x + 3:.0f} {top - 5:.0f}) rotate(-55)">'
            f"<title>{escape(column.module)}</title>{escape(column.label)}</text>"
        )
    for row, (group, indent, label) in enumerate(rows):
        y = top + _CELL * row
        parts.append(
            f'<text x="{4 + _INDENT * indent}" y="{y + 14:.0f}">'
            f"<title>{escape(group.origin)}</title>{escape(label)}</text>"
        )
        for number, column in enumerate(columns):
            parts += _cell(group, column, left + _CELL * number, y, colours[group.id])
    parts += _brackets(columns, left, bottom + 8, levels, width)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _columns(entries: list[Entry]) -> list[_Column]:
    """The modules in order; those without any group, too, have a column."""
    columns: dict[str, _Column] = {}
    for entry in entries:
        module = entry.name.rpartition(".")[0] or entry.name
        columns.setdefault(module, _Column(module, entry.runs)).entries.append(entry)
    return list(columns.values())


def _rows(shown: Shown) -> Iterator[tuple[AxisGroup, int, str]]:
    """The groups, each below the last of its parents, with its depth and its label."""
    known = {group.id for group in shown.groups}

    def below(parent: str | None, depth: int) -> Iterator[tuple[AxisGroup, int, str]]:
        for group in shown.groups:
            above = group.parents[-1] if group.parents and group.parents[-1] in known else None
            if above == parent:
                times = f", {shown.times[group.id]}x" if shown.times[group.id] > 1 else ""
                fixed = ", fixed" if group.fixed else ""
                yield group, depth, f"{group.id}: {group.size} units{fixed}{times}"
                yield from below(group.id, depth + 1)

    return below(None, 0)


def _colours(groups: list[AxisGroup]) -> dict[str, str]:
    """A colour for each group without parents, which those inside it share."""
    roots = {group.id: group.parents[0] if group.parents else group.id for group in groups}
    order = {root: number for number, root in enumerate(dict.fromkeys(roots.values()))}
    return {group: _COLOURS[order[root] % len(_COLOURS)] for group, root in roots.items()}


def _cell(group: AxisGroup, column: _Column, x: float, y: float, colour: str) -> Iterator[str]:
    """The triangles of a group on a module's entries, with the layouts for who points at them."""
    places = [
        (entry, dim)
        for entry in column.entries
        for dim, layout in enumerate(entry.layouts)
        if any(ref.group == group.id for ref in references(layout))
    ]
    if not places:
        return
    told = dict.fromkeys(
        f"{entry.name} [{', '.join(map(str, entry.layouts))}]" for entry, _ in places
    )
    near, far = 2, _CELL - 2
    path = ""
    if any(dim == 0 for _, dim in places):
        path += f"M{x + near:.0f} {y + near:.0f}h{far - near}l{near - far} {far - near}z"
    if any(dim > 0 for _, dim in places):
        path += f"M{x + far:.0f} {y + far:.0f}h{near - far}l{far - near} {near - far}z"
    style = f'fill="none" stroke="{colour}"' if group.fixed else f'fill="{colour}"'
    yield f'<path d="{path}" {style}><title>{escape(chr(10).join(told))}</title></path>'


def _grid(left: float, top: float, columns: int, rows: int) -> str:
    across = (f"M{left:.0f} {top + _CELL * row:.0f}h{_CELL * columns}" for row in range(rows + 1))
    down = (f"M{left + _CELL * n:.0f} {top:.0f}v{_CELL * rows}" for n in range(columns + 1))
    return "".join((*across, *down))


def _brackets(
    columns: list[_Column], left: float, y: float, levels: int, width: float
) -> Iterator[str]:
    """Below the columns of each run of layers a bracket with its name and length."""
    for level in range(levels):
        spans: dict[Run, list[int]] = {}
        for number, column in enumerate(columns):
            if len(column.runs) > level:
                spans.setdefault(column.runs[-1 - level], []).append(number)
        starts = [left + _CELL * numbers[0] + 2 for numbers in spans.values()]
        for (run, numbers), x, end in zip(spans.items(), starts, [*starts[1:], width], strict=True):
            length = _CELL * len(numbers) - 4
            name = f"{run}, {run.times}x"
            label = _shortened(name, max(int((end - x) / _LETTER) - 1, 3))
            yield (
                f'<path d="M{x:.0f} {y + 20 * level:.0f}v4h{length}v-4" fill="none" '
                f'stroke="#5b6472"/><text x="{x:.0f}" y="{y + 20 * level + 16:.0f}" '
                f'fill="#5b6472"><title>{escape(name)}</title>{escape(label)}</text>'
            )


def _shortened(text: str, most: int) -> str:
    """A text that keeps its end."""
    return text if len(text) <= most else f"…{text[1 - most :].lstrip('.')}"
