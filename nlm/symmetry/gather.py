"""From the layouts of a parameter and a permutation to the index arrays of the ``permute`` op.

For every dimension that a free group touches, the new position is decomposed into the coordinates
of its layout's parts, each coordinate is looked up in its group's permutation, and the old position
is put together again. A group whose parent stands in the same dimension (heads x head_dim) needs
no more than a flat index; where the parent is another dimension of the parameter (experts
[E, F, D]) the index gets that dimension as a leading axis.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nlm.symmetry.layout import Family, Fixed, Layout, Product, Ref, references
from nlm.symmetry.permutation import Groups, Permutation, is_free

Coordinates = dict[str, Tensor]


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
        shape = (*(layouts[other].size for other in outer), layout.size)
        grid = torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")
        known: Coordinates = {}
        for other, position in zip((*outer, axis), grid, strict=True):
            known.update(_coordinates(layouts[other], position))
        old = _old_position(layout, grid[-1], known, groups, permutation)
        yield Gather(axis, old.contiguous(), outer)


def _parent_axes(axis: int, layouts: tuple[Layout, ...], groups: Groups) -> tuple[int, ...]:
    """The other axes of the parameter that hold parents or selectors missing on this one."""
    layout = layouts[axis]
    axes: list[int] = []
    for name in _missing(layout, groups, set()):
        holders = [
            other
            for other, candidate in enumerate(layouts)
            if other != axis and name in _factors(candidate)
        ]
        if len(holders) != 1:
            raise ValueError(
                f"nlm.symmetry: the index of {name!r}, on which axis {axis} ({layout}) depends, "
                f"must stand on exactly one other axis, got {len(holders)} in "
                f"[{', '.join(map(str, layouts))}]"
            )
        if holders[0] not in axes:
            axes.append(holders[0])
    return tuple(axes)


def _missing(layout: Layout, groups: Groups, known: set[str]) -> Iterator[str]:
    """The parents and selectors whose index the position along a layout does not tell."""
    if isinstance(layout, Ref):
        if is_free(groups, layout.group):
            yield from (name for name in groups[layout.group].parents if name not in known)
    elif not isinstance(layout, Fixed):
        if isinstance(layout, Family) and layout.selector not in known:
            yield layout.selector
        inside = known | _factors(layout)
        for part in layout.parts:
            yield from _missing(part, groups, inside | _factors(part))


def _factors(layout: Layout) -> set[str]:
    """The groups whose index the position along a layout determines everywhere."""
    if isinstance(layout, Ref):
        return {layout.group}
    if isinstance(layout, Product):
        return set().union(*(_factors(part) for part in layout.parts))
    return set()


def _coordinates(layout: Layout, position: Tensor) -> Coordinates:
    """The index of each factor group at every position along a layout."""
    if isinstance(layout, Ref):
        return {layout.group: position}
    found: Coordinates = {}
    if isinstance(layout, Product):
        for part, local in _split(layout, position):
            found.update(_coordinates(part, local))
    return found


def _split(layout: Product, position: Tensor) -> Iterator[tuple[Layout, Tensor]]:
    """The position within each part of a product."""
    stride = layout.size
    for part in layout.parts:
        stride //= part.size
        yield part, (position // stride) % part.size


def _old_position(
    layout: Layout,
    position: Tensor,
    known: Mapping[str, Tensor],
    groups: Groups,
    permutation: Permutation,
) -> Tensor:
    """For every new position along a layout the old one; ``known`` holds the new coordinates."""
    if isinstance(layout, Fixed):
        return position
    if isinstance(layout, Ref):
        if not is_free(groups, layout.group):
            return position
        parents = tuple(known[parent] for parent in groups[layout.group].parents)
        return permutation[layout.group][(*parents, position)]
    if isinstance(layout, Product):
        old = torch.zeros_like(position)
        for part, local in _split(layout, position):
            old = old * part.size + _old_position(part, local, known, groups, permutation)
        return old
    old = torch.empty_like(position)
    start = 0
    for number, part in enumerate(layout.parts):
        if isinstance(layout, Family):
            inside = known[layout.selector] == number
        else:
            inside = (position >= start) & (position < start + part.size)
        local_known = {name: index[inside] for name, index in known.items()}
        local = position[inside] - start
        local_known.update(_coordinates(part, local))
        old[inside] = start + _old_position(part, local, local_known, groups, permutation)
        if not isinstance(layout, Family):
            start += part.size
    return old
