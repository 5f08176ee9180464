"""Which leaves a permutation may depend on, and which families hold.

A permutation of one group may be another one for every index of a second group (units inside heads)
if every tensor of the computation that has the first also has the second, exactly once: the
parameters, all intermediate results, and what operations compute on the way. Attention scores have
the heads but not the units inside, so these may be permuted differently in each head, and the heads
not differently for each unit. Nothing here knows what a head is.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from nlm.symmetry.atoms import (
    Atom,
    Axis,
    choose,
    compounds,
    find,
    find_selector,
    leaves,
    pin,
    resolve,
)
from nlm.symmetry.axes import collapse
from nlm.symmetry.handlers import Array, Lookup, Record
from nlm.symmetry.sums import couple

Choices = dict[tuple[Atom, int], int]  # (sum, which of its occurrences) -> part


def tell_apart(records: list[Record], entries: list[Array]) -> None:
    """Makes families of the leaves that stand nowhere without a sum.

    With an index: .3 s for DenseNet-121, of which each sum holds those before it; scans take 11 s.
    """
    where: dict[Atom, set[int]] = {}  # the tensors in which a leaf or a sum stands
    for number, axes in enumerate(_distinct(records)):
        for atom in (each for axis in axes for each in (*leaves(axis), *compounds(axis))):
            where.setdefault(atom, set()).add(number)
    split: list[Atom] = []

    def together(candidates: Iterable[Atom], lead: Atom) -> list[Atom]:
        split[:] = [leaf for leaf in candidates if where[leaf] <= where[lead]]
        return split

    for x in entries:
        for lead in [each for axis in x.axes for each in compounds(axis)]:
            if find(lead) is lead and lead.kind == "sum":
                couple(x.axes, lead, together)
                for leaf in split:
                    where.update((each, where[leaf]) for each in leaves([leaf]))
                split.clear()


def settle(records: list[Record], entries: list[Array]) -> None:
    """Gives up families that do not stand everywhere together with their selector."""
    for x in entries:
        for each in [each for axis in x.axes for each in compounds(axis)]:
            parts = [list(leaves(part)) for part in each.parts]
            if each.kind == "sum" and any(p and not any(leaf.read for leaf in p) for p in parts):
                pin([each], "partly read")  # how far may hang on the shape of the input
    changed = True
    while changed:
        changed = False
        for axes in _distinct(records):
            for family in _loose(axes):
                collapse(family)
                changed = True
        for x in entries:
            for family in unwritable(x.axes):
                collapse(family)
                changed = True


def _distinct(records: list[Record]) -> Iterator[tuple[Axis, ...]]:
    seen = set()
    for axes, _ in records:
        resolved = tuple(resolve(axis) for axis in axes)
        key = tuple(tuple(map(id, axis)) for axis in resolved)
        if key not in seen:
            seen.add(key)
            yield resolved


def _loose(axes: tuple[Axis, ...]) -> list[Atom]:
    """The families of a tensor of which the selector is not there once, or a member is not read."""
    found = [each for axis in axes for each in compounds(axis)]
    families = [each for each in found if each.kind == "family"]
    if not families:
        return []
    times = Counter(id(each) for each in found if each.kind == "sum")
    paths = dict(_paths(axes))
    loose = []
    for family in families:
        selector = find_selector(family)
        unread = any(
            not leaf.read and not leaf.pinned for part in family.parts for leaf in leaves(part)
        )
        if unread or times[id(selector)] != 1:
            loose.append(family)
            continue
        above = paths[id(selector)].items()
        if not all(paths[id(family)].get(key) == part for key, part in above):
            loose.append(family)
    return loose


def _paths(axes: tuple[Axis, ...]) -> Iterator[tuple[int, dict[int, int]]]:
    """For each sum and family of a tensor the parts of other sums that it stands in."""

    def walk(axis: Axis, path: dict[int, int]) -> Iterator[tuple[int, dict[int, int]]]:
        for atom in resolve(axis):
            if atom.kind == "leaf":
                continue
            yield id(atom), path
            selector = atom if atom.kind == "sum" else find_selector(atom)
            for number, part in enumerate(atom.parts):
                yield from walk(part, {**path, id(selector): number})

    for axis in axes:
        yield from walk(axis, {})


# --- what a layout can say ------------------------------------------------------------------------


def unwritable(axes: list[Axis]) -> list[Atom]:
    """The families of a parameter that no layout can say."""
    bad: list[Atom] = []

    def walk(atoms: Axis, within: list[Axis]) -> None:
        for number, atom in enumerate(atoms):
            if selects_behind(atom, atoms[number:], within):
                for row in rows(atom, atoms[number + 1 :]):
                    walk(row, [row])
                return
            if atom.kind == "family" and not _is_still(find_selector(atom), axes):
                bad.append(atom)
            for part in atom.parts:
                walk(resolve(part), within)

    for axis in axes:
        walk(resolve(axis), axes)
    return bad


def _hidden(axes: list[Axis]) -> set[Atom]:
    """The leaves of the selectors that a parameter's layout names as wholes."""
    found: set[Atom] = set()

    def walk(atoms: Axis, within: list[Axis]) -> None:
        for number, atom in enumerate(atoms):
            if selects_behind(atom, atoms[number:], within):
                for row in rows(atom, atoms[number + 1 :]):
                    walk(row, [row])
                return
            if atom in map(find_selector, families(within)):
                found.update(leaves([atom]))
            else:
                for part in atom.parts:
                    walk(resolve(part), within)

    for axis in axes:
        walk(resolve(axis), axes)
    return found


def selects_behind(atom: Atom, atoms: Axis, axes: list[Axis]) -> bool:
    """Whether all families over a sum stand behind it in one product."""
    own = [each for each in families(axes) if find_selector(each) is atom]
    return atom.kind == "sum" and bool(own) and all(each in atoms for each in own)


def families(axes: list[Axis]) -> list[Atom]:
    return [each for axis in axes for each in compounds(axis) if each.kind == "family"]


def rows(lead: Atom, behind: Axis) -> list[Axis]:
    """A selector and what follows it, part by part."""
    return [
        resolve([*part, *choose(behind, lead, number)]) for number, part in enumerate(lead.parts)
    ]


def _is_still(selector: Atom, axes: list[Axis]) -> bool:
    """Whether a selector is a dimension's factor in which nothing moves."""
    return any(selector in resolve(axis) for axis in axes) and all(
        leaf.pinned for leaf in leaves([selector])
    )


# --- dependence -----------------------------------------------------------------------------------


@dataclass
class Occurrence:
    """A leaf in a tensor, present where the choices hold."""

    leaf: Atom
    choices: Choices


def _occurrences(axes: tuple[Axis, ...]) -> list[Occurrence]:
    """Every leaf of a tensor with the choices among parts that lead to it."""
    found: list[Occurrence] = []
    times: Counter[int] = Counter()

    def walk(axis: Axis, choices: Choices) -> None:
        for atom in resolve(axis):
            if atom.kind == "leaf":
                found.append(Occurrence(atom, choices))
                continue
            if atom.kind == "sum":
                key = (atom, times[id(atom)])
                times[id(atom)] += 1
            else:
                key = (find_selector(atom), 0)
            for number, part in enumerate(atom.parts):
                if choices.get(key, number) == number:
                    walk(part, {**choices, key: number})

    for axis in axes:
        walk(axis, {})
    return found


def _companions(
    axes: tuple[Axis, ...], lookups: frozenset[Lookup]
) -> Iterator[tuple[Atom, set[Atom]]]:
    """For each leaf in a tensor the others that are there exactly once whenever it is."""
    occurrences = _occurrences(axes)
    for one in occurrences:
        if one.leaf.pinned or one.leaf.wild:
            continue
        possible: Counter[Atom] = Counter()
        certain: set[Atom] = set()
        for other in occurrences:
            if other is one or any(
                other.choices.get(key, part) != part for key, part in one.choices.items()
            ):
                continue
            possible[other.leaf] += 1
            if other.choices.items() <= one.choices.items():
                certain.add(other.leaf)
        alone = {leaf for leaf in certain if possible[leaf] == 1}
        yield one.leaf, alone | _looked_up(lookups, alone, possible)


def _looked_up(lookups: frozenset[Lookup], alone: set[Atom], possible: Counter[Atom]) -> set[Atom]:
    """The leaves whose index is known by looking up, at every position of a tensor.

    Two look-ups over one axis are two indices: neither is known.
    """
    times = Counter(leaf for each in lookups for leaf in set(leaves(each.over)))
    known: set[Atom] = set()
    for each in lookups:
        keys = each.leaves()
        if len(keys) == len(set(keys)) and alone.issuperset(keys):
            known |= set(leaves(each.over))
    return {leaf for leaf in known if times[leaf] == 1 and leaf not in possible}


def parents_of(
    records: list[Record], entries: Mapping[str, Array | None], outermost: Axis
) -> dict[Atom, list[Atom]]:
    """For each leaf that may be permuted those on whose index its permutation may depend.

    Of two that could depend on one another it is the inner one, or the one not ``outermost``.
    """
    rank = {leaf: (-1, number) for number, leaf in enumerate(leaves(outermost))}
    for x in entries.values():
        for axis in x.axes if x is not None else ():
            for place, leaf in _placed(axis, 0):
                old = rank.get(leaf, (place, len(rank)))
                rank[leaf] = (min(old[0], place), old[1])
    together: dict[Atom, set[Atom]] = {}
    seen = set()
    for axes, lookups in records:
        key = (tuple(tuple(map(id, resolve(axis))) for axis in axes), lookups)
        if key in seen:
            continue
        seen.add(key)
        for leaf, companions in _companions(axes, lookups):
            if leaf in rank:
                others = companions - {leaf}
                together[leaf] = together[leaf] & others if leaf in together else others
    for x in entries.values():
        if x is not None and (hidden := _hidden(x.axes)):
            for leaf in together.keys() & {leaf for axis in x.axes for leaf in leaves(axis)}:
                together[leaf] -= hidden
    movable = {leaf for leaf in rank if not leaf.pinned and leaf.read}
    parents: dict[Atom, list[Atom]] = {leaf: [] for leaf in movable}

    def depends(leaf: Atom, on: Atom) -> bool:
        return leaf is on or any(depends(each, on) for each in parents.get(leaf, ()))

    for leaf in sorted(movable, key=lambda each: (-rank[each][0], rank[each][1])):
        eligible = (each for each in together.get(leaf, ()) if each in rank and each.size > 1)
        for other in sorted(eligible, key=lambda each: rank[each]):
            usable = other in movable or other.pinned
            if usable and not depends(other, leaf):
                parents[leaf].append(other)
    while incomplete := [
        (leaf, other)
        for leaf, own in parents.items()
        for other in own
        if not set(parents.get(other, ())) <= set(own)
    ]:
        for leaf, other in incomplete:
            parents[leaf].remove(other)
    return parents


def _placed(axis: Axis, place: int) -> Iterator[tuple[int, Atom]]:
    """The leaves of a dimension with how far inside its product they stand."""
    for number, atom in enumerate(resolve(axis)):
        if atom.kind == "leaf":
            yield place + number, atom
        else:
            for part in atom.parts:
                yield from _placed(part, place + number)
