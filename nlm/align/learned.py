"""Matching on a user's loss: the permutation at which the mean of two models does best.

The loss is a function of a state dict, the mean of A and the permuted B; a network is run on one by
``torch.func.functional_call``. Two ways to descend on it:

straight-through    free weights W start as A; in each step weight matching finds the permutation of
    B that is closest to W, and the gradient at the permuted B goes to W as if it were the same
    (Ainsworth, Hayase and Srinivasa, Git Re-Basin, arXiv:2209.04836, algorithm 2).
sinkhorn            the permutation is relaxed to the doubly stochastic matrices that Sinkhorn's
    iteration makes of free scores, with a matrix of its own for the units inside each pair of
    parents (Pena et al., Re-basin via implicit Sinkhorn differentiation, arXiv:2212.12042).

In each step the permutation at hand (the nearest one, of a relaxed one) is rated by its loss, and
the best one is kept.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nlm._state_dict import StateDict
from nlm.align.descent import Descent
from nlm.align.frank_wolfe import Entry, Point, Polytope
from nlm.align.nested import Move
from nlm.align.result import AlignmentReport, AlignmentResult, histograms, means
from nlm.align.similarity import Comparison
from nlm.align.weights import compared
from nlm.symmetry import PermutationSpec, SymmetryError
from nlm.symmetry.permutation import Permutation
from nlm.symmetry.stacks import joined, separated

_ITERATIONS = 50  # leave 1e-6 where the scores are a few units apart

Loss = Callable[[dict[str, Tensor]], Tensor]


class _Sinkhorn(torch.autograd.Function):
    """Rows and columns that sum to 1, and the gradient by the implicit function theorem.

    With P = exp(L + a 1^T + 1 b^T) and G the gradient for P, that for L is P * (G - x 1^T - 1 y^T),
    where x + P y and P^T x + y are the sums of P * G over rows and columns.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, iterations: int) -> Tensor:
        exact = 8 * scores.shape[-1] * torch.finfo(scores.dtype).eps
        for _ in range(iterations):
            scores = scores - scores.logsumexp(-2, keepdim=True)
            scores = scores - scores.logsumexp(-1, keepdim=True)
            if ((scores.exp().sum(-2) - 1).abs() <= exact).all():
                break
        plan = scores.exp()
        ctx.save_for_backward(plan)
        return plan

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        [plan] = ctx.saved_tensors
        rows, columns = ((plan * gradient).sum(dim)[..., None] for dim in (-1, -2))
        size, limits = plan.shape[-1], torch.finfo(plan.dtype)
        values, vectors = torch.linalg.eigh(torch.eye(size, dtype=plan.dtype) - plan.mT @ plan)
        inverse = torch.where(values > size * limits.eps, 1 / values, 0.0)  # 1 is in the kernel
        y = vectors @ (inverse[..., None] * (vectors.mT @ (columns - plan.mT @ rows)))
        x = rows - plan @ y
        return plan * (gradient - x - y.mT), None


def sinkhorn(scores: Tensor, iterations: int = 1000) -> Tensor:
    """The doubly stochastic matrices ``exp(scores + a 1^T + 1 b^T)``, differentiable once.

    Parameters
    ----------
    scores : float ``[..., n, n]``; divided by a small temperature they give nearly a permutation.
    iterations : at most so many, until columns sum to 1 but for rounding, as rows do.
    """
    found: Tensor = _Sinkhorn.apply(scores, iterations)
    return found


def straight_through_matching(
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    spec: PermutationSpec,
    loss: Loss,
    *,
    rate: Loss | None = None,
    steps: int = 100,
    learning_rate: float = 1e-2,
    momentum: float = 0.9,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> AlignmentResult:
    """The permutation of ``b``'s units at which the mean with ``a`` has the least loss.

    Parameters
    ----------
    a, b : state dicts of the specification's entries and shapes, of any float dtype, on the CPU.
    spec : what may be permuted, proven.
    loss : a state dict (of ``a``'s entries and dtypes) -> scalar, differentiable; it may draw
        another batch at each call.
    rate : what the permutations are rated by, without gradients, where ``loss`` itself would be
        noisy: the loss on data that stay the same.
    steps, learning_rate, momentum : of gradient descent.
    seed : of the order in which weight matching visits the groups.
    progress : called after each step with its number and the rating; what it raises cancels.

    Returns
    -------
    AlignmentResult
        The one with the least rating; weight matching's is the first of them. ``report.objective``
        are the ratings, step by step.

    Raises
    ------
    SymmetryError
        The specification is not proven.
    ValueError, TypeError
        Different entries or shapes, NaN or inf, integer or complex weights, no step.
    """
    search = _Search("straight-through", a, b, spec, loss, rate, steps)
    free = {name: of[0].float().clone().requires_grad_() for name, of in search.entries.items()}
    optimizer = torch.optim.SGD(free.values(), learning_rate, momentum)
    permutation = spec.identity()
    for step in range(steps):
        comparisons = [
            Comparison(weight.detach(), search.entries[name][1].float(), spec.params[name])
            for name, weight in free.items()
        ]
        descent = Descent(spec.groups, comparisons, permutation)
        descent.run(seed + step)
        permutation = descent.permutation
        search.rate(permutation, step, progress)
        moved = search.moved(permutation)
        moved |= {name: moved[name] + (free[name] - free[name].detach()) for name in free}
        optimizer.zero_grad()
        loss(search.middle(moved)).backward()
        optimizer.step()
    return search.result()


def sinkhorn_matching(
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    spec: PermutationSpec,
    loss: Loss,
    *,
    rate: Loss | None = None,
    steps: int = 100,
    learning_rate: float = 0.1,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> AlignmentResult:
    """The permutation of ``b``'s units at which the mean with ``a`` has the least loss, relaxed.

    Groups whose parents are not inside one another stay as they are. Memory as for
    :mod:`nlm.align.frank_wolfe`, and what the loss keeps for its gradient.

    Parameters
    ----------
    a, b, spec, loss, rate, steps, progress : as for :func:`straight_through_matching`.
    learning_rate : of Adam, on the scores.
    seed : of the noise on the scores at the start, where they favour the identity.

    Returns
    -------
    AlignmentResult
        As of :func:`straight_through_matching`, without weight matching's permutation.

    Raises
    ------
    SymmetryError, ValueError, TypeError
        As :func:`straight_through_matching`.
    """
    search = _Search("sinkhorn", a, b, spec, loss, rate, steps)
    standing = {name for group in spec.free for name, _ in spec.carriers(group)}
    moving = [name for name, of in search.b.items() if name in standing and of.is_floating_point()]
    start = spec.identity()
    polytope = Polytope(
        spec.groups, [Entry(spec.params[name], [search.b[name]]) for name in moving], [start]
    )
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for group, matrix in (polytope.point(start, 0.0) or {}).items():
        noise = torch.randn(matrix.shape, generator=generator, dtype=matrix.dtype)
        scores[group] = (matrix + 0.1 * noise).requires_grad_()
    optimizer = torch.optim.Adam(scores.values(), learning_rate)
    for step in range(steps):
        point: Point = {}
        for tree in polytope.trees:
            for name in tree.members:
                plan = sinkhorn(scores[name], _ITERATIONS)
                point[name] = plan * _around(tree, name, point) if tree.above[name] else plan
        with torch.no_grad():
            [permutation] = polytope.nearest([point])
        assert permutation is not None
        search.rate(permutation, step, progress)
        soft = dict(zip(moving, polytope.carried(0, point), strict=True))
        optimizer.zero_grad()
        loss(search.middle({**search.b, **soft})).backward()
        optimizer.step()
    return search.result()


def _around(tree: Move, name: str, point: Point) -> Tensor:
    """The matrices of a member's parents, for all pairs of which it has one of its own."""
    parent = tree.above[name][-1]
    held = tree.held[parent]
    found = point[parent].movedim(-2, len(held) + len(tree.above[parent]))
    for place, group in enumerate(tree.held[name]):
        if group not in held:
            found = found.unsqueeze(place)
    return found[..., None, None]


class _Search:
    """Two models, the loss of their mean under a permutation, and the best permutation so far."""

    def __init__(
        self,
        method: str,
        a: StateDict,
        b: StateDict,
        spec: PermutationSpec,
        loss: Loss,
        rate: Loss | None,
        steps: int,
    ) -> None:
        if not spec.proven:
            raise SymmetryError(
                "nlm.align: a specification is proven before anything is matched with it, got one "
                "that is not verified"
            )
        if steps < 1:
            raise ValueError(f"nlm.align: there is at least one step, got {steps}")
        self.started = time.perf_counter()
        self.method = method
        self.spec = spec
        self.entries, self.excluded = compared({"model_a": a, "model_b": b}, spec, ())
        self.a, self.b = (
            {name: of.detach() for name, of in joined(spec.stacks, state).items()}
            for state in (a, b)
        )
        self.loss = rate or loss
        self.ratings: list[float] = []
        self.last: Permutation = {}
        self.best: Permutation = {}

    def moved(self, permutation: Permutation) -> dict[str, Tensor]:
        """B under a permutation, with stacks as one."""
        state = separated(self.spec.stacks, self.b)
        return joined(self.spec.stacks, self.spec.apply(permutation, state))

    def middle(self, b: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean of A and B; A's own entries where they are no numbers or of another shape."""
        mean = {
            name: (of + b[name].to(of.dtype)) / 2
            if of.is_floating_point() and of.shape == b[name].shape
            else of
            for name, of in self.a.items()
        }
        return separated(self.spec.stacks, mean)

    def rate(
        self, permutation: Permutation, step: int, progress: Callable[[int, float], None] | None
    ) -> None:
        """Rates a permutation, unless it is the last one again, and keeps it if it is the best."""
        if self.last and all(
            torch.equal(index, self.last[group]) for group, index in permutation.items()
        ):
            value = self.ratings[-1]
        else:
            with torch.no_grad():
                value = float(self.loss(self.middle(self.moved(permutation))))
            if not self.best or value < min(self.ratings):
                self.best = permutation
            self.last = permutation
        self.ratings.append(value)
        if progress is not None:
            progress(step + 1, self.ratings[-1])

    def result(self) -> AlignmentResult:
        comparisons = [
            Comparison(in_a, in_b, self.spec.params[name])
            for name, (in_a, in_b) in self.entries.items()
        ]
        similarity = Descent(self.spec.groups, comparisons, self.best).agreement()
        report = AlignmentReport(
            self.method,
            self.ratings,
            means(similarity),
            time.perf_counter() - self.started,
            excluded=self.excluded,
            histogram=histograms(similarity),
        )
        return AlignmentResult(self.best, report)
