"""assignment beyond the rules of all operators: ties, hard structures, certificates, starts."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from nlm._registry import operations
from nlm.ops import Assignment, assignment


def check(costs: Tensor, maximize: bool, solved: Assignment) -> float:
    """A permutation, as good as the duals prove; returns its sum."""
    size = costs.shape[-1]
    wide = costs.double()
    assert solved.columns.sort().values.tolist() == list(range(size))
    total = wide[range(size), solved.columns].sum().item()
    reduced = wide - solved.column_duals
    bound = reduced.amax(1) if maximize else reduced.amin(1)
    gap = total - (bound.sum() + solved.column_duals.sum()).item()
    rounding = 1e-14 * size * max(wide.abs().max().item(), 1.0)
    assert abs(gap) <= rounding
    assert (bound - solved.row_duals).abs().max().item() <= rounding
    return total


def scipy_total(costs: Tensor, maximize: bool) -> float:
    matrix = costs.double().numpy()
    return matrix[linear_sum_assignment(matrix, maximize)].sum().item()


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


STRUCTURES = {
    "uniform": lambda n: random(n, n).abs(),
    "planted": lambda n: random(n, n) + 4 * torch.eye(n)[torch.randperm(n)],
    "correlations": lambda n: torch.corrcoef(torch.cat([x := random(n, 20), x + random(n, 20)]))[
        :n, n:
    ],
    "low rank": lambda n: random(n, 3) @ random(3, n),
    "products": lambda n: torch.arange(n)[:, None] * torch.arange(float(n)),
    "distances": lambda n: (torch.arange(n)[:, None] - torch.arange(float(n))).abs(),
    "few values": lambda n: (random(n, n) * 2).round(),
    "zeros and ones": lambda n: (random(n, n) > 1.5).float(),
    "all equal": lambda n: torch.full((n, n), 3.0),
    "equal rows": lambda n: random(1, n).expand(n, n),
    "equal columns": lambda n: random(n, 1).expand(n, n),
    "blocks": lambda n: torch.arange(n)[:, None].div(7).floor() * (torch.arange(n) // 5),
    "far from zero": lambda n: random(n, n).double() + 1e6,
    "many scales": lambda n: random(n, n).double() * 10.0 ** random(n, n).mul(3),
}


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("size", [2, 3, 17, 128, 129, 600])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_optimal_with_proof(structure: str, size: int, maximize: bool) -> None:
    costs = STRUCTURES[structure](size)
    total = check(costs, maximize, assignment(costs, maximize))
    assert total == pytest.approx(scipy_total(costs, maximize), rel=1e-12, abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.booleans(), st.randoms(use_true_random=False))
def test_against_all_permutations(size: int, most: int, maximize: bool, draw) -> None:
    matrix = [[draw.randint(-most, most) for _ in range(size)] for _ in range(size)]
    sums = [
        sum(row[j] for row, j in zip(matrix, order, strict=True))
        for order in itertools.permutations(range(size))
    ]
    costs = torch.tensor(matrix, dtype=torch.float64)
    assert check(costs, maximize, assignment(costs, maximize)) == (max if maximize else min)(sums)


@settings(max_examples=60, deadline=None)
@given(st.integers(450, 580), st.sampled_from([1, 2, 5, 40, 10**6]), st.integers(0, 2**31))
def test_integers_are_exact(size: int, most: int, seed: int) -> None:
    costs = torch.from_numpy(np.random.default_rng(seed).integers(0, most + 1, (size, size)))
    assert check(costs.float(), False, assignment(costs.float())) == scipy_total(costs, False)


@pytest.mark.parametrize("size", [64, 300])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_any_start_gives_an_optimum(structure: str, size: int) -> None:
    costs = STRUCTURES[structure](size)
    first = assignment(costs, maximize=True)
    again = assignment(costs, maximize=True, start=first)
    assert check(costs, True, again) == pytest.approx(check(costs, True, first), rel=1e-12)
    changed = costs.clone()
    changed[::20] = changed[::20].flip(0, 1)
    total = check(changed, True, assignment(changed, maximize=True, start=first))
    assert total == pytest.approx(scipy_total(changed, True), rel=1e-12, abs=1e-12)
    wrong = Assignment(torch.full((size,), 2), first.row_duals, -7 * first.column_duals)
    assert check(costs, True, assignment(costs, maximize=True, start=wrong)) == pytest.approx(
        check(costs, True, first), rel=1e-12, abs=1e-12
    )


@pytest.mark.parametrize("size", [64, 600])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_changed_rows_suffice(structure: str, size: int) -> None:
    costs = STRUCTURES[structure](size).clone()
    solved = assignment(costs, maximize=True)
    make = torch.Generator().manual_seed(0)
    for _ in range(4):
        rows = torch.randperm(size, generator=make)[: size // 20]
        costs[rows] = costs[rows.roll(1)].roll(1, 1)
        changed = torch.zeros(size, dtype=torch.bool)
        changed[rows] = True
        solved = assignment(costs, maximize=True, start=solved, changed=changed)
        total = check(costs, True, solved)
        assert total == pytest.approx(scipy_total(costs, True), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("is_matched", [False, True])
def test_rows_that_have_not_changed_are_read_on_paths_only(is_matched: bool) -> None:
    costs = random(600, 600) + 9.0 * is_matched * torch.eye(600)
    start = assignment(costs, maximize=True)
    changed = torch.arange(600) < 40
    costs[:40] = costs[:40].flip(0) if is_matched else -costs[:40]
    unread = ~changed[:, None] & (torch.arange(600) != start.columns[:, None])
    costs[unread] = float("nan")
    if is_matched:
        solved = assignment(costs, maximize=True, start=start, changed=changed)
        assert solved.columns.tolist() == [*reversed(range(40)), *range(40, 600)]
    else:
        with pytest.raises(ValueError, match="costs must be finite"):
            assignment(costs, maximize=True, start=start, changed=changed)


@pytest.mark.parametrize("size", [64, 600])
def test_what_has_changed_at_its_match_is_noticed(size: int) -> None:
    costs = random(size, size)
    start = assignment(costs)
    costs[range(size), start.columns] += 100
    unmarked = torch.zeros(size, dtype=torch.bool)
    check(costs, False, assignment(costs, start=start, changed=unmarked))


def test_start_of_an_unchanged_problem_is_returned() -> None:
    costs = random(3, 200, 200)
    first = assignment(costs)
    again = assignment(costs, start=first)
    for old, new in zip(first, again, strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("size", [40, 140])
def test_batch_is_solved_problem_by_problem(size: int) -> None:
    costs = random(2, 3, size, size)
    batch = assignment(costs)
    for place in itertools.product(range(2), range(3)):
        for result, single in zip(batch, assignment(costs[place]), strict=True):
            assert torch.equal(result[place], single)


def test_reference_proves_its_solution() -> None:
    for structure in ("uniform", "few values", "planted"):
        costs = STRUCTURES[structure](30)
        solved = operations()["assignment"].reference(costs, False, *[None] * 4)
        check(costs, False, Assignment(*solved))


@pytest.mark.parametrize("size", [3, 200])
def test_costs_of_any_magnitude(size: int) -> None:
    small = random(size, size).double()
    for scale in (2.0**-1000, 2.0**490):
        for result, expected in zip(assignment(small * scale), assignment(small), strict=True):
            factor = 1 if result.dtype == torch.int64 else scale
            assert torch.equal(result, expected * factor)
    with pytest.raises(ValueError, match=r"at most 1e\+150 in magnitude, got 1\.5e\+308 at"):
        assignment(torch.full((size, size), 1.5e308, dtype=torch.float64))


def test_results_require_no_gradient() -> None:
    costs = torch.ones(3, 3, requires_grad=True)
    assert not any(result.requires_grad for result in assignment(costs))
