"""Siblings: modules that the graph treats alike, while it is read.

All siblings have the same axes, those of their stacked parameters but for the first: their index.
A node that belongs to one sibling is a slice of the whole at its index, so the index stands in
every record of it. Nodes that pick a sibling's part (column i of a router's gates) do not cut the
axis that they pick from: it is the siblings' index. Nodes that lay results of all siblings along a
dimension have it there. That the graph does treat them alike is decided in
:mod:`nlm.symmetry.alike`.
"""

import operator
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from nlm.symmetry.atoms import Atom, Axis, is_pinned, pin, resolve, size_of
from nlm.symmetry.axes import broadcast, unify, view
from nlm.symmetry.graph import operation_name
from nlm.symmetry.handlers import Array
from nlm.symmetry.handlers.registry import dim_of, replaced
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
        dim = args[1] if len(args) > 1 else node.kwargs.get("dim", 0)
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


def _is_part(node: fx.Node) -> bool:
    return node.target is operator.getitem
