"""From the layouts of a parameter and a permutation to the index arrays of the ``permute`` op.

For every dimension that a free group touches the index array is filled block by block: within one,
the old position is the sum over the axes of stride times the index looked up in the axis' group. A
group whose parent stands in the same dimension (heads x head_dim) needs no more than a flat index;
where the parent is another dimension of the parameter (experts [E, F, D]) the index gets that
dimension as a leading axis.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nlm.symmetry.blocks import Block, blocks, choices
from nlm.symmetry.layout import Layout, references
from nlm.symmetry.permutation import Groups, Permutation, is_free


@dataclass(frozen=True)
class Gather:
    """One gathered axis: ``new[i] = old[index[i_parents..., i]]`` along ``axis``."""

    axis: int
    index: Tensor  # int64 [*sizes of the parent axes, size of the axis]
    parents: tuple[int, ...] = ()


def gathers(
    layouts: tuple[Layout, ...], groups: Groups, permutation: Permutation
) -> Iterator[Gather]:
    """The gathers that apply a full permutation to one parameter."""
    for axis, layout in enumerate(layouts):
        if not any(is_free(groups, ref.group) for ref in references(layout)):
            continue
        outer = _parent_axes(axis, layouts, groups)
        parts = [*(layouts[other] for other in outer), layout]
        sizes = [part.size for part in parts]
        index = torch.empty(sizes, dtype=torch.int64)
        for block in blocks(parts, sizes):
            block.view(index).copy_(_old_positions(block, groups, permutation))
        yield Gather(axis, index, outer)


def _parent_axes(axis: int, layouts: tuple[Layout, ...], groups: Groups) -> tuple[int, ...]:
    """The other axes of the parameter that hold parents or selectors missing on this one."""
    axes: list[int] = []
    names = list(_missing(layouts[axis], groups))
    while names:
        name = names.pop(0)
        holders = [
            other
            for other, candidate in enumerate(layouts)
            if other != axis and all(part.axes_of(name) for part in choices(candidate))
        ]
        if len(holders) != 1:
            raise ValueError(
                f"nlm.symmetry: the index of {name!r}, on which axis {axis} ({layouts[axis]}) "
                f"depends, must stand on exactly one other axis, got {len(holders)} in "
                f"[{', '.join(map(str, layouts))}]"
            )
        if holders[0] not in axes:
            axes.append(holders[0])
            names += [
                other
                for part in choices(layouts[holders[0]])
                for other in part.at
                if not part.axes_of(other)
            ]
    return tuple(axes)


def _missing(layout: Layout, groups: Groups) -> dict[str, None]:
    """The groups that say what happens along a layout and do not stand there themselves."""
    missing: dict[str, None] = {}
    for part in choices(layout):
        needed = list(part.at)
        if moving := [name for name in needed if is_free(groups, name)]:
            raise ValueError(
                f"nlm.symmetry: the group that selects among the parts of a family is fixed, got "
                f"{moving[0]!r} in {layout}"
            )
        for axis in part.axes:
            if axis.group is not None and is_free(groups, axis.group):
                needed += groups[axis.group].parents
        missing |= dict.fromkeys(name for name in needed if not part.axes_of(name))
    return missing


def _old_positions(block: Block, groups: Groups, permutation: Permutation) -> Tensor:
    """The old position along the last dimension for every new one, one dimension per axis."""
    count = len(block.axes)

    def along(number: int) -> Tensor:
        shape = [-1 if other == number else 1 for other in range(count)]
        return torch.arange(block.axes[number].size).reshape(shape)

    old = torch.tensor(block.start[-1])
    for number, axis in enumerate(block.axes):
        if axis.dim != len(block.start) - 1:
            continue
        position = along(number)
        if axis.group is not None and is_free(groups, axis.group):
            parents = tuple(
                torch.tensor(block.at[parent])
                if parent in block.at
                else along(block.axis_of_parent(parent, number))
                for parent in groups[axis.group].parents
            )
            position = permutation[axis.group][(*parents, position)]
        old = old + axis.stride * position
    return old
