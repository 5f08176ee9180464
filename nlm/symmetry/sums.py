"""Axes as stretches one after the other: what slices, splits and concatenations make of them.

A slice of a dimension cuts its leading atom into a sum. The other leaves of the tensor that stand
nowhere without that atom may be different ones in every stretch (the heads of q, k and v): they
become families over the sum, and a stretch has the member.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from nlm.symmetry.atoms import (
    Atom,
    Axis,
    choose,
    compound,
    compounds,
    find,
    find_selector,
    fixed,
    is_pinned,
    is_wild,
    leaves,
    mark_read,
    mentions,
    pin,
    resolve,
    same,
    size_of,
    wild,
)

Together = Callable[[Iterable[Atom], Atom], list[Atom]]

MOST_PARTS = 256  # of a grid that is read row by row


def cut(axis: Sequence[Atom], sizes: list[int]) -> list[Axis]:
    """An axis as stretches of the given sizes, one after the other."""
    axis = resolve(axis)
    if len(sizes) == 1:
        return [axis]
    if is_pinned(axis) and not axis[0].families:
        return [fixed(size, _reason(axis, "cut")) for size in sizes]
    if is_wild(axis):
        return [wild(size) for size in sizes]
    lead, inner = axis[0], axis[1:]
    if units := cut_lead(lead, size_of(inner), sizes):
        return [
            [*taken, *restrict(inner, lead, span, taken)] for span, taken in _spans(lead, units)
        ]
    if inner and lead.size <= MOST_PARTS:  # boundaries inside a row
        rows = segments(axis)
        ends = sorted({*ends_of(rows), *itertools.accumulate(sizes)})
        pieces = iter(cut_parts(rows, ends))
        return [_joined(pieces, size) for size in sizes]
    pin(axis, "cut inside a row")
    return [fixed(size, "cut inside a row") for size in sizes]


def cut_lead(lead: Atom, inner: int, sizes: list[int]) -> list[int]:
    """Makes a sum of a leading atom with boundaries at the given sizes; in units of the atom.

    An empty list where a boundary falls inside a row.
    """
    if any(size % inner for size in sizes):
        return []
    units = [size // inner for size in sizes]
    if lead.kind == "leaf":
        parts = [
            [Atom(unit, lead.pinned, lead.wild, read=False)] if unit != 1 else [] for unit in units
        ]
        if lead.read:
            for part in parts:
                mark_read(part)
        lead.become("sum", parts)
    elif lead.kind == "sum":
        ends = sorted({*ends_of(lead.parts), *itertools.accumulate(units)})
        refine(lead, [end - start for start, end in itertools.pairwise([0, *ends])])
    return units


def _spans(lead: Atom, units: list[int]) -> Iterator[tuple[range | None, Axis]]:
    """For each stretch of a cut atom the numbers of its parts and the axis that it is."""
    if lead.kind == "family":
        columns = zip(*(cut(part, units) for part in lead.parts), strict=True)
        for unit, column in zip(units, columns, strict=True):
            yield None, [compound("family", list(column), unit, lead.selector)]
        return
    start = 0
    for unit in units:
        stop = start
        while sum(size_of(part) for part in lead.parts[start:stop]) < unit:
            stop += 1
        part = lead.parts[start:stop]
        yield range(start, stop), part[0] if len(part) == 1 else [compound("sum", part, unit)]
        start = stop


def restrict(axis: Sequence[Atom], lead: Atom, span: range | None, taken: Axis) -> Axis:
    """An axis where only some parts of a selector are left: families over it become theirs."""
    if span is None:
        return list(axis)
    if len(span) == 1:
        return choose(axis, lead, span[0])
    [narrow] = taken
    found: Axis = []
    for atom in resolve(axis):
        if atom.kind == "family" and find_selector(atom) is lead:
            parts = [atom.parts[number] for number in span]
            found.append(compound("family", parts, atom.size, narrow))
        elif atom.kind == "sum" and mentions(atom, lead):
            parts = [restrict(part, lead, span, taken) for part in atom.parts]
            found.append(compound("sum", parts, atom.size))
        else:
            found.append(atom)
    return found


def segments(axis: Axis) -> list[Axis]:
    """A grid as its rows; the order of the rows is pinned."""
    lead, inner = axis[0], axis[1:]
    if lead.kind == "leaf":
        lead.pinned = lead.pinned or "rows of a grid"
        return [resolve(inner)] * lead.size
    if lead.kind == "family":
        pin(axis, "grids that do not fit")
        return [fixed(size_of(inner), "grids that do not fit")] * lead.size
    return [[*part, *choose(inner, lead, number)] for number, part in enumerate(lead.parts)]


def refine(atom: Atom, sizes: list[int]) -> None:
    """Cuts the parts of a sum further; its own boundaries are among those of ``sizes``."""
    remaining = iter(sizes)
    cut_parts: list[Axis] = []
    origin: list[int] = []
    for number, part in enumerate(list(atom.parts)):
        wanted: list[int] = []
        while sum(wanted) < size_of(part):
            wanted.append(next(remaining))
        for piece in cut(part, wanted):
            cut_parts.append(piece)
            origin.append(number)
    for family in atom.families:
        family = find(family)
        if family.kind == "family" and find_selector(family) is atom:
            family.parts = [family.parts[number] for number in origin]
    atom.parts = cut_parts


def ends_of(parts: list[Axis]) -> list[int]:
    return list(itertools.accumulate(map(size_of, parts)))


def cut_parts(parts: list[Axis], ends: list[int]) -> list[Axis]:
    pieces: list[Axis] = []
    start = 0
    for part in parts:
        stop = start + size_of(part)
        inside = [end for end in ends if start < end <= stop]
        pieces += cut(part, [b - a for a, b in itertools.pairwise([start, *inside])])
        start = stop
    return pieces


def _joined(pieces: Iterator[Axis], size: int) -> Axis:
    taken: list[Axis] = []
    while sum(map(size_of, taken)) < size:
        taken.append(next(pieces))
    return taken[0] if len(taken) == 1 else [compound("sum", taken, size)]


# --- whole tensors --------------------------------------------------------------------------------


def pieces(
    axes: Sequence[Axis], dim: int, sizes: list[int], together: Together
) -> list[list[Axis]]:
    """A tensor as stretches along one dimension: the axes of each.

    ``together(candidates, lead)`` says which leaves stand in no tensor without the atom that is
    cut. Such a leaf may be another one in every stretch: it becomes a family.
    """
    axis = resolve(axes[dim])
    lead = axis[0] if axis else Atom(1)
    usable = lead.kind == "sum" or not (lead.kind == "family" or lead.pinned or lead.wild)
    usable = usable and len(sizes) > 1 and not (is_pinned(axis) and not lead.families)
    units = cut_lead(lead, size_of(axis[1:]), sizes) if usable else []
    if not units:
        return [[*axes[:dim], piece, *axes[dim + 1 :]] for piece in cut(axis, sizes)]
    couple(axes, lead, together)
    found: list[list[Axis]] = []
    for span, taken in _spans(lead, units):
        rest = [restrict(other, lead, span, taken) for other in axes]
        rest[dim] = [*taken, *restrict(axis[1:], lead, span, taken)]
        found.append(rest)
    return found


def couple(axes: Sequence[Axis], lead: Atom, together: Together) -> None:
    """Makes families over a sum of the leaves that stand nowhere without it."""
    if len(lead.parts) > MOST_PARTS:
        return
    told = set(leaves([lead]))  # by the part of the sum in which they stand
    for family in (each for axis in axes for each in compounds(axis)):
        if family.kind == "family" and find_selector(family) is lead:
            met = Counter(leaf for part in family.parts for leaf in set(leaves(part)))
            told |= {leaf for leaf, times in met.items() if times == 1}
    candidates = {
        leaf: None
        for axis in axes
        for leaf in leaves(axis)
        if not leaf.pinned and not leaf.wild and leaf not in told
    }
    for leaf in together(candidates, lead):
        members = [[Atom(leaf.size, read=leaf.read)] for _ in lead.parts]
        leaf.become("family", members, lead)


def concatenate(axes: Sequence[Axis]) -> Axis:
    """Axes one after the other."""
    parts: list[Axis] = [resolve(axis) for axis in axes]
    size = sum(map(size_of, parts))
    if len(parts) == 1:
        return parts[0]
    if all(is_pinned(part) or is_wild(part) for part in parts):
        return fixed(size, _reason([atom for part in parts for atom in part], "filled"))
    return [compound("sum", parts, size)]


def _reason(axis: Axis, otherwise: str) -> str:
    return next((leaf.pinned for leaf in leaves(axis) if leaf.pinned), otherwise)


def stack(tensors: Sequence[Sequence[Axis]]) -> tuple[Axis, list[Axis]]:
    """The new dimension of stacked tensors, and the others: families where they differ."""
    lead = compound("sum", [[] for _ in tensors], len(tensors))
    axes: list[Axis] = []
    for column in zip(*tensors, strict=True):
        parts = [resolve(axis) for axis in column]
        if len(parts) == 1 or all(same(parts[0], part) for part in parts[1:]):
            axes.append(parts[0])
        else:
            axes.append([compound("family", parts, size_of(parts[0]), lead)])
    return [lead], axes
