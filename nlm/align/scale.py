"""Similarities of weights and correlations of activations on one scale.

What misleads an assignment is what units have in common by chance. On that scale both are as large:
correlations count the deviation of the similarities of weights over their own. Of weights it is
what independent ones of their size would give,

    deviation^2 = sum_W  |W_A|^2 |W_B|^2 / (n size(W)),    n units, differences from their mean;

of correlations it is measured, with rows and columns centred, as an assignment sees no more.
"""

import functools
import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from torch import Tensor

from nlm import ops
from nlm.align.seen import Seen, innermost
from nlm.align.similarity import Comparison, Correlation, chain_of
from nlm.symmetry.blocks import Block
from nlm.symmetry.permutation import Groups


def on_one_scale(
    comparisons: Sequence[Comparison], seen: Seen, groups: Groups, dual: float
) -> list[Correlation]:
    """The correlations, block by block, weighted to have the share ``dual`` beside the weights.

    A group that several modules show counts by their mean. Where it has no weights that differ,
    any factor will do.
    """
    shown = [(each, block) for each in seen.comparisons for block in each.blocks]
    often = Counter(name for _, block in shown for name in innermost(groups, block))

    @functools.cache
    def by_weights(name: str) -> float:
        return _by_weights(comparisons, groups, name) or 1.0

    found = []
    for each, block in shown:
        names = sorted(innermost(groups, block))
        summed = [_positions(groups, block, name) for name in names]  # for each pair of units
        share = fmean(
            by_weights(name) / (often[name] * math.sqrt(count))
            for name, count in zip(names, summed, strict=True)
        )
        deviation = _by_activations(each, block)
        weight = dual / (1 - dual) * share / deviation if deviation > 0 else 0.0
        found.append(Correlation(each.b, each.layouts[1], [block], weight))
    return found


def _by_weights(comparisons: Sequence[Comparison], groups: Groups, name: str) -> float:
    """The deviation of the similarities of a group's units, were their weights independent."""
    squares = []
    for comparison in comparisons:
        assert comparison.a is not None
        for block in comparison.blocks:
            for axis in block.axes_of(name):
                units = _units(groups, block, axis)
                count = math.prod(block.axes[each].size for each in units)
                spreads = [_spread(block.view(x), units) for x in (comparison.a, comparison.b)]
                size = math.prod(each.size for each in block.axes)
                squares.append(comparison.weight**2 * math.prod(spreads) / (count * size))
    return math.sqrt(math.fsum(squares))


def _by_activations(seen: Correlation, block: Block) -> float:
    """The deviation of a block's correlations."""
    [(view, _)] = seen.operands(block, seen.b)
    size = math.prod(axis.size for axis in block.axes)
    centred = view.reshape(size, size)
    for dim in (0, 1):
        centred = centred - centred.mean(dim, keepdim=True)
    return math.sqrt(math.fsum(centred.square().mean(1).tolist()) / size)


def _positions(groups: Groups, block: Block, name: str) -> int:
    """How many positions of a block belong to each unit of a group."""
    units = _units(groups, block, block.axes_of(name)[0])
    return math.prod(axis.size for at, axis in enumerate(block.axes) if at not in units)


def _units(groups: Groups, block: Block, axis: int) -> list[int]:
    """The axes that say at which unit of a group a position is: its parents' and its own."""
    held = chain_of(block, axis, (), groups[str(block.axes[axis].group)].parents).held
    return [*(place for place in held if place >= 0), axis]


def _spread(view: Tensor, units: list[int]) -> float:
    """The sum of squared differences from the mean over the units."""
    count = math.prod(view.shape[axis] for axis in units)
    rest = [axis for axis in range(view.dim()) if axis not in units]
    _, _, squares = ops.channel_moments(view.permute(*units, *rest).reshape(count, -1))
    return math.fsum(squares.tolist())
