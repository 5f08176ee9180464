"""Conformance samples of assignment: random real costs, whose optimum is unique."""

from collections.abc import Iterator
from typing import Any

import torch
from _compare import Case, Mistake, Sample
from torch import Tensor

from nlm import ops
from nlm._registry import operations

FINITE = "nlm.assignment: {} must be finite and at most 1e+150 in magnitude, "


def layouts() -> Iterator[tuple[str, Tensor]]:
    """Problems of every size and layout that the kernels tell apart."""
    make = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make, dtype=torch.float64)

    yield "one row", random(1, 1)
    yield "batch of one row", random(4, 1, 1)
    yield "few rows", random(7, 7)
    yield "heads", random(12, 12, 33, 33)
    yield "pairs of heads", random(5 * 33, 7 * 33).view(5, 33, 7, 33).transpose(1, 2)
    yield "pairs of many heads", random(2, 3 * 17, 2 * 17).view(2, 3, 17, 2, 17).transpose(2, 3)
    yield "transposed", random(3, 65, 65).mT
    yield "every second", random(202, 202)[::2, ::2]
    yield "no common stride", random(2, 3, 41, 41).transpose(0, 1)
    yield "many columns", random(2, 131, 131)
    yield "candidates", random(2, 521, 521)
    yield "correlated", random(301, 1) @ random(1, 301) + 0.1 * random(301, 301)
    yield "well matched", random(601, 601) + 9 * torch.eye(601, dtype=torch.float64).flip(0)
    yield "no rows", random(3, 0, 0)
    yield "no problems", random(0, 5, 5)
    yield "no groups of problems", random(0, 3, 5, 5)


def samples() -> Iterator[Sample]:
    make = torch.Generator().manual_seed(1)
    for name, costs in layouts():
        for dtype in (torch.float32, torch.float64):
            for maximize in (False, True):
                how = f"{name}, {dtype}, {'most' if maximize else 'least'}"
                yield Sample(how, (costs.to(dtype), maximize, None, None, None, None))
        other = costs.clone()
        size = costs.shape[-1]
        rows = torch.randperm(size, generator=make)[: max(1, size // 20)]
        other[..., rows, :] = torch.randn(other[..., rows, :].shape, generator=make).double()
        columns, row_duals, duals = ops.assignment(costs, maximize=True)
        yield Sample(f"{name}, started", (other, True, columns, None, duals, None))
        changed = torch.zeros(costs.shape[:-1], dtype=torch.bool)
        changed[..., rows] = True
        yield Sample(f"{name}, changed", (other, True, columns, row_duals, duals, changed))
        nonsense = columns.flip(-1) - 1, None, duals * 3 + torch.rand(size, generator=make), None
        yield Sample(f"{name}, started with nonsense", (other, True, *nonsense))


def judged(args: tuple[Any, ...], results: list[Tensor]) -> list[Tensor]:
    """The permutation, both sums, and the largest cost plus what the duals lack of being right."""
    costs, maximize = args[0].double(), args[1]
    columns, row_duals, column_duals = results
    matched = costs.gather(-1, columns[..., None])[..., 0]
    slack = costs - row_duals[..., None] - column_duals[..., None, :]
    lacking = (slack if maximize else -slack).clamp(min=0)
    lacking += torch.zeros_like(slack).scatter(
        -1, columns[..., None], (matched - row_duals - column_duals.gather(-1, columns))[..., None]
    )
    scale = costs.abs().amax() if costs.numel() else 0.0
    return [columns, matched.sum(-1), (row_duals + column_duals).sum(-1), scale + lacking.abs()]


def mistakes() -> Iterator[Mistake]:
    call, rule = ops.assignment, "nlm.assignment: "
    costs, solved = torch.ones(2, 3, 3), ops.assignment(torch.ones(2, 3, 3))
    yield Mistake(call, (costs.int(),), TypeError, rule + "costs must be float32 or float64, got")
    yield Mistake(call, (costs[:, :2],), ValueError, rule + "costs must be square matrices")
    yield Mistake(call, (costs[0, 0],), ValueError, rule + "costs must be square matrices")
    for start in ((x[0] for x in solved), (x.float() for x in solved)):
        yield Mistake(
            call, (costs, False, tuple(start)), ValueError, rule + "the columns of a start must be"
        )
    for value, text in ((float("nan"), "nan"), (float("-inf"), "-inf")):
        wrong = costs.clone()
        wrong[1, 2, 0] = value
        message = FINITE.format("costs") + f"got {text} at [1, 2, 0]"
        yield Mistake(call, (wrong,), ValueError, message, reads_values=True)
    wrong = costs[0].repeat(200, 200)
    wrong[599, 599] = float("inf")
    message = FINITE.format("costs") + "got inf at [599, 599]"
    yield Mistake(call, (wrong,), ValueError, message, reads_values=True)
    duals = torch.tensor([[0.0, float("inf"), 0.0]] * 2, dtype=torch.float64)
    message = FINITE.format("the column duals of a start") + "got inf at [0, 1]"
    start = (solved.columns, solved.row_duals, duals)
    yield Mistake(call, (costs, False, start), ValueError, message, reads_values=True)
    changed = torch.ones(2, 3, dtype=torch.bool)
    message = FINITE.format("the row duals of a start") + "got inf at [0, 1]"
    start = (solved.columns, duals, solved.column_duals)
    yield Mistake(call, (costs, False, start, changed), ValueError, message, reads_values=True)
    message = rule + "the changed rows of a start must be torch.bool of shape (2, 3)"
    yield Mistake(call, (costs, False, tuple(solved), changed[0]), ValueError, message)
    message = rule + "the row duals of a start with changed rows must be a tensor, got NoneType"
    yield Mistake(call, (costs, False, None, changed), TypeError, message)


CASES = {
    "assignment": Case(
        samples,
        mistakes,
        plain=lambda *args: operations()["assignment"].reference(*args),
        judged=judged,
        poison=False,
    )
}
