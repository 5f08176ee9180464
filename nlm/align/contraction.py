"""Similarities of weights by gathered matrix products, and only of what changed.

:func:`nlm.ops.group_similarity_` reads the second model in the order found so far as it multiplies:
nothing is copied. A permutation that has changed at some positions since a similarity was made
changes it by the terms at these positions, by their difference where that is one tensor, else those
of the old order are taken away and those of the new one added.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nlm import ops
from nlm.align.similarity import Chain, Comparison, Window, similarity, source
from nlm.symmetry.blocks import Block
from nlm.symmetry.gather import Gather, Gathers

_AT_ONCE = 1 << 22  # entries of a model that are read for a change: memory for a few of that size


@dataclass(frozen=True)
class Place:
    """A block that says something about a group of a move.

    ``carried``: the value of the assignments found here is added to the parent's similarity.
    """

    comparison: Comparison
    block: Block
    chain: Chain
    chains: Mapping[int, Chain]
    carried: bool

    @property
    def size(self) -> int:
        """Positions of the block: the work of its similarity, for one group."""
        return math.prod(axis.size for axis in self.block.axes)

    @property
    def is_whole(self) -> bool:
        """Whether the block says something for all indices of the parents that are held."""
        return all(isinstance(part, slice) for part in self.chain.key)


@dataclass(frozen=True)
class Change:
    """What a group that is held has changed in a block: ``new`` instead of ``old`` on its axis.

    The two differ only at ``positions`` of the axis ``at``, which is its own or a parent's.
    """

    old: Gather
    new: Gather
    at: int
    positions: Tensor

    @property
    def is_plain(self) -> bool:
        """Whether the positions are those of the axis itself, which has no parents."""
        return self.new.axis == self.at and not self.new.parents and not self.old.parents


def add_similarity(
    target: Tensor,
    place: Place,
    order: Gathers,
    tables: Mapping[str, Tensor],
    window: Window | None = None,
) -> None:
    """Adds what a block says about the units of a group to ``target[place.chain.key]``.

    Activations, and blocks in which the order of an axis depends on the pair of units that are
    compared, go through :func:`nlm.align.similarity.similarity`.

    Parameters
    ----------
    order : of the groups that do not move.
    tables, window : see :func:`nlm.align.similarity.similarity`.
    """
    comparison, block, chain, chains = place.comparison, place.block, place.chain, place.chains
    closed = [axis for axis in chains if axis not in chain.axes]
    if comparison.a is None or any(set(chains[axis].axes) & set(chain.axes) for axis in closed):
        held = comparison.in_order(order)
        target[chain.key] += similarity(comparison, held, block, chain, chains, tables, window)
        return
    a, b = (block.view(tensor) for tensor in (comparison.a, comparison.b))
    if window is not None:
        a, b = (
            view.narrow(chain.axes[0], part.start, part.stop - part.start)
            for view, part in zip((a, b), window, strict=True)
        )
    gathers = [*_held(place, order), *(_closed(place, axis, tables) for axis in closed)]
    _add(target, place, a, b, gathers)


def of_correlations(place: Place, order: Gathers, window: Window | None = None) -> Tensor:
    """What :func:`add_similarity` adds to zeros, of a block of activations alone."""
    held = place.comparison.in_order(order)
    return similarity(place.comparison, held, place.block, place.chain, place.chains, {}, window)


def add_change(target: Tensor, place: Place, before: Gathers, changes: Sequence[Change]) -> None:
    """Adds to ``target[place.chain.key]`` what changes in the order of held groups make of it.

    Some positions at a time, so that it takes little memory of its own.
    """
    assert place.comparison.a is not None
    a, b = (place.block.view(tensor) for tensor in (place.comparison.a, place.comparison.b))
    gathers = {gather.axis: gather for gather in _held(place, before)}
    for change in changes:
        if change.is_plain:
            gathers.pop(change.at, None)
        rows = max(1, _AT_ONCE * a.shape[change.at] // max(1, a.numel()))
        for positions in change.positions.split(rows):
            part = a.index_select(change.at, positions)
            if change.is_plain:
                wide = torch.promote_types(b.dtype, torch.float32)
                old, new = (
                    b.index_select(change.at, each.index[positions]).to(wide)
                    for each in (change.old, change.new)
                )
                rest = [_at(each, change.at, positions) for each in gathers.values()]
                _add(target, place, part.to(wide), new - old, rest)
            else:
                still = Gather(change.at, torch.arange(b.shape[change.at]))
                for gather, sign in ((change.old, -1.0), (change.new, 1.0)):
                    known = {change.at: still} | gathers | {gather.axis: gather}
                    parts = [_at(each, change.at, positions) for each in known.values()]
                    _add(target, place, part, b, parts, sign)
        gathers[change.new.axis] = change.new


def changes(place: Place, before: Gathers, after: Gathers) -> list[Change] | None:
    """What has changed in a block; None where that is not said by positions that are summed."""
    old, new = ({gather.axis: gather for gather in _held(place, each)} for each in (before, after))
    found = []
    for axis in sorted({*old, *new}):
        one = old.get(axis, new.get(axis))
        assert one is not None
        still = torch.arange(one.index.shape[-1]).expand(one.index.shape)
        first, second = (each.get(axis, Gather(axis, still, one.parents)) for each in (old, new))
        differs = first.index != second.index
        if not differs.any():
            continue
        choices = []
        for dim, at in enumerate((*one.parents, axis)):
            if at not in place.chain.held:
                rows = differs.movedim(dim, 0).reshape(differs.shape[dim], -1)
                positions = rows.any(1).nonzero().squeeze(1)
                choices.append((len(positions) / differs.shape[dim], at, positions))
        if not choices:
            return None
        _, at, positions = min(choices, key=lambda choice: choice[:2])
        found.append(Change(first, second, at, positions))
    return found


def work(place: Place, found: Sequence[Change]) -> float:
    """The products of a change: those of its positions, twice where two orders are compared."""
    sizes = [axis.size for axis in place.block.axes]
    return place.size * sum(
        (1 if change.is_plain else 2) * len(change.positions) / sizes[change.at] for change in found
    )


def _add(
    target: Tensor,
    place: Place,
    a: Tensor,
    b: Tensor,
    gathers: Sequence[Gather],
    sign: float = 1.0,
) -> None:
    chain = place.chain
    kept = [axis for axis in chain.held if axis >= 0]
    above = len(chain.axes) - 1
    out = target[chain.key]
    of_a, of_b = (range(len(kept) + i * above, len(kept) + (i + 1) * above) for i in range(2))
    ops.group_similarity_(
        out.permute(*range(len(kept)), *of_a, out.dim() - 2, *of_b, out.dim() - 1),
        a,
        b,
        chain.axes,
        kept,
        [gather.index for gather in gathers],
        [gather.axis for gather in gathers],
        [gather.parents for gather in gathers],
        sign * place.comparison.weight,
    )


def _held(place: Place, order: Gathers) -> list[Gather]:
    """How the axes of the second model are gathered whose groups do not move."""
    block, found = place.block, []
    for number, axis in enumerate(block.axes):
        if axis.group is None or axis.group not in order.moved or number in place.chains:
            continue
        parents = order.groups[axis.group].parents
        index = order.moved[axis.group][
            tuple(block.at.get(parent, slice(None)) for parent in parents)
        ]
        outer = [block.axis_of_parent(name, number) for name in parents if name not in block.at]
        found.append(Gather(number, index, tuple(outer)))
    return found


def _closed(place: Place, axis: int, tables: Mapping[str, Tensor]) -> Gather:
    """How an axis is gathered whose group moves, and is matched by its table for now."""
    axes = range(len(place.block.axes))
    sizes = [each.size for each in place.block.axes]

    def along(label: int) -> Tensor:
        return torch.arange(sizes[label]).view([-1 if x == label else 1 for x in axes])

    index, depends = source(place.block, axis, (), place.chains, tables, along)
    parents = sorted(depends - {axis})
    index = index.permute(*(x for x in axes if x not in depends), *parents, axis)
    return Gather(axis, index.reshape([sizes[x] for x in (*parents, axis)]), tuple(parents))


def _at(gather: Gather, axis: int, positions: Tensor) -> Gather:
    """A gather of some positions along an axis, its own or another."""
    along = (*gather.parents, gather.axis)
    if axis not in along:
        return gather
    index = gather.index.index_select(along.index(axis), positions)
    return Gather(gather.axis, index, gather.parents)
