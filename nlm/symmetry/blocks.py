"""Blocks: the plain grids of groups that a parameter with sums and families is made of.

Choosing one part of every sum and one member of every family leaves a product of groups and fixed
stretches: a strided view of the parameter, one axis per factor. The blocks of a parameter cover it
once.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from nlm.symmetry.layout import Family, Fixed, Layout, Product, Ref, references


@dataclass(frozen=True)
class Axis:
    """``size`` positions of a group, or of a fixed stretch (None), ``stride`` apart on ``dim``."""

    group: str | None
    size: int
    stride: int
    dim: int


@dataclass(frozen=True)
class Block:
    """A grid inside a parameter.

    Attributes
    ----------
    axes : its axes, in the order of the dimensions and row-major within one.
    start : where it begins on each dimension.
    at : selector of a family -> its index throughout the block.
    """

    axes: tuple[Axis, ...]
    start: tuple[int, ...]
    at: Mapping[str, int] = field(default_factory=dict)

    def view(self, tensor: Tensor) -> Tensor:
        """The block of a parameter, one dimension per axis, without a copy."""
        steps = tensor.stride()
        offset = sum(start * step for start, step in zip(self.start, steps, strict=True))
        return tensor.as_strided(
            [axis.size for axis in self.axes],
            [axis.stride * steps[axis.dim] for axis in self.axes],
            tensor.storage_offset() + offset,
        )

    def axes_of(self, group: str) -> list[int]:
        """The axes on which a group stands."""
        return [number for number, axis in enumerate(self.axes) if axis.group == group]

    def holds(self, group: str) -> bool:
        """Whether the index of a group is known throughout the block."""
        return group in self.at or bool(self.axes_of(group))

    def axis_of_parent(self, parent: str, child: int) -> int:
        """The axis that says at which index of ``parent`` the units on axis ``child`` are."""
        found = self.axes_of(parent)
        near = [number for number in found if self.axes[number].dim == self.axes[child].dim]
        if not found or (len(found) > 1 and not near):
            raise ValueError(
                f"nlm.symmetry: the index of {parent!r}, on which {self.axes[child].group!r} "
                f"depends, must be known throughout a block, got it on {len(found)} other axes"
            )
        return (near or found)[-1]


def blocks(layouts: Sequence[Layout], shape: Sequence[int], partial: bool = False) -> list[Block]:
    """The blocks of a parameter; a dimension without groups has the size that ``shape`` says.

    ``partial``: families whose selector stands on none of the dimensions are left out.

    Raises
    ------
    ValueError
        The selector of a family stands nowhere.
    """
    dims = [
        list(choices(layout if any(references(layout)) else Fixed(size), dim))
        for dim, (layout, size) in enumerate(zip(layouts, shape, strict=True))
    ]
    found = []
    for choice in itertools.product(*dims):
        at = _agreed(part.at for part in choice)
        if at is None:
            continue
        standing = [axis for part in choice for axis in part.axes]
        if absent := set(at) - {axis.group for axis in standing}:
            if partial:
                continue
            raise ValueError(
                f"nlm.symmetry: the selector of a family stands on a dimension of the parameter, "
                f"got none with {sorted(absent)} in [{', '.join(map(str, layouts))}]"
            )
        start = [part.start[0] for part in choice]
        axes = []
        for axis in standing:
            if axis.group in at:
                start[axis.dim] += at[axis.group] * axis.stride
            else:
                axes.append(axis)
        found.append(Block(tuple(axes), tuple(start), at))
    return found


def choices(layout: Layout, dim: int = 0) -> Iterator[Block]:
    """The blocks along one dimension; selectors still stand on their axes."""
    if isinstance(layout, (Ref, Fixed)):
        group = layout.group if isinstance(layout, Ref) else None
        named = group is not None or layout.size != 1
        yield Block((Axis(group, layout.size, 1, dim),) if named else (), (0,))
    elif isinstance(layout, Product):
        yield from _grids(layout, dim)
    else:
        start = 0
        for number, part in enumerate(layout.parts):
            for choice in choices(part, dim):
                if not isinstance(layout, Family):
                    yield replace(choice, start=(choice.start[0] + start,))
                elif (at := _agreed((choice.at, {layout.selector: number}))) is not None:
                    yield replace(choice, at=at)
            if not isinstance(layout, Family):
                start += part.size


def _grids(layout: Product, dim: int) -> Iterator[Block]:
    for choice in itertools.product(*(list(choices(part, dim)) for part in layout.parts)):
        at = _agreed(part.at for part in choice)
        if at is None:
            continue
        axes: list[Axis] = []
        start, step = 0, layout.size
        for part, inner in zip(layout.parts, choice, strict=True):
            step //= part.size
            start += inner.start[0] * step
            axes += [replace(axis, stride=axis.stride * step) for axis in inner.axes]
        yield Block(tuple(axes), (start,), at)


def _agreed(
    choices: "Iterator[Mapping[str, int]] | Sequence[Mapping[str, int]]",
) -> dict[str, int] | None:
    """What several choices say together; None where they contradict one another."""
    agreed: dict[str, int] = {}
    for choice in choices:
        if any(agreed.setdefault(name, index) != index for name, index in choice.items()):
            return None
    return agreed
