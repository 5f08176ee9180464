"""The algebra of axes against its meaning: every permutation that the axes leave commutes.

A *world* is a random sequence of operations on small tensors, of numbers and of axes at once. When
the permutations that its axes allow are drawn at random and its parameters are permuted by them,
every tensor that is computed from these must come out permuted as its own axes say.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nlm.symmetry import atoms, axes, sums
from nlm.symmetry.atoms import Atom, Axis
from nlm.symmetry.dependence import settle, tell_apart
from nlm.symmetry.handlers import Array, always_with

Choices = dict[Atom, int]


class Draw:
    """A permutation for every leaf, drawn when it is first asked for; pinned ones stay."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn: dict[Atom, list[int]] = {}

    def of(self, leaf: Atom) -> list[int]:
        if leaf not in self.drawn:
            index = torch.randperm(leaf.size, generator=self.generator).tolist()
            self.drawn[leaf] = list(range(leaf.size)) if leaf.pinned else index
        return self.drawn[leaf]


def digits(position: int, sizes: Sequence[int]) -> list[int]:
    found = []
    for size in reversed(sizes):
        position, digit = divmod(position, size)
        found.append(digit)
    return found[::-1]


def joined(found: Sequence[int], sizes: Sequence[int]) -> int:
    position = 0
    for digit, size in zip(found, sizes, strict=True):
        position = position * size + digit
    return position


def part_of(atom: Atom, digit: int) -> tuple[int, int]:
    """The part of a sum in which a position stands, and where the part begins."""
    start = 0
    for number, part in enumerate(atom.parts):
        if digit < start + atoms.size_of(part):
            return number, start
        start += atoms.size_of(part)
    raise AssertionError("a sum is as long as its parts")


def choose(axis: Sequence[Atom], position: int, chosen: Choices) -> None:
    """Notes in which part of every sum a position stands."""
    axis = atoms.resolve(axis)
    for atom, digit in zip(axis, digits(position, atoms.sizes_of(axis)), strict=True):
        if atom.kind == "sum":
            chosen[atom], start = part_of(atom, digit)
            choose(atom.parts[chosen[atom]], digit - start, chosen)
        elif atom.kind == "family" and (selector := atoms.find_selector(atom)) in chosen:
            choose(atom.parts[chosen[selector]], digit, chosen)


def origin(axis: Sequence[Atom], position: int, chosen: Choices, draw: Draw) -> int:
    """Where the value comes from that a permutation brings to a position."""
    axis = atoms.resolve(axis)
    found = []
    for atom, digit in zip(axis, digits(position, atoms.sizes_of(axis)), strict=True):
        if atom.kind == "leaf":
            found.append(draw.of(atom)[digit])
        elif atom.kind == "sum":
            number, start = part_of(atom, digit)
            found.append(start + origin(atom.parts[number], digit - start, chosen, draw))
        else:
            part = atom.parts[chosen[atoms.find_selector(atom)]]
            found.append(origin(part, digit, chosen, draw))
    return joined(found, atoms.sizes_of(axis))


def permutation(tensor: Sequence[Axis], draw: Draw) -> list[int]:
    """The flat permutation of a whole tensor that a draw stands for."""
    axis = [atom for each in tensor for atom in each]
    found = []
    for position in range(atoms.size_of(axis)):
        chosen: Choices = {}
        known = -1
        while known < len(chosen):
            known = len(chosen)
            choose(axis, position, chosen)
        found.append(origin(axis, position, chosen, draw))
    assert sorted(found) == list(range(len(found)))
    return found


Compute = Callable[[list[Tensor]], Tensor]


class World:
    """Tensors by their axes, with how each is computed from those before it."""

    def __init__(self, pick: Callable[[Sequence[Any]], Any]) -> None:
        self.pick = pick
        self.axes: list[list[Axis]] = []
        self.values: list[Tensor] = []
        self.compute: list[Compute | None] = []  # None for parameters
        self.records: list[tuple[tuple[Axis, ...], frozenset]] = []

    def add(self, tensor: list[Axis], compute: Compute | None, value: Tensor | None = None) -> None:
        if value is None:
            assert compute is not None
            value = compute(self.values)
        assert [atoms.size_of(axis) for axis in tensor] == list(value.shape)
        self.axes.append(tensor)
        self.values.append(value)
        self.compute.append(compute)
        self.records.append((tuple(tensor), frozenset()))

    def parameter(self) -> None:
        self.parameter_of([self.pick([1, 2, 3, 4, 6]) for _ in range(self.pick([1, 2]))])

    def parameter_of(self, shape: Sequence[int]) -> None:
        kinds = self.pick([(atoms.free,)] * 3 + [(atoms.free, lambda n: atoms.fixed(n, "input"))])
        value = torch.rand(tuple(shape), dtype=torch.float64)
        self.add([self.pick(kinds)(size) for size in shape], None, value)

    def some(self) -> tuple[int, list[Axis], Tensor]:
        number = self.pick(range(len(self.axes)))
        return number, self.axes[number], self.values[number]

    def together(self, leaves, lead):
        return always_with(self.records, leaves, lead)

    # Every operation is done on axes as its handler does it.

    def permuted(self) -> None:
        number, tensor, value = self.some()
        dims = self.pick(list(itertools.permutations(range(value.dim()))))
        self.add([tensor[dim] for dim in dims], lambda v: v[number].permute(dims))

    def viewed(self) -> None:
        number, tensor, value = self.some()
        shape, left = [], value.numel()
        while left > 1:
            shape.append(self.pick([n for n in range(2, left + 1) if left % n == 0]))
            left //= shape[-1]
        self.add(axes.view(tensor, shape), lambda v: v[number].reshape(shape))

    def stretches(self, size: int) -> list[int]:
        ends = sorted({size, *(self.pick(range(1, size)) for _ in range(self.pick([1, 1, 2])))})
        return [stop - start for start, stop in itertools.pairwise([0, *ends])]

    def split(self) -> None:
        number, tensor, value = self.some()
        if long := [dim for dim, size in enumerate(value.shape) if size > 1]:
            dim = self.pick(long)
            sizes = self.stretches(value.shape[dim])
            found = sums.pieces(tensor, dim, sizes, self.together)
            for place in {self.pick(range(len(sizes))) for _ in range(2)}:
                self.add(
                    found[place],
                    lambda v, place=place: v[number].split(sizes, dim)[place],
                )

    def overwritten(self) -> None:
        """A stretch of a vector is replaced by the values of another parameter."""
        number, tensor, value = self.some()
        if value.dim() == 1 and len(value) > 1:
            first, *rest = sums.cut(tensor[0], sizes := self.stretches(len(value)))
            self.parameter_of([sizes[0]])
            other = len(self.axes) - 1
            assert atoms.size_of(first) == sizes[0]
            axis = sums.concatenate([self.axes[other][0], *rest])
            self.add([axis], lambda v: torch.cat([v[other], v[number][sizes[0] :]]))

    def partner(self, value: Tensor, dim: int | None = None) -> int:
        """Another tensor that has the same sizes, but for one dimension; the same if need be."""

        def rest(each: Tensor) -> list[int]:
            return [size for at, size in enumerate(each.shape) if at != dim]

        same = [
            number
            for number, each in enumerate(self.values)
            if each.dim() == value.dim() and rest(each) == rest(value)
        ]
        return self.pick(same)

    def concatenated(self) -> None:
        one, _, value = self.some()
        if not value.dim():
            return
        dim = self.pick(range(value.dim()))
        numbers = [one, *(self.partner(value, dim) for _ in range(self.pick([1, 1, 2])))]
        tensors = [self.axes[number] for number in numbers]
        found = axes.broadcast(*([*t[:dim], [], *t[dim + 1 :]] for t in tensors))
        found[dim] = sums.concatenate([tensor[dim] for tensor in tensors])
        self.add(found, lambda v: torch.cat([v[number] for number in numbers], dim))

    def stacked(self) -> None:
        one, _, value = self.some()
        numbers = [one, *(self.partner(value) for _ in range(self.pick([1, 2])))]
        dim = self.pick(range(value.dim() + 1))
        new, found = sums.stack([self.axes[number] for number in numbers])
        found.insert(dim, new)
        self.add(found, lambda v: torch.stack([v[number] for number in numbers], dim))

    def added(self) -> None:
        one, tensor, value = self.some()
        other = self.partner(value)
        found = axes.broadcast(tensor, self.axes[other])
        self.add(found, lambda v: v[one] * 0.7 + v[other])

    def spread(self) -> None:
        number, tensor, _ = self.some()
        size = self.pick([2, 3])
        self.add([atoms.wild(size), *tensor], lambda v: v[number].expand(size, *v[number].shape))

    def repeated(self) -> None:
        number, tensor, value = self.some()
        if value.dim():
            repeat = self.pick([True, False])
            axis = tensor[-1]
            axis = [*atoms.wild(2), *axis] if repeat else [*axis, *atoms.wild(2)]
            times = [*[1] * (value.dim() - 1), 2]
            self.add(
                [*tensor[:-1], axis],
                lambda v: v[number].repeat(times) if repeat else v[number].repeat_interleave(2, -1),
            )

    def largest(self) -> None:
        number, tensor, value = self.some()
        if value.dim():
            dim = self.pick(range(value.dim()))
            self.add([*tensor[:dim], *tensor[dim + 1 :]], lambda v: v[number].amax(dim))

    def multiplied(self) -> None:
        one, tensor, value = self.some()
        if value.dim() == 2:
            widths = [v.shape[1] if v.dim() == 2 else 0 for v in self.values]
            other = self.pick([n for n, width in enumerate(widths) if width == value.shape[1]])
            factor = self.axes[other]
            axes.unify(tensor[1], factor[1])
            self.records.append(((tensor[0], tensor[1], factor[0]), frozenset()))
            self.add([tensor[0], factor[0]], lambda v: v[one] @ v[other].t())

    def pinned(self) -> None:
        _, tensor, value = self.some()
        if value.dim():
            atoms.pin(self.pick(tensor), "told apart")

    def collapsed(self) -> None:
        _, tensor, _ = self.some()
        for each in [each for axis in tensor for each in atoms.compounds(axis)]:
            if each.kind == "family" and self.pick([True, False]):
                axes.collapse(each)


OPERATIONS = [
    World.parameter, World.permuted, World.viewed, World.viewed, World.split, World.split,
    World.overwritten, World.concatenated, World.stacked, World.added, World.added, World.spread,
    World.repeated, World.largest, World.multiplied, World.pinned, World.collapsed,
]  # fmt: skip
ADDING = {World.split}  # a leaf may become a family there, which has more permutations


def described(world: World) -> str:
    """The axes of all tensors, leaves numbered as they are met."""
    numbers: dict[Atom, int] = {}

    def text(axis: Sequence[Atom]) -> str:
        return " x ".join(
            f"{'p' if atom.pinned else 'w' if atom.wild else 'g'}"
            f"{numbers.setdefault(atom, len(numbers))}:{atom.size}"
            if atom.kind == "leaf"
            else f"{atom.kind}({' | '.join(map(text, atom.parts))})"
            for atom in atoms.resolve(axis)
        )

    return "; ".join(", ".join(map(text, tensor)) for tensor in world.axes)


def built(pick: Callable[[Sequence[Any]], Any], length: int, watched: bool = False) -> World:
    torch.manual_seed(0)
    world = World(pick)
    world.parameter()
    for _ in range(length):
        operation = pick(OPERATIONS)
        memo: dict[int, Any] = {}
        before = copy.deepcopy(world.axes, memo) if watched else []
        operation(world)
        if watched and operation not in ADDING:
            only_takes_away(world, before, memo)
        if world.values[-1].numel() > 48:
            for each in (world.axes, world.values, world.compute):
                each.pop()
    finish(world)
    return world


def finish(world: World) -> None:
    """What discovery does at the end: families that do not hold everywhere are given up."""
    entries = [
        Array(tensor)
        for tensor, compute in zip(world.axes, world.compute, strict=True)
        if compute is None
    ]
    for tensor in world.axes:
        for axis in tensor:
            atoms.mark_read(axis)
    tell_apart(world.records, entries)
    settle(world.records, entries)


def only_takes_away(world: World, before: list[list[Axis]], memo: dict[int, Any]) -> None:
    """What is allowed after an operation was allowed before it."""
    every = [atom for tensor in [*world.axes, *before] for axis in tensor for atom in axis]
    if any(each.kind == "family" for each in atoms.compounds(every)):
        return  # a member alone does not say where it stands
    originals = {id(copied): number for number, copied in memo.items()}
    living = {id(each): each for each in _reachable(world.axes)}
    draw, induced = Draw(0), Draw(0)
    for leaf in (leaf for tensor in before for axis in tensor for leaf in atoms.leaves(axis)):
        now = living.get(originals[id(leaf)])
        if now is None:
            return  # replaced
        index = permutation([[now]], draw)
        assert not leaf.pinned or index == sorted(index)
        induced.drawn[leaf] = index
    for old, new in zip(before, world.axes, strict=False):
        assert permutation(old, induced) == permutation(new, draw)


def _reachable(tensors: list[list[Axis]]) -> list[Atom]:
    """All atoms by which tensors are written, also those that were replaced since."""
    found: dict[int, Atom] = {}

    def walk(atom: Atom) -> None:
        if id(atom) not in found:
            found[id(atom)] = atom
            for other in [*([atom.forward] if atom.forward else []), *itertools.chain(*atom.parts)]:
                walk(other)

    for atom in [atom for tensor in tensors for axis in tensor for atom in axis]:
        walk(atom)
    return list(found.values())


def check(world: World, seed: int) -> None:
    draw = Draw(seed)
    moved: list[Tensor] = []
    for tensor, value, compute in zip(world.axes, world.values, world.compute, strict=True):
        index = torch.tensor(permutation(tensor, draw))
        expected = value.flatten()[index].view(value.shape)
        moved.append(expected if compute is None else compute(moved))
        torch.testing.assert_close(moved[-1], expected, rtol=0, atol=1e-9)


def pick_by(data: st.DataObject) -> Callable[[Sequence[Any]], Any]:
    return lambda options: data.draw(st.sampled_from(options))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.data())
def test_permutations_that_axes_allow_commute_with_what_is_computed(data) -> None:
    world = built(pick_by(data), data.draw(st.integers(1, 12)))
    for seed in range(2):
        check(world, seed)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_operations_only_take_permutations_away(data) -> None:
    built(pick_by(data), data.draw(st.integers(1, 8)), watched=True)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.randoms(use_true_random=False), st.integers(0, 2**32))
def test_the_same_operations_give_the_same_axes(_, seed: int) -> None:
    import random

    first, second = (built(random.Random(seed).choice, 10) for _ in range(2))
    assert described(first) == described(second)
