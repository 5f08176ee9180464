"""Siblings: modules that the graph treats alike, while it is read.

All siblings have the same axes, those of their stacked parameters but for the first: their index.
A node that belongs to one sibling is a slice of the whole at its index, so the index stands in
every record of it. Nodes that pick a sibling's part (column i of a router's gates) do not cut the
axis that they pick from: it is the siblings' index. Nodes that lay results of all siblings along a
dimension have it there. That the graph does treat them alike is decided in
:mod:`nlm.symmetry.alike`.
"""

import operator
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from nlm.symmetry.atoms import Atom, Axis, is_pinned, pin, resolve, size_of
from nlm.symmetry.axes import broadcast, unify, view
from nlm.symmetry.graph import operation_name
from nlm.symmetry.handlers import Array
from nlm.symmetry.handlers.registry import dim_of, replaced
from nlm.symmetry.handlers.shapes import span
from nlm.symmetry.operations import bound
from nlm.symmetry.stacks import stack_of
from nlm.symmetry.sums import concatenate

Space = Hashable  # siblings, or the positions of an axis


@dataclass(frozen=True)
class Pick:
    """One of n equal stretches of a dimension (None: one of the values that index values take)."""

    space: Space
    index: int
    count: int
    dim: int | None
    source: fx.Node
    kept: bool = False  # whether the dimension stays, as that stretch


@dataclass
class Siblings:
    """Siblings that are alike.

    Attributes
    ----------
    names : name of a stack -> its members.
    index : node -> the sibling to which it belongs.
    picks : the nodes that take what is picked for a sibling.
    joins : node -> the runs of arguments that it lays along a dimension, one of each sibling.
    axis : the siblings' index, while a graph is read.
    """

    names: dict[str, tuple[str, ...]]
    index: dict[fx.Node, int] = field(default_factory=dict)
    picks: dict[fx.Node, Pick] = field(default_factory=dict)
    joins: dict[fx.Node, list[range]] = field(default_factory=dict)
    axis: Axis = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stack_of = stack_of(self.names)

    @property
    def count(self) -> int:
        return len(next(iter(self.names.values())))

    @property
    def movable(self) -> bool:
        """Whether the algebra of axes has left permutations of all siblings."""
        atoms = resolve(self.axis)
        return all(atom.kind == "leaf" for atom in atoms) and not is_pinned(atoms)

    def begin(self) -> None:
        """Before a graph is read."""
        self.axis = [Atom(self.count, read=True)]
        self.whole = {pick.source for node, pick in self.picks.items() if _is_part(node)}

    def result(self, node: fx.Node, args: Any) -> Any:
        """What a node yields that picks or joins; None for any other."""
        if node in self.whole:
            return args[0]
        if node in self.picks:
            return self._picked(self.picks[node], args[0])
        if node in self.joins:
            return self._joined(node, args)
        return None

    def _picked(self, pick: Pick, x: Array) -> Array:
        if pick.dim is None:
            unify(x.over or [], self.axis)
            return Array(x.axes)
        axis = x.axes[pick.dim]
        outer, inner = view([axis], [self.count, size_of(axis) // self.count])
        unify(outer, self.axis)
        axes = replaced(x.axes, pick.dim, inner) if pick.kept else replaced(x.axes, pick.dim)
        return Array(axes, x.over)

    def _joined(self, node: fx.Node, args: Any) -> Array:
        parts: list[Array] = list(args[0])
        if any(x.over is not None for x in parts):
            pin(self.axis, "index values")
        dim = bound(node.target, node.args, node.kwargs).get("dim", 0)
        if operation_name(node.target) == "stack":
            axes = broadcast(*(x.axes for x in parts))
            axes.insert(dim % (len(axes) + 1), self.axis)
            return Array(axes)
        dim = dim_of(parts[0], dim)
        others = broadcast(*(replaced(x.axes, dim, []) for x in parts))
        axes, place = [], 0
        for run in [*self.joins[node], range(len(parts), len(parts))]:
            axes += [x.axes[dim] for x in parts[place : run.start]]
            if run:
                [inner] = broadcast(*([x.axes[dim]] for x in parts[run.start : run.stop]))
                axes.append([*self.axis, *inner])
            place = run.stop
        return Array(replaced(others, dim, concatenate(axes)))


# --- what is picked -------------------------------------------------------------------------------


def picks(nodes: fx.Graph, values: Mapping[fx.Node, Any]) -> Iterator[tuple[fx.Node, Pick]]:
    """The nodes that take one of n equal stretches of an axis; ``values`` are all nodes' axes."""
    for node in nodes.nodes:
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        source = node.args[0]
        whole: Any = source.args[0] if _is_part(node) and source.args else source
        x = values.get(whole)
        if not isinstance(x, Array):
            continue
        found = _part(node, source, x) if _is_part(node) else _stretch(node, x)
        if found is None:
            continue
        axis, index, width, dim, kept = found
        atoms = resolve(axis)
        count, rest = divmod(size_of(axis), width) if type(width) is int and width > 0 else (0, 0)
        if atoms and count > 1 and not rest and type(index) is int:
            yield node, Pick((atoms[0], count), index % count, count, dim, source, kept)


Stretch = tuple[Axis, Any, Any, int | None, bool]  # of an axis: its number, width; dimension, kept


def _stretch(node: fx.Node, x: Array) -> Stretch | None:
    name = operation_name(node.target)
    given = bound(node.target, node.args, node.kwargs)
    if name in ("eq", "ne") and x.over is not None:
        return x.over, given["other"], 1, None, False
    if name in ("select", "select_copy"):
        dim = dim_of(x, given["dim"])
        return x.axes[dim], given["index"], 1, dim, False
    if name in ("slice", "slice_copy", "narrow") and given.get("step", 1) == 1:
        dim = dim_of(x, given.get("dim", 0))
        start: Any = given.get("start")
        end = start + given["length"] if name == "narrow" else given.get("end")
        if all(each is None or type(each) is int for each in (start, end)):
            first, last = span(x, dim, start, end)
            if last > first and first % (last - first) == 0:
                return x.axes[dim], first // (last - first), last - first, dim, True
    return None


def _part(node: fx.Node, source: fx.Node, x: Array) -> Stretch | None:
    name = operation_name(source.target)
    if name not in ("unbind", "unbind_copy", "split", "chunk", "split_with_sizes", "tensor_split"):
        return None
    dim = dim_of(x, bound(source.target, source.args, source.kwargs).get("dim", 0))
    shapes = [list(each.shape) for each in source.meta["val"]]
    width = size_of(x.axes[dim]) // len(shapes)
    equal = all(shape == shapes[0] for shape in shapes)
    return (x.axes[dim], node.args[1], width, dim, name[:6] != "unbind") if equal else None


def _is_part(node: fx.Node) -> bool:
    return node.target is operator.getitem
