"""Steps of all groups together: the polynomial is the objective, and the end is never lower."""

import itertools

import pytest
import torch
from _structured import STRUCTURED, specification

import nlm
from nlm.align import weight_matching
from nlm.align.frank_wolfe import Entry, Polytope, _between, _highest
from nlm.symmetry import PermutationSpec

CASES = {
    "layers": ("r:6 f:5", {"up": ["f:5", "r:6"], "b": ["f:5"], "down": ["3", "f:5", "2"]}),
    "a residual stream": ("r:6 f:5", {"w": ["r:6", "r:6"], "up": ["f:5", "r:6"], "b": ["r:6"]}),
    "heads": (
        "h:3 d:2<h r:4",
        {"q": ["h:3 x d:2", "r:4"], "o": ["r:4", "h:3 x d:2"], "s": ["h:3"]},
    ),
    "heads that cannot move": ("h:3! d:3<h", {"w": ["h:3 x d:3", "4"]}),
    "groups of queries": (
        "kv:2 rep:2<kv d:2<kv,rep e:2<kv r:4",
        {"q": ["kv:2 x rep:2 x d:2", "r:4"], "k": ["kv:2 x e:2", "4"], "o": ["3", "kv:2 x rep:2"]},
    ),
    "heads of falcon": (
        "g:2 r:2<g d:2<g e:2<g",
        {"qkv": ["g:2 x (r:2 x d:2 + d:2 + e:2)", "3"], "o": ["3", "g:2 x r:2 x e:2"]},
    ),
    "a square inside each head": ("h:3 d:3<h", {"w": ["h:3", "d:3", "d:3"], "b": ["h:3 x d:3"]}),
    "fused, as a family": (
        "s:3! h:3 d:2<h e:2<h",
        {"qkv": ["s:3 x s<h:3 | h:3 | h:3> x s<d:2 | d:2 | e:2>", "4"]},
    ),
    "experts": ("e:3 f:2<e", {"up": ["e:3", "f:2", "4"], "down": ["e:3", "4", "f:2"]}),
    "parents in no chain": (
        "r:2 x:2<r y:2<r d:2<r,x,y",
        {"w": ["r:2 x x:2", "y:2 x d:2", "3"], "v": ["r:2", "x:2", "3"]},
    ),
    "independent parents beside a layer": (
        "x:2 y:3 d:2<x,y f:4",
        {"w": ["x:2 x d:2", "y:3", "f:4"]},
    ),
}
STAY = {
    "parents in no chain": {"r", "x", "y", "d"},
    "independent parents beside a layer": {"x", "y", "d"},
}


def weights(spec: PermutationSpec, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(
            [layout.size for layout in layouts], generator=generator, dtype=torch.float64
        )
        for name, layouts in spec.params.items()
    }


def common(states) -> float:
    return sum(
        float((a[name] * b[name]).sum()) for a, b in itertools.combinations(states, 2) for name in a
    )


def polytope(spec, states, start) -> Polytope:
    entries = [
        Entry(layouts, [state[name] for state in states]) for name, layouts in spec.params.items()
    ]
    return Polytope(spec.groups, entries, start)


def along(hull, points, ends):
    return sum(term.along(lambda length: _between(points, ends, length)) for term in hull.terms)


@pytest.mark.parametrize("case", CASES)
def test_at_permutations_the_polynomial_is_the_objective(case):
    """Of three models, of which one or none keeps its order."""
    spec = specification(*CASES[case])
    states = [weights(spec, seed) for seed in range(3)]
    for kept in (0, 3):
        start, end = (
            [spec.identity() if n == kept else spec.random(first + n) for n in range(3)]
            for first in (10, 20)
        )
        hull = polytope(spec, states, [None if n == kept else p for n, p in enumerate(start)])
        moving = {name for tree in hull.trees for name in tree.members}
        assert moving == set(spec.free) - STAY.get(case, set())
        end = [
            {name: (last if name in moving else first)[name] for name in first}
            for first, last in zip(start, end, strict=True)
        ]
        points, ends = (
            [None if n == kept else hull.point(p, 0.0) for n, p in enumerate(each)]
            for each in (start, end)
        )
        polynomial = along(hull, points, ends)
        for length, chosen in ((0.0, start), (1.0, end)):
            moved = [spec.apply(p, state) for p, state in zip(chosen, states, strict=True)]
            assert polynomial(length) == pytest.approx(common(moved), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("case", [name for name in CASES if name != "parents in no chain"])
def test_gradients_and_lengths_are_right_inside_the_hull(case):
    spec = specification(*CASES[case])
    states = [weights(spec, seed) for seed in range(3)]
    hull = polytope(spec, states, [spec.random(10 + n) for n in range(3)])
    points = [hull.point(p, 0.7) for p in hull.start]
    for part in (part for point in points for part in point.values()):
        part.requires_grad_()

    def value():
        total = 0.0
        for term in hull.terms:
            carried = [term.carried(number, point)[0] for number, point in enumerate(points)]
            for a, b in itertools.combinations(carried, 2):
                total = total + (a * b).sum()
        return total

    value().backward()
    gradients = [{name: torch.zeros_like(part) for name, part in point.items()} for point in points]
    with torch.no_grad():
        for term in hull.terms:
            term.add_gradient(points, gradients)
        for point, gradient in zip(points, gradients, strict=True):
            for name, part in point.items():
                expected = torch.zeros_like(part) if part.grad is None else part.grad
                torch.testing.assert_close(gradient[name], expected, rtol=1e-9, atol=1e-9)
        ends = [hull.point(vertex, 0.0) for vertex in hull.nearest(gradients)]
        start = points
        polynomial = along(hull, start, ends)
        for length in torch.linspace(0, 1, 21).tolist():
            points = _between(start, ends, length)
            assert polynomial(length) == pytest.approx(float(value()), rel=1e-9, abs=1e-9)
            assert polynomial(_highest(polynomial)) >= polynomial(length) - 1e-9


def test_steps_ascend_and_their_end_is_kept_only_if_it_is_higher():
    kept = 0
    for case in CASES:
        spec = specification(*CASES[case])
        a, b = weights(spec, 0), weights(spec, 1)
        seen = []
        report = weight_matching(
            a, b, spec, frank_wolfe=True, progress=lambda *of, seen=seen: seen.append(of)
        ).report
        assert report.method == "frank-wolfe" and report.relaxed == sorted(report.relaxed)
        assert report.objective == sorted(report.objective)
        assert report.objective[0] == pytest.approx(common([a, b]))
        steps = len(report.relaxed) - 1
        assert seen[:steps] == list(enumerate(report.relaxed[1:], 1))
        sweeps = [value for _, value in seen[steps:]]
        assert report.objective[-len(sweeps) :] == sweeps
        kept += len(report.objective) == len(sweeps) + 2
    assert kept > len(CASES) / 2


@pytest.mark.parametrize("case", STRUCTURED)
def test_a_planted_permutation_comes_back(case):
    torch.manual_seed(0)
    model, spec, inputs = STRUCTURED[case]()
    spec.verify(model.eval(), inputs[:8])
    planted = spec.random(0)
    noisy = {
        name: tensor + 0.05 * tensor.std() * torch.randn_like(tensor)
        for name, tensor in model.state_dict().items()
    }
    result = nlm.align(model, spec.apply(planted, noisy), spec, "frank-wolfe")
    whole = spec.compose(planted, result.permutation)
    assert all(torch.equal(whole[group], still) for group, still in spec.identity().items())
