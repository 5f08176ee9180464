"""Block moves: the best permutation of a group together with all the units inside it.

A move takes a group and everything that has it among its parents (a head and the units in it, an
expert and its hidden units); all other groups are held. It is solved from the inside out: for the
innermost group the best assignment is found for every pair (parent in A, parent in B); what these
assignments are worth is the value of the pair, to which the parent's own similarity adds; so on up
to the outermost group, whose assignment decides which of the inner ones hold (Verma and Elbayad,
arXiv:2403.00986, for heads). Where every block sees one chain of the move, this is the optimum of
the move. Where it sees several (a residual stream on both axes of a square weight, the channels
in and out of a grouped convolution), one chain is solved at a time with the others held, and the
caller sees to it that nothing is lost; a move of one group alone can be relaxed instead
(:mod:`nlm.align.relaxation`).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nlm.align.assignment import matched, solved
from nlm.align.contraction import (
    Place,
    add_change,
    add_similarity,
    changes,
    of_correlations,
    work,
)
from nlm.align.relaxation import relaxed
from nlm.align.similarity import Comparison, Window, chain_of
from nlm.ops import Assignment
from nlm.symmetry.blocks import Block
from nlm.symmetry.gather import Gathers
from nlm.symmetry.permutation import Groups, Permutation

_AT_ONCE = 1 << 27  # entries of a similarity, 1 GiB; a larger one is made pair by pair


Standing = Mapping[str, Sequence[tuple[Comparison, Block]]]
Assign = Callable[[str, Tensor | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Kept:
    """The similarity of a group, in the order of the others in which it was made.

    ``replaced``: the share of its terms that were taken away and added since it was made afresh.
    """

    order: Gathers
    similarity: Tensor
    replaced: float


class Move:
    """A group and all that is inside it.

    Attributes
    ----------
    members : the groups that move, the outermost first.
    above : member -> its moving parents, outermost first.
    held : member -> its parents that do not move.
    places : member -> the blocks that say something about it, and see no other chain of the move.
    comparisons : where the members stand.
    blocks : the identities of the blocks they stand in.
    keeps : whether similarities are kept until they are needed again.
    nbytes : of the similarities of all members.
    quadratic : whether a block sees more than one chain of the move.
    is_chained : whether the parents of each member that move are inside one another; else the move
        cannot be solved.
    """

    def __init__(self, top: str, groups: Groups, standing: Standing) -> None:
        self.groups = groups
        members = [top]
        members += [name for name, of in groups.items() if top in of.parents and not of.fixed]
        depth = {name: len(set(groups[name].parents) & set(members)) for name in members}
        self.members = sorted(members, key=lambda name: depth[name])
        self.above = {
            name: [parent for parent in self.members if parent in groups[name].parents]
            for name in self.members
        }
        self.held = {
            name: [
                parent
                for parent in groups
                if parent in groups[name].parents and parent not in self.members
            ]
            for name in self.members
        }
        self.places: dict[str, list[Place]] = {name: [] for name in self.members}
        self._bent: dict[str, list[Place]] = {name: [] for name in self.members}
        self.comparisons: list[Comparison] = []
        self.blocks: set[int] = set()
        self.quadratic = False
        self.keeps = True
        self.nbytes = 8 * sum(self._entries(name) for name in self.members)
        self._tables: dict[str, Tensor] = {}
        self._kept: dict[str, Kept] = {}
        self._solved: dict[str, Assignment] = {}
        self.is_chained = all(
            self.above[parent] == self.above[name][:number]
            for name in self.members
            for number, parent in enumerate(self.above[name])
        )
        if self.is_chained:
            for name in self.members:
                for comparison, block in standing.get(name, ()):
                    if id(block) not in self.blocks:
                        self.blocks.add(id(block))
                        self._place(comparison, block)

    def _place(self, comparison: Comparison, block: Block) -> None:
        chains = {
            number: chain_of(block, number, self.above[axis.group], self.held[axis.group])
            for number, axis in enumerate(block.axes)
            if axis.group in self.places
        }
        if comparison not in self.comparisons:
            self.comparisons.append(comparison)
        inner = {axis for chain in chains.values() for axis in chain.axes[:-1]}
        leaves = [axis for axis in chains if axis not in inner]
        self.quadratic |= len(leaves) > 1
        for axis, chain in chains.items():
            below = [leaf for leaf in leaves if axis in chains[leaf].axes]
            root = [leaf for leaf in leaves if chains[leaf].axes[0] == chain.axes[0]]
            carried = len(root) == 1
            if not carried or below == [axis]:
                places = self.places if set(chains) <= set(chain.axes) else self._bent
                place = Place(comparison, block, chain, chains, carried)
                places[str(block.axes[axis].group)].append(place)

    def solve(self, permutation: Permutation) -> Permutation:
        """The permutation with the best assignments for the members.

        A quadratic move starts from the assignments of all pairs that its last solution found.
        """
        tables = self._tables if self.quadratic else {}
        for name in self.members if self.quadratic else ():
            current = permutation[name].permute(*self._order(name), -1)
            pairs = self._sizes(self.above[name])
            spread = current.reshape(*current.shape[:-1], *(1 for _ in pairs), -1)
            tables.setdefault(name, spread.expand(*current.shape[:-1], *pairs, -1).clone())
            tables[name][self._followed(name, permutation)] = permutation[name]

        def assign(name: str, inner: Tensor | None) -> tuple[Tensor, Tensor]:
            tables[name], value = self._assign(name, permutation, tables, inner)
            return tables[name], value

        return self.best(permutation, assign)

    def best(self, permutation: Permutation, assign: Assign) -> Permutation:
        """The permutation with the members assigned from the inside out.

        ``assign(member, inner)`` gives the best assignments of a member for all pairs of parents
        and what they are worth, where ``inner`` is what those inside each pair of its units are.
        """
        tables: dict[str, Tensor] = {}
        inner: dict[str, Tensor] = {}
        for name in reversed(self.members):
            tables[name], value = assign(name, inner.pop(name, None))
            if self.above[name]:
                parent = self.above[name][-1]
                value = self._seen_by_parent(name, value)
                inner[parent] = inner[parent] + value if parent in inner else value
        found = dict(permutation)
        for name in self.members:
            found[name] = tables[name][self._followed(name, found)]
        return found

    def matrix(self, name: str, permutation: Permutation) -> Tensor:
        """A member's permutation as ones among zeros for all pairs of units, float32.

        ``[*held parents, *moving parents in A, *the same in B, n, n]``, as its similarity.
        """
        pairs, size = self._sizes(self.above[name]), self.groups[name].size
        found = torch.zeros(*self._sizes(self.held[name]), *pairs, *pairs, size, size)
        ones = torch.nn.functional.one_hot(permutation[name], size)
        found[self._followed(name, permutation)] = ones.to(found.dtype)
        return found

    def _assign(
        self,
        name: str,
        permutation: Permutation,
        tables: Mapping[str, Tensor],
        inner: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The best assignments of a member for all pairs of parents, and what they are worth."""
        held = self._sizes(self.held[name])
        pairs = self._sizes(self.above[name])
        size = self.groups[name].size
        table = torch.empty([*held, *pairs, *pairs, size], dtype=torch.int64)
        value = torch.empty([*held, *pairs, *pairs], dtype=torch.float64)
        order = self._still(permutation)
        for window in _windows(held, pairs, size):
            at: tuple[slice, ...] = ()
            if window is not None:
                rest = [slice(None)] * (len(pairs) - 1)
                at = (*(slice(None) for _ in held), window[0], *rest, window[1], *rest)
            carried = self._similarity(name, order, [*value[at].shape, size, size], window)
            other = torch.zeros_like(carried) if self.quadratic else None
            if self._bent[name] and other is not None:
                carried = carried.clone()
                for place in self._bent[name]:
                    add_similarity(
                        carried if place.carried else other, place, order, tables, window
                    )
            if inner is not None:
                carried = carried + inner[at]
            found = solved(carried if other is None else carried + other, self._solved.get(name))
            if window is None:
                self._solved[name] = found
            table[at] = found.columns
            value[at] = matched(carried, table[at]).sum(-1)
        return table, value

    @property
    def is_relaxable(self) -> bool:
        """Whether the move is quadratic in the assignment of one group."""
        return self.quadratic and len(self.members) == 1

    def relax(self, permutation: Permutation) -> Permutation:
        """The permutation with the assignment of its group that Frank-Wolfe steps lead to."""
        [name] = self.members
        order, axes = self._still(permutation), self._order(name)
        start = permutation[name].permute(*axes, -1)
        shape = [*start.shape, start.shape[-1]]
        straight = self._similarity(name, order, shape, None)

        def gradient(assignment: Tensor) -> Tensor:
            found = straight.clone()
            for place in self._bent[name]:
                add_similarity(found, place, order, {name: assignment})
            return found

        back = sorted(range(len(axes)), key=axes.__getitem__)
        return {**permutation, name: relaxed(gradient, start).permute(*back, -1)}

    def _still(self, permutation: Permutation) -> Gathers:
        """The order of the groups that do not move."""
        still = {member: replace(self.groups[member], fixed=True) for member in self.members}
        return Gathers({**self.groups, **still}, permutation)

    def _similarity(
        self, name: str, order: Gathers, shape: list[int], window: Window | None
    ) -> Tensor:
        """The similarity of a member's units over its places, but for those that are bent."""
        seen = [place for place in self.places[name] if place.comparison.a is None]
        if len(seen) == len(self.places[name]) == 1 and seen[0].is_whole:
            return of_correlations(seen[0], order, window)
        similarity = self._of_weights(name, order, shape, window)
        if seen and name in self._kept:
            similarity = similarity.clone()
        for place in seen:
            add_similarity(similarity, place, order, {}, window)
        return similarity

    def _of_weights(
        self, name: str, order: Gathers, shape: list[int], window: Window | None
    ) -> Tensor:
        """What the parameters say of it.

        The next time only the terms at changed positions are replaced, where that is less work. It
        is made afresh once twice its work has gone into that, so that roundings do not add up.
        """
        places = [place for place in self.places[name] if place.comparison.a is not None]
        whole = sum(place.size for place in places)
        kept = self._kept.pop(name, None)
        found = None if kept is None else [changes(each, kept.order, order) for each in places]
        if kept is not None and found is not None and None not in found:
            pairs = [(p, each) for p, each in zip(places, found, strict=True) if each]
            share = sum(work(place, each) for place, each in pairs) / max(whole, 1)
            if share < 0.9 and kept.replaced + share <= 2:
                for place, each in pairs:
                    add_change(kept.similarity, place, kept.order, each)
                self._kept[name] = Kept(order, kept.similarity, kept.replaced + share)
                return kept.similarity
        similarity = torch.zeros(shape, dtype=torch.float64)
        for place in places:
            add_similarity(similarity, place, order, {}, window)
        if self.keeps and window is None and places:
            self._kept[name] = Kept(order, similarity, 0.0)
        return similarity

    def forget(self) -> None:
        """Gives the memory of earlier solutions back."""
        self._kept.clear()
        self._solved.clear()
        self._tables.clear()

    def _seen_by_parent(self, name: str, value: Tensor) -> Tensor:
        """The value for all pairs of parents, as a similarity of the innermost one's units."""
        held = self.held[self.above[name][-1]]
        extra = [dim for dim, group in enumerate(self.held[name]) if group not in held]
        value = value.sum(extra) if extra else value
        return value.movedim(len(held) + len(self.above[name]) - 1, -2)

    def _entries(self, name: str) -> int:
        """Of the similarity of a member for all pairs of parents."""
        pairs = math.prod(self._sizes(self.above[name])) * self.groups[name].size
        return math.prod(self._sizes(self.held[name])) * pairs**2

    def _sizes(self, names: Sequence[str]) -> list[int]:
        return [self.groups[name].size for name in names]

    def _order(self, name: str) -> list[int]:
        """Where the parents that are held, and then those that move, stand among all of them."""
        parents = self.groups[name].parents
        return [parents.index(parent) for parent in (*self.held[name], *self.above[name])]

    def _followed(self, name: str, permutation: Permutation) -> tuple[Tensor, ...]:
        """Where a table holds what a permutation of the parents needs, in the parents' order."""
        parents = self.groups[name].parents
        if not parents:
            return ()
        grid = torch.meshgrid(*(torch.arange(size) for size in self._sizes(parents)), indexing="ij")
        new = dict(zip(parents, grid, strict=True))
        old = [
            permutation[parent][
                (*(new[above] for above in self.groups[parent].parents), new[parent])
            ]
            for parent in self.above[name]
        ]
        return (*(new[parent] for parent in (*self.held[name], *self.above[name])), *old)


def _windows(held: list[int], pairs: list[int], size: int) -> Iterator[Window | None]:
    """The pairs of outermost parents that are compared at once: all, or one after the other."""
    if not pairs or math.prod(held) * (math.prod(pairs) * size) ** 2 <= _AT_ONCE:
        yield None
        return
    for in_a, in_b in itertools.product(range(pairs[0]), repeat=2):
        yield slice(in_a, in_a + 1), slice(in_b, in_b + 1)
