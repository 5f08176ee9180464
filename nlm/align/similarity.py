"""The similarity of the units of two models, read off one parameter or one module's output.

What two models have at one place is compared position by position: weights W_A and W_B by their
product, activations by their correlation. Cut into blocks (grids whose axes are groups or fixed
stretches), a parameter contributes to the similarity of a group, with the group's axis unfolded to
the front and all other axes contracted,

    S[i, j] = sum_r  W_A[i, r] W_B[j, r],

where W_B has every other axis in its current permutation. For units inside others (the parents)
there is one such matrix for each index of the parent in A and each in B,

    S[h, h', i, j] = sum_r  W_A[h, i, r] W_B[h', j, r].

Biases and norm parameters are vectors: their S is an outer product (a scalar product would not
depend on the permutation).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nlm.symmetry.blocks import Block, blocks
from nlm.symmetry.gather import Gather, Gathers, apply
from nlm.symmetry.layout import Fixed, Layout

Window = tuple[slice, slice]

_CHUNK = 1 << 18  # products that are summed at once: their float64 copies stay in cache


def dot(a: Tensor, b: Tensor) -> float:
    """The sum of products, exact to float64."""
    pairs = zip(*(each.reshape(-1).split(_CHUNK) for each in (a, b)), strict=True)
    return math.fsum(float(torch.dot(x.double(), y.double())) for x, y in pairs)


def in_order(tensor: Tensor, layouts: tuple[Layout, ...], order: Gathers) -> Tensor:
    """A parameter with the groups in a permutation's order; itself where none moves."""
    plan = order.of(layouts)
    return apply([tensor], [plan])[0] if plan else tensor


def _agree(one: Gather | None, other: Gather | None) -> bool:
    return one is other or (
        one is not None and other is not None and torch.equal(one.index, other.index)
    )


class Comparison:
    """A parameter of two models, in its own type; sums of products are in float64.

    Parameters
    ----------
    a, b : the parameter in both models, of the same shape.
    layouts : how the groups make up its dimensions.
    normalise : whether the products are divided by those of the norms.
    """

    def __init__(
        self, a: Tensor, b: Tensor, layouts: tuple[Layout, ...], normalise: bool = False
    ) -> None:
        norms = [math.sqrt(dot(each, each)) for each in (a, b)]
        if any(norm > 0 and not 1e-12 < norm < 1e15 for norm in norms):
            a, b = a.double(), b.double()  # products in float32 would leave its range
        self.a: Tensor | None = a
        self.b = b
        self.layouts = layouts
        self.blocks = blocks(layouts, b.shape)
        self.weights = [1 / norm if normalise and norm > 0 else 1.0 for norm in norms]
        self.weight = math.prod(self.weights)
        self.scale = math.prod(norms) * self.weight

    @property
    def nbytes(self) -> int:
        """What is compared."""
        return self.b.nbytes + (0 if self.a is None else self.a.nbytes)

    def in_order(self, order: Gathers) -> Tensor:
        """The second model with the groups in a permutation's order."""
        return in_order(self.b, self.layouts, order)

    def value(self, order: Gathers) -> float:
        """The sum of the products, exact to float64."""
        assert self.a is not None
        return self.weight * dot(self.a, self.in_order(order))

    def gain(self, before: Gathers, after: Gathers, value: float) -> float:
        """What the sum of products rises by from one order, in which it is ``value``, to another.

        Where they differ at less than half of the positions of one dimension, only these are read.
        """
        old, new = (
            {each.axis: each for each in order.of(self.layouts)} for order in (before, after)
        )
        moved = [axis for axis in {*old, *new} if not _agree(old.get(axis), new.get(axis))]
        parents = {parent for each in (*old.values(), *new.values()) for parent in each.parents}
        if len(moved) == 1 and self.a is not None and not parents & {*old, *new, *moved}:
            [axis] = moved
            still = torch.arange(self.b.shape[axis])
            first, last = (part[axis].index if axis in part else still for part in (old, new))
            if first.dim() == last.dim() == 1:
                at = (first != last).nonzero().squeeze(1)
                if 2 * len(at) < len(still):
                    a = self.a.index_select(axis, at)
                    rest = [each for each in new.values() if each.axis != axis]
                    parts = [self.b.index_select(axis, index[at]) for index in (first, last)]
                    low, high = (dot(a, b) for b in apply(parts, [rest, rest]))
                    return self.weight * (high - low)
        return self.value(after) - value

    def parts(self, order: Gathers) -> Iterator[tuple[Block, int, tuple[Tensor, ...]]]:
        """The products and both models' squares, block by block, a stretch of axis 0 at a time.

        With each comes the index on that axis at which the stretch begins.
        """
        assert self.a is not None
        held = self.in_order(order)
        for block in self.blocks:
            views = block.view(self.a), block.view(held)
            rows = max(1, _CHUNK // max(1, views[0][:1].numel()))
            for number, pair in enumerate(zip(*(view.split(rows) for view in views), strict=True)):
                a, b = (
                    each.to(torch.promote_types(each.dtype, torch.float32)) * weight
                    for each, weight in zip(pair, self.weights, strict=True)
                )
                yield block, number * rows, (a * b, a.square(), b.square())

    def operands(self, block: Block, held: Tensor) -> list[tuple[Tensor, list[int]]]:
        """What is multiplied in a block, and its axes: i in A, (number of axes) + i in B."""
        assert self.a is not None
        count = len(block.axes)
        in_a = block.view(self.a).double() * self.weight, list(range(count))
        return [in_a, (block.view(held).double(), list(range(count, 2 * count)))]


class Correlation(Comparison):
    """The outputs of a module in two models, by the correlation of their units.

    Parameters
    ----------
    correlation : float64 [n, n], the first model's units in rows.
    layout : how the groups make up the units.
    used : the blocks that count.
    weight : what the sum of the matched correlations is multiplied with.
    """

    def __init__(
        self, correlation: Tensor, layout: Layout, used: list[Block], weight: float = 1.0
    ) -> None:
        self.a = None
        self.b = correlation
        self.layouts = (Fixed(layout.size), layout)
        self.blocks = used
        self.weight = weight
        self.scale = weight * layout.size

    def where(self, counts: Callable[[Block], bool]) -> "Correlation":
        """The same, by the blocks for which this holds."""
        used = [each for each in self.blocks if counts(each)]
        return Correlation(self.b, self.layouts[1], used, self.weight)

    def value(self, order: Gathers) -> float:
        return self.weight * float(self._used(self._matched(order)).sum())

    def parts(self, order: Gathers) -> Iterator[tuple[Block, int, tuple[Tensor, ...]]]:
        held = self._matched(order)
        for block in self.blocks:
            both = block.view(held)
            yield block, 0, (both, torch.ones_like(both), torch.ones_like(both))

    def _matched(self, order: Gathers) -> Tensor:
        """The correlation of each unit with the one in its place."""
        plan = order.of(self.layouts[1:])
        units = plan[0].index if plan else torch.arange(len(self.b))
        return self.b.gather(1, units[:, None]).squeeze(1)

    def _used(self, units: Tensor) -> Tensor:
        """The units of the blocks that count; 0 for others."""
        used = torch.zeros(len(units), dtype=torch.float64)
        for block in self.blocks:
            block.view(used).copy_(block.view(units))
        return used

    def products(self) -> Tensor:
        """What the units of the first model and of the second count together, float64 [n, n]."""
        used = self._used(torch.ones(len(self.b), dtype=torch.float64))
        return self.b * (self.weight * used[:, None] * used)

    def operands(self, block: Block, held: Tensor) -> list[tuple[Tensor, list[int]]]:
        sizes = [axis.size for axis in block.axes]
        strides = [axis.stride * step for step in held.stride() for axis in block.axes]
        offset = held.storage_offset() + block.start[0] * sum(held.stride())
        view = held.as_strided(sizes * 2, strides, offset)
        return [(view if self.weight == 1 else view * self.weight, list(range(2 * len(sizes))))]


@dataclass(frozen=True)
class Chain:
    """A moving group on an axis of a block.

    Attributes
    ----------
    axes : the axes of its moving parents, outermost first, and its own.
    held : for each parent that does not move the axis it stands on, or ~index where its index is
        the same throughout the block.
    """

    axes: tuple[int, ...]
    held: tuple[int, ...]

    @property
    def key(self) -> tuple[int | slice, ...]:
        """Where the block's similarity lies along the parents that do not move."""
        return tuple(~place if place < 0 else slice(None) for place in self.held)


def chain_of(block: Block, axis: int, moving: Sequence[str], still: Sequence[str]) -> Chain:
    """The chain of the group on an axis, whose parents move or stand still."""
    return Chain(
        (*(block.axis_of_parent(parent, axis) for parent in moving), axis),
        tuple(
            ~block.at[parent] if parent in block.at else block.axis_of_parent(parent, axis)
            for parent in still
        ),
    )


def source(
    block: Block,
    axis: int,
    units: tuple[int, ...],
    chains: Mapping[int, Chain],
    tables: Mapping[str, Tensor],
    along: Callable[[int], Tensor],
) -> tuple[Tensor, set[int]]:
    """The index in B along an axis, and its labels: i in A, (number of axes) + i in B.

    Only the axes of ``units`` have labels in B. ``along(label)`` is the index itself.
    """
    if axis in units or axis not in chains:
        label = len(block.axes) + axis if axis in units else axis
        return along(label), {label}
    *parents, _ = chains[axis].axes
    above = [source(block, parent, units, chains, tables, along) for parent in parents]
    outer = [place for place in chains[axis].held if place >= 0]
    index = tables[str(block.axes[axis].group)][
        (
            *(along(at) if at >= 0 else torch.tensor(~at) for at in chains[axis].held),
            *map(along, parents),
            *(place for place, _ in above),
            along(axis),
        )
    ]
    return index, {axis, *outer, *parents}.union(*(labels for _, labels in above))


def similarity(
    comparison: Comparison,
    held: Tensor,
    block: Block,
    chain: Chain,
    chains: Mapping[int, Chain],
    tables: Mapping[str, Tensor],
    window: Window | None = None,
) -> Tensor:
    """What one block says about the units of one group.

    Parameters
    ----------
    held : the second model with everything in order that does not move.
    chain : the group and its moving parents, which are open: all pairs of units are compared.
    chains : axis -> chain for all moving groups of the block; those that are not open are matched
        by ``tables``: group -> int64 ``[*held parents, *moving parents in A, *the same in B, n]``.
    window : restricts the outermost axis of ``chain``, in A and in B.

    Returns
    -------
    float64 ``[*held parents, *moving parents in A, *the same in B, n, n]``, without the held
    parents whose index is the same throughout the block (see :attr:`Chain.key`).
    """
    count = len(block.axes)
    ranges = [torch.arange(axis.size) for axis in block.axes] * 2
    first = chain.axes[0]
    if window is not None:
        ranges[first], ranges[count + first] = (ranges[first][part] for part in window)

    def along(label: int) -> Tensor:
        return ranges[label].reshape([-1 if other == label else 1 for other in range(2 * count)])

    closed = {axis for axis in chains if axis not in chain.axes}

    def arrange(tensor: Tensor, labels: list[int]) -> tuple[Tensor, list[int]]:
        """An operand with everything matched that is not open, and the labels of its axes."""
        if all(label - count not in closed for label in labels):
            for dim, label in enumerate(labels):
                if len(ranges[label]) < tensor.shape[dim]:
                    tensor = tensor.narrow(dim, int(ranges[label][0]), len(ranges[label]))
            is_open = [label - count in chain.axes for label in labels]
            return tensor, [
                label if own else label % count for label, own in zip(labels, is_open, strict=True)
            ]
        places = [
            (along(label), {label})
            if label < count
            else source(block, label - count, chain.axes, chains, tables, along)
            for label in labels
        ]
        used = sorted(set[int]().union(*(depends for _, depends in places)))
        found = tensor[tuple(index for index, _ in places)]
        return found.reshape([len(ranges[label]) for label in used]), used

    arranged = [arrange(*operand) for operand in comparison.operands(block, held)]
    parents, own = chain.axes[:-1], chain.axes[-1]
    out = [axis for axis in chain.held if axis >= 0]
    out += [*parents, *(count + axis for axis in parents), own, count + own]
    return torch.einsum(*(part for operand in arranged for part in operand), out)
