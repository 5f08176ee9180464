"""A specification as tables in the terminal and as a page with its figure."""

from collections.abc import Iterator

from markupsafe import Markup
from rich import box
from rich.table import Table

from nlm.checkpoint.names import printable
from nlm.cli.page import page
from nlm.cli.spec_figure import figure
from nlm.cli.spec_layers import Shown, shown
from nlm.symmetry import PermutationSpec
from nlm.symmetry.permutation import index_shape
from nlm.symmetry.text import counted, headline


def proof(spec: PermutationSpec) -> str:
    """Whether and how the specification is proven, as a sentence."""
    found = spec.verified
    if found is None or not spec.proven:
        return "Not verified."
    control = "" if found.control is None else f", {found.control:.1e} where a symmetry is broken"
    shapes = f" on {found.shapes} shapes of inputs" if found.shapes > 1 else ""
    dtype = printable(found.dtype)
    return f"Verified in {dtype}{shapes}: outputs change by {found.max_error:.1e}{control}."


def tables(spec: PermutationSpec, fold: bool) -> list[Table]:
    """The groups, the layouts, and what stays in order; layers that are alike once if ``fold``."""
    view = shown(spec, fold)
    made = [
        _table(("group", "units", "for each of", "permutations", "found at"), _groups(spec, view)),
        _table(("entry", "one layout per dimension"), _entries(view)),
    ]
    if notes := list(_notes(spec)):
        made.append(_table(("stays in order", "why"), notes))
    return made


def render(spec: PermutationSpec, name: str, fold: bool = True) -> str:
    """The page as HTML. All text from the specification is escaped."""
    view = shown(spec, fold)
    return page(
        "spec.html.jinja",
        name=name,
        headline=headline(spec),
        proof=proof(spec),
        outputs=spec.outputs,
        figure=Markup(figure(view)),
        groups=list(_groups(spec, view)),
        entries=list(_entries(view)),
        notes=list(_notes(spec)),
    )


def _table(columns: tuple[str, ...], rows: Iterator[tuple[str, ...]] | list) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        right = column in {"units", "permutations"}
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    return table


def _groups(spec: PermutationSpec, view: Shown) -> Iterator[tuple[str, ...]]:
    for group in view.groups:
        times = view.times[group.id]
        copies = 1
        for size in index_shape(spec.groups, group.id)[:-1]:
            copies *= size
        yield (
            group.id + (f" ({times}x)" if times > 1 else ""),
            str(group.size),
            " x ".join(group.parents),
            "fixed" if group.fixed else str(copies * times),
            group.origin,
        )


def _entries(view: Shown) -> Iterator[tuple[str, str]]:
    for entry in view.entries:
        yield entry.title, f"[{', '.join(map(str, entry.layouts))}]"


def _notes(spec: PermutationSpec) -> Iterator[tuple[str, str]]:
    """The unknown operations and the reasons for pins, those that are alike counted."""
    for operation, count in spec.opaque_ops.items():
        yield operation, f"not known, {counted(count, 'time')}: what it touches is pinned"
    reasons: dict[str, list[str]] = {}
    for what, why in spec.pinned.items():
        reasons.setdefault(why, []).append(what)
    for why, places in reasons.items():
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        yield f"{places[0]}{more}", why
