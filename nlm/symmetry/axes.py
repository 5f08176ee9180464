"""The algebra of axes: making two axes one, reading them in another shape, broadcasting.

What is known of an axis is written in :mod:`nlm.symmetry.atoms`.
"""

import itertools
import math
from collections.abc import Sequence

from nlm.symmetry.atoms import (
    Atom,
    Axis,
    compound,
    find,
    find_selector,
    fixed,
    is_pinned,
    is_wild,
    leaves,
    mark_read,
    pin,
    resolve,
    size_of,
    sizes_of,
)
from nlm.symmetry.sums import MOST_PARTS, cut_parts, ends_of, refine, segments


def unify(x: Sequence[Atom], y: Sequence[Atom], nested: bool = False) -> None:
    """Makes two axes of one size the same; what cannot be made the same is pinned.

    Wild leaves are left alone, but for those inside sums and families (``nested``): these take the
    place of what they meet.
    """
    while True:
        x, y = resolve(x), resolve(y)
        if not x or not y:
            return
        a, b = x[0], y[0]
        if a.size == b.size:
            _unify_atoms(a, b, nested)
            x, y = x[1:], y[1:]
            continue
        if a.size > b.size:
            x, y, a, b = y, x, b, a
        if b.size % a.size == 0 and _split(b, a.size, b.size // a.size):
            continue
        _unify_misaligned(x, y)
        return


def _unify_atoms(a: Atom, b: Atom, nested: bool) -> None:
    if a is b or (not nested and (a.wild or b.wild)):
        return
    if is_pinned([a]) and is_pinned([b]):
        return  # in order both, and still two: one may have been turned round on its way here
    if b.kind == "leaf" and (a.kind != "leaf" or b.wild):
        a, b = b, a
    if a.kind == "leaf":
        if any(leaf is a for leaf in leaves([b])):
            if b.kind == "family":
                collapse(b)
            else:
                pin([b], "part of itself")
            return
        if a.pinned:
            pin([b], a.pinned)
        if a.read:
            mark_read([b])
        a.forward = b
    elif a.kind == "sum" and b.kind == "sum":
        _align(a, b)
        _unify_parts(a, b)
        a, b = find(a), find(b)
        if a is not b and a.kind == b.kind == "sum":
            _align(a, b)
            a.forward = b
            b.families += a.families
    elif a.kind == b.kind and find_selector(a) is find_selector(b):
        _unify_parts(a, b)
        a, b = find(a), find(b)
        if a is not b and a.kind == b.kind == "family":
            a.forward = b
    else:
        for atom in (a, b):
            if atom.kind == "family":
                collapse(atom)
        unify([a], [b], nested)


def _unify_parts(a: Atom, b: Atom) -> None:
    for p, q in list(zip(a.parts, b.parts, strict=True)):
        unify(p, q, nested=True)


def collapse(family: Atom) -> None:
    """Gives up a family: all its members become the same."""
    family = find(family)
    if family.kind != "family":
        return
    parts = family.parts
    family.become("product", [parts[0]])
    for part in parts[1:]:
        unify(parts[0], part, nested=True)


def _align(a: Atom, b: Atom) -> None:
    """Gives two sums the same boundaries."""
    ends = sorted({*ends_of(a.parts), *ends_of(b.parts)})
    sizes = [end - start for start, end in itertools.pairwise([0, *ends])]
    for atom in (a, b):
        refine(atom, sizes)


def _unify_misaligned(x: Axis, y: Axis) -> None:
    """Grids that do not fit (4 x 6 and 3 x 8): the stretches between their common boundaries."""
    if all(axis[0].kind == "sum" or axis[0].size <= MOST_PARTS for axis in (x, y)):
        p, q = (segments(axis) for axis in (x, y))
        ends = sorted({*ends_of(p), *ends_of(q)})
        p, q = (cut_parts(parts, ends) for parts in (p, q))
        for one, other in zip(p, q, strict=True):
            unify(one, other, nested=True)
    else:
        pin(x, "grids that do not fit")
        pin(y, "grids that do not fit")


# --- products -------------------------------------------------------------------------------------


def _split(atom: Atom, outer: int, inner: int) -> bool:
    """Refines an atom into outer x inner positions; whether it could be."""
    if atom.kind == "leaf":
        pair = [
            Atom(outer, atom.pinned, atom.wild, atom.read),
            Atom(inner, atom.pinned, atom.wild, atom.read),
        ]
        atom.become("product", [pair])
        return True
    if atom.kind == "sum" and any(size_of(part) % inner for part in atom.parts):
        return False
    sides: list[tuple[Axis, Axis]] = []
    for part in atom.parts:
        cells = regroup(resolve(part), [size_of(part) // inner, inner])
        if cells is None:
            return False
        sides.append((cells[0], cells[1]))
    outers, inners = ([side[k] for side in sides] for k in (0, 1))
    if atom.kind == "family":
        selector = atom.selector
        first = compound("family", outers, outer, selector)
    else:
        selector = first = compound("sum", outers, outer)
        for family in atom.families:
            family = find(family)
            if family.kind == "family" and find_selector(family) is atom:
                family.selector = first
                first.families.append(family)
    atom.become("product", [[first, compound("family", inners, inner, selector)]])
    return True


def regroup(atoms: Axis, sizes: list[int]) -> list[Axis] | None:
    """The row-major atoms of one axis as several axes; None where a boundary cannot be made."""
    remaining = list(atoms)
    found: list[Axis] = []
    for size in sizes:
        taken: Axis = []
        missing = size
        while missing > 1:
            remaining = resolve(remaining)
            atom = remaining[0]
            if missing % atom.size == 0:
                taken.append(atom)
                missing //= atom.size
                remaining = remaining[1:]
            elif atom.size % missing or not _split(atom, missing, atom.size // missing):
                return None
        found.append(taken)
    return found


def view(axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis]:
    """The axes of a tensor that is read in another shape.

    Only the smallest stretches of dimensions with equal products have to do with one another; one
    that cannot be followed is pinned.
    """
    atoms = [atom for axis in axes for atom in resolve(axis)]
    found: list[Axis] = []
    sizes = list(shape)
    while sizes:
        if sizes[0] == 1:
            found.append([])
            sizes.pop(0)
            continue
        old, new = [atoms.pop(0)], [sizes.pop(0)]
        while size_of(old) != math.prod(new):
            if size_of(old) < math.prod(new):
                old.append(atoms.pop(0))
            else:
                new.append(sizes.pop(0))
        cells = regroup(old, new)
        if cells is None:
            pin(old, "read in another shape")
            cells = [fixed(size, "read in another shape") for size in new]
        found += cells
    return found


# --- broadcasting ---------------------------------------------------------------------------------


def broadcast(*tensors: Sequence[Axis]) -> list[Axis]:
    """The axes of the result of an element-wise operation."""
    found: list[Axis] = []
    for back in range(1, max(map(len, tensors), default=0) + 1):
        candidates = [
            axes[-back] for axes in tensors if len(axes) >= back and size_of(axes[-back]) != 1
        ]
        for one, other in itertools.combinations(candidates, 2):
            unify(one, other)
        found.append(_tamest(candidates))
    return found[::-1]


def _tamest(candidates: list[Axis]) -> Axis:
    """One of unified axes, with what is not wild in place of what is."""
    if not candidates:
        return []
    best = resolve(candidates[0])
    for candidate in candidates[1:]:
        other = resolve(candidate)
        if sizes_of(other) == sizes_of(best):
            best = [b if a.wild else a for a, b in zip(best, other, strict=True)]
        elif is_wild(best):
            best = other
        elif any(atom.wild for atom in best) and not is_wild(other):
            if not any(atom.wild for atom in other):
                best = other
            else:
                best = _apart(best, other)
        if _crossed(best, other):
            best = _apart(best, other)
    return best


def _apart(x: Axis, y: Axis) -> Axis:
    """The axis of what two axes make together that do not go together."""
    pin(x, "grids that do not fit")
    pin(y, "grids that do not fit")
    return fixed(size_of(x), "grids that do not fit")


def _crossed(x: Axis, y: Axis) -> bool:
    """Whether two grids have a factor at different places: repeated, and with repeated elements."""
    places = [
        {atom: size_of(axis[number:]) for number, atom in enumerate(axis) if not atom.wild}
        for axis in (x, y)
    ]
    return any(places[1].get(atom, place) != place for atom, place in places[0].items())
