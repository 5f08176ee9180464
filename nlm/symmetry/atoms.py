"""The algebra of axes: what is known about the order of the positions along a tensor's dimension.

A dimension is a row-major list of atoms. Two dimensions that share an atom are always permuted
together; an atom that is pinned is never permuted. An atom is one of

=========  ====================================================================================
leaf       ``size`` positions of which nothing more is known
product    a list of atoms (768 units viewed as 12 heads of 64)
sum        several lists of atoms, one after the other (a concatenation, the parts of a slice)
family     one list of atoms per part of a *selector*, another atom of the same tensor, a sum: the
           inner units of q, k and v in a fused projection are other units each
=========  ====================================================================================

Learning more about an atom changes the atom itself, so that every tensor that mentions it learns
it at once: ``unify`` makes two lists of atoms one, ``cut`` makes sums, ``regroup`` makes products.
Each only ever *takes permutations away*; where two descriptions do not fit, both are pinned.

A leaf is *wild* where any permutation changes nothing: all values along it are equal (a tensor
filled with zeros, an expanded dimension). What a wild leaf meets does not concern it.
"""

import math
from collections.abc import Iterator, Sequence

Axis = list["Atom"]


class Atom:
    """A factor of a dimension; compared by identity, after :func:`resolve`.

    ``pinned`` says why it stays as it is ("" where it need not), ``read`` whether an operation used
    its values (a table of which only some rows are sliced off is not read in the others).
    """

    __slots__ = (
        "families",
        "forward",
        "kind",
        "parts",
        "pinned",
        "read",
        "selector",
        "size",
        "wild",
    )

    def __init__(self, size: int, pinned: str = "", wild: bool = False, read: bool = False) -> None:
        self.size = size
        self.pinned = pinned
        self.wild = wild
        self.read = read
        self.kind = "leaf"
        self.parts: list[Axis] = []
        self.selector: Atom | None = None
        self.families: list[Atom] = []  # those of which this atom is the selector
        self.forward: Atom | None = None

    def become(self, kind: str, parts: list[Axis], selector: "Atom | None" = None) -> None:
        """Learns its structure."""
        self.kind, self.parts, self.selector = kind, parts, selector
        if selector is not None:
            selector.families.append(self)


def free(size: int) -> Axis:
    """A new axis of which nothing is known."""
    return [Atom(size)] if size != 1 else []


def fixed(size: int, why: str) -> Axis:
    """A new axis that is never permuted."""
    return [Atom(size, pinned=why)] if size != 1 else []


def wild(size: int) -> Axis:
    """A new axis along which all values are equal."""
    return [Atom(size, wild=True)] if size != 1 else []


def compound(kind: str, parts: list[Axis], size: int, selector: Atom | None = None) -> Atom:
    """A new sum or family."""
    atom = Atom(size)
    atom.become(kind, parts, selector)
    return atom


def find(atom: Atom) -> Atom:
    """The atom that now stands for one."""
    while atom.forward is not None:
        atom = atom.forward
    return atom


def find_selector(family: Atom) -> Atom:
    assert family.selector is not None
    return find(family.selector)


def size_of(axis: Sequence[Atom]) -> int:
    return math.prod(atom.size for atom in axis)


def sizes_of(axis: Sequence[Atom]) -> list[int]:
    return [atom.size for atom in axis]


def resolve(axis: Sequence[Atom]) -> Axis:
    """The axis in terms of leaves, sums and families of two or more positions."""
    found: Axis = []
    for atom in map(find, axis):
        if atom.size == 1:
            continue
        if atom.kind == "family":
            _simplify_family(atom)
        if atom.kind == "sum" and len(atom.parts) == 1:
            atom.become("product", atom.parts)
        if atom.kind == "product":
            found += resolve(atom.parts[0])
        else:
            found.append(atom)
    return found


def _simplify_family(atom: Atom) -> None:
    """Equal members are no family; members that are products of equal sizes are several.

    A member that is a family over the same selector is the member of that.
    """
    selector = find_selector(atom)
    atom.parts = [choose(part, selector, number) for number, part in enumerate(atom.parts)]
    members = atom.parts
    first = members[0]
    if all(same(first, other) for other in members[1:]):
        atom.become("product", [first])
    elif len(first) != 1 and all(sizes_of(other) == sizes_of(first) for other in members[1:]):
        columns = zip(*members, strict=True)
        factors = [
            compound("family", [[each] for each in column], column[0].size, selector)
            for column in columns
        ]
        atom.become("product", [factors])


def choose(axis: Sequence[Atom], lead: Atom, number: int) -> Axis:
    """An axis where one part of a selector is left: families over it become the member."""
    found: Axis = []
    for atom in resolve(axis):
        if atom.kind == "family" and find_selector(atom) is lead:
            found += choose(atom.parts[number], lead, number)
        elif atom.kind == "sum" and mentions(atom, lead):
            parts = [choose(part, lead, number) for part in atom.parts]
            found.append(compound("sum", parts, atom.size))
        else:
            found.append(atom)
    return found


def mentions(atom: Atom, lead: Atom) -> bool:
    return any(each.kind == "family" and find_selector(each) is lead for each in compounds([atom]))


def same(x: Sequence[Atom], y: Sequence[Atom]) -> bool:
    """Whether two resolved axes are the same atoms."""
    return len(x) == len(y) and all(a is b for a, b in zip(x, y, strict=True))


def leaves(axis: Sequence[Atom]) -> Iterator[Atom]:
    """Every leaf, also inside sums and families."""
    for atom in resolve(axis):
        if atom.kind == "leaf":
            yield atom
        else:
            for part in atom.parts:
                yield from leaves(part)


def compounds(axis: Sequence[Atom]) -> Iterator[Atom]:
    """Every sum and family, from the outside in."""
    for atom in resolve(axis):
        if atom.kind != "leaf":
            yield atom
            for part in atom.parts:
                yield from compounds(part)


def pin(axis: Sequence[Atom], why: str) -> None:
    """Forbids every permutation of an axis; the first reason is kept."""
    for leaf in leaves(axis):
        leaf.pinned = leaf.pinned or why


def is_pinned(axis: Sequence[Atom]) -> bool:
    return all(leaf.pinned for leaf in leaves(axis))


def is_wild(axis: Sequence[Atom]) -> bool:
    return all(
        atom.wild or (atom.kind == "family" and all(is_wild(part) for part in atom.parts))
        for atom in resolve(axis)
    )


def mark_read(axis: Sequence[Atom]) -> None:
    for leaf in leaves(axis):
        leaf.read = True
