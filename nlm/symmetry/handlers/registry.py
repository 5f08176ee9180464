"""The registry of handlers, and what they are given and return."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from nlm.symmetry.atoms import Atom, Axis, compounds, leaves
from nlm.symmetry.sums import pieces


class NotUnderstood(Exception):
    """Raised by a handler for a form of its operation that it does not know."""


@dataclass(frozen=True, eq=False)
class Lookup:
    """Index values along some axes: whoever is looked up with them depends on the index there."""

    axes: tuple[Axis, ...]
    over: Axis

    def leaves(self) -> list[Atom]:
        """Those of its axes: where all of them stand, the index is known."""
        return [leaf for axis in self.axes for leaf in leaves(axis)]


@dataclass
class Array:
    """What is known about a tensor.

    Attributes
    ----------
    axes : one per dimension.
    over : where the values are positions along an axis (the result of topk), that axis.
    lookup : the identity of these values, kept while they are only reshaped.
    lookups : the index values that the tensor was looked up with, or computed from what was.
    constant : the value, of small tensors that depend on no input and no parameter.
    tied : whether several values may well be equal (zeros of a relu, signs, integers).
    """

    axes: list[Axis]
    over: Axis | None = None
    lookup: Lookup | None = None
    lookups: frozenset[Lookup] = frozenset()
    constant: Tensor | None = None
    tied: bool = False

    def __post_init__(self) -> None:
        if self.over is not None and self.lookup is None:
            self.lookup = Lookup(tuple(self.axes), self.over)

    def shaped(self, axes: list[Axis]) -> "Array":
        """The same values in another shape."""
        return Array(axes, self.over, self.lookup, self.lookups)


Record = tuple[tuple[Axis, ...], frozenset[Lookup]]


def always_with(records: list[Record], candidates: Iterable[Atom], lead: Atom) -> list[Atom]:
    """Which of some leaves stand in no tensor without an atom.

    A scan that ends early: while a graph is read its axes change with every operation, and few
    operations ask (GPT-2: 12, in under 1 ms). Once all is read, ``tell_apart`` keeps an index.
    """
    left = dict.fromkeys(candidates)
    for axes, _ in records:
        if not left:
            break
        if not any(each is lead for axis in axes for each in compounds(axis)):
            for leaf in (leaf for axis in axes for leaf in leaves(axis)):
                left.pop(leaf, None)
    return list(left)


@dataclass
class Step:
    """One operation of the graph, for its handler.

    ``around`` are axes at one position of which the operation runs (:mod:`nlm.symmetry.siblings`).
    """

    node: fx.Node
    records: list[Record]
    lookups: frozenset[Lookup] = frozenset()
    around: tuple[Axis, ...] = ()

    @property
    def several(self) -> bool:
        """Whether the operation returns several tensors."""
        return isinstance(self.node.meta["val"], (tuple, list))

    @property
    def shape(self) -> list[int]:
        """The shape of the result, of the first of several."""
        value = self.node.meta["val"]
        return [int(size) for size in (value[0] if self.several else value).shape]

    @property
    def shapes(self) -> list[list[int]]:
        """The shapes of several results."""
        return [[int(size) for size in value.shape] for value in self.node.meta["val"]]

    @property
    def name(self) -> str:
        """The operation's name without its library and overload: "linear"."""
        return str(self.node.target).split(".")[1]

    def record(self, axes: Sequence[Axis]) -> None:
        """Notes a tensor that the operation computes on the way, by its axes.

        A product notes all axes that it pairs, before it sums: what stands in both operands at
        different positions (rows and columns of a Gram matrix) is there twice.
        """
        self.records.append(((*self.around, *axes), self.lookups))

    def together(self, candidates: Iterable[Atom], lead: Atom) -> list[Atom]:
        """Which of some leaves stand in no tensor so far without an atom."""
        return always_with(self.records, candidates, lead)

    def pieces(self, x: Array, dim: int, sizes: list[int]) -> list[Array]:
        """A tensor as stretches along a dimension."""
        nonempty = [size for size in sizes if size]
        cuts = iter(pieces(x.axes, dim, nonempty, self.together) if nonempty else [])
        found = []
        for size in sizes:
            axes = next(cuts) if size else [*x.axes[:dim], [Atom(0)], *x.axes[dim + 1 :]]
            found.append(Array(axes, x.over))
        return found


Handler = Callable[..., Any]


@dataclass(frozen=True)
class Registered:
    """A handler; ``reads`` is false where the operation only passes values on.

    ``looks_up`` is true where it understands index values as such; elsewhere those that are not
    passed on are just numbers, and what they number stays in order.
    """

    function: Handler
    reads: bool
    looks_up: bool


HANDLERS: dict[str, Registered] = {}


def handler(
    *names: str, reads: bool = True, looks_up: bool = False
) -> Callable[[Handler], Handler]:
    """Registers a function for operations: "linear" for aten's, "mylib.op" for any other's.

    ``reads=False`` says that the operation returns some of its operand's values as they are,
    ``looks_up=True`` that the function deals with index values (:attr:`Array.over`).
    """

    def register(function: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = Registered(function, reads, looks_up)
        return function

    return register


# --- shared by handlers ---------------------------------------------------------------------------


def dim_of(x: Array, dim: int) -> int:
    return dim % max(len(x.axes), 1)


def replaced(axes: list[Axis], dim: int, *new: Axis) -> list[Axis]:
    return [*axes[:dim], *new, *axes[dim + 1 :]]
