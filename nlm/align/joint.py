"""Several models under comparison, and the permutation of each into a shared order."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from nlm.align.descent import Descent, check_rise
from nlm.align.frank_wolfe import Entry, Polytope
from nlm.align.similarity import Comparison, dot, in_order
from nlm.symmetry import Layout, PermutationSpec
from nlm.symmetry.gather import Gathers
from nlm.symmetry.permutation import Permutation

Factors = Mapping[str, tuple[tuple[Layout, ...], Sequence[Tensor]]]


class Joint:
    """Several models and the permutation of each into a shared order, at first the identity.

    Parameters
    ----------
    entries : parameter -> of every model.
    factors : of their activations, see :func:`nlm.align.pairs.factors`.

    Attributes
    ----------
    permutations : of each model.
    products : of every pair of models in the shared order; of a model with itself the squared norm
        of its weights.
    objective : the sum over all pairs, at first and whenever :meth:`record` was called.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        entries: Mapping[str, Sequence[Tensor]],
        factors: Factors,
        count: int,
    ) -> None:
        self.groups = spec.groups
        self.layouts = spec.params | {name: layouts for name, (layouts, _) in factors.items()}
        self.entries = {**entries, **{name: of for name, (_, of) in factors.items()}}
        self.factors = factors
        self.permutations: list[Permutation] = []
        self.products = [[0.0] * count for _ in range(count)]
        self.move([spec.identity() for _ in range(count)])
        self.objective: list[float] = []
        self.record()

    def record(self) -> float:
        """Notes the objective, and says it."""
        self.objective.append(_over_pairs(self.products))
        return self.objective[-1]

    def check(self) -> None:
        """Raises RuntimeError where the objective has fallen since it was noted before."""
        scale = math.fsum(abs(product) for row in self.products for product in row)
        check_rise(self.objective, scale)

    def move(self, permutations: Sequence[Permutation]) -> None:
        """Goes on to other permutations."""
        self.products = self._products(permutations)
        self.permutations = list(permutations)

    def accept(self, permutations: Sequence[Permutation]) -> bool:
        """Goes on to other permutations, if the objective rises."""
        before = self.permutations, self.products
        self.move(permutations)
        if _over_pairs(self.products) > _over_pairs(before[1]):
            return True
        self.permutations, self.products = before
        return False

    def improve(self, number: int, seed: int, max_sweeps: int, tolerance: float) -> bool:
        """Aligns one model with the sum of the others, and says whether that gained anything."""
        orders = self._orders(self.permutations)
        comparisons = []
        for name, tensors in self.entries.items():
            layouts = self.layouts[name]
            wide = torch.promote_types(tensors[number].dtype, torch.float32)
            others = [
                in_order(tensor, layouts, order).to(wide)
                for place, (tensor, order) in enumerate(zip(tensors, orders, strict=True))
                if place != number
            ]
            total = functools.reduce(torch.add, others)
            comparisons.append(Comparison(total, tensors[number].to(wide), layouts))
        descent = Descent(self.groups, comparisons, self.permutations[number])
        descent.run(seed, max_sweeps, tolerance)
        found = list(self.permutations)
        found[number] = descent.permutation
        return self.accept(found)

    def relax(self, progress: Callable[[int, float], None], tolerance: float) -> list[float]:
        """Tries what Frank-Wolfe steps of all models together find; their objectives."""
        entries = [Entry(self.layouts[name], of) for name, of in self.entries.items()]
        hull = Polytope(self.groups, entries, self.permutations)
        found, relaxed = hull.solve(progress, tolerance)
        self.accept([each for each in found if each is not None])
        return relaxed

    def _orders(self, permutations: Sequence[Permutation]) -> list[Gathers]:
        return [Gathers(self.groups, permutation) for permutation in permutations]

    def _products(self, permutations: Sequence[Permutation]) -> list[list[float]]:
        """Of every pair of models in the shared order, exact to float64.

        Those of two whose permutations are the ones at hand are known.
        """
        orders = self._orders(permutations)
        known = [
            any(new is old for old in self.permutations[at : at + 1])
            for at, new in enumerate(permutations)
        ]
        pairs = [
            (m, n) for m in range(len(orders)) for n in range(m + 1) if not known[m] or not known[n]
        ]
        terms: dict[tuple[int, int], list[float]] = {pair: [] for pair in pairs}
        for name, tensors in self.entries.items() if pairs else ():
            layouts = self.layouts[name]
            moved = [
                in_order(tensor, layouts, order)
                for tensor, order in zip(tensors, orders, strict=True)
            ]
            for m, n in pairs:
                if m != n or name not in self.factors:
                    terms[m, n].append(dot(moved[m], moved[n]))
        products = [list(row) for row in self.products]
        for (m, n), values in terms.items():
            products[m][n] = products[n][m] = math.fsum(values)
        return products


def _over_pairs(products: Sequence[Sequence[float]]) -> float:
    """The sum over every two models."""
    return math.fsum(value for number, row in enumerate(products) for value in row[:number])
