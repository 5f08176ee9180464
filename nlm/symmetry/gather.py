"""From the layouts of a parameter and a permutation to the index arrays of the ``permute`` op.

For every dimension that a moved group touches, the new position is decomposed into the coordinates
of its layout's parts, each coordinate is looked up in its group's permutation, and the old position
is put together again. A group whose parent stands in the same dimension (heads x head_dim) needs
no more than a flat index; where the parent is another dimension of the parameter (experts
[E, F, D]) the index gets that dimension as a leading axis.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nlm import ops
from nlm.symmetry.layout import Family, Fixed, Layout, Product, Ref, references
from nlm.symmetry.permutation import Groups, Permutation, identity, is_free

Coordinates = dict[str, Tensor]  # group -> its index at each position; -1 where it has none
Layouts = tuple[Layout, ...]


@dataclass(frozen=True)
class Gather:
    """One gathered axis: ``new[i] = old[index[i_parents..., i]]`` along ``axis``."""

    axis: int
    index: Tensor  # int64 [*sizes of the parent axes, size of the axis]
    parents: tuple[int, ...] = ()


class _Moved:
    """The index arrays of those groups whose permutation is not the identity.

    Each is looked at when it is asked for: a parameter carries few of a deep network's groups.
    """

    def __init__(self, groups: Groups, permutation: Permutation) -> None:
        self._groups, self._permutation = groups, permutation
        self._known: dict[str, bool] = {}

    def __contains__(self, name: str) -> bool:
        if name not in self._known:
            moves = name in self._permutation and is_free(self._groups, name)
            self._known[name] = moves and not torch.equal(
                self._permutation[name], identity(self._groups, name)
            )
        return self._known[name]

    def __getitem__(self, name: str) -> Tensor:
        return self._permutation[name]


class Gathers:
    """The gathers of one full permutation; an index that many parameters share is built once.

    Groups whose permutation is the identity are left alone.
    """

    def __init__(self, groups: Groups, permutation: Permutation) -> None:
        self.groups = groups
        self.moved = _Moved(groups, permutation)
        self._built: dict[Layouts, Tensor] = {}

    def of(self, layouts: Layouts, left_out: Collection[int] = ()) -> list[Gather]:
        """The gathers of a parameter, but for the dimensions that are left out."""
        found = []
        for axis, layout in enumerate(layouts):
            if axis in left_out or not self._moves(layout):
                continue
            outer = self._outer_axes(axis, layouts)
            key = (*(layouts[other] for other in outer), layout)
            if key not in self._built:
                self._built[key] = self._build(key)
            found.append(Gather(axis, self._built[key], outer))
        return found

    def _build(self, layouts: Layouts) -> Tensor:
        """The index of the last layout's axis, with the others as its parent axes."""
        *outer, own = layouts
        if isinstance(own, Ref) and not self.groups[own.group].parents:
            return self.moved[own.group]
        known: Coordinates = {}
        for axis, layout in enumerate(outer):
            shape = [-1 if other == axis else 1 for other in range(len(layouts))]
            known.update(_coordinates(layout, torch.arange(layout.size).view(shape), known))
        sizes = [layout.size for layout in layouts]
        position = torch.arange(own.size).expand(sizes)
        known = {name: index.expand(sizes) for name, index in known.items()}
        return self._old(own, position, known).contiguous()

    def _moves(self, layout: Layout) -> bool:
        return any(ref.group in self.moved for ref in references(layout))

    def _outer_axes(self, axis: int, layouts: Layouts) -> tuple[int, ...]:
        """The other axes of the parameter that hold parents or selectors missing on this one."""
        axes: list[int] = []
        for name in self._missing(layouts[axis], _factors(layouts[axis])):
            holders = [
                other
                for other, candidate in enumerate(layouts)
                if other != axis and name in _factors(candidate)
            ]
            if len(holders) != 1:
                raise ValueError(
                    f"nlm.symmetry: the index of {name!r}, on which axis {axis} "
                    f"({layouts[axis]}) depends, must stand on exactly one other axis, got "
                    f"{len(holders)} in [{', '.join(map(str, layouts))}]"
                )
            if holders[0] not in axes:
                axes.append(holders[0])
        return tuple(axes)

    def _missing(self, layout: Layout, here: set[str]) -> Iterator[str]:
        """The parents and selectors that the moved groups of a layout need and that are not here.

        Those of a sum's or a family's part are here only for that part.
        """
        if isinstance(layout, Ref):
            if layout.group in self.moved:
                yield from (name for name in self.groups[layout.group].parents if name not in here)
        elif not isinstance(layout, Fixed) and self._moves(layout):
            if isinstance(layout, Family) and layout.selector not in here:
                yield layout.selector
            for part in layout.parts:
                yield from self._missing(part, here | _factors(part))

    def _old(self, layout: Layout, position: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        """For every new position along a layout the old one; ``known`` are the new coordinates."""
        if not self._moves(layout):
            return position
        if isinstance(layout, Ref):
            parents = [known[parent] for parent in self.groups[layout.group].parents]
            if any(bool((parent < 0).any()) for parent in parents):
                raise ValueError(
                    f"nlm.symmetry: the parents of a group have an index wherever it stands, got "
                    f"{layout.group!r} in places without one of "
                    f"{', '.join(self.groups[layout.group].parents)}"
                )
            return self.moved[layout.group][(*parents, position)]
        if isinstance(layout, Product):
            known = {**known, **_coordinates(layout, position, known)}
            old = torch.zeros_like(position)
            for part, local in _split(layout, position):
                old = old * part.size + self._old(part, local, known)
            return old
        assert not isinstance(layout, Fixed)
        old = position.clone()
        start = 0
        for number, part in enumerate(layout.parts):
            if isinstance(layout, Family):
                inside = known[layout.selector] == number
            else:
                inside = (position >= start) & (position < start + part.size)
            if self._moves(part):
                local = position[inside] - start
                around = {name: index[inside] for name, index in known.items()}
                old[inside] = start + self._old(part, local, around)
            if not isinstance(layout, Family):
                start += part.size
        return old


def gathers(layouts: Layouts, groups: Groups, permutation: Permutation) -> list[Gather]:
    """The gathers that apply a full permutation to one parameter."""
    return Gathers(groups, permutation).of(layouts)


def apply(
    tensors: Iterable[Tensor],
    plans: Iterable[list[Gather]],
    out: list[Tensor] | None = None,
) -> list[Tensor]:
    """Each tensor in its new order: without gradients, on the tensor's own device.

    Written to ``out`` where it is given, contiguous and of the same shapes and types.
    """
    tensors, plans = [tensor.detach() for tensor in tensors], list(plans)
    return ops.permute(
        tensors,
        [
            [gather.index.to(tensor.device) for gather in plan]
            for tensor, plan in zip(tensors, plans, strict=True)
        ],
        [[gather.axis for gather in plan] for plan in plans],
        [[gather.parents for gather in plan] for plan in plans],
        out=out,
    )


def _factors(layout: Layout) -> set[str]:
    """The groups whose index a position along a layout tells, in a family by its selector."""
    if isinstance(layout, Ref):
        return {layout.group}
    if isinstance(layout, (Product, Family)):
        return set().union(*(_factors(part) for part in layout.parts))
    return set()


def _coordinates(layout: Layout, position: Tensor, known: Mapping[str, Tensor]) -> Coordinates:
    """The index of each factor group at every position along a layout."""
    if isinstance(layout, Ref):
        return {layout.group: position}
    found: Coordinates = {}
    if isinstance(layout, Product):
        factors = list(_split(layout, position))
        for part, local in sorted(factors, key=lambda factor: isinstance(factor[0], Family)):
            found = _coordinates(part, local, {**known, **found}) | found
    elif isinstance(layout, Family) and layout.selector in known:
        for number, part in enumerate(layout.parts):
            inside = known[layout.selector] == number
            for name, index in _coordinates(part, position, known).items():
                found[name] = torch.where(inside, index, found.get(name, -1))
    return found


def _split(layout: Product, position: Tensor) -> Iterator[tuple[Layout, Tensor]]:
    """The position within each part of a product."""
    stride = layout.size
    for part in layout.parts:
        stride //= part.size
        yield part, (position // stride) % part.size
