"""Frank-Wolfe steps over all groups of several models at once.

A permutation of model m, written as matrices P_m of zeros and ones, brings its weights into an
order that all models share, Y_m = P_m(W_m). What they have in common there,

    f(P) = sum_{m < n} sum_W <Y_m, Y_n>,

is a polynomial in the matrices: each group that stands on a block of a weight is a factor of it, as
sum_jl P[i, j] W[j, l] Q[k, l] has two, and units inside others are one with their parents. It is
maximised over the convex hull of all permutations: doubly stochastic matrices, and for units inside
others matrices P[h, h', i, i'] whose blocks have all rows and columns sum to the parent's P[h, h'].
A step goes towards the best permutation for the gradient, which nested assignments find exactly
(:mod:`nlm.align.nested`), by the one length for all models and groups at which f is highest: on the
way Y_m is a polynomial whose degree d is the number of factors, known from d + 1 points, and f, of
degree 2 d, from the products between these. The end is projected onto the nearest permutations.

One model may keep its order; for two models this is what Vogelstein et al. do for graphs ("Fast
approximate quadratic programming for graph matching", PLoS ONE 10, 2015), for more Crisostomi et
al. for networks ("Cycle-consistent multi-model merging", arXiv:2405.17897).

Memory: beside the weights (in float32, or float64 where one is), for every model that moves about
five times the matrices of all its groups, n^2 entries for n units, those inside others counted over
all of their parents. The products go through PyTorch's BLAS, which may round differently for
other numbers of threads.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from nlm.align.assignment import best_assignment, matched
from nlm.align.nested import Move
from nlm.align.similarity import chain_of, dot, in_order
from nlm.symmetry.blocks import Block, blocks
from nlm.symmetry.gather import Gathers
from nlm.symmetry.layout import Layout
from nlm.symmetry.permutation import Groups, Permutation, is_free

Point = dict[str, Tensor]  # group -> [*held parents, *parents, *parents in the model, n, n]

_MOST_STEPS = 100
_LEAST_GAIN = 1e-4  # of a step, relative to f
_BLUR = 0.8  # the weight of the hull's centre in where the steps start


@dataclass(frozen=True)
class Entry:
    """A parameter in all models, and its weight in the objective."""

    layouts: tuple[Layout, ...]
    tensors: Sequence[Tensor]
    weight: float = 1.0


@dataclass(frozen=True)
class Factor:
    """What a group does to a block: ``point[group][key]`` acts on the axes with these labels."""

    group: str
    key: tuple[int | slice, ...]
    labels: tuple[int, ...]


class Term:
    """A block of a parameter in all models.

    Axis i has the label i in the shared order, and (number of axes) + i in a model's own where its
    group moves.
    """

    def __init__(
        self, block: Block, views: Sequence[Tensor], weight: float, moves: Mapping[str, Move]
    ) -> None:
        count = len(block.axes)
        chains = {}
        for number, axis in enumerate(block.axes):
            name = axis.group
            if name is not None and name in moves:
                above, held = moves[name].above[name], moves[name].held[name]
                chains[number] = chain_of(block, number, above, held)
        inner = {at for chain in chains.values() for at in chain.axes[:-1]}
        self.block = block
        self.views = views
        self.weight = weight
        self.shared = list(range(count))
        self.own = [count + at if at in chains else at for at in self.shared]
        self.factors = []
        for own, chain in chains.items():
            if own not in inner:
                *parents, _ = chain.axes
                still = (at for at in chain.held if at >= 0)
                labels = (*still, *parents, *(count + at for at in parents), own, count + own)
                self.factors.append(Factor(str(block.axes[own].group), chain.key, labels))

    def carried(
        self, number: int, point: Point | None, without: Factor | None = None
    ) -> tuple[Tensor, list[int]]:
        """A model's block in the shared order, but for one factor, and the labels of its axes."""
        view, labels = self.views[number], self.own
        if point is None:
            return view, self.shared
        left = [factor for factor in self.factors if factor is not without]
        while left:
            factor = left.pop(0)
            needed = {*self.shared, *(without.labels if without is not None else ())}
            needed.update(*(other.labels for other in left))
            kept = sorted(needed & {*labels, *factor.labels})
            matrices = point[factor.group][factor.key]
            view, labels = torch.einsum(view, labels, matrices, factor.labels, kept), kept
        return view, labels

    def add_gradient(
        self, points: Sequence[Point | None], gradients: Sequence[Point | None]
    ) -> None:
        """Adds the gradient of what the block adds to f, for every model that moves."""
        carried = [self.carried(number, point)[0] for number, point in enumerate(points)]
        total = functools.reduce(torch.add, carried)
        for number, gradient in enumerate(gradients):
            if gradient is None:
                continue
            others = (total - carried[number]) * self.weight
            for factor in self.factors:
                view, labels = self.carried(number, points[number], factor)
                gradient[factor.group][factor.key] += torch.einsum(
                    others, self.shared, view, labels, factor.labels
                )

    def along(self, at: Callable[[float], Sequence[Point | None]]) -> Polynomial:
        """What the block adds to f, as a polynomial in the length of a step."""
        nodes = np.linspace(0, 1, len(self.factors) + 1)
        rows = [
            [self.carried(number, point)[0] for number, point in enumerate(at(float(node)))]
            for node in nodes
        ]
        products = np.empty((len(nodes), len(nodes)))
        for first, row in enumerate(rows):
            total = functools.reduce(torch.add, row)
            others = [total - own for own in row]
            for second, other in enumerate(rows[: first + 1]):
                value = sum(map(dot, others, other)) / 2
                products[first, second] = products[second, first] = value
        lagrange = np.linalg.inv(np.vander(nodes, increasing=True))  # [power, node]
        powers = np.arange(len(nodes))
        coefficients = np.bincount(
            np.add.outer(powers, powers).ravel(), (lagrange @ products @ lagrange.T).ravel()
        )
        return Polynomial(self.weight * coefficients)


class Polytope:
    """The convex hull of the permutations of several models.

    Groups whose parents are not inside one another, and all in one tree with them, stay as the
    start has them.

    Parameters
    ----------
    start : the permutation of each model; None for one that keeps its order.
    """

    def __init__(
        self, groups: Groups, entries: Sequence[Entry], start: Sequence[Permutation | None]
    ) -> None:
        self.start = start
        trees = [
            Move(name, groups, {})
            for name, group in groups.items()
            if not group.fixed and not any(is_free(groups, parent) for parent in group.parents)
        ]
        owners = Counter(name for tree in trees for name in tree.members)
        self.trees = [
            tree
            for tree in trees
            if tree.is_chained and all(owners[name] == 1 for name in tree.members)
        ]
        moves = {name: tree for tree in self.trees for name in tree.members}
        still = {**groups, **{name: replace(groups[name], fixed=True) for name in moves}}
        orders = [Gathers(still, permutation or {}) for permutation in start]
        tensors = [tensor for entry in entries for tensor in entry.tensors]
        is_wide = any(tensor.dtype == torch.float64 for tensor in tensors)
        self.dtype = torch.float64 if is_wide else torch.float32
        self.terms: list[Term] = []
        self._parts: list[tuple[list[Tensor], list[Term]]] = []
        for entry in entries:
            parts = [
                in_order(tensor.to(self.dtype), entry.layouts, order)
                for tensor, order in zip(entry.tensors, orders, strict=True)
            ]
            terms = [
                Term(block, [block.view(part) for part in parts], entry.weight, moves)
                for block in blocks(entry.layouts, parts[0].shape)
            ]
            self.terms += terms
            self._parts.append((parts, terms))

    def solve(
        self, progress: Callable[[int, float], None] | None = None, tolerance: float = _LEAST_GAIN
    ) -> tuple[list[Permutation | None], list[float]]:
        """The permutations nearest to where the steps end; f before and after each step.

        A step that gains less than ``tolerance`` of f, or than 1e-4 of it, is the last.
        ``progress`` is called after each step with its number and f.
        """
        points = [self.point(permutation, _BLUR) for permutation in self.start]
        values: list[float] = []
        for step in range(_MOST_STEPS):
            gradients = [
                point and {group: torch.zeros_like(part) for group, part in point.items()}
                for point in points
            ]
            for term in self.terms:
                term.add_gradient(points, gradients)
            ends = [self.point(vertex, 0.0) for vertex in self.nearest(gradients)]
            between = functools.cache(functools.partial(_between, points, ends))
            polynomial = sum((term.along(between) for term in self.terms), Polynomial([0.0]))
            length = _highest(polynomial)
            before, after = (float(polynomial(at)) for at in (0.0, length))
            values = values or [before]
            if after - before <= max(tolerance, _LEAST_GAIN) * abs(after):
                break
            points = between(length)
            values.append(after)
            if progress is not None:
                progress(step + 1, after)
        return self.nearest(points), values

    def carried(self, number: int, point: Point) -> list[Tensor]:
        """A model's parameters in the shared order, differentiable in the matrices."""
        found = []
        for parts, terms in self._parts:
            found.append(torch.empty_like(parts[number]))
            for term in terms:
                term.block.view(found[-1]).copy_(term.carried(number, point)[0])
        return found

    def point(self, permutation: Permutation | None, blur: float) -> Point | None:
        """The matrices of a permutation, drawn towards the centre of the hull."""
        if permutation is None:
            return None
        point = {}
        for tree in self.trees:
            for name in tree.members:
                units = [tree.groups[each].size for each in (*tree.above[name], name)]
                matrix = tree.matrix(name, permutation).to(self.dtype)
                point[name] = matrix.mul_(1 - blur).add_(blur / max(1, math.prod(units)))
        return point

    def nearest(self, points: Sequence[Point | None]) -> list[Permutation | None]:
        """For each model the permutation of the greatest product with some matrices."""
        found: list[Permutation | None] = []
        for point, permutation in zip(points, self.start, strict=True):
            if point is not None and permutation is not None:
                assign = functools.partial(_assigned, point)
                for tree in self.trees:
                    permutation = tree.best(permutation, assign)
            found.append(permutation)
        return found


def _assigned(point: Point, name: str, inner: Tensor | None) -> tuple[Tensor, Tensor]:
    """The best assignments of a group, and what they are worth with those inside them."""
    worth = point[name] if inner is None else point[name] + inner
    table = best_assignment(worth)
    return table, matched(worth, table).sum(-1)


def _between(
    points: Sequence[Point | None], ends: Sequence[Point | None], length: float
) -> list[Point | None]:
    if length in (0.0, 1.0):
        return list(ends if length else points)
    return [
        point
        and end
        and {group: torch.lerp(part, end[group], length) for group, part in point.items()}
        for point, end in zip(points, ends, strict=True)
    ]


def _highest(polynomial: Polynomial) -> float:
    """Where on [0, 1] a polynomial is highest."""
    bends = np.clip(polynomial.deriv().roots().real, 0, 1).tolist()
    return float(max([0.0, 1.0, *bends], key=polynomial))
