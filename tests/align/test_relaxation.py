"""A group on both axes of one weight: plain steps can lose, Frank-Wolfe steps end higher."""

import itertools

import pytest
import torch
from _structured import specification

from nlm.align import relaxation
from nlm.align.descent import Descent
from nlm.align.nested import Move
from nlm.align.similarity import Comparison
from nlm.symmetry import PermutationSpec

SIZE = 12
SPEC = specification(
    f"r:{SIZE} f:{SIZE}",
    {"w": [f"r:{SIZE}", f"r:{SIZE}"], "up": [f"f:{SIZE}", f"r:{SIZE}"], "b": [f"r:{SIZE}"]},
)
SQUARE = specification(f"r:{SIZE}", {"w": [f"r:{SIZE}", f"r:{SIZE}"], "b": [f"r:{SIZE}"]})


def problem(spec: PermutationSpec, seed: int) -> tuple[dict, dict]:
    make = torch.Generator().manual_seed(seed)
    a, b = (
        {
            name: torch.randn([layout.size for layout in layouts], generator=make)
            for name, layouts in spec.params.items()
        }
        for _ in range(2)
    )
    return a, b


def product(a, b) -> float:
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


def descent(spec: PermutationSpec, a: dict, b: dict) -> Descent:
    comparisons = [Comparison(a[name], b[name], spec.params[name]) for name in spec.params]
    return Descent(spec.groups, comparisons)


@pytest.mark.parametrize(("spec", "trials", "gain"), [(SPEC, 10, 15.0), (SQUARE, 40, 25.0)])
def test_frank_wolfe_steps_end_higher_than_refusals(spec, trials, gain, monkeypatch):
    """And every accepted permutation is better than the one before, in the true objective."""
    accept, ends = Descent._accept, {True: [], False: []}

    def checked(self, move, found):
        before = product(a, spec.apply(self.permutation, b))
        is_better = accept(self, move, found)
        after = product(a, spec.apply(self.permutation, b))
        assert after > before if is_better else after == before
        return is_better

    monkeypatch.setattr(Descent, "_accept", checked)
    for relaxes in ends:
        with monkeypatch.context() as patch:
            if not relaxes:
                patch.setattr(Move, "is_relaxable", False)
            for seed in range(trials):
                a, b = problem(spec, seed)
                found = descent(spec, a, b)
                found.run(seed)
                assert found.objective == sorted(found.objective)
                ends[relaxes].append(found.objective[-1])
    gains = torch.tensor(ends[True]) - torch.tensor(ends[False])
    assert gains.mean() > gain
    assert (gains >= 0).double().mean() > 0.9


def test_a_plain_step_often_lowers_the_objective():
    lower = 0
    for seed in range(40):
        a, b = problem(SQUARE, seed)
        found = descent(SQUARE, a, b)
        before = product(a, b)
        [move] = found._moves
        lower += product(a, SQUARE.apply(move.solve(found.permutation), b)) < before
    assert lower > 8


@pytest.mark.parametrize("seed", range(8))
def test_the_length_of_a_step_is_the_best_one(seed, monkeypatch):
    """On f(P) = <L, P> + <A, P B P^T> in float64; and each end of a step is a true gradient."""
    make = torch.Generator().manual_seed(seed)
    a, b, line = torch.randn(3, SIZE, SIZE, generator=make, dtype=torch.float64)
    points = []

    def value(point):
        return float((line * point).sum() + (a * (point @ b @ point.T)).sum())

    def gradient(assignment):
        p = relaxation._matrix(assignment)
        return line + a @ p @ b.T + a.T @ p @ b

    def record(slope):
        solved = best(slope)
        points.append((slope.clone(), solved))
        return solved

    best = relaxation.best_assignment
    monkeypatch.setattr(relaxation, "best_assignment", record)
    start = torch.randperm(SIZE, generator=make)
    relaxation.relaxed(gradient, start)
    point = relaxation._matrix(start).requires_grad_()
    for (slope, vertex), (after, _) in itertools.pairwise(points[:-1]):
        total = (line * point).sum() + (a * (point @ b @ point.T)).sum()
        [true] = torch.autograd.grad(total, point)
        assert torch.allclose(slope, true, atol=1e-9)
        way = relaxation._matrix(vertex) - point.detach()
        lengths = torch.linspace(0, 1, 201, dtype=torch.float64)
        best_value = max(value(point.detach() + t * way) for t in lengths)
        moved = (after - slope).norm() / (gradient(vertex) - slope).norm()
        assert value(point.detach() + moved * way) >= best_value - 1e-9
        point = (point.detach() + moved * way).requires_grad_()
